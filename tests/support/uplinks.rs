//! A host with two ways to the internet, and a network service that changes its mind.
//!
//! ```text
//! internet ──── gateway ──── eth0 host     192.168.1.10, 2001:db8:2::10 by 192.168.1.1, 2001:db8:2::1
//!         └──── second ───── eth1 host     192.168.2.10, 2001:db8:3::10 by 192.168.2.1, 2001:db8:3::1
//! ```
//!
//! Each gateway passes on only what has an address of its own link, as networks of providers do.

use super::netns::veth;
use super::{Netns, Topology};

/// One of the two ways.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Uplink {
    /// The interface.
    pub(crate) device: &'static str,
    v4: &'static str,
    v6: &'static str,
    gateway_v4: &'static str,
    gateway_v6: &'static str,
}

/// The way that [`Topology::desktop`] has.
pub(crate) const FIRST: Uplink = Uplink {
    device: "eth0",
    v4: "192.168.1.10/24",
    v6: "2001:db8:2::10/64",
    gateway_v4: "192.168.1.1",
    gateway_v6: "2001:db8:2::1",
};
/// The other.
pub(crate) const SECOND: Uplink = Uplink {
    device: "eth1",
    v4: "192.168.2.10/24",
    v6: "2001:db8:3::10/64",
    gateway_v4: "192.168.2.1",
    gateway_v6: "2001:db8:3::1",
};

/// A desktop and its second way, which is up but not the default.
pub(crate) struct Uplinks {
    /// The desktop.
    pub(crate) lab: Topology,
    second: Netns,
}

impl Uplinks {
    /// Builds it; the first way is the default.
    pub(crate) fn new() -> Self {
        let lab = Topology::desktop();
        let second = Netns::new("second");
        veth(&lab.internet, "eth1", &second, "eth0");
        lab.internet.address("eth1", &["198.51.101.2/24", "2001:db8:e::2/64"]);
        second.address("eth0", &["198.51.101.1/24", "2001:db8:e::1/64"]);
        lab.internet.routes(&["192.168.2.0/24 via 198.51.101.1", "2001:db8:3::/64 via 2001:db8:e::1"]);
        second.routes(&["203.0.113.0/24 via 198.51.101.2", "2001:db8:1::/48 via 2001:db8:e::2"]);
        for key in ["net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"] {
            second.sysctl(key, "1");
        }
        veth(&second, "eth1", &lab.host, "eth1");
        second.address("eth1", &["192.168.2.1/24", "2001:db8:3::1/64"]);
        for (gateway, v4, v6) in
            [(&lab.gateway, "192.168.1.0/24", "2001:db8:2::/64"), (&second, "192.168.2.0/24", "2001:db8:3::/64")]
        {
            gateway.nft("add table inet provider");
            gateway.nft("add chain inet provider strangers { type filter hook forward priority 0; }");
            gateway.nft(&format!("add rule inet provider strangers iifname eth1 ip saddr != {v4} drop"));
            gateway.nft(&format!("add rule inet provider strangers iifname eth1 ip6 saddr != {v6} drop"));
        }
        let uplinks = Self { lab, second };
        uplinks.addresses(SECOND);
        uplinks
    }

    /// The gateway of the second way, whose `eth1` is on the host's link.
    pub(crate) fn second(&self) -> &Netns {
        &self.second
    }

    /// The link comes up, with its addresses.
    pub(crate) fn up(&self, uplink: Uplink) {
        self.lab.host.ip(&format!("link set {} up", uplink.device));
        self.addresses(uplink);
    }

    fn addresses(&self, uplink: Uplink) {
        for address in [uplink.v4, uplink.v6] {
            let nodad = if address.contains(':') { "nodad" } else { "" };
            self.lab.host.ip(&format!("addr replace {address} dev {} {nodad}", uplink.device));
        }
    }

    /// The link goes down, and its addresses with it.
    pub(crate) fn down(&self, uplink: Uplink) {
        self.lab.host.ip(&format!("addr flush dev {} scope global", uplink.device));
        self.lab.host.ip(&format!("link set {} down", uplink.device));
    }

    /// The second link's device is pulled out and plugged in again: a new device with an old name, and all it had.
    pub(crate) fn replug_second(&self) {
        self.lab.host.ip("link del eth1");
        veth(&self.second, "eth1", &self.lab.host, "eth1");
        self.second.address("eth1", &["192.168.2.1/24", "2001:db8:3::1/64"]);
        self.up(SECOND);
    }

    /// Makes it the default, in each of the families `-4` and `-6` that is named.
    pub(crate) fn default(&self, uplink: Uplink, families: &[&str]) {
        for family in families {
            let gateway = if *family == "-4" { uplink.gateway_v4 } else { uplink.gateway_v6 };
            self.lab.host.ip(&format!("{family} route replace default via {gateway} dev {}", uplink.device));
        }
    }

    /// Takes the default routes of these families away.
    pub(crate) fn no_default(&self, families: &[&str]) {
        for family in families {
            self.lab.host.ip(&format!("{family} route flush exact default"));
        }
    }

    /// The link's IPv4 address becomes another one, and its routes with it.
    pub(crate) fn renumber(&self, uplink: Uplink, last: u8) {
        let net = uplink.gateway_v4.trim_end_matches('1');
        let host = &self.lab.host;
        host.ip(&format!("-4 addr flush dev {}", uplink.device));
        host.ip(&format!("addr add {net}{last}/24 dev {}", uplink.device));
    }
}
