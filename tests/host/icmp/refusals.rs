//! What rules and keys refuse, and how that looks.

use std::net::SocketAddr;

use socket2::{Domain, Protocol, Socket, Type};

use super::super::support::sites::NAME;
use super::super::support::topology::GATEWAY_V4;
use super::super::support::tunproxy::{Place, Said};
use super::super::support::{Capture, Sites, Topology, run};
use super::{FOUR, HOP_V4, SIX, TUN, ping, profile_with, request};

#[test]
fn rules_decide_and_what_is_not_carried_is_refused_and_never_leaves() {
    run(&["ping", TUN], || {
        let lab = Topology::with_lan();
        let _sites = Sites::open(&lab);
        let rules = "'DST-PORT,0-65535,REJECT-DROP', 'SRC-PORT,0-65535,REJECT-DROP', 'NETWORK,udp,REJECT-DROP',
                     'NETWORK,tcp,REJECT-DROP', 'IP-CIDR,203.0.113.20/32,REJECT', 'IP-CIDR6,2001:db8:1::20/128,REJECT',
                     'IP-CIDR,203.0.113.21/32,REJECT-DROP', 'IP-CIDR,203.0.113.22/32,abroad',
                     'IP-CIDR6,2001:db8:1::22/128,abroad', 'DOMAIN,www.example.test,abroad',
                     'IP-CIDR,203.0.113.23/32,choice', 'NETWORK,icmp,DIRECT', 'MATCH,REJECT'";
        let tunproxy = profile_with("icmp-timeout: 1", rules).start(&lab.host);
        let mut capture = Capture::start(&lab.host, "eth0");
        capture.prove(|mark| {
            let socket = lab.host.enter(|| Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::ICMPV4)));
            let to: SocketAddr = format!("{GATEWAY_V4}:0").parse().expect("an address");
            let message = [&[8, 0, 0, 0, 0, 1, 0, 1][..], mark.as_bytes()].concat();
            socket.expect("root opens raw sockets").send_to(&message, &to.into()).expect("it leaves");
        });
        let said = ping(&lab.host, "203.0.113.23");
        assert!(said.succeeded(), "the group's member is DIRECT: {said:?}\n{}", tunproxy.output());
        assert!(ping(&lab.host, FOUR).succeeded(), "by NETWORK,icmp");
        for ns in [&lab.host, lab.client()] {
            for (site, words) in [
                ("203.0.113.20", "Packet filtered"),
                ("2001:db8:1::20", "Administratively prohibited"),
                ("203.0.113.22", "Packet filtered"),
                ("2001:db8:1::22", "Administratively prohibited"),
                (NAME, "filtered"),
            ] {
                let said = ping(ns, &if site == NAME { format!("-4 {site}") } else { site.to_owned() });
                assert!(said.code == Some(1) && said.stdout.contains(words), "{site}: {said:?}\n{}", tunproxy.output());
            }
            let said = Said::of(ns.command("ping").args(["-n", "-c", "2", "-i", "0.2", "-W", "2", "203.0.113.21"]));
            assert!(said.code == Some(1) && !said.stdout.contains("From"), "{said:?}");
        }
        for last in [20, 21, 22] {
            capture.assert_nothing("refused echo requests", |packet| {
                request(packet, &format!("203.0.113.{last}")).is_some()
                    || request(packet, &format!("2001:db8:1::{last}")).is_some()
            });
        }
        tunproxy.line("choice -> DIRECT");
        for (target, outcome) in [("abroad", "outcome=failed"), ("REJECT", "outcome=rejected")] {
            let told = |line: &&str| line.contains("network=icmp") && line.contains(&format!("outbound=\"{target}\""));
            let said = tunproxy.output();
            assert!(said.lines().filter(told).all(|line| line.contains(outcome)), "{said}");
            assert!(said.lines().any(|line| told(&line)), "{said}");
        }
    });
}

#[test]
fn forwarding_that_is_switched_off_and_a_family_that_is_not_carried_are_refusals() {
    run(&["ping", TUN], || {
        let lab = Topology::with_lan();
        let _sites = Sites::open(&lab);
        let tunproxy = profile_with("disable-icmp-forwarding: true", "'MATCH,DIRECT'").start(&lab.host);
        for (site, words) in [(FOUR, "Packet filtered"), (SIX, "Administratively prohibited")] {
            let said = ping(&lab.host, site);
            assert!(said.code == Some(1) && said.stdout.contains(words), "{said:?}");
        }
        assert!(ping(&lab.host, HOP_V4).succeeded(), "our own address answers");
        assert!(tunproxy.stop().success());
        let place = Place::new("ipv6: false\ntun: { enable: true }\nrules: ['MATCH,DIRECT']\n");
        let _tunproxy = place.start(&lab.host);
        let said = ping(&lab.host, SIX);
        assert!(said.code == Some(1) && said.stdout.contains("No route"), "{said:?}");
        assert!(ping(&lab.host, FOUR).succeeded());
    });
}
