//! Other tunnels on the host, started before us: WireGuard as wg-quick sets it up, Tailscale, OpenVPN. Both carry, and
//! each keeps its own path.

use super::super::support::client::act_in;
use super::super::support::peers::digest::of_pattern;
use super::super::support::sites::{NAME, V4, V6};
use super::super::support::topology::{GATEWAY_V4, HOST_V4, HOST_V6};
use super::super::support::{Dump, Netns, Sites, Topology, run};
use super::carrier::{Carrier, NEAR_V4, NEAR_V6};
use super::{TUN, both_rp_filters, profile};

/// Bytes of a bulk transfer through two tunnels.
const BULK: u64 = 10 << 20;

/// What wg-quick does for a peer with all addresses: routes and rules, and a firewall that remembers the mark.
pub(crate) fn wg_quick(host: &Netns) {
    for words in [
        "-4 route add default dev wg0 table 51820",
        "-4 rule add not fwmark 0xca6c table 51820",
        "-4 rule add table main suppress_prefixlength 0",
        "-6 route add default dev wg0 table 51820",
        "-6 rule add not fwmark 0xca6c table 51820",
        "-6 rule add table main suppress_prefixlength 0",
    ] {
        host.ip(words);
    }
    host.sysctl("net.ipv4.conf.all.src_valid_mark", "1");
    for (family, near) in [("ip", NEAR_V4), ("ip6", NEAR_V6)] {
        host.nft(&format!(
            "table {family} wg-quick-wg0 {{
               chain preraw {{ type filter hook prerouting priority -300; iifname != \"wg0\" {family} daddr {near} fib saddr type != local drop; }}
               chain premangle {{ type filter hook prerouting priority -150; meta l4proto udp meta mark set ct mark; }}
               chain postmangle {{ type filter hook postrouting priority -150; meta l4proto udp meta mark 0xca6c ct mark set meta mark; }}
             }}"
        ));
    }
}

/// Tailscale's rules, and its table with a subnet and its own ranges.
fn tailscale(host: &Netns) {
    for family in ["-4", "-6"] {
        for words in [
            "rule add pref 5210 fwmark 0x80000/0xff0000 table main",
            "rule add pref 5230 fwmark 0x80000/0xff0000 table default",
            "rule add pref 5250 fwmark 0x80000/0xff0000 type unreachable",
            "rule add pref 5270 table 52",
        ] {
            host.ip(&format!("{family} {words}"));
        }
    }
    host.routes(&["203.0.113.128/25 dev ts0 table 52", "2001:db8:1:1::/64 dev ts0 table 52"]);
}

/// Counts what leaves for `port` with exactly that mark and with any other.
pub(crate) fn count_marks(host: &Netns, port: u16, mark: u32) {
    host.nft(&format!(
        "table inet counting {{
           counter right {{ }}
           counter wrong {{ }}
           chain post {{
             type filter hook postrouting priority 300;
             udp dport {port} meta mark {mark:#x} counter name right;
             udp dport {port} meta mark != {mark:#x} counter name wrong;
           }}
         }}"
    ));
}

pub(crate) fn counted(host: &Netns, name: &str) -> u64 {
    let said = host.nft(&format!("list counter inet counting {name}"));
    let packets = said.split("packets ").nth(1).and_then(|rest| rest.split(' ').next()?.parse().ok());
    packets.unwrap_or_else(|| panic!("{said}"))
}

/// Sites answer `who`, over both protocols, in bulk and by name; they see `near` as the client.
pub(crate) fn carries(who: &Netns, near: [&str; 2]) {
    for (site, near) in [V4, V6].into_iter().zip(near) {
        let said = who.run("curl", &["-sSg", "--connect-timeout", "20", &format!("http://{site}/")]);
        assert!(said.contains(&format!("client={near}\n")), "{site}: {said}");
        assert_eq!(act_in(who, &format!("datagram {site}:7 x")), Ok("x".to_owned()), "{site}");
        for direction in ["up", "down"] {
            let outcome = act_in(who, &format!("{direction} {site}:9000 {BULK}"));
            assert_eq!(outcome, Ok(of_pattern(BULK)), "{direction} {site}");
        }
    }
    for act in ["ask", "datagram"] {
        assert_eq!(act_in(who, &format!("{act} {NAME}:7 x")), Ok("x".to_owned()), "{act} by name");
    }
}

#[test]
fn wireguard_set_up_by_wg_quick_carries_what_we_send_and_is_carried_past_us() {
    run(&["curl", "dig", TUN], || {
        for outer in ["203.0.113.51:51820", "[2001:db8:1::51]:51820"] {
            both_rp_filters(Topology::with_lan, |lab| {
                let _sites = Sites::open(&lab);
                let _wg = Carrier::start(&lab.host, "wg0", Some(0xca6c), &lab.internet, outer);
                wg_quick(&lab.host);
                count_marks(&lab.host, 51820, 0xca6c);
                let near = [NEAR_V4, NEAR_V6];
                carries(&lab.host, near);
                let alone = counted(&lab.host, "right");
                let before = Dump::take(&lab.host);
                let tunproxy = profile("auto-forward: true", "'DST-PORT,81,REJECT', 'MATCH,DIRECT'").start(&lab.host);
                tunproxy.assert_carries(&lab.host);
                for site in [V4, V6] {
                    assert_eq!(act_in(&lab.host, &format!("connect {site}:81")), Err("ECONNREFUSED".to_owned()));
                }
                carries(&lab.host, near);
                carries(lab.client(), near);
                // Its firewall gives UDP the mark of the connection back, that is none, before the reverse path is checked.
                let bound = ["-b", HOST_V4, "+short", "+tries=1", &format!("@{GATEWAY_V4}"), NAME, "A"];
                assert!(lab.host.run("dig", &bound).starts_with("198.18."), "a question from a bound socket");
                assert!(counted(&lab.host, "right") > alone, "the tunnel carried it");
                assert_eq!(counted(&lab.host, "wrong"), 0, "with its own mark and no other");
                assert!(tunproxy.stop().success());
                before.assert_same(&Dump::take(&lab.host));
                carries(&lab.host, near);
            });
        }
    });
}

#[test]
fn tailscale_keeps_its_networks_its_mark_and_its_path() {
    run(&["curl", TUN], || {
        both_rp_filters(Topology::desktop, |lab| {
            let _sites = Sites::open(&lab);
            let networks = ["203.0.113.150", "[2001:db8:1:1::150]"];
            let behind: Vec<_> = networks.map(|host| lab.sites.http(format!("{host}:80").parse().unwrap())).into();
            assert_eq!(behind.len(), 2);
            let _ts = Carrier::start(&lab.host, "ts0", Some(0x80000), &lab.internet, "203.0.113.52:41641");
            tailscale(&lab.host);
            count_marks(&lab.host, 41641, 0x80000);
            let reached = || {
                for (host, near) in networks.into_iter().zip([NEAR_V4, NEAR_V6]) {
                    let said = lab.host.run("curl", &["-sSg", "--connect-timeout", "20", &format!("http://{host}/")]);
                    assert!(said.contains(&format!("client={near}\n")), "{host}: {said}");
                    let bulk = format!("http://{host}/bytes/{BULK}");
                    let script = format!("curl -sSg --connect-timeout 20 {bulk} | sha256sum");
                    assert!(lab.host.run("sh", &["-c", &script]).starts_with(&of_pattern(BULK)), "{host}");
                }
            };
            reached();
            let alone = counted(&lab.host, "right");
            let before = Dump::take(&lab.host);
            let tunproxy = profile("", "'DST-PORT,81,REJECT', 'MATCH,DIRECT'").start(&lab.host);
            tunproxy.assert_carries(&lab.host);
            reached();
            carries(&lab.host, [HOST_V4, HOST_V6]);
            assert!(counted(&lab.host, "right") > alone);
            assert_eq!(counted(&lab.host, "wrong"), 0);
            assert!(tunproxy.stop().success());
            before.assert_same(&Dump::take(&lab.host));
            reached();
        });
    });
}

#[test]
fn what_goes_direct_takes_the_more_specific_routes_of_another_tunnel() {
    run(&["curl", TUN], || {
        both_rp_filters(Topology::desktop, |lab| {
            let _sites = Sites::open(&lab);
            // As OpenVPN has it: no mark, halves of everything, and a route to its own server past them.
            let _vpn = Carrier::start(&lab.host, "corp0", None, &lab.internet, "203.0.113.53:1194");
            lab.host.routes(&[
                &format!("203.0.113.53/32 via {GATEWAY_V4}"),
                "0.0.0.0/1 dev corp0",
                "128.0.0.0/1 dev corp0",
                "2000::/3 dev corp0",
            ]);
            let near = [NEAR_V4, NEAR_V6];
            carries(&lab.host, near);
            let before = Dump::take(&lab.host);
            let tunproxy = profile("", "'DST-PORT,81,REJECT', 'MATCH,DIRECT'").start(&lab.host);
            tunproxy.assert_carries(&lab.host);
            for site in [V4, V6] {
                assert_eq!(act_in(&lab.host, &format!("connect {site}:81")), Err("ECONNREFUSED".to_owned()), "{site}");
            }
            carries(&lab.host, near);
            assert!(tunproxy.stop().success());
            before.assert_same(&Dump::take(&lab.host));
            carries(&lab.host, near);
        });
    });
}

#[test]
fn tailscale_that_comes_later_takes_its_networks_and_nothing_else() {
    run(&["curl", TUN], || {
        both_rp_filters(Topology::desktop, |lab| {
            let _sites = Sites::open(&lab);
            let _behind = lab.sites.http("203.0.113.150:80".parse().unwrap());
            let tunproxy = profile("", "'DST-PORT,81,REJECT', 'MATCH,DIRECT'").start(&lab.host);
            carries(&lab.host, [HOST_V4, HOST_V6]);
            let client = || lab.host.run("curl", &["-sS", "--connect-timeout", "20", "http://203.0.113.150/"]);
            assert!(client().contains(&format!("client={HOST_V4}\n")));
            let _ts = Carrier::start(&lab.host, "ts0", Some(0x80000), &lab.internet, "203.0.113.52:41641");
            tailscale(&lab.host);
            count_marks(&lab.host, 41641, 0x80000);
            assert!(client().contains(&format!("client={NEAR_V4}\n")));
            carries(&lab.host, [HOST_V4, HOST_V6]);
            for site in [V4, V6] {
                assert_eq!(act_in(&lab.host, &format!("connect {site}:81")), Err("ECONNREFUSED".to_owned()), "{site}");
            }
            assert!(counted(&lab.host, "right") > 0);
            assert_eq!(counted(&lab.host, "wrong"), 0);
            let foreign = |words: &str| {
                let rules = lab.host.ip(words);
                // Ours, and those of ours ahead of them.
                let ours = |line: &str| ["90", "500", "501"].iter().any(|first| line.starts_with(first));
                rules.lines().filter(|line| !ours(line)).map(|line| format!("{line}\n")).collect::<String>()
            };
            let before = [foreign("-4 rule"), foreign("-6 rule")];
            assert!(before[0].contains("lookup 52"), "{before:?}");
            assert!(tunproxy.stop().success());
            assert_eq!([foreign("-4 rule"), foreign("-6 rule")], before, "nothing of the other went with us");
            assert!(client().contains(&format!("client={NEAR_V4}\n")));
        });
    });
}
