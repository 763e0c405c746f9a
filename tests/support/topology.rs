//! The networks that tests run on, dual stack.
//!
//! ```text
//! internet ──── gateway ──── host ──── lan          internet: every address of 203.0.113.0/24 and 2001:db8:1::/48
//!     198.51.100.0/24   192.168.1.0/24  10.7.0.0/24           gateway .1, host .10; host .1, lan client .2
//!     2001:db8:f::/64   2001:db8:2::/64 fd00:7::/64           2001:db8:2::10 is a global address of the host
//! ```

use super::netns::veth;
use super::weather::{Radio, Weather};
use super::world::set_resolv_conf;
use super::{Netns, Peers};

/// An address of the internet that swallows every packet.
pub(crate) const BLACK_HOLE_V4: &str = "203.0.113.200";
/// The same for IPv6.
pub(crate) const BLACK_HOLE_V6: &str = "2001:db8:1:dead::1";
/// The gateway, as the host's resolver and next hop.
pub(crate) const GATEWAY_V4: &str = "192.168.1.1";
/// The same for IPv6.
pub(crate) const GATEWAY_V6: &str = "2001:db8:2::1";
/// The host under test on its uplink, reachable from the internet.
pub(crate) const HOST_V4: &str = "192.168.1.10";
/// The same for IPv6: a global address.
pub(crate) const HOST_V6: &str = "2001:db8:2::10";
/// The host under test on its LAN.
pub(crate) const HOST_LAN_V4: &str = "10.7.0.1";
/// The same for IPv6.
pub(crate) const HOST_LAN_V6: &str = "fd00:7::1";
/// The LAN client.
pub(crate) const CLIENT_V4: &str = "10.7.0.2";
/// The same for IPv6.
pub(crate) const CLIENT_V6: &str = "fd00:7::2";

/// Hosts and links of one test, with a thread for servers on the internet and one on the gateway.
pub(crate) struct Topology {
    /// Servers at the addresses of the internet.
    pub(crate) sites: Peers,
    /// Servers on the gateway: its resolver.
    pub(crate) at_gateway: Peers,
    /// All of 203.0.113.0/24 and 2001:db8:1::/48: a server may listen on any of these addresses.
    pub(crate) internet: Netns,
    /// Forwards between the internet and the uplink of the host, `eth1`. No address translation: the host is public.
    pub(crate) gateway: Netns,
    /// The host under test: uplink `eth0`, and `lan0` where there is a LAN.
    pub(crate) host: Netns,
    /// A client behind the host under test, with its `eth0`.
    pub(crate) lan: Option<Netns>,
    /// Links with weather; they go with the topology.
    radios: Vec<Radio>,
}

impl Topology {
    /// Internet, gateway and the host under test, which uses the gateway's resolver.
    pub(crate) fn desktop() -> Self {
        let (internet, gateway, host) = (Netns::new("internet"), Netns::new("gateway"), Netns::new("host"));
        veth(&gateway, "eth1", &host, "eth0");
        Self::upon(internet, gateway, host, Vec::new())
    }

    /// The same with weather between the gateway and the host.
    pub(crate) fn desktop_in(weather: Weather) -> Self {
        let (internet, gateway, host) = (Netns::new("internet"), Netns::new("gateway"), Netns::new("host"));
        let radio = Radio::between([(&gateway, "eth1"), (&host, "eth0")], weather);
        Self::upon(internet, gateway, host, vec![radio])
    }

    /// Gives the three hosts, the last two of which are linked, all the rest.
    fn upon(internet: Netns, gateway: Netns, host: Netns, radios: Vec<Radio>) -> Self {
        for ns in [&internet, &gateway, &host] {
            ns.sysctl("net.ipv4.ip_local_port_range", "1024 65535");
        }
        link_internet(&internet, &gateway);
        address_host(&gateway, &host);
        set_resolv_conf(&format!("nameserver {GATEWAY_V4}\n"));
        let (sites, at_gateway) = (Peers::new(&internet), Peers::new(&gateway));
        Self { sites, at_gateway, internet, gateway, host, lan: None, radios }
    }

    /// The host under test with the internet on its link, which is the gateway too. What a router between them costs
    /// would be charged to whoever sends, because a packet crosses veths on the sender's CPU time.
    pub(crate) fn adjacent() -> Self {
        let (internet, host) = (Netns::new("internet"), Netns::new("host"));
        for ns in [&internet, &host] {
            ns.sysctl("net.ipv4.ip_local_port_range", "1024 65535");
        }
        serve_internet(&internet);
        veth(&internet, "eth1", &host, "eth0");
        address_host(&internet, &host);
        set_resolv_conf(&format!("nameserver {GATEWAY_V4}\n"));
        let gateway = internet.clone();
        let (sites, at_gateway) = (Peers::new(&internet), Peers::new(&gateway));
        Self { sites, at_gateway, internet, gateway, host, lan: None, radios: Vec::new() }
    }

    /// The topology of [`Topology::desktop`], and a LAN client behind the host, which forwards and answers for the
    /// client's names.
    pub(crate) fn with_lan() -> Self {
        Self::desktop().and_lan()
    }

    /// The same, and a LAN client behind the host.
    #[must_use]
    pub(crate) fn and_lan(self) -> Self {
        let lan = lan();
        veth(&self.host, "lan0", &lan, "eth0");
        self.with_client(lan)
    }

    /// The same with weather between the client and the host.
    #[must_use]
    pub(crate) fn and_lan_in(mut self, weather: Weather) -> Self {
        let lan = lan();
        self.radios.push(Radio::between([(&self.host, "lan0"), (&lan, "eth0")], weather));
        self.with_client(lan)
    }

    fn with_client(self, lan: Netns) -> Self {
        let mut topology = self;
        topology.host.address("lan0", &[&format!("{HOST_LAN_V4}/24"), &format!("{HOST_LAN_V6}/64")]);
        lan.address("eth0", &[&format!("{CLIENT_V4}/24"), &format!("{CLIENT_V6}/64")]);
        lan.routes(&[&format!("default via {HOST_LAN_V4}"), &format!("default via {HOST_LAN_V6}")]);
        topology.gateway.routes(&[&format!("10.7.0.0/24 via {HOST_V4}"), &format!("fd00:7::/64 via {HOST_V6}")]);
        forward(&topology.host);
        topology.lan = Some(lan);
        topology
    }

    /// Sets strict (`1`) or no (`0`) reverse path filtering on the host under test; distributions differ in it.
    #[must_use]
    pub(crate) fn rp_filter(self, value: &str) -> Self {
        let listing = self.host.enter(|| {
            let entries = std::fs::read_dir("/proc/sys/net/ipv4/conf").expect("/proc");
            entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect::<Vec<_>>()
        });
        for device in listing {
            self.host.sysctl(&format!("net.ipv4.conf.{device}.rp_filter"), value);
        }
        self
    }

    /// The client on the LAN.
    ///
    /// # Panics
    /// In a topology without one.
    pub(crate) fn client(&self) -> &Netns {
        self.lan.as_ref().expect("a topology with a LAN")
    }
}

fn lan() -> Netns {
    Netns::with_resolv_conf("lan", &format!("nameserver {HOST_LAN_V4}\n"))
}

fn link_internet(internet: &Netns, gateway: &Netns) {
    veth(internet, "eth0", gateway, "eth0");
    internet.address("eth0", &["198.51.100.2/24", "2001:db8:f::2/64"]);
    gateway.address("eth0", &["198.51.100.1/24", "2001:db8:f::1/64"]);
    internet.routes(&["default via 198.51.100.1", "default via 2001:db8:f::1"]);
    serve_internet(internet);
    gateway.routes(&["203.0.113.0/24 via 198.51.100.2", "2001:db8:1::/48 via 2001:db8:f::2"]);
    forward(gateway);
}

/// All its addresses are its own.
fn serve_internet(internet: &Netns) {
    internet.routes(&[
        "local 203.0.113.0/24 dev lo",
        "local 2001:db8:1::/48 dev lo",
        // In the table that is asked first, or the local ranges above would win.
        &format!("blackhole {BLACK_HOLE_V4}/32 table local"),
        &format!("blackhole {BLACK_HOLE_V6}/128 table local"),
    ]);
    // A local route is enough to bind in IPv4, not in IPv6.
    internet.sysctl("net.ipv6.ip_nonlocal_bind", "1");
}

fn address_host(gateway: &Netns, host: &Netns) {
    gateway.address("eth1", &[&format!("{GATEWAY_V4}/24"), &format!("{GATEWAY_V6}/64")]);
    host.address("eth0", &[&format!("{HOST_V4}/24"), &format!("{HOST_V6}/64")]);
    host.routes(&[&format!("default via {GATEWAY_V4}"), &format!("default via {GATEWAY_V6}")]);
    // The internet routes 192.168.1.0/24 here as if it were public, so that it can open connections to the host.
}

fn forward(router: &Netns) {
    router.sysctl("net.ipv4.ip_forward", "1");
    router.sysctl("net.ipv6.conf.all.forwarding", "1");
}
