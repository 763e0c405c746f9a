//! Upstream proxies, ours and the distribution's, by name and by address; and the outbounds that say no.

use std::net::SocketAddr;

use super::support::client::act_in;
use super::support::peers::Peer;
use super::support::peers::digest::of_pattern;
use super::support::peers::dns::Behaviour;
use super::support::peers::proxy::Door;
use super::support::program::{PATIENCE, Program};
use super::support::sites::{NAME, V4, V6, zone};
use super::support::topology::{BLACK_HOLE_V4, HOST_V4, HOST_V6};
use super::support::tunproxy::Place;
use super::support::{Sites, Topology, run, third_party, world};

const TUN: &str = "/dev/net/tun";

/// Where the proxies are.
const PROXY: &str = "203.0.113.3";

fn at(port: u16) -> SocketAddr {
    format!("{PROXY}:{port}").parse().expect("an address")
}

/// A profile that sends everything to the outbound `up`, whose other keys are `keys`.
fn through(keys: &str) -> Place {
    with_rules(keys, "'MATCH,up'")
}

fn with_rules(keys: &str, rules: &str) -> Place {
    let server = if keys.contains("server:") { String::new() } else { format!("server: {PROXY}, ") };
    Place::new(&profile("fake-ip", &format!("{{ name: up, {server}{keys} }}"), rules))
}

fn profile(mode: &str, proxies: &str, rules: &str) -> String {
    format!(
        "
mode: rule
ipv6: true
log-level: info
dns: {{ enable: true, enhanced-mode: {mode}, nameserver: [192.168.1.1] }}
proxies: [{proxies}]
rules: [{rules}]
"
    )
}

/// Our own proxies, which write down what they are asked for.
fn own_proxies(lab: &Topology) -> (Door, [Peer; 2]) {
    let door = Door::knowing(&[(NAME, V4)]).with_credentials("ann", "secret:word");
    let peers = [lab.sites.socks5(at(1080), door.clone()), lab.sites.http_proxy(at(8080), door.clone())];
    (door, peers)
}

const OWN: [&str; 2] = [
    "type: socks5, port: 1080, username: ann, password: 'secret:word', udp: true",
    "type: http, port: 8080, username: ann, password: 'secret:word'",
];

#[test]
fn an_upstream_is_told_the_name_that_the_client_asked_for() {
    run(&["curl"], || {
        let lab = Topology::desktop();
        let sites = Sites::open(&lab);
        let (door, _peers) = own_proxies(&lab);
        for keys in OWN {
            let said = through(keys).exec(&lab.host, "curl", &["-sS", &format!("http://{NAME}/p")]);
            assert!(said.stdout.contains(&format!("host={NAME} path=/p client=203.0.113")), "{keys}: {said:?}");
        }
        assert_eq!(door.requests.all(), [format!("tcp {NAME}:80"), format!("tcp {NAME}:80")]);
        assert_eq!(sites.dns.queries.all(), Vec::<String>::new(), "the upstream resolves, not we");
    });
}

#[test]
fn an_upstream_is_told_the_address_that_the_client_connected_to() {
    run(&["curl"], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let (door, _peers) = own_proxies(&lab);
        for keys in OWN {
            for site in [V4, V6] {
                let said = through(keys).exec(&lab.host, "curl", &["-sSg", &format!("http://{site}/p")]);
                assert!(said.stdout.contains(&format!("host={site} path=/p")), "{keys}: {said:?}");
            }
        }
        assert_eq!(door.requests.count(|request| request == format!("tcp {V4}:80")), 2, "{:?}", door.requests.all());
    });
}

#[test]
fn the_distributions_proxies_carry_names_and_addresses() {
    run(&["curl", "danted", "microsocks", "tinyproxy"], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let _programs = distributions_proxies(&lab);
        for keys in [
            "type: socks5, port: 1081",
            "type: socks5, port: 1082, username: ann, password: secret",
            "type: http, port: 8081, username: ann, password: secret",
        ] {
            for site in [NAME, V4] {
                let said = through(keys).exec(&lab.host, "curl", &["-sS", &format!("http://{site}/p")]);
                assert!(said.stdout.contains(&format!("host={site} path=/p client=")), "{keys}: {said:?}");
                // A proxy that looks the name up may come from its other family.
                assert!([HOST_V4, HOST_V6].iter().all(|host| !said.stdout.contains(host)), "{keys}: {said:?}");
            }
        }
    });
}

fn distributions_proxies(lab: &Topology) -> [Program; 3] {
    lab.internet.ip(&format!("addr add {PROXY}/32 dev lo"));
    [
        third_party::danted(&lab.internet, at(1081), PROXY),
        third_party::microsocks(&lab.internet, at(1082), Some(("ann", "secret"))),
        third_party::tinyproxy(&lab.internet, at(8081), Some(("ann", "secret"))),
    ]
}

#[test]
fn datagrams_go_through_socks5_by_name_and_by_address() {
    run(&["danted"], || {
        let lab = Topology::desktop();
        let sites = Sites::open(&lab);
        let (door, _peers) = own_proxies(&lab);
        lab.internet.ip(&format!("addr add {PROXY}/32 dev lo"));
        let _danted = third_party::danted(&lab.internet, at(1081), PROXY);
        for keys in [OWN[0], "type: socks5, port: 1081, udp: true"] {
            for site in [NAME, V4] {
                let outcome = through(keys).act(&lab.host, &format!("datagram {site}:7 hello"));
                assert_eq!(outcome, Ok("hello".to_owned()), "{keys}, {site}");
            }
        }
        assert_eq!(door.requests.all(), [format!("udp {NAME}:7"), format!("udp {V4}:7")]);
        assert_eq!(sites.datagrams.count(|from| from.starts_with("192.168.")), 0, "none went directly");
    });
}

#[test]
fn halves_close_one_by_one_through_every_upstream() {
    run(&[], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let (door, _peers) = own_proxies(&lab);
        for keys in OWN {
            for direction in ["up", "down", "both"] {
                let outcome = through(keys).act(&lab.host, &format!("{direction} {V4}:9000 10000000"));
                assert_eq!(outcome, Ok(of_pattern(10_000_000)), "{keys}, {direction}");
            }
        }
        assert_eq!(door.requests.all().len(), 6, "every one through its upstream");
    });
}

#[test]
fn what_a_proxy_could_not_reach_the_client_sees_as_refused() {
    run(&[], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let (door, _peers) = own_proxies(&lab);
        for keys in OWN {
            let outcome = through(keys).act(&lab.host, &format!("connect {V4}:81"));
            assert_eq!(outcome, Err("ECONNREFUSED".to_owned()), "{keys}");
        }
        assert_eq!(door.requests.all().len(), 2, "the proxy was asked, and said no");
    });
}

#[test]
fn a_dead_proxy_fails_its_flows_and_no_others() {
    run(&["curl"], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let rules = "'DST-PORT,80,DIRECT', 'MATCH,up'";
        let refusing = with_rules("type: socks5, port: 1", rules);
        assert_eq!(refusing.act(&lab.host, &format!("connect {V4}:7")), Err("ECONNREFUSED".to_owned()));
        let silent = with_rules(&format!("type: socks5, server: {BLACK_HOLE_V4}, port: 1080"), rules);
        assert_eq!(silent.act(&lab.host, &format!("connect {V4}:7 3")), Err("ETIMEDOUT".to_owned()));
        for (place, why) in [(refusing, "upstream proxy up (203.0.113.3:1) refused the connection"), (silent, "")] {
            let script = format!("curl -s --connect-timeout 2 http://{V4}:7/ & curl -sS http://{V4}/alive; wait");
            let said = place.exec(&lab.host, "sh", &["-c", &script]);
            assert!(said.stdout.contains("path=/alive"), "{said:?}");
            let words = [&format!("destination={V4}:7"), "outbound=\"up\"", "outcome=failed", why];
            let told = said.stderr.lines().any(|line| words.iter().all(|word| line.contains(word)));
            assert!(told, "the failed flow has its line, with {words:?}: {said:?}");
        }
    });
}

#[test]
fn wrong_credentials_end_in_a_refusal_with_its_reason() {
    run(&["curl"], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let (door, _peers) = own_proxies(&lab);
        for (keys, reason) in [
            ("type: socks5, port: 1080, username: ann, password: no", "refused the user name and password"),
            ("type: socks5, port: 1080", "wants another kind of authentication"),
            ("type: http, port: 8080", "refused the user name and password (407)"),
        ] {
            let said = through(keys).exec(&lab.host, "curl", &["-sS", &format!("http://{V4}/")]);
            assert_eq!(said.code, Some(7), "{keys}: {said:?}");
            let told = |line: &str| line.contains(&format!("destination={V4}:80")) && line.contains(reason);
            assert!(said.stderr.lines().any(told), "{reason}: {said:?}");
        }
        assert_eq!(door.requests.all(), Vec::<String>::new());
    });
}

#[test]
fn reject_answers_at_once_and_reject_drop_never() {
    run(&[], || {
        let lab = Topology::desktop();
        let sites = Sites::open(&lab);
        let reject = with_rules("type: socks5, port: 1", "'MATCH,REJECT'");
        for site in [V4, V6] {
            for words in [format!("connect {site}:80"), format!("datagram {site}:7 x")] {
                assert!(act_in(&lab.host, &words).is_ok(), "it would answer directly: {words}");
                assert_eq!(reject.act(&lab.host, &words), Err("ECONNREFUSED".to_owned()), "{words}");
            }
        }
        let drop = with_rules("type: socks5, port: 1", "'MATCH,REJECT-DROP'");
        assert_eq!(drop.act(&lab.host, &format!("connect {V4}:80 3")), Err("ETIMEDOUT".to_owned()));
        assert_eq!(drop.act(&lab.host, &format!("datagram {V4}:7 x 3")), Err("EAGAIN".to_owned()));
        assert_eq!(sites.datagrams.all().len(), 2, "only the two that were sent directly");
    });
}

#[test]
fn an_outbound_that_is_not_built_refuses_and_never_goes_direct() {
    run(&[], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let vmess = "type: vmess, port: 443, uuid: 00000000-0000-0000-0000-000000000000, alterId: 0, cipher: auto";
        let place = through(vmess);
        assert_eq!(place.act(&lab.host, &format!("connect {V4}:80")), Err("ECONNREFUSED".to_owned()));
        let said = place.check(&lab.host);
        assert!(said.succeeded() && (said.stdout + &said.stderr).contains("vmess"));
    });
}

#[test]
fn datagrams_for_an_outbound_without_udp_fall_through_to_the_next_rule() {
    run(&[], || {
        let lab = Topology::desktop();
        let sites = Sites::open(&lab);
        let (door, _peers) = own_proxies(&lab);
        let first = format!("{{ name: first, server: {PROXY}, {} }}", OWN[1]);
        let proxies = format!("{first}, {{ name: second, server: {PROXY}, {} }}", OWN[0]);
        let place =
            Place::new(&profile("fake-ip", &proxies, "'DST-PORT,7,first', 'DST-PORT,7,second', 'MATCH,REJECT'"));
        assert_eq!(place.act(&lab.host, &format!("datagram {V4}:7 hello")), Ok("hello".to_owned()));
        assert_eq!(place.act(&lab.host, &format!("ask {V4}:7 hello")), Ok("hello".to_owned()));
        assert_eq!(door.requests.all(), [format!("udp {V4}:7"), format!("tcp {V4}:7")], "the second, then the first");
        assert_eq!(sites.datagrams.count(|from| from.starts_with("192.168.")), 0, "none went directly");

        let place = Place::new(&profile("fake-ip", &first, "'DST-PORT,7,first', 'MATCH,DIRECT'"));
        let said = place.check(&lab.host);
        let warned = said.stdout + &said.stderr;
        assert!(warned.contains("UDP") && warned.contains("DIRECT"), "check names the rule it falls past: {warned}");
    });
}

#[test]
fn a_real_address_is_dialled_itself_and_its_name_serves_the_rules_while_it_is_remembered() {
    run(&["curl"], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let (door, _peers) = own_proxies(&lab);
        let url = format!("http://{NAME}/r");
        for (place, requests) in [
            (&format!("{{ name: up, server: {PROXY}, {} }}", OWN[0]), vec![format!("tcp {V4}:80")]),
            (&format!("{{ name: up, server: {PROXY}, {} }}", OWN[1]), vec![format!("tcp {V4}:80")]),
            (&"{ name: up, type: direct }".to_owned(), vec![]),
        ]
        .map(|(proxy, requests)| (Place::new(&redir_host(proxy, "redir-host")), requests))
        {
            let before = door.requests.all().len();
            let said = place.exec(&lab.host, "curl", &["-4sS", &url]);
            assert!(said.stdout.contains(&format!("host={NAME} path=/r")), "{said:?}");
            let told = |line: &str| line.contains(&format!("destination={V4}:80 name={NAME}"));
            assert!(said.stderr.lines().any(told), "{said:?}");
            assert_eq!(door.requests.all()[before..], requests);
        }
        let place = Place::new(&redir_host(&format!("{{ name: up, server: {PROXY}, {} }}", OWN[0]), "redir-host"));
        assert_eq!(place.act(&lab.host, &format!("datagram {NAME}:7 hello")), Ok("hello".to_owned()));
        let last = door.requests.all().pop().expect("a request");
        assert!([format!("udp {V4}:7"), format!("udp {V6}:7")].contains(&last), "{last}");
        let normal = Place::new(&redir_host("{ name: up, type: direct }", "normal"));
        let said = normal.exec(&lab.host, "curl", &["-4sS", &url]);
        assert_eq!(said.code, Some(7), "nothing is remembered: {said:?}");
        assert!(said.stderr.contains("MATCH,REJECT"), "{said:?}");
    });
}

/// Sends what is asked for by the sites' name to `up`, and refuses the rest.
fn redir_host(proxy: &str, mode: &str) -> String {
    profile(mode, proxy, &format!("'DOMAIN,{NAME},up', 'MATCH,REJECT'"))
}

#[test]
fn an_upstream_that_never_answers_for_datagrams_holds_up_nothing_else() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let door = Door { mute_for_datagrams: true, ..Door::knowing(&[(NAME, V4)]) };
        let _peer = lab.sites.socks5(at(1080), door.clone());
        let slow = format!("{{ name: up, server: {PROXY}, type: socks5, port: 1080, udp: true }}");
        let dead = format!("{{ name: dead, server: {PROXY}, type: socks5, port: 1, udp: true }}");
        let rules = "'DST-PORT,9999,dead', 'IP-CIDR,203.0.113.10/32,up', 'MATCH,DIRECT'";
        let tun = "tun: { enable: true, auto-route: true, dns-hijack: ['any:53'] }";
        let tunproxy = Place::new(&(profile("fake-ip", &format!("{slow}, {dead}"), rules) + tun)).start(&lab.host);
        let host = lab.host.clone();
        let waiting = std::thread::spawn(move || act_in(&host, &format!("datagram {V4}:7 hello 5")));
        let asked = || (door.requests.count(|request| request == "associate") > 0).then_some(());
        assert!(world::poll_until(PATIENCE, asked).is_some(), "{}", tunproxy.output());
        assert_eq!(act_in(&lab.host, &format!("ask {V4}:7 hello")), Ok("hello".to_owned()), "{}", tunproxy.output());
        assert_eq!(act_in(&lab.host, &format!("datagram {V6}:7 hello")), Ok("hello".to_owned()));
        assert_eq!(act_in(&lab.host, &format!("datagram {V4}:9999 hello")), Err("ECONNREFUSED".to_owned()));
        assert_eq!(waiting.join().expect("no panic"), Err("EAGAIN".to_owned()), "its datagram is lost, as UDP may be");
    });
}

#[test]
fn ip_version_holds_for_datagrams_and_another_family_is_taken_where_one_has_no_route() {
    run(&[], || {
        let lab = Topology::desktop();
        let sites = Sites::open(&lab);
        let from = |version: &str| {
            let place = Place::new(&profile(
                "fake-ip",
                &format!("{{ name: up, type: direct, ip-version: {version} }}"),
                "'MATCH,up'",
            ));
            let outcome = place.act(&lab.host, &format!("datagram {NAME}:7 hello"));
            assert_eq!(outcome, Ok("hello".to_owned()), "{version}");
            let last = sites.datagrams.all().pop().expect("a datagram");
            if last.starts_with('[') { "IPv6" } else { "IPv4" }
        };
        for (version, family) in [("ipv4", "IPv4"), ("ipv6", "IPv6"), ("ipv4-prefer", "IPv4"), ("ipv6-prefer", "IPv6")]
        {
            assert_eq!(from(version), family, "{version}");
        }
        lab.host.ip("-6 route del default");
        for version in ["ipv6-prefer", "dual"] {
            assert_eq!(from(version), "IPv4", "{version}");
        }
    });
}

#[test]
fn a_name_whose_nameserver_is_silent_is_an_unreachable_host() {
    run(&[], || {
        let lab = Topology::desktop();
        let zone = zone().behaviour("silent.example.test", Behaviour::Silence);
        let _sites = Sites::with(&lab, zone);
        let place = Place::new(&profile("fake-ip", "", "'MATCH,DIRECT'"));
        assert_eq!(place.act(&lab.host, "connect silent.example.test:80"), Err("EHOSTUNREACH".to_owned()));
        assert_eq!(place.act(&lab.host, "datagram silent.example.test:7 x"), Err("ECONNREFUSED".to_owned()));
    });
}
