//! Upstream proxies, ours and the distribution's, by name and by address; and the outbounds that say no.

use std::net::SocketAddr;

use super::support::client::act_in;
use super::support::peers::Peer;
use super::support::peers::digest::of_pattern;
use super::support::peers::proxy::Door;
use super::support::program::Program;
use super::support::sites::{NAME, V4, V6};
use super::support::topology::{BLACK_HOLE_V4, HOST_V4, HOST_V6};
use super::support::tunproxy::Place;
use super::support::{Sites, Topology, run, third_party};

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
    Place::new(&format!(
        "
mode: rule
ipv6: true
log-level: info
dns: {{ enable: true, enhanced-mode: fake-ip, nameserver: [192.168.1.1] }}
proxies: [{{ name: up, {server}{keys} }}]
rules: [{rules}]
"
    ))
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
        for place in [refusing, silent] {
            let script = format!("curl -s --connect-timeout 2 http://{V4}:7/ & curl -sS http://{V4}/alive; wait");
            let said = place.exec(&lab.host, "sh", &["-c", &script]);
            assert!(said.stdout.contains("path=/alive"), "{said:?}");
            assert!(said.stderr.lines().any(|line| line.contains("up")), "the failed flow has its line: {said:?}");
        }
    });
}

#[test]
fn wrong_credentials_end_in_a_refusal_with_its_reason() {
    run(&["curl"], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let (door, _peers) = own_proxies(&lab);
        for keys in ["type: socks5, port: 1080, username: ann, password: no", "type: http, port: 8080"] {
            let said = through(keys).exec(&lab.host, "curl", &["-sS", &format!("http://{V4}/")]);
            assert_eq!(said.code, Some(7), "{keys}: {said:?}");
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
        let place = with_rules("type: http, port: 8080", "'DST-PORT,7,up', 'MATCH,DIRECT'");
        assert_eq!(place.act(&lab.host, &format!("datagram {V4}:7 hello")), Ok("hello".to_owned()));
        assert_eq!(sites.datagrams.all().len(), 1);
        let said = place.check(&lab.host);
        let warned = said.stdout + &said.stderr;
        assert!(warned.contains("UDP") && warned.contains("DIRECT"), "check names the rule it falls past: {warned}");
    });
}
