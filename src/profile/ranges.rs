//! The prefixes that are ours alone, and what must not lie in them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::decode::host;
use super::report::Report;
use super::routes::Proxy;
use crate::net::Host;

/// Prefixes that have a meaning of their own on every host (RFC 6890, RFC 4291), with the words for it.
fn reserved() -> [(IpNet, &'static str); 7] {
    let v4 = |a, b, prefix| IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::new(a, b, 0, 0), prefix));
    let v6 = |first, prefix| IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::new(first, 0, 0, 0, 0, 0, 0, 0), prefix));
    [
        (v4(0, 0, 8), "0.0.0.0/8 is \"this network\""),
        (v4(127, 0, 8), "127.0.0.0/8 is this host itself"),
        (v4(169, 254, 16), "169.254.0.0/16 is link-local"),
        (v4(224, 0, 3), "224.0.0.0/3 is multicast and reserved"),
        (v6(0, 8), "::/8 is reserved, ::1 is this host itself"),
        (v6(0xfe80, 10), "fe80::/10 is link-local"),
        (v6(0xff00, 8), "ff00::/8 is multicast"),
    ]
}

/// Why no address of `net` can be ours to give out or to have, if one cannot.
pub(super) fn not_ours(net: IpNet) -> Option<&'static str> {
    reserved().into_iter().find(|(other, _)| overlap(net, *other)).map(|(_, why)| why)
}

/// Whether the two have an address in common: of two prefixes one then holds the other.
pub(super) fn overlap(a: IpNet, b: IpNet) -> bool {
    a.contains(&b) || b.contains(&a)
}

/// The prefixes of the profile: fake addresses, and those on the device.
#[derive(Debug)]
pub(super) struct Ranges {
    fake: Vec<IpNet>,
    device: Vec<IpNet>,
    /// Where we answer names.
    listen: Option<SocketAddr>,
}

impl Ranges {
    pub(super) fn new(fake: Ipv4Net, fake6: Option<Ipv6Net>, device: &[Ipv6Net], listen: Option<SocketAddr>) -> Self {
        let fake = std::iter::once(IpNet::V4(fake)).chain(fake6.map(IpNet::V6)).collect();
        Self { fake, device: device.iter().copied().map(IpNet::V6).collect(), listen }
    }

    /// Why nobody whom we could ask has the address `ip`.
    pub(super) fn no_server_at(&self, ip: IpAddr) -> Option<String> {
        if let Some(net) = self.fake.iter().find(|net| net.contains(&ip)) {
            return Some(format!("{net} is the range of our own fake addresses"));
        }
        if let Some(net) = self.device.iter().find(|net| net.contains(&ip)) {
            return Some(format!("{net} is on our own device"));
        }
        let nobody = match ip {
            IpAddr::V4(ip) => ip.is_unspecified() || ip.is_multicast() || ip.is_broadcast(),
            IpAddr::V6(ip) => ip.is_unspecified() || ip.is_multicast(),
        };
        nobody.then(|| "it is not the address of one host".to_owned())
    }

    /// Why no nameserver that we could ask is at `server`.
    pub(super) fn no_nameserver_at(&self, server: SocketAddr) -> Option<String> {
        let ourselves = self.listen.is_some_and(|listen| {
            let here = listen.ip() == server.ip() || (listen.ip().is_unspecified() && server.ip().is_loopback());
            here && listen.port() == server.port()
        });
        if ourselves {
            Some("there we answer ourselves (dns.listen)".to_owned())
        } else {
            self.no_server_at(server.ip())
        }
    }

    /// Adds an error for each proxy whose server cannot be where it is said to be.
    pub(super) fn check_servers(&self, proxies: &[Proxy], report: &mut Report) {
        for proxy in proxies {
            let Some(server) = proxy.node.child("server") else { continue };
            let Some(Host::Ip(ip)) = server.text().and_then(|text| host(text.trim())) else { continue };
            if let Some(why) = self.no_server_at(ip) {
                let path = format!("{}.server", proxy.path);
                report.error(server, path, format!("no proxy answers at `{ip}`: {why}"));
            }
        }
    }
}
