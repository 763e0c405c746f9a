//! The networks that each case is tried on.

use std::net::IpAddr;

use tunproxy::net::client_of;
use tunproxy::stack::Config;

use super::link::Weather;
use super::rough::Rough;

/// The device's MTU everywhere here.
pub(crate) const MTU: usize = 1500;

/// One of the networks that each case is tried on.
#[derive(Debug, Clone)]
pub(crate) struct Net {
    pub(crate) offload: bool,
    pub(crate) v6: bool,
    /// The clients are this host itself: no congestion control.
    pub(crate) own: bool,
    pub(crate) ipv6: bool,
    pub(crate) carry_echo: bool,
    pub(crate) weather: Weather,
    /// What the client lacks.
    pub(crate) rough: Rough,
    pub(crate) seed: u64,
    /// Receive and send buffer of each client socket.
    pub(crate) buffer: usize,
    /// Packets that the device takes in one turn.
    pub(crate) room: usize,
    /// Bytes that the stack's flows may take.
    pub(crate) memory: usize,
    /// Handshakes that one client may have under way.
    pub(crate) handshakes: usize,
    /// A router between client and device whose link to the client carries no more than this.
    pub(crate) hop: Option<u16>,
}

impl Net {
    pub(crate) fn new(offload: bool, v6: bool) -> Self {
        let weather = Weather::CALM;
        Self {
            offload,
            v6,
            own: true,
            ipv6: true,
            carry_echo: true,
            weather,
            rough: Rough::default(),
            seed: 1,
            buffer: 256 << 10,
            room: usize::MAX,
            memory: usize::MAX,
            handshakes: usize::MAX,
            hop: None,
        }
    }

    /// With and without offloads, IPv4 and IPv6.
    pub(crate) fn all() -> [Self; 4] {
        [Self::new(false, false), Self::new(false, true), Self::new(true, false), Self::new(true, true)]
    }

    pub(crate) fn client(&self) -> IpAddr {
        address(self.v6, "192.0.2.10", "2001:db8:1::10")
    }

    pub(crate) fn server(&self) -> IpAddr {
        address(self.v6, "198.51.100.7", "2001:db8:2::7")
    }

    /// An address that hand-made segments come from; the smoltcp client never sees what is sent there.
    pub(crate) fn peer(&self) -> IpAddr {
        address(self.v6, "192.0.2.77", "2001:db8:1::77")
    }

    pub(super) fn config(&self) -> Config {
        let own = if self.own { vec![self.client(), self.peer()] } else { Vec::new() };
        Config {
            mtu: MTU,
            offload: self.offload,
            own,
            echo: vec![address(self.v6, "198.18.0.2", "fdfe:dcba:9876::2")],
            carry_echo: self.carry_echo,
            reserved: vec!["198.18.0.0/15".parse().unwrap(), "fdfe:dcba:9876::/48".parse().unwrap()],
            ipv6: self.ipv6,
            seed: self.seed,
            memory: self.memory,
            client: client_of,
            handshakes: self.handshakes,
            tell_ended: false,
        }
    }
}

fn address(v6: bool, four: &str, six: &str) -> IpAddr {
    if v6 { six } else { four }.parse().unwrap()
}
