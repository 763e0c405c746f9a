//! dispatch

mod entry;

pub use entry::{Back, Entry};
