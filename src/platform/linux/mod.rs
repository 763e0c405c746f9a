//! Linux.

pub(super) mod holder;
pub(super) mod socket;
pub(super) mod udp;
