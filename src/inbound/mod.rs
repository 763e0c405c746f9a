//! Where flows come from.

mod access;
#[cfg(test)]
mod fixture;
mod http;
mod listener;
mod mixed;
mod refusal;
mod socks;

pub use access::{Access, BindAddress, User};
pub use listener::{Accepted, BindError, Drops, Listener};
pub use mixed::serve;
