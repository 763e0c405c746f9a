//! Paths that carry less than the links at their ends say: TCP gets through, whoever tells it and whoever does not.

use super::support::client::act_in;
use super::support::peers::digest::of_pattern;
use super::support::sites::{V4, V6};
use super::support::topology::HOST_LAN_V4;
use super::support::tunproxy::Place;
use super::support::{Sites, Topology, run};

const TUN: &str = "/dev/net/tun";
const BYTES: u64 = 10 << 20;

fn profile() -> Place {
    Place::new(&format!(
        "
mode: rule
ipv6: true
log-level: info
tun: {{ enable: true, auto-route: true, dns-hijack: ['any:53'] }}
dns: {{ enable: true, listen: '{HOST_LAN_V4}:53', enhanced-mode: fake-ip, nameserver: [192.168.1.1] }}
rules: ['MATCH,DIRECT']
"
    ))
}

/// Both ways, from the host and from a LAN client whose link carries 1500, by each family that a link of `mtu` carries.
fn everything_passes(lab: &Topology, mtu: u16) {
    let _sites = Sites::open(lab);
    let tunproxy = profile().start(&lab.host);
    tunproxy.assert_carries(lab.client());
    let sites = if mtu < 1280 { &[V4][..] } else { &[V4, V6] };
    for ns in [&lab.host, lab.client()] {
        for site in sites {
            for direction in ["up", "down"] {
                let outcome = act_in(ns, &format!("{direction} {site}:9000 {BYTES}"));
                let said = || format!("{mtu}: {direction} {site} from {}\n{}", ns.name(), tunproxy.output());
                assert_eq!(outcome, Ok(of_pattern(BYTES)), "{}", said());
            }
        }
    }
}

#[test]
fn tcp_passes_a_smaller_hop_whose_router_says_so() {
    run(&[TUN], || {
        for mtu in [1500, 1280, 576] {
            let lab = Topology::with_lan();
            lab.gateway.ip(&format!("link set eth0 mtu {mtu}"));
            lab.internet.ip(&format!("link set eth0 mtu {mtu}"));
            everything_passes(&lab, mtu);
        }
    });
}

/// What a router does where its messages get lost: it lowers the segment size in SYNs to what its link carries. A client
/// behind us announces its own to us, and we ours to the server.
#[test]
fn tcp_passes_a_smaller_hop_that_clamps_while_its_messages_are_lost() {
    run(&[TUN], || {
        for mtu in [1280, 576] {
            let lab = Topology::with_lan();
            lab.gateway.ip(&format!("link set eth0 mtu {mtu}"));
            lab.internet.ip(&format!("link set eth0 mtu {mtu}"));
            lab.gateway.nft("add table inet clamp");
            lab.gateway.nft("add chain inet clamp forward { type filter hook forward priority 0; policy accept; }");
            lab.gateway.nft("add rule inet clamp forward tcp flags syn tcp option maxseg size set rt mtu");
            for ns in [&lab.host, &lab.internet] {
                ns.nft("add table inet deaf");
                ns.nft("add chain inet deaf input { type filter hook input priority -300; policy accept; }");
                ns.nft("add rule inet deaf input icmp type destination-unreachable icmp code frag-needed drop");
                ns.nft("add rule inet deaf input icmpv6 type packet-too-big drop");
            }
            everything_passes(&lab, mtu);
        }
    });
}

/// The host's own uplink is the small one, and its LAN does not know.
#[test]
fn a_client_with_a_larger_link_than_the_uplink_loses_nothing() {
    run(&[TUN], || {
        for mtu in [1400, 1280] {
            let lab = Topology::with_lan();
            lab.host.ip(&format!("link set eth0 mtu {mtu}"));
            lab.gateway.ip(&format!("link set eth1 mtu {mtu}"));
            everything_passes(&lab, mtu);
        }
    });
}
