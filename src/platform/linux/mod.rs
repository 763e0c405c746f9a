//! Linux.

pub(super) mod netlink;
pub(super) mod rootless;
pub(super) mod socket;
pub(super) mod tun;
