//! Linux.

pub(super) mod netlink;
pub(super) mod socket;
