//! What we ask of the operating system: sockets that bypass us, the TUN, and the host's routes, rules and resolver.
//!
//! `cfg(target_os)` appears here alone.

mod applied;
mod cleanup;
mod closed;
mod dialer;
mod firewall;
mod gate;
mod journal;
mod journalled;
mod layout;
mod may_start;
mod not_set;
mod outline;
mod overlap;
mod own_sockets;
mod plan;
mod proof;
mod resolver;
mod routing;
mod selection;
mod severed;
#[cfg(test)]
mod specification;
mod survey;
mod undo;
mod words;

#[cfg(target_os = "linux")]
mod linux;

#[cfg(target_os = "linux")]
use linux as imp;

/// Packets that may wait for us in the device while another task has the core: a burst of datagrams, mostly. The
/// kernel's default of 500 loses datagrams at a tenth of the rate that it forwards by itself.
const QUEUE_LENGTH: u32 = 4096;

pub use applied::{Applied, Change, HostError, Proof, Seen, SettleError, Settled, Step};
pub use cleanup::{FOUND_OPEN, Report, cleanup, cleanup_closed};
pub use closed::{KillSwitch, left_closed};
pub use dialer::{Dialer, Fwmark, UdpSocket, descriptors, descriptors_for_flows, is_spare};
pub use firewall::Nft;
pub use gate::{Gate, Hook};
pub use imp::bounded::Hurry;
pub use imp::capability::{Capability, may_administer_network, program_may_administer_network};
pub use imp::echo::EchoSocket;
pub use imp::holder::tcp_listener;
pub use imp::inherited::{ignore_children, is_ignored, mind_children, unblock_signals};
pub use imp::memory::memory;
pub use imp::netlink::{Netlink, NetlinkError};
pub use imp::nft::{ask_ahead, program as nft_program, ruleset as firewall_rules};
pub use imp::process::{Condition, condition};
pub use imp::processor::thread_time;
pub use imp::rootless;
pub use imp::stranded::Stranded;
pub use imp::sysctl::{
    PORT_RANGE, are_read_only as parameters_are_read_only, first_open_port, local_ports, read as read_parameter,
};
pub use imp::tun::{Framing, HEADROOM, Layout, TunQueue, open_packet, open_tun};
pub use imp::turn::Turn;
pub use imp::udp::{Arrival, DatagramSocket};
pub use imp::watch::{DirectoryWatch, Watch, Woken};
pub use journal::{Journal, JournalError, Rehearsal, SUSPENDED, let_go_on, lost_by, person_of};
pub use journalled::{Journalled, holder};
pub use may_start::PlanError;
pub use not_set::not_set;
pub use outline::{Before, Group};
pub use own_sockets::{OwnSockets, Sending};
pub use plan::{HostOptions, HostPlan, Sysctl, gates_in_the_way};
pub use resolver::{DnsPlan, can_be_asked, nameservers};
pub use routing::{
    DirectWay, Family, Gateway, Link, LinkState, MarkMatch, Neighbour, Ports, Route, RouteKind, RouteTable, Rule,
    RuleAction, SeenLink, SeenRoute,
};
pub use selection::interface_not_there;
pub use survey::{NftState, NoRoom, Numbers, Parameters, Survey, Wishes, takes_everything};
pub use words::{
    parameter as parameter_name, ports as ports_in_words, protocol as protocol_name, rule as rule_command,
};
