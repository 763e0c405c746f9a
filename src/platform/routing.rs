//! The words of policy routing as plain data: tables, routes, rules. What the kernel is told, and what it tells.

use std::fmt;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::{Fwmark, words};

/// Actions of rules that end the look-up (`FR_ACT_*`, linux/fib_rules.h).
const BLACKHOLE: u8 = 6;
const UNREACHABLE: u8 = 7;
const PROHIBIT: u8 = 8;

/// A routing table's number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct RouteTable(pub u32);

impl RouteTable {
    /// The table that ordinary routes live in.
    pub const MAIN: Self = Self(254);
}

impl fmt::Display for RouteTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::MAIN => f.write_str("main"),
            Self(253) => f.write_str("default"),
            Self(255) => f.write_str("local"),
            Self(number) => number.fmt(f),
        }
    }
}

/// IPv4 or IPv6: the kernel keeps rules and tables of each apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Both, in the order in which they are set up.
    pub const BOTH: [Self; 2] = [Self::V4, Self::V6];

    /// The family of a prefix.
    #[must_use]
    pub fn of(prefix: &IpNet) -> Self {
        match prefix {
            IpNet::V4(_) => Self::V4,
            IpNet::V6(_) => Self::V6,
        }
    }

    /// The prefix that holds every address of the family.
    #[must_use]
    pub fn everything(self) -> IpNet {
        match self {
            Self::V4 => IpNet::V4(ipnet::Ipv4Net::default()),
            Self::V6 => IpNet::V6(ipnet::Ipv6Net::default()),
        }
    }
}

/// Where a route leads.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum RouteKind {
    /// Out of this device, without a gateway.
    Device(String),
    /// Out of this table: the look-up goes on with the next rule.
    Throw,
    /// Nowhere: whoever sends is told so at once (EHOSTUNREACH; of others, ICMP).
    Unreachable,
}

/// One route of ours.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Route {
    /// The table it stands in.
    pub table: RouteTable,
    /// The destinations it is for.
    pub to: IpNet,
    /// Where it leads.
    pub kind: RouteKind,
    /// Its preference among routes to the same prefix: lower wins.
    pub metric: u32,
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.kind {
            RouteKind::Device(device) => write!(f, "{} dev {device} table {}", self.to, self.table),
            RouteKind::Throw => write!(f, "throw {} table {}", self.to, self.table),
            RouteKind::Unreachable => write!(f, "unreachable {} table {}", self.to, self.table),
        }
    }
}

/// What a rule does with what it selects.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum RuleAction {
    /// Look the destination up in a table; on a miss go on with the next rule.
    Lookup(RouteTable),
    /// Go on at the rule of this priority.
    Goto(u32),
    /// Nothing: a target for [`RuleAction::Goto`].
    Nop,
    /// Any other action of the kernel's, by its number (`FR_ACT_*`). We only read these, but for [`Self::UNREACHABLE`].
    Other(u8),
}

impl RuleAction {
    /// Nowhere: whoever sends is told so at once (ENETUNREACH; of others, ICMP).
    pub const UNREACHABLE: Self = Self::Other(UNREACHABLE);
}

/// Sockets that must match: a transport protocol and, of it, a range of ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Ports {
    /// The lowest port.
    pub first: u16,
    /// The highest port.
    pub last: u16,
}

/// A mark and the bits of it that count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct MarkMatch {
    /// The value.
    pub mark: u32,
    /// The bits that are compared.
    pub mask: u32,
}

impl MarkMatch {
    /// Exactly the bits that `mark` has.
    #[must_use]
    pub fn bits(mark: Fwmark) -> Self {
        Self { mark: mark.0, mask: mark.0 }
    }
}

/// One rule of the routing policy. A field that is `None` matches everything.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Rule {
    /// Which of the two rule lists.
    pub family: Family,
    /// Its place in the list: lower comes first.
    pub priority: u32,
    /// Source prefix. `0.0.0.0/32` selects sockets that have no address yet.
    pub from: Option<IpNet>,
    /// Destination prefix.
    pub to: Option<IpNet>,
    /// Arriving interface; `lo` selects what the host itself sends.
    pub iif: Option<String>,
    /// Interface that the socket is bound to.
    pub oif: Option<String>,
    /// Mark and mask.
    pub mark: Option<MarkMatch>,
    /// Transport protocol number.
    pub protocol: Option<u8>,
    /// Source ports.
    pub source_ports: Option<Ports>,
    /// Destination ports.
    pub destination_ports: Option<Ports>,
    /// Owners of the socket, first and last uid.
    pub uids: Option<(u32, u32)>,
    /// Routes with a prefix of at most this length do not count.
    pub suppress_prefix_length: Option<u32>,
    /// Routes by the interfaces of some group do not count: never one of ours.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub suppresses_group: bool,
    /// What happens.
    pub action: RuleAction,
    /// `FRA_PROTOCOL`: who is said to have made it. Ours say "kernel" (2), so that network services leave them be.
    pub origin: u8,
    /// It has selectors that have no field here (tos, l3mdev, "not", ...): never one of ours.
    pub foreign_selectors: bool,
    /// "not": it is for what its selectors do not select. Then `foreign_selectors` is true as well.
    #[serde(default)]
    pub inverted: bool,
}

impl Rule {
    /// `RTPROT_KERNEL`, which systemd-networkd never removes.
    pub const KERNEL: u8 = 2;

    /// A rule that selects everything.
    #[must_use]
    pub fn new(family: Family, priority: u32, action: RuleAction) -> Self {
        Self {
            family,
            priority,
            from: None,
            to: None,
            iif: None,
            oif: None,
            mark: None,
            protocol: None,
            source_ports: None,
            destination_ports: None,
            uids: None,
            suppress_prefix_length: None,
            suppresses_group: false,
            action,
            origin: Self::KERNEL,
            foreign_selectors: false,
            inverted: false,
        }
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let family = if self.family == Family::V4 { "-4" } else { "-6" };
        write!(f, "rule {family} priority {}{}", self.priority, if self.inverted { " not" } else { "" })?;
        if let Some(from) = self.from {
            write!(f, " from {from}")?;
        }
        if let Some(to) = self.to {
            write!(f, " to {to}")?;
        }
        if let Some(mark) = self.mark {
            write!(f, " fwmark {:#x}/{:#x}", mark.mark, mark.mask)?;
        }
        if let Some(iif) = &self.iif {
            write!(f, " iif {iif}")?;
        }
        if let Some(oif) = &self.oif {
            write!(f, " oif {oif}")?;
        }
        if let Some((first, last)) = self.uids {
            write!(f, " uidrange {first}-{last}")?;
        }
        if let Some(protocol) = self.protocol {
            write!(f, " ipproto {}", words::protocol(protocol))?;
        }
        if let Some(ports) = self.source_ports {
            write!(f, " sport {}", words::ports(ports))?;
        }
        if let Some(ports) = self.destination_ports {
            write!(f, " dport {}", words::ports(ports))?;
        }
        match self.action {
            RuleAction::Lookup(table) => write!(f, " lookup {table}")?,
            RuleAction::Goto(priority) => write!(f, " goto {priority}")?,
            RuleAction::Nop => f.write_str(" nop")?,
            RuleAction::Other(BLACKHOLE) => f.write_str(" blackhole")?,
            RuleAction::Other(UNREACHABLE) => f.write_str(" unreachable")?,
            RuleAction::Other(PROHIBIT) => f.write_str(" prohibit")?,
            RuleAction::Other(action) => write!(f, " action {action}")?,
        }
        if let Some(length) = self.suppress_prefix_length {
            write!(f, " suppress_prefixlength {length}")?;
        }
        if self.suppresses_group {
            f.write_str(" suppress_ifgroup")?;
        }
        Ok(())
    }
}

/// A network interface, as far as we care.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// The kernel's number for it.
    pub index: u32,
    /// Its name.
    pub name: String,
}

/// What may change about an interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinkState {
    /// The kernel's number for it: another one means another interface.
    pub index: u32,
    /// It is up.
    pub up: bool,
    /// The largest packet that it takes, in bytes.
    pub mtu: u32,
}

/// The gateway of a default route.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gateway {
    /// The family of the route.
    pub family: Family,
    /// Its address, which may be of the other family.
    pub address: std::net::IpAddr,
    /// The device it is a neighbour by.
    pub device: u32,
    /// The preference of the route: lower wins.
    pub metric: u32,
    /// The route has other next hops besides, between which the kernel divides what goes there.
    pub one_of_several: bool,
}

/// A default route, or one of its next hops, that has no gateway: the device alone leads out, as that of a modem or a tunnel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DirectWay {
    /// The family of the route.
    pub family: Family,
    /// The device.
    pub device: u32,
    /// The preference of the route: lower wins.
    pub metric: u32,
}

/// What the kernel knows of a neighbour.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Neighbour {
    /// It was there within the last half minute or so.
    Present,
    /// It was there once.
    Remembered,
    /// It has been asked and has not answered so far.
    Asked,
    /// It has not answered.
    Absent,
    /// Nobody asks: the link has no neighbours, or somebody wrote it by hand.
    Fixed,
}

/// A network interface as it is now.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SeenLink {
    /// The kernel's number for it.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// What made it, as `ip -d link` says: "tun", "wireguard", "veth"; empty for hardware.
    pub kind: String,
    /// It is switched on.
    pub up: bool,
    /// Something is at its other end.
    pub carrier: bool,
    /// The largest packet that it takes, in bytes.
    pub mtu: u32,
}

/// A route that somebody has in place, as far as the layout depends on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SeenRoute {
    /// The table it stands in.
    pub table: RouteTable,
    /// The destinations it is for.
    pub to: IpNet,
    /// The device it leaves by. A route with several next hops is seen once for each.
    pub device: Option<u32>,
    /// Its destinations are neighbours: no gateway, no several next hops, and it does lead somewhere.
    pub on_link: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_is_told_in_the_words_of_ip() {
        let rule = Rule::new(Family::V4, 100, RuleAction::Lookup(RouteTable(77)));
        let to = |first, last| Some(Ports { first, last });
        let dns = Rule { protocol: Some(6), destination_ports: to(53, 53), ..rule.clone() };
        assert_eq!(dns.to_string(), "rule -4 priority 100 ipproto tcp dport 53 lookup 77");
        let many = Rule { protocol: Some(17), source_ports: to(1, 9), ..rule.clone() };
        assert_eq!(many.to_string(), "rule -4 priority 100 ipproto udp sport 1-9 lookup 77");
        let other = Rule { protocol: Some(47), action: RuleAction::Other(PROHIBIT), ..rule };
        assert_eq!(other.to_string(), "rule -4 priority 100 ipproto 47 prohibit");
    }
}
