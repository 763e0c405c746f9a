//! What is known of one flow: the plain record that rules read. It holds no scratch space and no protocol's flags.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use crate::net::{Address, Host, Name};

/// The transport of a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Network {
    /// A TCP connection.
    Tcp,
    /// A UDP exchange with one peer.
    Udp,
    /// Echo requests (ping) of one id to one host.
    Icmp,
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Icmp => "icmp",
        })
    }
}

/// The way by which a flow came to us.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Inbound {
    /// The TUN device.
    Tun,
    /// `mixed-port`.
    Mixed,
    /// `port`.
    Http,
    /// `socks-port`.
    Socks,
}

impl fmt::Display for Inbound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tun => "tun",
            Self::Mixed => "mixed",
            Self::Http => "http",
            Self::Socks => "socks",
        })
    }
}

/// Something that may have to be looked up before a rule can decide. Asking again after a look-up is the resume.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Fact<T> {
    /// Nobody asked yet.
    #[default]
    Unknown,
    /// The look-up failed; it is not tried again for this flow.
    Failed,
    /// The answer.
    Known(T),
}

/// Which fact a rule lacks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FactKind {
    /// The address of the destination's name.
    Ip,
}

/// One flow's metadata.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Session {
    /// What it speaks.
    pub network: Network,
    /// How the flow reached us.
    pub inbound: Inbound,
    /// Who sends, as we see it. Of an echo request the port is the id, which no rule looks at.
    pub source: SocketAddr,
    /// Where it wants to go; never a fake address. The port of an echo request is 0.
    pub destination: Address,
    /// The name for which `destination` was last given out, where that is an address and one is remembered. It serves the
    /// rules and the log; nobody dials it, because what it leads to may have changed since, or be another of its addresses.
    pub remembered: Option<Name>,
    /// The address of `destination` when that is a name, once a rule or an outbound asked.
    pub resolved: Fact<IpAddr>,
}

impl Session {
    /// A flow of which nothing else is known yet.
    #[must_use]
    pub fn new(network: Network, inbound: Inbound, source: SocketAddr, destination: Address) -> Self {
        Self { network, inbound, source, destination, remembered: None, resolved: Fact::Unknown }
    }

    /// The destination's name as rules see it, if one is known.
    #[must_use]
    pub fn name(&self) -> Option<&Name> {
        match &self.destination.host {
            Host::Name(name) => Some(name),
            Host::Ip(_) => self.remembered.as_ref(),
        }
    }

    /// The destination's address, as far as it is known; asks nobody.
    #[must_use]
    pub fn ip(&self) -> Fact<IpAddr> {
        match &self.destination.host {
            Host::Ip(ip) => Fact::Known(*ip),
            Host::Name(_) => self.resolved.clone(),
        }
    }
}
