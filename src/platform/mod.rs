//! What we ask of the operating system: sockets that bypass us, the TUN, and the host's routes, rules and resolver.
//!
//! `cfg(target_os)` appears here alone.

mod dialer;
mod routing;
#[cfg(target_os = "linux")]
mod linux;

#[cfg(target_os = "linux")]
use linux as imp;

pub use dialer::{Dialer, Fwmark, UdpSocket};
pub use imp::holder::tcp_listener;
pub use imp::netlink::{Netlink, NetlinkError};
pub use imp::rootless;
pub use imp::tun::{Framing, HEADROOM, Layout, TunQueue, open_packet, open_tun};
pub use imp::udp::{Arrival, DatagramSocket};
pub use routing::{Family, Link, MarkMatch, Ports, Route, RouteKind, RouteTable, Rule, RuleAction, SeenRoute};
