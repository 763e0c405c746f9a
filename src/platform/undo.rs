//! How single changes are undone: as data, so that a later process can do it, and each harmless to do twice.

use std::fmt;
use std::path::PathBuf;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::applied::HostError;
use super::firewall::TableId;
use super::imp::resolv_conf::is_overtaken;
use super::imp::{nft, resolv_conf, sysctl};
use super::routing::{Route, RouteKind, Rule};
use super::{Netlink, NetlinkError};

/// What was where a file of ours is now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum OldFile {
    /// Nothing.
    Missing,
    /// A symbolic link to this target, absolute or not.
    Link(String),
    /// A file.
    File {
        /// Its bytes.
        content: Vec<u8>,
        /// Its permission bits.
        mode: u32,
        /// Its owner.
        uid: u32,
        /// Its group.
        gid: u32,
    },
}

impl OldFile {
    /// Whether whoever reads it finds `text`.
    pub(super) fn reads_as(&self, text: &str) -> bool {
        match self {
            // Nobody would have rewritten what already said the same.
            Self::Missing | Self::Link(_) => false,
            Self::File { content, .. } => content == text.as_bytes(),
        }
    }
}

/// The inverse of one change.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Undo {
    /// Delete exactly this rule.
    Rule(Rule),
    /// Delete exactly this route.
    Route(Route),
    /// Delete an address.
    Address {
        /// The interface.
        device: String,
        /// The address.
        address: IpNet,
    },
    /// Put a kernel parameter back.
    Sysctl {
        /// Below /proc/sys.
        path: String,
        /// What we wrote. Whoever wrote something else since then meant it. `None`: the kernel changed it as a
        /// consequence of another one, and it is put back whatever it is now.
        ours: Option<String>,
        /// What it was.
        old: String,
    },
    /// Take down the kill switch's firewall table.
    Table(TableId),
    /// Put /etc/resolv.conf back.
    ResolvConf {
        /// The file.
        path: PathBuf,
        /// What we wrote; anything else in it is somebody's later will.
        ours: String,
        /// What it was.
        old: OldFile,
    },
}

/// What undoing came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Undone {
    /// It is as it was.
    Restored,
    /// It was already as it had been, or what held it is gone.
    AlreadyGone,
    /// Somebody changed it after us, so it stays.
    LeftAlone,
}

impl Undo {
    /// Whether the change stays in place when our process and its TUN are gone. Only such changes are journalled.
    pub(super) fn outlives_us(&self) -> bool {
        match self {
            Self::Address { .. } => false,
            Self::Route(route) => !matches!(route.kind, RouteKind::Device(_)),
            Self::Rule(_) | Self::Sysctl { .. } | Self::Table(_) | Self::ResolvConf { .. } => true,
        }
    }

    /// Whether the change is part of what keeps a kill switch closed: its table, and the routing that it relies on.
    pub(super) fn closes(&self) -> bool {
        matches!(self, Self::Table(_) | Self::Rule(_) | Self::Route(_))
    }

    /// Whether the change refuses traffic, and only a kill switch does.
    pub(super) fn refuses(&self) -> bool {
        matches!(self, Self::Table(_) | Self::Route(Route { kind: RouteKind::Unreachable, .. }))
    }

    /// Whether the change stays in place when the machine is rebooted.
    pub(super) fn outlives_kernel(&self) -> bool {
        matches!(self, Self::ResolvConf { .. })
    }

    /// Whether the change may be in place though making it failed (`why`), as far as a look tells. It is then undone like one
    /// that was made, which does no harm where it was not.
    pub(super) fn may_be_in_place(&self, why: &HostError) -> bool {
        match self {
            // nft may have done its work, and only the look at it failed, or the patience for it was at its end.
            Self::Table(_) => true,
            // Where somebody was faster nothing of ours is there, and an empty file is the beginning of theirs.
            Self::ResolvConf { .. } if matches!(why, HostError::Io { source, .. } if is_overtaken(source)) => false,
            Self::ResolvConf { path, ours, old } => resolv_conf::is_begun(path, ours, old),
            // One act of the kernel's, whose answer came; and somebody else may have made just this.
            Self::Rule(_) | Self::Route(_) | Self::Address { .. } | Self::Sysctl { .. } => false,
        }
    }

    /// Undoes the change.
    pub(super) fn perform(&self, netlink: &mut Netlink) -> Result<Undone, HostError> {
        match self {
            Self::Rule(rule) => {
                // A deletion also fits a rule with more selectors: look for the exact one first.
                if netlink.rules(rule.family)?.contains(rule) {
                    gone(netlink.delete_rule(rule))
                } else {
                    Ok(Undone::AlreadyGone)
                }
            }
            Self::Route(route) => gone(netlink.delete_route(route)),
            Self::Address { device, address } => gone(netlink.delete_address(device, *address)),
            Self::Sysctl { path, ours, old } => {
                sysctl::restore(path, ours.as_deref(), old).map_err(|source| HostError::io(self, source))
            }
            Self::Table(table) => nft::take_down(table).map_err(|source| HostError::io(self, source)),
            Self::ResolvConf { path, ours, old } => {
                resolv_conf::restore(path, ours, old).map_err(|source| HostError::io(self, source))
            }
        }
    }
}

fn gone(result: Result<(), NetlinkError>) -> Result<Undone, HostError> {
    match result {
        Ok(()) => Ok(Undone::Restored),
        Err(error) if error.is_gone() => Ok(Undone::AlreadyGone),
        Err(error) => Err(error.into()),
    }
}

impl fmt::Display for Undo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rule(rule) => write!(f, "delete {rule}"),
            Self::Route(route) => write!(f, "delete route {route}"),
            Self::Address { device, address } => write!(f, "delete address {address} dev {device}"),
            Self::Sysctl { path, old, .. } => write!(f, "set {path} back to {old}"),
            Self::Table(table) => write!(f, "delete the firewall table {}", table.name),
            Self::ResolvConf { path, .. } => write!(f, "put {} back", path.display()),
        }
    }
}
