//! Linux.

pub(super) mod holder;
pub(super) mod netlink;
pub mod rootless;
pub(super) mod socket;
pub(super) mod tun;
pub(super) mod udp;
