//! How flows come in: the TUN, and the proxy listeners.

pub mod tun;
