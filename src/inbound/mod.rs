//! How flows come in: the TUN, and the proxy listeners.

mod access;
#[cfg(test)]
mod fixture;
mod http;
mod listener;
mod mixed;
mod refusal;
mod socks;
pub mod tun;

pub use access::{Access, User};
pub use listener::{Accepted, BindError, Drops, Listener};
pub use mixed::serve;
