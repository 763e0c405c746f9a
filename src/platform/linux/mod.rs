//! Linux.

pub(super) mod socket;
pub(super) mod udp;
