//! Linux.

pub(super) mod bounded;
pub(super) mod capability;
pub(super) mod connections;
mod diag;
pub(super) mod echo;
pub(super) mod holder;
pub(super) mod inherited;
mod legacy;
mod listeners;
pub(super) mod memory;
pub(super) mod netlink;
pub(super) mod nft;
pub(super) mod process;
pub(super) mod processor;
mod program;
pub(super) mod resolv_conf;
pub mod rootless;
pub(super) mod socket;
pub(super) mod stranded;
pub(super) mod survey;
pub(super) mod sysctl;
pub(super) mod tun;
pub(super) mod turn;
pub(super) mod udp;
pub(super) mod watch;
