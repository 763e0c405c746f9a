//! The checks: one file each, pure over the record.

mod before_us;
mod device;
mod firewall;
mod forwarding;
mod in_place;
mod neighbours;
mod past_us;
mod profile;
mod resolver;
mod rights;
mod run;
mod start;
mod system;
mod tracking;
mod uplink;

use super::finding::Finding;
use super::record::Record;

pub(super) use in_place::OF_TUN;
pub(super) use resolver::is_fake;
pub(super) use rights::NAMESPACES;
pub(super) use tracking::{TRACKED, TRACKED_AT_MOST};

/// A check: its name, and what it finds.
pub(super) type Check = (&'static str, fn(&Record) -> Vec<Finding>);

/// All checks, in the order in which their findings are told.
pub(super) const ALL: &[Check] = &[
    ("run", run::check),
    ("start", start::check),
    ("in-place", in_place::check),
    ("past-us", past_us::check),
    ("neighbours", neighbours::check),
    ("device", device::check),
    ("uplink", uplink::check),
    ("resolver", resolver::check),
    ("forwarding", forwarding::check),
    ("firewall", firewall::check),
    ("tracking", tracking::check),
    ("rights", rights::check),
    ("system", system::check),
    ("profile", profile::check),
];
