//! What others set up while we run is planned for: VPNs, networks, addresses, uplinks; and a crash meanwhile leaves nothing.

use std::time::Duration;

use super::change::{BOTH, Chance, Internet, NAMESERVERS, profile};
use super::support::lengths::asked;
use super::support::netns::veth;
use super::support::program::PATIENCE;
use super::support::tunproxy::Said;
use super::support::uplinks::{FIRST, SECOND, Uplinks};
use super::support::{Dump, Netns, Sites, Topology, run, world};

const TUN: &str = "/dev/net/tun";

/// The device by which the kernel would send to a site.
fn way(host: &Netns, more: &str) -> String {
    let said = host.ip(&format!("route get 203.0.113.10 {more}"));
    let device = said.split_once(" dev ").and_then(|(_, rest)| rest.split(' ').next()).map(str::to_owned);
    device.unwrap_or(said)
}

#[test]
fn a_vpn_that_comes_up_after_us_carries_us_and_not_our_traffic() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let vpn = Netns::new("vpn");
        veth(&lab.host, "wg0", &vpn, "eth0");
        lab.host.address("wg0", &["10.66.0.2/32"]);
        let before = Dump::take(&lab.host);
        let tunproxy = profile(NAMESERVERS).start(&lab.host);
        assert_eq!(way(&lab.host, "mark 0xca6c"), "tunproxy0");
        // What wg-quick up does, in its order: the kernel puts each rule before all others.
        let ((), _) = tunproxy.line_after(
            || {
                lab.host.ip("route add default dev wg0 table 51820");
                lab.host.ip("rule add not fwmark 0xca6c table 51820");
                lab.host.ip("rule add table main suppress_prefixlength 0");
            },
            &["ours move from priority 9000"],
        );
        let settled = || {
            let rules = lab.host.ip("-4 rule");
            let first = rules.lines().nth(1).is_some_and(|line| line.contains("fwmark 0x1000000/0x1000000"));
            (first && !rules.contains("9043:")).then_some(())
        };
        assert!(world::poll_until(PATIENCE, settled).is_some(), "{}\n{}", lab.host.ip("rule"), tunproxy.output());
        assert_eq!(way(&lab.host, ""), "tunproxy0", "the host's traffic comes to us");
        assert_eq!(way(&lab.host, "mark 0x1000000"), "wg0", "ours goes by the VPN");
        assert_eq!(way(&lab.host, "mark 0xca6c"), "eth0", "the VPN's carrier goes by the uplink");
        tunproxy.assert_carries(&lab.host);
        // wg-quick down.
        lab.host.ip("rule del not fwmark 0xca6c table 51820");
        lab.host.ip("rule del table main suppress_prefixlength 0");
        lab.host.ip("route flush table 51820");
        let gone = || (!lab.host.ip("-4 rule").contains("0xca6c")).then_some(());
        assert!(world::poll_until(PATIENCE, gone).is_some(), "{}\n{}", lab.host.ip("rule"), tunproxy.output());
        assert_eq!(way(&lab.host, "mark 0x1000000"), "eth0");
        assert!(tunproxy.stop().success());
        before.assert_same(&Dump::take(&lab.host));
    });
}

#[test]
fn networks_of_our_own_and_addresses_that_come_and_go_are_kept_in_mind() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let before = Dump::take(&lab.host);
        let tunproxy = profile(NAMESERVERS).start(&lab.host);
        let table = || lab.host.nft("list table inet tunproxy");
        for round in 0..3 {
            let lan = Netns::new(&format!("lan{round}"));
            veth(&lab.host, "lan9", &lan, "eth0");
            lab.host.address("lan9", &["203.0.113.161/28", "2001:db8:77::1/64"]);
            let known = || {
                let rules = lab.host.ip("-4 rule") + &lab.host.ip("-6 rule");
                let rules = rules.contains("to 203.0.113.160/28 lookup main") && rules.contains("to 2001:db8:77::/64");
                let asked = ["saddr set 203.0.113.161", "update @asked_203_0_113_161"];
                (rules && asked.iter().all(|words| table().contains(words))).then_some(())
            };
            assert!(world::poll_until(PATIENCE, known).is_some(), "{}\n{}", table(), tunproxy.output());
            assert_eq!(way(&lab.host, "").as_str(), "tunproxy0");
            // Sets of other addresses have kept what they remember: they were not made anew.
            assert!(table().contains("set asked_192_168_1_10"), "{}", table());
            lab.host.ip("link del lan9");
            let forgotten = || {
                let rules = lab.host.ip("-4 rule") + &lab.host.ip("-6 rule");
                let gone = !rules.contains("203.0.113.160/28") && !rules.contains("2001:db8:77::");
                (gone && !table().contains("203.0.113.161") && !table().contains("203_0_113_161")).then_some(())
            };
            assert!(world::poll_until(PATIENCE, forgotten).is_some(), "{}\n{}", table(), tunproxy.output());
        }
        assert!(!tunproxy.output().contains("ERROR"), "{}", tunproxy.output());
        assert!(tunproxy.stop().success());
        before.assert_same(&Dump::take(&lab.host));
    });
}

#[test]
fn a_strict_uplink_is_told_of_marks_for_as_long_as_it_is_one() {
    run(&[TUN], || {
        let net = Uplinks::new();
        let host = &net.lab.host;
        let _internet = Internet::open(&net.lab);
        host.sysctl("net.ipv4.ip_forward", "1");
        for device in ["all", "eth0", "eth1"] {
            host.sysctl(&format!("net.ipv4.conf.{device}.rp_filter"), "1");
        }
        let before = Dump::take(host);
        let read = |device: &str| {
            let path = format!("/proc/sys/net/ipv4/conf/{device}/src_valid_mark");
            host.enter(move || std::fs::read_to_string(path).unwrap_or_default().trim().to_owned())
        };
        let marked = || (read("eth0"), read("eth1"));
        let tunproxy = profile(NAMESERVERS).start(host);
        assert_eq!(marked(), ("1".to_owned(), "0".to_owned()));
        for (uplink, wanted) in [(SECOND, ("0", "1")), (FIRST, ("1", "0"))] {
            net.default(uplink, BOTH);
            let right = || {
                let (first, second) = marked();
                ((first.as_str(), second.as_str()) == wanted).then_some(())
            };
            assert!(world::poll_until(PATIENCE, right).is_some(), "{:?}\n{}", marked(), tunproxy.output());
        }
        tunproxy.assert_carries(host);
        assert!(tunproxy.stop().success());
        before.assert_same(&Dump::take(host));
    });
}

/// Something that makes the run add, remove or restore what is on record; returns what takes it back.
fn stir(host: &Netns, what: u64) -> Vec<String> {
    let quietly = |words: &str| drop(Said::of(host.command("ip").args(words.split(' '))));
    match what {
        0 => {
            host.ip("rule add priority 5210 fwmark 0x80000/0xff0000 lookup main");
            vec!["rule del priority 5210".to_owned()]
        }
        1 => {
            host.ip("link add lan9 type veth peer name lan9p");
            host.ip("addr add 203.0.113.161/28 dev lan9");
            host.ip("link set lan9 up");
            vec!["link del lan9".to_owned()]
        }
        2 => {
            host.ip("route add default dev eth0 table 51820");
            host.ip("rule add not fwmark 0xca6c table 51820");
            vec!["rule del not fwmark 0xca6c table 51820".to_owned(), "route flush table 51820".to_owned()]
        }
        3 => {
            // Whether there are any yet, and where they stand, is chance.
            for words in ["-4 rule del protocol kernel iif tunproxy0", "-6 rule del protocol kernel iif tunproxy0"] {
                quietly(words);
            }
            quietly("-4 route flush table 2022");
            Vec::new()
        }
        4 => {
            std::fs::write("/etc/resolv.conf.new", "search other\nnameserver fe80::2%eth0\n").expect("a file");
            std::fs::rename("/etc/resolv.conf.new", "/etc/resolv.conf").expect("a file in its place");
            Vec::new()
        }
        _ => {
            host.ip("route replace default via 192.168.1.1 dev eth0 metric 7");
            vec!["route del default metric 7".to_owned()]
        }
    }
}

#[test]
fn after_a_kill_at_any_moment_of_a_change_a_cleanup_puts_the_host_back() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let host = &lab.host;
        world::own_etc("search lan\nnameserver fe80::1%eth0\n");
        host.sysctl("net.ipv6.conf.default.addr_gen_mode", "1");
        let before = Dump::take(host);
        let place = profile(NAMESERVERS);
        let mut chance = Chance(11);
        for round in 0..asked("TUNPROXY_KILLS", 6) {
            let tunproxy = place.start(host);
            let (mut done, mut back) = (Vec::new(), Vec::new());
            for _ in 0..=chance.below(3) {
                let what = chance.below(6);
                if !done.contains(&what) {
                    done.push(what);
                    back.extend(stir(host, what));
                }
                // Chance picks the moment: this is no wait for anything.
                std::thread::sleep(Duration::from_millis(chance.below(180)));
            }
            let said = tunproxy.output();
            let place = tunproxy.kill();
            back.iter().for_each(|words| drop(host.ip(words)));
            let cleaned = place.clean_up(host);
            let gone = || (!host.nft("list tables").contains("tunproxy")).then_some(());
            assert!(world::poll_until(PATIENCE, gone).is_some(), "the table outlives its owner");
            if done.contains(&4) {
                let left = std::fs::read_to_string("/etc/resolv.conf").unwrap();
                assert_eq!(left, "search other\nnameserver fe80::2%eth0\n", "{cleaned}");
                std::fs::write("/etc/resolv.conf", "search lan\nnameserver fe80::1%eth0\n").unwrap();
            }
            let now = Dump::take(host);
            assert!(before == now, "{round}, {done:?}: {}\n{cleaned}\n{said}", before.diff(&now));
        }
    });
}

#[test]
fn a_route_by_a_public_gateway_that_is_named_without_its_device_leads_to_that_gateway() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        lab.host.address("eth0", &["198.51.100.2/24"]);
        let before = Dump::take(&lab.host);
        let tunproxy = profile(NAMESERVERS).start(&lab.host);
        assert_eq!(way(&lab.host, ""), "tunproxy0");
        lab.host.ip("route add 100.100.0.0/16 via 198.51.100.1");
        let route = lab.host.ip("route show 100.100.0.0/16");
        assert!(route.contains("dev eth0"), "{route}");
        lab.host.ip("route del 100.100.0.0/16");
        // What the firewall has to know of an address that comes is no work of others.
        let line = || lab.host.address("eth0", &["198.51.100.3/24"]);
        let ((), said) = tunproxy.line_after(line, &["this host has changed: the firewall table is set"]);
        assert!(!tunproxy.output().contains("another program removed"), "{said}\n{}", tunproxy.output());
        lab.host.ip("addr del 198.51.100.3/24 dev eth0");
        assert!(tunproxy.stop().success());
        before.assert_same(&Dump::take(&lab.host));
    });
}
