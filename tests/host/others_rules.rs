//! Rules and routes of others around ours: their own traffic stays theirs, ours comes to us, and so do questions to port 53.

use super::neighbours::{TUN, both_rp_filters, profile};
use super::support::client::act_in;
use super::support::netns::veth;
use super::support::program::PATIENCE;
use super::support::sites::{NAME, V4, zone};
use super::support::topology::{GATEWAY_V4, GATEWAY_V6, HOST_V4};
use super::support::tunproxy::Said;
use super::support::uplinks::Uplinks;
use super::support::{Dump, Netns, Peers, Sites, Topology, run, world};

/// A nameserver in the network of another VPN.
const MAGIC: &str = "100.100.100.100";
/// Tailscale's table for its own networks, and a LAN kept out of every VPN.
const SPLITS: [&str; 3] = [
    "-4 rule add pref 5270 lookup 52",
    "-4 rule add pref 1000 to 192.168.1.0/24 lookup main",
    "-6 rule add pref 1000 to 2001:db8:2::/64 lookup main",
];

/// The host of another VPN, on `eth1` of the host under test, with its route in a table of its own.
fn vpn(lab: &Topology) -> Netns {
    let vpn = Netns::new("vpn");
    veth(&vpn, "eth0", &lab.host, "eth1");
    vpn.address("eth0", &["100.100.100.100/10"]);
    lab.host.address("eth1", &["100.64.0.10/32"]);
    vpn.routes(&["10.7.0.0/24 via 100.64.0.10", "192.168.1.0/24 via 100.64.0.10"]);
    lab.host.ip("route add 100.64.0.0/10 dev eth1 src 100.64.0.10 table 52");
    vpn
}

fn split(host: &Netns, verb: &str) {
    SPLITS.iter().for_each(|rule| drop(host.ip(&rule.replace(" add ", &format!(" {verb} ")))));
}

/// The address that `server` gives for the sites' name, asked in this way.
fn asked(ns: &Netns, server: &str, way: &[&str]) -> String {
    let mut dig = ns.command("dig");
    dig.args(["+tries=1", "+timeout=3", "+short", &format!("@{server}"), NAME, "A"]).args(way);
    Said::of(&mut dig).stdout
}

/// Every question to port 53 is ours.
fn takes_questions(lab: &Topology) -> Option<()> {
    let ways: [&[&str]; 4] = [&[], &["+tcp"], &["-b", HOST_V4], &["-b", HOST_V4, "+tcp"]];
    let fake = |ns, server, way: &[&str]| asked(ns, server, way).starts_with("198.18.");
    let v4 = [MAGIC, GATEWAY_V4].into_iter().all(|server| ways.iter().all(|way| fake(&lab.host, server, way)));
    let v6 = ways[..2].iter().all(|way| fake(&lab.host, GATEWAY_V6, way));
    let client = [MAGIC, GATEWAY_V4, GATEWAY_V6].into_iter().all(|server| fake(lab.client(), server, &[]));
    (v4 && v6 && client).then_some(())
}

fn questions_are_taken(lab: &Topology, tun: &str) {
    let _sites = Sites::open(lab);
    let vpn = vpn(lab);
    let peers = Peers::new(&vpn);
    let _magic = peers.dns("100.100.100.100:53".parse().expect("an address"), zone());
    let _theirs = peers.tcp_echo("100.100.100.100:445".parse().expect("an address"));
    let _router = lab.at_gateway.tcp_echo(format!("{GATEWAY_V4}:445").parse().expect("an address"));
    split(&lab.host, "add");
    let before = Dump::take(&lab.host);
    assert_eq!(asked(&lab.host, MAGIC, &[]).trim(), V4, "it is there");
    assert_eq!(asked(lab.client(), MAGIC, &[]).trim(), V4, "for clients too");
    let tunproxy = profile(tun, "'MATCH,REJECT'").start(&lab.host);
    let theirs_work = || {
        for ns in [&lab.host, lab.client()] {
            for server in [MAGIC, GATEWAY_V4] {
                assert_eq!(act_in(ns, &format!("ask {server}:445 x")), Ok("x".to_owned()), "{server}");
            }
        }
    };
    let taken = |when: &str| {
        let taken = world::poll_until(PATIENCE, || takes_questions(lab));
        assert!(taken.is_some(), "{when}: {}{}", tunproxy.output(), lab.host.ip("rule"));
        theirs_work();
    };
    taken("theirs were there first");
    split(&lab.host, "del");
    let gone = || lab.host.ip("rule").lines().all(|rule| !rule.starts_with("8")).then_some(());
    assert!(world::poll_until(PATIENCE, gone).is_some(), "ours go with theirs: {}", lab.host.ip("rule"));
    split(&lab.host, "add");
    taken("ours were there first");
    assert!(tunproxy.stop().success());
    before.assert_same(&Dump::take(&lab.host));
}

#[test]
fn questions_come_to_us_though_rules_of_others_know_the_nameserver_and_their_networks_stay_theirs() {
    run(&["dig", TUN], || both_rp_filters(Topology::with_lan, |lab| questions_are_taken(&lab, "")));
}

#[test]
fn with_marks_in_the_check_of_sources_and_under_a_kill_switch_too() {
    run(&["dig", TUN], || {
        let lab = Topology::with_lan().rp_filter("1");
        lab.host.sysctl("net.ipv4.conf.all.src_valid_mark", "1");
        questions_are_taken(&lab, "kill-switch: true");
    });
}

/// Rules of others that do not ask for an address, or for all of a range that ours are in.
const PARTS: [&str; 4] = [
    "-4 rule add pref 1000 iif lo uidrange 0-0 lookup 52",
    "-4 rule add pref 1000 from 10.7.0.0/24 lookup 52",
    "-6 rule add pref 1000 iif lan0 lookup 52",
    "-6 rule add pref 1000 to fc00::/7 lookup main",
];

/// The address that this host gives for the sites' name.
fn given(ns: &Netns, family: &str) -> String {
    let mut dig = ns.command("dig");
    dig.args(["+tries=1", "+timeout=3", "+short", &format!("@{GATEWAY_V4}"), NAME, family]);
    Said::of(&mut dig).stdout.trim().to_owned()
}

#[test]
fn what_answers_lead_to_is_ours_as_well_whoever_else_rules_over_who_asks() {
    run(&["dig", TUN], || {
        let lab = Topology::with_lan();
        let _sites = Sites::open(&lab);
        lab.host.ip(&format!("-4 route add default via {GATEWAY_V4} dev eth0 table 52"));
        lab.host.ip(&format!("-6 route add default via {GATEWAY_V6} dev eth0 table 52"));
        for rule in PARTS {
            lab.host.ip(rule);
            let before = Dump::take(&lab.host);
            let tunproxy = profile("", "'MATCH,DIRECT'").start(&lab.host);
            for ns in [&lab.host, lab.client()] {
                let v4 = given(ns, "A");
                assert!(v4.starts_with("198.18."), "{rule}: {v4}");
                assert_eq!(act_in(ns, &format!("ask {v4}:7 x")), Ok("x".to_owned()), "{rule}");
                let v6 = given(ns, "AAAA");
                assert!(v6.starts_with("fdfe:"), "{rule}: {v6}");
                assert_eq!(act_in(ns, &format!("ask [{v6}]:7 x")), Ok("x".to_owned()), "{rule}");
            }
            assert!(tunproxy.stop().success());
            before.assert_same(&Dump::take(&lab.host));
            lab.host.ip(&rule.replace(" add ", " del "));
        }
    });
}

#[test]
fn what_a_crashed_run_had_ahead_of_others_is_cleaned_up() {
    run(&["dig", TUN], || {
        let lab = Topology::desktop();
        split(&lab.host, "add");
        let before = Dump::take(&lab.host);
        let left = profile("", "'MATCH,DIRECT'").start(&lab.host).kill();
        assert!(lab.host.ip("rule").lines().any(|rule| rule.starts_with("804:")), "{}", lab.host.ip("rule"));
        left.clean_up(&lab.host);
        before.assert_same(&Dump::take(&lab.host));
    });
}

/// Ways to take all that a host sends to table 100, one after the other with `ip`.
const TAKING: [&[&str]; 9] = [
    &["rule add pref 1000 iif lo lookup 100"],
    &["rule add pref 1000 not from 1.2.3.4 lookup 100"],
    &["rule add pref 1000 to 0.0.0.0/1 lookup 100", "rule add pref 1001 to 128.0.0.0/1 lookup 100"],
    &["rule add pref 1000 ipproto tcp lookup 100", "rule add pref 1001 ipproto udp lookup 100"],
    &["rule add pref 1000 uidrange 0-65534 lookup 100"],
    &["rule add pref 1000 fwmark 0x0/0x3f00 lookup 100"],
    &["rule add pref 1000 lookup 100 suppress_ifgroup 99"],
    &["rule add pref 2500 lookup 100", "rule add pref 1000 goto 2500"],
    // sing-box's and mihomo's own numbers.
    &[
        "rule add pref 9002 not dport 53 lookup main suppress_prefixlength 0",
        "rule add pref 9003 not iif lo lookup 100",
        "rule add pref 9003 from 0.0.0.0 iif lo lookup 100",
    ],
];

#[test]
fn our_traffic_comes_to_us_though_rules_of_others_take_everything() {
    run(&[TUN], || {
        let uplinks = Uplinks::new();
        let host = &uplinks.lab.host;
        let _sites = Sites::open(&uplinks.lab);
        host.ip("route add default via 192.168.2.1 dev eth1 table 100");
        for rules in TAKING {
            let change = |verb: &str| rules.iter().for_each(|it| drop(host.ip(&it.replace("add", verb))));
            let refused = || act_in(host, &format!("connect {V4}:80 5")) == Err("ECONNREFUSED".to_owned());
            for theirs_first in [true, false] {
                if theirs_first {
                    change("add");
                    // Where only the first look-up is taken, packets leave by one way with the address of the other.
                    let out = act_in(host, &format!("connect {V4}:80 2")).is_ok();
                    assert!(out || rules.len() > 2, "{rules:?} lead out");
                }
                let tunproxy = profile("", "'MATCH,REJECT'").start(host);
                if !theirs_first {
                    change("add");
                }
                let ours = world::poll_until(PATIENCE, || refused().then_some(()));
                assert!(ours.is_some(), "{rules:?}, first: {theirs_first}: {}{}", tunproxy.output(), host.ip("rule"));
                assert!(tunproxy.stop().success());
                change("del");
            }
        }
    });
}

#[test]
fn a_route_of_anothers_in_a_table_of_ours_takes_nothing_and_is_told() {
    run(&[TUN], || {
        let uplinks = Uplinks::new();
        let host = &uplinks.lab.host;
        let _sites = Sites::open(&uplinks.lab);
        let before = Dump::take(host);
        for route in ["default", "203.0.113.0/24"] {
            let tunproxy = profile("", "'MATCH,REJECT'").start(host);
            let ((), line) = tunproxy.line_after(
                || drop(host.ip(&format!("route add {route} via 192.168.2.1 dev eth1 table 2022"))),
                &["another program has a route in table 2022"],
            );
            let refused = || act_in(host, &format!("connect {V4}:80 5")) == Err("ECONNREFUSED".to_owned());
            assert!(world::poll_until(PATIENCE, || refused().then_some(())).is_some(), "{line}");
            // Once is enough, and what comes to the new tables is seen as well.
            let ((), _) = tunproxy.line_after(
                || drop(host.ip("route add 203.0.113.0/25 via 192.168.2.1 dev eth1 table 2025")),
                &["another program has a route in table 2024 or 2025"],
            );
            assert!(world::poll_until(PATIENCE, || refused().then_some(())).is_some());
            assert!(tunproxy.stop().success());
            host.ip("route flush table 2025");
            host.ip(&format!("route del {route} table 2022"));
            before.assert_same(&Dump::take(host));
        }
    });
}

#[test]
fn a_stop_takes_no_route_of_anothers_for_one_of_ours_that_is_left() {
    run(&[TUN], || {
        for keys in ["kill-switch: true", "route-exclude-address: [198.51.100.0/24]"] {
            let lab = Topology::desktop();
            let tunproxy = profile(keys, "'MATCH,REJECT'").start(&lab.host);
            // It hears of the route and of its end at the same moment.
            tunproxy.freeze();
            for to in ["default", "198.51.100.0/24"] {
                lab.host.ip(&format!("route add {to} via {GATEWAY_V4} table 2022"));
            }
            tunproxy.signal(nix::sys::signal::Signal::SIGTERM);
            tunproxy.signal(nix::sys::signal::Signal::SIGCONT);
            tunproxy.line("the host is as it was");
            assert!(tunproxy.wait().success());
        }
    });
}

#[test]
fn a_network_with_just_the_tuns_addresses_is_no_run_of_ours() {
    run(&[TUN], || {
        let lab = Topology::with_lan();
        lab.host.ip("addr add 198.18.0.1/30 dev lan0");
        let refused = profile("", "'MATCH,DIRECT'").try_start(&lab.host).err().expect("a refusal");
        assert!(refused.contains("the network of lan0"), "{refused}");
    });
}
