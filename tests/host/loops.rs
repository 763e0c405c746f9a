//! A stranger's rule leads our own packets into the TUN: they are refused at once, and told once.

use super::support::client::act_in;
use super::support::peers::proxy::Door;
use super::support::sites::{NAME, V4, V6};
use super::support::tunproxy::Place;
use super::support::{Sites, Topology, run};

const TUN: &str = "/dev/net/tun";

fn profile() -> Place {
    Place::new(
        "ipv6: true\ntun: { enable: true }\ndns: { enable: true, enhanced-mode: fake-ip, nameserver: [192.168.1.1] }\nrules: ['MATCH,DIRECT']\n",
    )
}

#[test]
fn packets_of_our_own_that_come_back_are_refused_and_told_once_with_the_rule_that_does_it() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let tunproxy = profile().start(&lab.host);
        for site in [V4, V6] {
            assert_eq!(act_in(&lab.host, &format!("ask {site}:7 x")), Ok("x".to_owned()));
            assert_eq!(act_in(&lab.host, &format!("datagram {site}:7 x")), Ok("x".to_owned()));
        }
        assert_eq!(tunproxy.counted(&lab.host, &["flows", "returned"]), 0);
        for family in ["-4", "-6"] {
            lab.host.ip(&format!("{family} rule add priority 100 lookup 2022"));
        }
        let before = tunproxy.descriptors();
        let (refused, line) =
            tunproxy.line_after(|| act_in(&lab.host, &format!("connect {V4}:80")), &["came back to us by"]);
        assert_eq!(refused, Err("ENETUNREACH".to_owned()));
        for words in ["WARN", "203.0.113.10:80", "tunproxy0", "leaving by eth0", "priority 100 lookup 2022"] {
            assert!(line.contains(words), "{words}: {line}");
        }
        assert_eq!(act_in(&lab.host, &format!("connect {V6}:80")), Err("ENETUNREACH".to_owned()));
        for site in [V4, V6] {
            assert_eq!(act_in(&lab.host, &format!("datagram {site}:7 x")), Err("ECONNREFUSED".to_owned()), "{site}");
        }
        // A name that was never asked for: our own question comes back as well.
        assert!(act_in(&lab.host, "connect other.example.test:80").is_err());
        for _ in 0..50 {
            assert!(act_in(&lab.host, &format!("connect {V4}:80")).is_err());
        }
        let (returned, opened) =
            (tunproxy.counted(&lab.host, &["flows", "returned"]), tunproxy.counted(&lab.host, &["flows", "failed"]));
        assert!(returned >= 54, "{returned}");
        assert!(opened < 3 * 60, "each is dialled once: {opened}\n{}", tunproxy.output());
        assert!(tunproxy.descriptors() < before + 20, "{} after {before}", tunproxy.descriptors());
        let told = tunproxy.output().lines().filter(|line| line.contains("came back to us by")).count();
        assert_eq!(told, 1, "{}", tunproxy.output());
        for family in ["-4", "-6"] {
            lab.host.ip(&format!("{family} rule del priority 100 lookup 2022"));
        }
        for site in [V4, V6, NAME] {
            assert_eq!(act_in(&lab.host, &format!("ask {site}:7 x")), Ok("x".to_owned()), "{site}");
        }
        assert!(tunproxy.stop().success());
    });
}

#[test]
fn where_the_profile_leaves_routes_to_others_a_route_that_leads_back_is_told_too() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let place = Place::new("tun: { enable: true, auto-route: false }\nrules: ['MATCH,DIRECT']\n");
        let tunproxy = place.start(&lab.host);
        lab.host.ip("route add 203.0.113.0/24 dev tunproxy0");
        let (refused, line) =
            tunproxy.line_after(|| act_in(&lab.host, &format!("connect {V4}:80")), &["came back to us by"]);
        assert_eq!(refused, Err("ENETUNREACH".to_owned()));
        assert!(line.contains("a route of the table main") && line.contains("`ip route get 203.0.113.10`"), "{line}");
        assert!(tunproxy.stop().success());
    });
}

#[test]
fn a_question_of_our_own_over_tcp_that_comes_back_is_refused_as_well() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let place = Place::new(
            "tun: { enable: true, dns-hijack: ['any:53', 'tcp://any:53'] }\ndns: { enable: true, enhanced-mode: fake-ip, nameserver: ['tcp://192.168.1.1'] }\nrules: ['MATCH,DIRECT']\n",
        );
        let tunproxy = place.start(&lab.host);
        tunproxy.assert_carries(&lab.host);
        assert_eq!(tunproxy.counted(&lab.host, &["flows", "returned"]), 0);
        lab.host.ip("rule add priority 100 lookup 2022");
        let (refused, line) = tunproxy.line_after(
            || act_in(&lab.host, "connect other.example.test:80"),
            &["came back to us by", "192.168.1.1:53"],
        );
        assert!(refused.is_err(), "{refused:?}");
        assert!(line.contains("priority 100 lookup 2022"), "{line}");
        assert!(tunproxy.counted(&lab.host, &["flows", "returned"]) >= 1);
        lab.host.ip("rule del priority 100 lookup 2022");
        assert_eq!(act_in(&lab.host, &format!("ask {NAME}:7 x")), Ok("x".to_owned()));
        assert!(tunproxy.stop().success());
    });
}

#[test]
fn datagrams_to_a_proxys_relay_that_come_back_end_at_once_where_its_connection_goes_its_own_way() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let _proxy = lab.sites.socks5("203.0.113.3:1080".parse().expect("an address"), Door::default());
        let place = Place::new(
            "tun: { enable: true }\nproxies: [{ name: up, type: socks5, server: 203.0.113.3, port: 1080, udp: true }]\nrules: ['MATCH,up']\n",
        );
        let tunproxy = place.start(&lab.host);
        assert_eq!(act_in(&lab.host, &format!("datagram {V4}:7 x")), Ok("x".to_owned()));
        lab.host.ip("rule add priority 100 ipproto udp lookup 2022");
        let before = tunproxy.descriptors();
        let words = ["came back to us by", "203.0.113.3:"];
        let (lost, _) = tunproxy.line_after(|| act_in(&lab.host, &format!("datagram {V4}:7 x 2")), &words);
        assert!(lost.is_err(), "{lost:?}");
        // They asked for no further association.
        assert!(tunproxy.descriptors() < before + 10, "{} after {before}", tunproxy.descriptors());
        lab.host.ip("rule del priority 100 ipproto udp lookup 2022");
        assert_eq!(act_in(&lab.host, &format!("datagram {V4}:7 x")), Ok("x".to_owned()));
        assert!(tunproxy.stop().success());
    });
}
