//! The sites that most tests talk to, and the names they have.

use std::net::SocketAddr;

use super::Topology;
use super::peers::dns::{NameServer, Zone};
use super::peers::{Peer, Record};
use super::topology::GATEWAY_V4;

/// Where the sites are, IPv4.
pub(crate) const V4: &str = "203.0.113.10";
/// Where the sites are, IPv6, as it stands in a URL.
pub(crate) const V6: &str = "[2001:db8:1::10]";
/// Their name, with an address in each family.
pub(crate) const NAME: &str = "www.example.test";
/// Length of the transfers that close one half first: 50 MiB.
pub(crate) const BULK: u64 = 50 << 20;

/// Sites at both addresses: HTTP on 80, echo on 7 (TCP and UDP) and on TCP 7001 to 7008, the exchange on 9000, one
/// that resets on 9001. The gateway's resolver knows their name.
pub(crate) struct Sites {
    /// The gateway's resolver.
    pub(crate) dns: NameServer,
    /// Where datagrams to the echo came from.
    pub(crate) datagrams: Record,
    /// The digests that the exchange saw.
    pub(crate) exchanged: Record,
    _peers: Vec<Peer>,
}

impl Sites {
    /// Opens them, with the usual names.
    pub(crate) fn open(lab: &Topology) -> Self {
        Self::with(lab, zone())
    }

    /// Opens them, with these names.
    pub(crate) fn with(lab: &Topology, zone: Zone) -> Self {
        let (datagrams, exchanged) = (Record::default(), Record::default());
        let mut peers = Vec::new();
        for host in [V4, V6] {
            let at = |port: u16| -> SocketAddr { format!("{host}:{port}").parse().expect("an address") };
            peers.extend([
                lab.sites.http(at(80)),
                lab.sites.tcp_echo(at(7)),
                lab.sites.udp_echo(at(7), &datagrams),
                lab.sites.tcp_exchange(at(9000), &exchanged),
                lab.sites.tcp_resetting(at(9001)),
            ]);
            peers.extend((7001..=7008).map(|port| lab.sites.tcp_echo(at(port))));
        }
        let dns = lab.at_gateway.dns(format!("{GATEWAY_V4}:53").parse().expect("an address"), zone);
        Self { dns, datagrams, exchanged, _peers: peers }
    }
}

/// The usual names: the sites', with every type a test asks for.
pub(crate) fn zone() -> Zone {
    Zone::default()
        .address(NAME, V4)
        .address(NAME, "2001:db8:1::10")
        .address("other.example.test", V4)
        .text(NAME, "some words")
        .https(NAME)
        .pointer(V4, NAME)
}
