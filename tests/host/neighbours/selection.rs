//! `include-…`, `exclude-…` and `route-…`: what is left out goes past us with its names, and nothing else does.

use super::super::support::client::act_in;
use super::super::support::netns::veth;
use super::super::support::sites::{NAME, V4, V6};
use super::super::support::topology::{CLIENT_V4, GATEWAY_V4, HOST_V4};
use super::super::support::tunproxy::{Place, Said, UNKNOWN_FAKE};
use super::super::support::{Dump, Netns, Peers, Sites, Topology, run, world};
use super::{TUN, act_as, both_rp_filters, leaks_while, leaves_the_host, profile, proven_capture};

/// What everybody tries, by address and by name.
fn tries() -> Vec<String> {
    let per_site = |site: &str| [format!("ask {site}:7 x"), format!("datagram {site}:7 x")];
    [V4, V6, NAME].into_iter().flat_map(per_site).collect()
}

fn refused() -> Result<String, String> {
    Err("ECONNREFUSED".to_owned())
}

fn goes_past(act: impl Fn(&str) -> Result<String, String>, who: &str) {
    for words in tries() {
        assert_eq!(act(&words), Ok("x".to_owned()), "{who}: {words}");
    }
    // Fake addresses mean something to us alone.
    assert_eq!(act(&format!("connect {UNKNOWN_FAKE}")), refused(), "{who}: a fake address");
}

fn is_taken(act: impl Fn(&str) -> Result<String, String>, who: &str) {
    for words in tries() {
        assert_eq!(act(&words), refused(), "{who}: {words}");
    }
}

/// The address of the sites' name, asked from a socket bound to the uplink's address.
fn bound_question(lab: &Topology, uid: u32) -> String {
    let mut dig = lab.host.command("setpriv");
    dig.args(["--reuid", &uid.to_string(), "--clear-groups", "dig", "+short", "+tries=1", "+timeout=20"]);
    Said::of(dig.args(["-b", HOST_V4, &format!("@{GATEWAY_V4}"), NAME, "A"])).stdout
}

fn users(tun: &str, out: &[u32], taken: &[u32]) {
    both_rp_filters(Topology::desktop, |lab| {
        let sites = Sites::open(&lab);
        let before = Dump::take(&lab.host);
        let mut capture = proven_capture(&lab);
        let tunproxy = profile(tun, "'MATCH,REJECT'").start(&lab.host);
        for &uid in out {
            goes_past(|words| act_as(&lab.host, uid, words), &uid.to_string());
            assert_eq!(bound_question(&lab, uid), format!("{V4}\n"), "{uid}");
        }
        let asked = sites.dns.queries.all().len();
        assert!(asked > 0, "those who are left out asked the gateway themselves");
        let leaks = leaks_while(&mut capture, leaves_the_host, || {
            for &uid in taken {
                is_taken(|words| act_as(&lab.host, uid, words), &uid.to_string());
                assert!(bound_question(&lab, uid).starts_with("198.18."), "{uid}");
            }
        });
        assert_eq!(leaks, Vec::<String>::new());
        assert_eq!(sites.dns.queries.all().len(), asked, "nobody else did");
        assert!(tunproxy.stop().success());
        before.assert_same(&Dump::take(&lab.host));
    });
}

#[test]
fn excluded_users_go_past_us_with_their_names_and_nobody_else_does() {
    run(&["dig", "setpriv", TUN], || {
        users("exclude-uid: [1000], exclude-uid-range: ['2000:2999']", &[1000, 2000, 2999], &[0, 1001, 3000]);
    });
}

#[test]
fn only_included_users_are_taken_and_of_them_not_the_excluded() {
    run(&["dig", "setpriv", TUN], || {
        let tun = "include-uid: [1000], include-uid-range: ['2000:2999'], exclude-uid: [2500]";
        users(tun, &[0, 999, 2500, 3000, 65534], &[1000, 2000, 2999]);
    });
}

/// A second LAN of the host, with one client.
fn second_lan(lab: &Topology, device: &str) -> Netns {
    let client = Netns::with_resolv_conf("second", &format!("nameserver {GATEWAY_V4}\n"));
    veth(&lab.host, device, &client, "eth0");
    lab.host.address(device, &["10.8.0.1/24", "fd00:8::1/64"]);
    client.address("eth0", &["10.8.0.2/24", "fd00:8::2/64"]);
    client.routes(&["default via 10.8.0.1", "default via fd00:8::1"]);
    lab.gateway.routes(&["10.8.0.0/24 via 192.168.1.10", "fd00:8::/64 via 2001:db8:2::10"]);
    client
}

/// What a client of the LAN tries by address; a program of its own for the name, because resolv.conf is a program's.
fn client_goes_past(client: &Netns, own: &str) {
    for site in [V4, V6] {
        assert_eq!(act_in(client, &format!("ask {site}:7 x")), Ok("x".to_owned()), "{site}");
        assert_eq!(act_in(client, &format!("datagram {site}:7 x")), Ok("x".to_owned()), "{site}");
    }
    assert_eq!(act_in(client, &format!("connect {UNKNOWN_FAKE}")), refused());
    let said = client.run("curl", &["-sS4", "--connect-timeout", "20", &format!("http://{V4}/")]);
    assert!(said.contains(&format!("client={own}\n")), "it went by itself: {said}");
    assert_eq!(client.run("dig", &["+short", &format!("@{GATEWAY_V4}"), NAME, "A"]), format!("{V4}\n"));
}

fn client_is_taken(client: &Netns) {
    for site in [V4, V6] {
        assert_eq!(act_in(client, &format!("ask {site}:7 x")), refused(), "{site}");
        assert_eq!(act_in(client, &format!("datagram {site}:7 x")), refused(), "{site}");
    }
    assert!(client.run("dig", &["+short", &format!("@{GATEWAY_V4}"), NAME, "A"]).starts_with("198.18."));
}

#[test]
fn what_comes_by_an_excluded_interface_goes_past_us_even_if_the_interface_comes_later() {
    run(&["curl", "dig", TUN], || {
        both_rp_filters(Topology::with_lan, |lab| {
            let _sites = Sites::open(&lab);
            let before = Dump::take(&lab.host);
            let place = profile("exclude-interface: [lan0, guest0]", "'MATCH,REJECT'");
            let not_there = "tun.exclude-interface: there is no interface guest0 now";
            for word in ["plan", "doctor"] {
                let said = place.look(&lab.host, word, &[]).stdout;
                assert_eq!(said.matches(not_there).count(), 1, "{word}: {said}");
            }
            let tunproxy = place.start(&lab.host);
            tunproxy.line(not_there);
            assert!(!tunproxy.output().contains("no interface lan0"), "{}", tunproxy.output());
            client_goes_past(lab.client(), CLIENT_V4);
            is_taken(|words| act_in(&lab.host, words), "the host");
            let guest = second_lan(&lab, "guest0");
            client_goes_past(&guest, "10.8.0.2");
            lab.host.ip("link del guest0");
            let third = second_lan_again(&lab, guest);
            client_is_taken(&third);
            lab.host.ip("link del other0");
            assert!(tunproxy.stop().success());
            before.assert_same(&Dump::take(&lab.host));
        });
    });
}

/// The same LAN on an interface that nobody excluded.
fn second_lan_again(lab: &Topology, client: Netns) -> Netns {
    drop(client);
    lab.gateway.ip("-4 route del 10.8.0.0/24");
    lab.gateway.ip("-6 route del fd00:8::/64");
    second_lan(lab, "other0")
}

#[test]
fn only_what_comes_by_an_included_interface_is_taken() {
    run(&["curl", "dig", TUN], || {
        both_rp_filters(Topology::with_lan, |lab| {
            let sites = Sites::open(&lab);
            let second = second_lan(&lab, "guest0");
            let before = Dump::take(&lab.host);
            let tunproxy = profile("include-interface: [lan0]", "'MATCH,REJECT'").start(&lab.host);
            tunproxy.line("what this host itself sends is left out");
            client_is_taken(lab.client());
            assert_eq!(sites.dns.queries.all(), Vec::<String>::new());
            client_goes_past(&second, "10.8.0.2");
            goes_past(|words| act_in(&lab.host, words), "the host");
            assert!(tunproxy.stop().success());
            let with_host = profile("include-interface: [lan0, lo]", "'MATCH,REJECT'").start(&lab.host);
            assert!(!with_host.output().contains("left out"), "{}", with_host.output());
            is_taken(|words| act_in(&lab.host, words), "the host");
            client_is_taken(lab.client());
            client_goes_past(&second, "10.8.0.2");
            assert!(with_host.stop().success());
            before.assert_same(&Dump::take(&lab.host));
        });
    });
}

#[test]
fn a_host_that_is_left_out_keeps_its_resolver() {
    run(&[TUN], || {
        let lab = Topology::with_lan();
        let _sites = Sites::open(&lab);
        // Of a host that is taken, this would be rewritten.
        let text = "nameserver fe80::1%eth0\n";
        world::set_resolv_conf(text);
        let kept = || std::fs::read_to_string("/etc/resolv.conf").unwrap() == text;
        for (tun, keeps) in [("exclude-interface: [lo]", true), ("include-interface: [lan0]", true), ("", false)] {
            let tunproxy = profile(tun, "'MATCH,REJECT'").start(&lab.host);
            assert_eq!(kept(), keeps, "{tun}: {}", tunproxy.output());
            assert!(tunproxy.stop().success());
            assert!(kept());
        }
    });
}

/// Sites beside the usual ones, inside and outside of the prefixes.
const NEAR: [&str; 2] = ["203.0.113.50", "[2001:db8:1::50]"];
const FAR: [&str; 2] = ["203.0.113.150", "[2001:db8:1:1::150]"];

fn prefixes(tun: &str, past: [&str; 2], taken: [&str; 2]) {
    both_rp_filters(Topology::with_lan, |lab| {
        let sites = Sites::open(&lab);
        let at = |peers: &Peers, host: &str| peers.tcp_echo(format!("{host}:7").parse().expect("an address"));
        let _more: Vec<_> = NEAR.iter().chain(&FAR).map(|host| at(&lab.sites, host)).collect();
        let before = Dump::take(&lab.host);
        let mut capture = proven_capture(&lab);
        let tunproxy = profile(tun, "'MATCH,REJECT'").start(&lab.host);
        for ns in [&lab.host, lab.client()] {
            for host in past {
                assert_eq!(act_in(ns, &format!("ask {host}:7 x")), Ok("x".to_owned()), "{} {host}", ns.name());
            }
        }
        let leaks = leaks_while(&mut capture, leaves_the_host, || {
            for ns in [&lab.host, lab.client()] {
                for host in taken {
                    assert_eq!(act_in(ns, &format!("ask {host}:7 x")), refused(), "{} {host}", ns.name());
                }
                // Names have rules wherever their server is.
                for server in [past[0], taken[0], GATEWAY_V4] {
                    let answer = ns.run("dig", &["+short", "+tries=1", &format!("@{server}"), NAME, "A"]);
                    assert!(answer.starts_with("198.18."), "{} {server}: {answer}", ns.name());
                }
            }
            assert_eq!(act_in(&lab.host, &format!("ask {NAME}:7 x")), refused(), "by name");
        });
        assert_eq!(leaks, Vec::<String>::new());
        assert_eq!(sites.dns.queries.all(), Vec::<String>::new());
        assert!(tunproxy.stop().success());
        before.assert_same(&Dump::take(&lab.host));
    });
}

#[test]
fn only_routed_prefixes_are_taken_and_every_name() {
    run(&["dig", TUN], || {
        prefixes("route-address: [203.0.113.0/26, '2001:db8:1::/64']", FAR, NEAR);
    });
}

#[test]
fn excluded_prefixes_go_past_us_and_no_name_does() {
    run(&["dig", TUN], || {
        let old_names =
            "inet4-route-exclude-address: [203.0.113.0/26], inet6-route-exclude-address: ['2001:db8:1::/64']";
        prefixes(old_names, NEAR, FAR);
        let inside = "route-address: [203.0.113.0/24, 203.0.113.48/29, '2001:db8:1::/48', '2001:db8:1::48/125'], \
                      route-exclude-address: [203.0.113.0/26, '2001:db8:1::/64']";
        prefixes(inside, NEAR, FAR);
    });
}

#[test]
fn a_kill_with_rules_for_users_and_interfaces_leaves_nothing_that_cleanup_does_not_remove() {
    run(&[TUN], || {
        let lab = Topology::with_lan();
        let _sites = Sites::open(&lab);
        let before = Dump::take(&lab.host);
        let tun = "include-interface: [lo, lan0, later0], include-uid-range: ['0:2000'], exclude-uid: [7]";
        let place: Place = profile(tun, "'MATCH,REJECT'").start(&lab.host).kill();
        for words in tries() {
            assert_eq!(act_in(&lab.host, &words), Ok("x".to_owned()), "{words}");
        }
        place.clean_up(&lab.host);
        before.assert_same(&Dump::take(&lab.host));
    });
}
