//! YAML -> what was written ([`Node`]) -> what it means; every mistake with its place, key path and a hint.

mod decode;
mod fields;
mod nearest;
mod node;
mod parse;
mod report;

pub use decode::{Decode, mismatch, scalar};
pub use fields::Fields;
pub use node::{Entry, Key, Node, Place, Position, Scalar, Value};
pub use parse::parse;
pub use report::{Block, Diagnostic, Report, Severity};
