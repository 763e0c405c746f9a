//! What a ping or a traceroute is told of hosts, routers and links.

use std::net::SocketAddr;
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, Type};

use super::super::support::packet::Packet;
use super::super::support::sites::NAME;
use super::super::support::topology::{BLACK_HOLE_V4, BLACK_HOLE_V6, GATEWAY_V4, GATEWAY_V6, HOST_LAN_V4, HOST_LAN_V6};
use super::super::support::tunproxy::Said;
use super::super::support::{Capture, Netns, Sites, Topology, run};
use super::{FOUR, HOP_V4, HOP_V6, SIX, TUN, hops, ping, profile, profile_with, request, seal_icmp, ttl};

#[test]
fn a_host_of_the_internet_answers_itself_one_hop_further_away() {
    run(&["ping", TUN], || {
        for filter in ["0", "1"] {
            let lab = Topology::with_lan().rp_filter(filter);
            let _sites = Sites::open(&lab);
            let truth = [FOUR, SIX].map(|site| ttl(&ping(&lab.host, site)).expect("it answers without us"));
            let tunproxy = profile_with("icmp-timeout: 1", "'MATCH,DIRECT'").start(&lab.host);
            tunproxy.assert_carries(&lab.host);
            for (site, truth) in [FOUR, SIX].into_iter().zip(truth) {
                let there = format!("destination={site} ");
                let words = ["network=icmp", &there, "MATCH,DIRECT", "up=56 down=56", "outcome=closed", "idle"];
                let (said, _line) = tunproxy.line_after(|| ping(&lab.host, site), &words);
                assert_eq!(ttl(&said), Some(truth - 1), "{site}: {said:?}\n{}", tunproxy.output());
                // The client's host is a hop as well.
                let said = ping(lab.client(), site);
                assert_eq!(ttl(&said), Some(truth - 2), "{site}: {said:?}\n{}", tunproxy.output());
            }
        }
    });
}

#[test]
fn a_name_with_a_fake_address_leads_to_the_host_itself() {
    run(&["ping", TUN], || {
        let lab = Topology::with_lan();
        let _sites = Sites::open(&lab);
        let tunproxy = profile("'DOMAIN,www.example.test,DIRECT', 'MATCH,REJECT'").start(&lab.host);
        for ns in [&lab.host, lab.client()] {
            for family in ["-4", "-6"] {
                let mut capture = Capture::start(&lab.host, "eth0");
                let said = ping(ns, &format!("{family} {NAME}"));
                assert!(said.succeeded(), "{said:?}\n{}", tunproxy.output());
                assert!(said.stdout.contains("198.18.") || said.stdout.contains("fdfe:dcba:9877:"), "{said:?}");
                let site = if family == "-4" { FOUR } else { SIX };
                let asked = capture.packets().iter().filter(|packet| request(packet, site).is_some()).count();
                assert_eq!(asked, 1, "the wire carried the real address");
            }
        }
        let said = ping(&lab.host, "198.18.77.77");
        assert!(said.code == Some(1) && said.stdout.contains("Destination Host Unreachable"), "{said:?}");
    });
}

#[test]
fn a_dead_host_stays_dead_and_an_unreachable_one_is_named_by_the_router_that_knows() {
    run(&["ping", TUN], || {
        let lab = Topology::with_lan();
        let _sites = Sites::open(&lab);
        let tunproxy = profile("'MATCH,DIRECT'").start(&lab.host);
        for ns in [&lab.host, lab.client()] {
            for hole in [BLACK_HOLE_V4, BLACK_HOLE_V6] {
                let said = Said::of(ns.command("ping").args(["-n", "-c", "2", "-i", "0.2", "-W", "2", hole]));
                let silent = said.stdout.contains(" 0 received") && !said.stdout.contains("From");
                assert!(said.code == Some(1) && silent, "{said:?}");
            }
            for (nowhere, router, words) in
                [("192.0.2.1", GATEWAY_V4, "Net Unreachable"), ("2001:db8:ffff::1", GATEWAY_V6, "No route")]
            {
                let said = ping(ns, nowhere);
                let told = said.stdout.contains(&format!("From {router} icmp_seq=1")) && said.stdout.contains(words);
                assert!(said.code == Some(1) && told, "{said:?}\n{}", tunproxy.output());
            }
        }
    });
}

#[test]
fn a_traceroute_names_us_and_every_router_behind_us() {
    run(&["traceroute", TUN], || {
        let lab = Topology::with_lan();
        let _sites = Sites::open(&lab);
        let _tunproxy = profile("'MATCH,DIRECT'").start(&lab.host);
        assert_eq!(hops(&lab.host, FOUR), [HOP_V4, GATEWAY_V4, FOUR]);
        assert_eq!(hops(&lab.host, SIX), [HOP_V6, GATEWAY_V6, SIX]);
        assert_eq!(hops(lab.client(), FOUR), [HOST_LAN_V4, HOP_V4, GATEWAY_V4, FOUR]);
        assert_eq!(hops(lab.client(), SIX), [HOST_LAN_V6, HOP_V6, GATEWAY_V6, SIX]);
    });
}

#[test]
fn a_request_leaves_with_what_it_asked_of_the_routers() {
    run(&["ping", TUN], || {
        let lab = Topology::with_lan();
        let _sites = Sites::open(&lab);
        let _tunproxy = profile("'MATCH,DIRECT'").start(&lab.host);
        for (words, ttl, tos, whole) in [("-Q 0x48 -M do -t 30", 29, 0x48, true), ("-M dont -t 200", 199, 0, false)] {
            let mut capture = Capture::start(&lab.host, "eth0");
            for site in [FOUR, SIX] {
                assert!(ping(&lab.host, &format!("{words} {site}")).succeeded(), "{words} {site}");
            }
            let seen = capture.packets();
            let (four, _) = seen.iter().find_map(|packet| request(packet, FOUR)).expect("it left");
            assert_eq!((four[8], four[1], four[6] & 0x40 != 0), (ttl, tos, whole));
            let (six, _) = seen.iter().find_map(|packet| request(packet, SIX)).expect("it left");
            assert_eq!((six[7], six[0] << 4 | six[1] >> 4), (ttl, tos));
        }
    });
}

#[test]
fn what_is_too_large_for_a_link_comes_back_with_its_mtu_and_what_may_be_cut_arrives() {
    run(&["ping", TUN], || {
        let lab = Topology::with_lan();
        let _sites = Sites::open(&lab);
        // The uplink itself, and a link further on.
        lab.host.ip("link set eth0 mtu 1450");
        lab.gateway.ip("link set eth1 mtu 1450");
        lab.gateway.ip("link set eth0 mtu 1320");
        lab.internet.ip("link set eth0 mtu 1320");
        let tunproxy = profile("'MATCH,DIRECT'").start(&lab.host);
        for ns in [lab.client(), &lab.host] {
            for site in [FOUR, SIX] {
                for length in [100, 1400, 4000, 20_000, 60_000] {
                    // IPv6 is cut by its source alone, which first has to learn of each smaller link.
                    let tries = if site == SIX { 3 } else { 1 };
                    let whole = |_| ping(ns, &format!("-M dont -s {length} {site}")).succeeded();
                    assert!((0..tries).any(whole), "{length} {site} {}\n{}", ns.name(), tunproxy.output());
                }
            }
            // Addresses of which no kernel has learnt anything yet.
            let last = if ns.name() == lab.host.name() { 11 } else { 12 };
            let (four, six) = (format!("203.0.113.{last}"), format!("2001:db8:1::{last}"));
            for (site, header, router) in [(&four, 28, GATEWAY_V4), (&six, 48, GATEWAY_V6)] {
                for (size, mtu) in [(1460, 1450), (1440, 1320)] {
                    let said = ping(ns, &format!("-M do -s {} {site}", size - header));
                    let told =
                        [format!("mtu = {mtu}"), format!("mtu={mtu}")].iter().any(|mtu| said.stdout.contains(mtu));
                    assert!(said.code == Some(1) && told, "{size} {site}: {said:?}\n{}", tunproxy.output());
                    let from = if mtu == 1320 { router } else { site };
                    assert!(said.stdout.contains(&format!("From {from} ")), "{said:?}");
                }
                assert!(ping(ns, &format!("-M do -s {} {site}", 1320 - header)).succeeded(), "{site}");
            }
        }
    });
}

#[test]
fn the_longest_request_there_is_comes_back_in_either_family() {
    run(&["ping", TUN], || {
        let lab = Topology::with_lan();
        let _sites = Sites::open(&lab);
        let tunproxy = profile("'MATCH,DIRECT'").start(&lab.host);
        for ns in [lab.client(), &lab.host] {
            // The length field of IPv4 counts its header of 20 bytes, that of IPv6 does not.
            for (site, longest) in [(FOUR, 65_507), (SIX, 65_527)] {
                let said = ping(ns, &format!("-s {longest} {site}"));
                assert!(said.succeeded(), "{} {site}: {said:?}\n{}", ns.name(), tunproxy.output());
            }
        }
    });
}

#[test]
fn requests_of_two_clients_with_one_id_are_told_apart() {
    run(&["ping", TUN], || {
        let lab = Topology::with_lan();
        let _sites = Sites::open(&lab);
        let _tunproxy = profile("'MATCH,DIRECT'").start(&lab.host);
        let mut capture = Capture::start(&lab.host, "eth0");
        let words = ["-n", "-c", "20", "-i", "0.05", "-W", "10", "-e", "4711", FOUR];
        let (host, client) = std::thread::scope(|scope| {
            let all = [&lab.host, lab.client()].map(|ns| scope.spawn(|| Said::of(ns.command("ping").args(words))));
            let [host, client] = all.map(|one| one.join().expect("no panic"));
            (host, client)
        });
        for said in [host, client] {
            assert!(said.stdout.contains("20 received") && !said.stdout.contains("DUP"), "{said:?}");
        }
        let id = |packet: &Packet| request(packet, FOUR).map(|(bytes, at)| [bytes[at + 4], bytes[at + 5]]);
        let ids: Vec<_> = capture.packets().iter().filter_map(id).collect();
        let distinct: std::collections::HashSet<_> = ids.iter().collect();
        assert_eq!((ids.len(), distinct.len()), (40, 2), "{distinct:?}");
    });
}

/// A host at every IPv4 address of the internet that answers echo requests by a program, after a while.
fn slow_hosts(internet: &Netns, delay: Duration) {
    internet.sysctl("net.ipv4.icmp_echo_ignore_all", "1");
    let listen = || {
        let hears = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::ICMPV4))?;
        let speaks = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(libc::IPPROTO_RAW)))?;
        std::io::Result::Ok((hears, speaks))
    };
    let (hears, speaks) = internet.enter(listen).expect("root opens raw sockets");
    // It ends with the test's own process.
    std::thread::spawn(move || {
        let mut space = [std::mem::MaybeUninit::uninit(); 2048];
        while let Ok(length) = hears.recv(&mut space) {
            // SAFETY: the kernel has written that many bytes.
            let mut packet: Vec<u8> = space[..length].iter().map(|byte| unsafe { byte.assume_init() }).collect();
            if packet.get(20) != Some(&8) {
                continue;
            }
            std::thread::sleep(delay);
            let (from, to) = (packet[12..16].to_vec(), packet[16..20].to_vec());
            packet[12..16].copy_from_slice(&to);
            packet[16..20].copy_from_slice(&from);
            (packet[8], packet[20]) = (64, 0);
            seal_icmp(&mut packet);
            let to = SocketAddr::from((<[u8; 4]>::try_from(from).expect("four bytes"), 0));
            speaks.send_to(&packet, &to.into()).expect("a way back");
        }
    });
}

#[test]
fn the_round_trip_time_is_that_of_the_host() {
    run(&["ping", TUN], || {
        let lab = Topology::with_lan();
        slow_hosts(&lab.internet, Duration::from_millis(300));
        let _tunproxy = profile("'MATCH,DIRECT'").start(&lab.host);
        let said = ping(&lab.host, FOUR);
        let time = said.stdout.split("time=").nth(1).and_then(|after| after.split(' ').next());
        let time: f64 = time.unwrap_or_else(|| panic!("{said:?}")).parse().expect("milliseconds");
        assert!((300.0..5000.0).contains(&time), "{said:?}");
    });
}
