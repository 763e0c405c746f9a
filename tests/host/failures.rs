//! How a connection fails through us is how it fails without us, whichever way out it takes.

use std::time::{Duration, Instant};

use super::support::client::{act_in, acts_in};
use super::support::peers::Peer;
use super::support::peers::digest::of_pattern;
use super::support::peers::proxy::Door;
use super::support::peers::tls::Identity;
use super::support::sites::{BULK, V4, V6};
use super::support::topology::{BLACK_HOLE_V4, BLACK_HOLE_V6, HOST_LAN_V4};
use super::support::tunproxy::{Place, Tunproxy};
use super::support::{Capture, Sites, Topology, packet, run};

const TUN: &str = "/dev/net/tun";

/// Where the proxies are.
const PROXY: &str = "203.0.113.3";

/// A run on the host with these proxies and rules, which LAN clients go through as well.
fn start(lab: &Topology, proxies: &str, rules: &str) -> Tunproxy {
    let profile = format!(
        "
mode: rule
ipv6: true
log-level: info
tun: {{ enable: true, auto-route: true, dns-hijack: ['any:53'] }}
dns: {{ enable: true, listen: '{HOST_LAN_V4}:53', enhanced-mode: fake-ip, nameserver: [192.168.1.1] }}
proxies: [{proxies}]
rules: [{rules}]
"
    );
    let tunproxy = Place::new(&profile).start(&lab.host);
    tunproxy.assert_carries(&lab.host);
    tunproxy
}

/// Every way out that there is: DIRECT, and both kinds of proxy, plain and behind TLS.
struct EveryWay {
    door: Door,
    proxies: String,
    _peers: Vec<Peer>,
}

impl EveryWay {
    const NAMES: [&str; 5] = ["DIRECT", "socks", "http", "socks-tls", "http-tls"];

    fn open(lab: &Topology) -> Self {
        let (door, identity) = (Door::default(), Identity::new(&["proxy.example.test"]));
        let at = |port: u16| format!("{PROXY}:{port}").parse().expect("an address");
        let peers = vec![
            lab.sites.socks5(at(1080), door.clone()),
            lab.sites.http_proxy(at(8080), door.clone()),
            lab.sites.tls_in_front_of(at(1080), at(1443), &identity),
            lab.sites.tls_in_front_of(at(8080), at(8443), &identity),
        ];
        let pin = &identity.fingerprint;
        let proxies = format!(
            "{{ name: socks, type: socks5, server: {PROXY}, port: 1080, udp: true }},
             {{ name: http, type: http, server: {PROXY}, port: 8080 }},
             {{ name: socks-tls, type: socks5, server: {PROXY}, port: 1443, tls: true, fingerprint: '{pin}' }},
             {{ name: http-tls, type: http, server: {PROXY}, port: 8443, tls: true, fingerprint: '{pin}' }}"
        );
        Self { door, proxies, _peers: peers }
    }
}

#[test]
fn a_reset_in_mid_stream_is_a_reset_through_every_way_out() {
    run(&[TUN], || {
        let lab = Topology::with_lan();
        let _sites = Sites::open(&lab);
        let ways = EveryWay::open(&lab);
        for way in EveryWay::NAMES {
            let tunproxy = start(&lab, &ways.proxies, &format!("'MATCH,{way}'"));
            for ns in [&lab.host, lab.client()] {
                for site in [V4, V6] {
                    let outcome = act_in(ns, &format!("ask {site}:9001 x"));
                    let said = || format!("{way} {} {site}\n{}", ns.name(), tunproxy.output());
                    assert_eq!(outcome, Err("ECONNRESET".to_owned()), "{}", said());
                }
            }
        }
        assert_eq!(ways.door.requests.count(|line| line.ends_with(":9001")), 4 * 4, "each but DIRECT asked its proxy");
    });
}

#[test]
fn fifty_megabytes_and_closed_halves_pass_every_way_out() {
    run(&[TUN], || {
        let lab = Topology::with_lan();
        let sites = Sites::open(&lab);
        let ways = EveryWay::open(&lab);
        let digest = of_pattern(BULK);
        for way in EveryWay::NAMES {
            let tunproxy = start(&lab, &ways.proxies, &format!("'MATCH,{way}'"));
            for ns in [&lab.host, lab.client()] {
                for direction in ["up", "down", "both"] {
                    let outcome = act_in(ns, &format!("{direction} {V4}:9000 {BULK}"));
                    assert_eq!(outcome, Ok(digest.clone()), "{way} {} {direction}\n{}", ns.name(), tunproxy.output());
                }
            }
        }
        assert_eq!(sites.exchanged.count(|line| line.ends_with(&digest)), 5 * 6);
    });
}

#[test]
fn what_a_proxy_says_of_its_failure_the_client_sees_as_that() {
    run(&[TUN], || {
        let lab = Topology::with_lan();
        let at = |port: u16| format!("{PROXY}:{port}").parse().expect("an address");
        // The codes of RFC 1928, section 6, and the statuses of RFC 9110, section 15, with what each means to a client.
        let codes = [
            (1, "ECONNREFUSED"),
            (2, "ECONNREFUSED"),
            (3, "ENETUNREACH"),
            (4, "EHOSTUNREACH"),
            (5, "ECONNREFUSED"),
            (6, "ETIMEDOUT"),
            (7, "ECONNREFUSED"),
            (8, "ECONNREFUSED"),
            (403, "ECONNREFUSED"),
            (502, "ECONNREFUSED"),
            (503, "ECONNREFUSED"),
            (504, "ETIMEDOUT"),
        ];
        let identity = Identity::new(&["proxy.example.test"]);
        let (mut peers, mut proxies, mut rules) = (Vec::new(), Vec::new(), Vec::new());
        for (code, _) in codes {
            let kind = if code < 10 { "socks5" } else { "http" };
            peers.push(if code < 10 {
                lab.sites.socks5_refusing(at(1000 + code), u8::try_from(code).expect("a small number"))
            } else {
                lab.sites.http_refusing(at(1000 + code), code)
            });
            peers.push(lab.sites.tls_in_front_of(at(1000 + code), at(2000 + code), &identity));
            let tls = format!("tls: true, fingerprint: '{}'", identity.fingerprint);
            for (outer, keys) in [(1000 + code, ""), (2000 + code, &tls)] {
                proxies.push(format!("{{ name: p{outer}, type: {kind}, server: {PROXY}, port: {outer}, {keys} }}"));
                rules.push(format!("'DST-PORT,{outer},p{outer}'"));
            }
        }
        let tunproxy = start(&lab, &proxies.join(", "), &format!("{}, 'MATCH,DIRECT'", rules.join(", ")));
        for (code, expected) in codes {
            let words = [1000 + code, 2000 + code].map(|port| [V4, V6].map(|site| format!("connect {site}:{port} 3")));
            let acts = words.as_flattened().iter().flat_map(|words| [&lab.host, lab.client()].map(|ns| (ns, words)));
            let outcomes = acts_in(acts.clone().map(|(ns, words)| (ns, words.clone())));
            for ((ns, words), outcome) in acts.zip(outcomes) {
                assert_eq!(outcome, Err(expected.to_owned()), "{words} by {}\n{}", ns.name(), tunproxy.output());
            }
        }
    });
}

#[test]
fn a_proxy_that_cannot_be_reached_fails_as_its_own_way_does() {
    run(&[TUN], || {
        let lab = Topology::with_lan();
        let _sites = Sites::open(&lab);
        // Where each proxy is supposed to be, and what the client then sees.
        let servers = [
            (PROXY, "ECONNREFUSED"),
            (BLACK_HOLE_V4, "ETIMEDOUT"),
            (BLACK_HOLE_V6, "ETIMEDOUT"),
            // The gateway has no route there and says so.
            ("198.51.101.1", "ENETUNREACH"),
            ("2001:db8:ffff::1", "ENETUNREACH"),
            // Nobody answers for it on the link.
            ("192.168.1.77", "EHOSTUNREACH"),
            ("2001:db8:2::77", "EHOSTUNREACH"),
        ];
        for kind in ["socks5", "http"] {
            let (mut proxies, mut rules) = (Vec::new(), Vec::new());
            for (number, (server, _)) in servers.iter().enumerate() {
                proxies.push(format!("{{ name: p{number}, type: {kind}, server: '{server}', port: 1 }}"));
                rules.push(format!("'DST-PORT,{},p{number}'", 100 + number));
            }
            let tunproxy = start(&lab, &proxies.join(", "), &format!("{}, 'MATCH,DIRECT'", rules.join(", ")));
            for (ns, site) in [(&lab.host, V4), (lab.client(), V6)] {
                let acts = (0..servers.len()).map(|number| (ns, format!("connect {site}:{} 8", 100 + number)));
                for ((server, expected), outcome) in servers.iter().zip(acts_in(acts)) {
                    let said = || format!("{kind} at {server}, {} {site}\n{}", ns.name(), tunproxy.output());
                    assert_eq!(outcome, Err((*expected).to_owned()), "{}", said());
                }
            }
        }
    });
}

#[test]
fn a_scan_through_us_sees_what_a_scan_without_us_sees() {
    run(&[TUN], || {
        let lab = Topology::with_lan();
        let at = |host: &str, port: u16| format!("{host}:{port}").parse().expect("an address");
        let _open: Vec<Peer> =
            (3000..3100).step_by(7).flat_map(|port| [V4, V6].map(|host| lab.sites.tcp_echo(at(host, port)))).collect();
        lab.internet.nft("add table inet filter");
        lab.internet.nft("add chain inet filter input { type filter hook input priority 0; policy accept; }");
        for rule in [
            "tcp dport 3010-3019 drop",
            "meta nfproto ipv4 tcp dport 3020-3024 reject with icmp type host-unreachable",
            "meta nfproto ipv6 tcp dport 3020-3024 reject with icmpv6 type addr-unreachable",
            "meta nfproto ipv4 tcp dport 3025-3029 reject with icmp type admin-prohibited",
            "meta nfproto ipv6 tcp dport 3025-3029 reject with icmpv6 type admin-prohibited",
            "meta nfproto ipv4 tcp dport 3030-3034 reject with icmp type net-unreachable",
            "meta nfproto ipv6 tcp dport 3030-3034 reject with icmpv6 type no-route",
            "tcp dport 3035-3039 reject with tcp reset",
            "tcp dport 3040-3044 reject with icmpx type port-unreachable",
        ] {
            lab.internet.nft(&format!("add rule inet filter input {rule}"));
        }
        lab.internet.sysctl("net.ipv4.icmp_ratelimit", "0");
        lab.internet.sysctl("net.ipv6.icmp.ratelimit", "0");
        let scan = |ns| acts_in([V4, V6].map(|site| (ns, format!("scan {site} 3000 100 8"))));
        let truth = scan(&lab.host).into_iter().collect::<Result<Vec<_>, _>>().expect("a scan");
        assert_eq!(truth[0].matches("open").count(), 10, "{truth:?}");
        for error in ["ECONNREFUSED", "ETIMEDOUT", "EHOSTUNREACH", "ENETUNREACH"] {
            assert!(truth[0].contains(error), "{error}: {truth:?}");
        }
        let tunproxy = start(&lab, "", "'MATCH,DIRECT'");
        for ns in [&lab.host, lab.client()] {
            for (seen, truth) in scan(ns).iter().zip(&truth) {
                assert_eq!(seen.as_ref(), Ok(truth), "{}\n{}", ns.name(), tunproxy.output());
            }
        }
    });
}

#[test]
fn twenty_thousand_connections_from_a_hundred_ports_are_all_answered() {
    run(&[TUN], || {
        let lab = Topology::with_lan();
        let _sites = Sites::open(&lab);
        let tunproxy = start(&lab, "", "'MATCH,DIRECT'");
        for (ns, site) in [(&lab.host, V4), (lab.client(), V6)] {
            let outcome = act_in(ns, &format!("reuse 10000 100 {site}:9000"));
            assert_eq!(outcome, Ok("10000".to_owned()), "{} {site}\n{:.3000}", ns.name(), tunproxy.output());
        }
    });
}

#[test]
fn a_rejected_datagram_is_refused_at_once_to_the_host_and_to_its_lan() {
    run(&[TUN], || {
        let lab = Topology::with_lan();
        let sites = Sites::open(&lab);
        let tunproxy = start(&lab, "", "'DST-PORT,443,REJECT', 'MATCH,DIRECT'");
        let mut capture = Capture::start(lab.client(), "eth0");
        for ns in [&lab.host, lab.client()] {
            for site in [V4, V6] {
                let refused = || {
                    let started = Instant::now();
                    let outcome = act_in(ns, &format!("datagram {site}:443 x 10"));
                    assert_eq!(outcome, Err("ECONNREFUSED".to_owned()), "{} {site}\n{}", ns.name(), tunproxy.output());
                    started.elapsed()
                };
                // The best of five: a busy machine is nothing that we could be blamed for.
                let fastest = (0..5).map(|_| refused()).min().expect("five");
                assert!(fastest < Duration::from_millis(300), "{fastest:?}");
            }
        }
        let told = |protocol: u8, kind: u8, code: u8| {
            move |packet: &packet::Packet| {
                let ip = packet.ip.is_some_and(|ip| ip.protocol == protocol);
                let start = if packet.ether_type == 0x0800 { 34 } else { 54 };
                ip && packet.bytes.get(start..start + 2) == Some(&[kind, code])
            }
        };
        let seen = capture.packets();
        // Destination unreachable, port unreachable: RFC 792, RFC 4443 section 3.1.
        assert!(seen.iter().filter(|packet| told(1, 3, 3)(packet)).count() >= 5, "ICMP on the client's wire");
        assert!(seen.iter().filter(|packet| told(58, 1, 4)(packet)).count() >= 5, "ICMPv6 on the client's wire");
        assert_eq!(sites.datagrams.all(), Vec::<String>::new());
    });
}

#[test]
fn what_is_accepted_and_reset_at_once_is_no_closed_port() {
    run(&[TUN], || {
        let lab = Topology::with_lan();
        let _server = lab.sites.tcp_resetting_at_once("203.0.113.10:72".parse().expect("an address"));
        let tunproxy = start(&lab, "", "'MATCH,DIRECT'");
        for ns in [&lab.host, lab.client()] {
            for _ in 0..200 {
                let outcome = act_in(ns, "ask 203.0.113.10:72 x");
                let reset = ["ECONNRESET", "EPIPE"].map(|name| Err(name.to_owned())).contains(&outcome);
                assert!(reset, "{}: {outcome:?}\n{}", ns.name(), tunproxy.output());
            }
        }
    });
}

#[test]
fn the_word_of_a_router_is_to_a_program_what_it_is_without_us() {
    run(&[TUN], || {
        let lab = Topology::with_lan();
        let refusals = [
            "icmp net-unreachable",
            "icmp host-unreachable",
            "icmp prot-unreachable",
            "icmp port-unreachable",
            "icmp net-prohibited",
            "icmp host-prohibited",
            "icmp admin-prohibited",
            "icmpv6 no-route",
            "icmpv6 admin-prohibited",
            "icmpv6 addr-unreachable",
            "icmpv6 port-unreachable",
            "icmpv6 policy-fail",
            "icmpv6 reject-route",
        ];
        lab.gateway.nft("add table inet firewall");
        lab.gateway.nft("add chain inet firewall forward { type filter hook forward priority 0; }");
        let mut acts = Vec::new();
        for (port, refusal) in (1001..).zip(refusals) {
            let (family, site) = if refusal.starts_with("icmpv6") { ("ipv6", V6) } else { ("ipv4", V4) };
            for protocol in ["tcp", "udp"] {
                let what = format!("meta nfproto {family} {protocol} dport {port} reject with {refusal}");
                lab.gateway.nft(&format!("add rule inet firewall forward {what}"));
            }
            // Of some of these words a datagram's sender hears nothing.
            acts.extend([format!("datagram {site}:{port} x 2"), format!("connect {site}:{port} 10")]);
        }
        for ns in [&lab.gateway, &lab.host] {
            ns.sysctl("net.ipv4.icmp_ratelimit", "0");
            ns.sysctl("net.ipv6.icmp.ratelimit", "0");
        }
        // A kernel says no more than 50 such words at once, whatever its limits for one receiver.
        let told = || -> Vec<_> {
            let of = |ns| acts.chunks(13).flat_map(move |some| acts_in(some.iter().map(|act| (ns, act.clone()))));
            of(&lab.host).chain(of(lab.client())).collect()
        };
        let truth = told();
        for error in ["EHOSTUNREACH", "ENETUNREACH", "ENOPROTOOPT", "ECONNREFUSED", "EACCES", "EAGAIN"] {
            assert!(truth.contains(&Err(error.to_owned())), "{error}: {truth:?}");
        }
        let tunproxy = start(&lab, "", "'MATCH,DIRECT'");
        for ((said, truth), act) in told().iter().zip(&truth).zip(acts.iter().cycle()) {
            assert_eq!(said, truth, "{act}\n{}", tunproxy.output());
        }
    });
}
