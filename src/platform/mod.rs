//! What we ask of the operating system: sockets that bypass us, the TUN, and the host's routes, rules and resolver.
//!
//! `cfg(target_os)` appears here alone.

mod applied;
mod cleanup;
mod dialer;
mod firewall;
mod journal;
mod layout;
mod plan;
mod resolver;
mod routing;
mod survey;
mod undo;

#[cfg(target_os = "linux")]
mod linux;

#[cfg(target_os = "linux")]
use linux as imp;

pub use applied::{Applied, HostError, Step};
pub use cleanup::{Report, cleanup};
pub use dialer::{Dialer, Fwmark, UdpSocket};
pub use firewall::Nft;
pub use imp::holder::tcp_listener;
pub use imp::netlink::{Netlink, NetlinkError};
pub use imp::rootless;
pub use imp::tun::{Framing, HEADROOM, Layout, TunQueue, open_packet, open_tun};
pub use imp::udp::{Arrival, DatagramSocket};
pub use journal::{Journal, JournalError};
pub use plan::{HostOptions, HostPlan, PlanError, Sysctl};
pub use resolver::DnsPlan;
pub use routing::{Family, Link, MarkMatch, Ports, Route, RouteKind, RouteTable, Rule, RuleAction, SeenRoute};
pub use survey::{NftState, NoRoom, Numbers, Parameters, Survey, Wishes};
