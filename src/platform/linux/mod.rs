//! Linux.

pub(super) mod socket;
