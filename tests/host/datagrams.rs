//! Datagrams that do not fit: what may not be cut is refused with the path's MTU, what may be cut arrives whole.

use super::support::client::{Session, act_in};
use super::support::program::PATIENCE;
use super::support::sites::{NAME, V4, V6};
use super::support::topology::{CLIENT_V4, HOST_LAN_V4, HOST_V4};
use super::support::tunproxy::Place;
use super::support::world::poll_until;
use super::support::{Capture, Sites, Topology, forged, packet, run};

const TUN: &str = "/dev/net/tun";

fn profile() -> Place {
    Place::new(&format!(
        "
mode: rule
ipv6: true
log-level: info
tun: {{ enable: true, auto-route: true, dns-hijack: ['any:53'] }}
dns: {{ enable: true, listen: '{HOST_LAN_V4}:53', enhanced-mode: fake-ip, nameserver: [192.168.1.1] }}
rules: ['MATCH,DIRECT']
"
    ))
}

#[test]
fn a_datagram_too_large_for_the_uplink_comes_back_with_its_mtu() {
    run(&[TUN], || {
        let lab = Topology::with_lan();
        let _sites = Sites::open(&lab);
        lab.host.ip("link set eth0 mtu 1400");
        lab.gateway.ip("link set eth1 mtu 1400");
        let tunproxy = profile().start(&lab.host);
        for ns in [&lab.host, lab.client()] {
            for site in [V4, V6] {
                let outcome = act_in(ns, &format!("whole {site}:7 1440"));
                assert_eq!(outcome, Ok("1400".to_owned()), "{} {site}\n{}", ns.name(), tunproxy.output());
                assert_eq!(act_in(ns, &format!("whole {site}:7 1300")), Ok("fits".to_owned()), "{site}");
            }
        }
    });
}

#[test]
fn a_datagram_too_large_further_on_comes_back_with_that_mtu() {
    run(&[TUN], || {
        let lab = Topology::with_lan();
        let _sites = Sites::open(&lab);
        lab.gateway.ip("link set eth0 mtu 1320");
        lab.internet.ip("link set eth0 mtu 1320");
        let tunproxy = profile().start(&lab.host);
        for ns in [&lab.host, lab.client()] {
            for site in [V4, V6] {
                let outcome = act_in(ns, &format!("whole {site}:7 1440"));
                assert_eq!(outcome, Ok("1320".to_owned()), "{} {site}\n{}", ns.name(), tunproxy.output());
            }
        }
    });
}

#[test]
fn what_may_be_cut_arrives_whole_both_ways() {
    run(&[TUN], || {
        let lab = Topology::with_lan();
        let sites = Sites::open(&lab);
        let _tunproxy = profile().start(&lab.host);
        let mut capture = Capture::start(lab.client(), "eth0");
        for length in [1472, 1473, 4000, 20_000, 60_000] {
            let word = "f".repeat(length);
            for ns in [&lab.host, lab.client()] {
                for site in [V4, V6] {
                    let outcome = act_in(ns, &format!("datagram {site}:7 {word}"));
                    let whole = outcome.as_ref() == Ok(&word);
                    assert!(whole, "{length} bytes, {} {site}: {:.20}", ns.name(), format!("{outcome:?}"));
                }
            }
        }
        assert_eq!(sites.datagrams.all().len(), 5 * 4);
        // The client's wire carries pieces: were they whole, this would prove nothing.
        let pieces = capture.packets().iter().filter(|packet| packet.is_fragment()).count();
        assert!(pieces > 100, "{pieces}");
    });
}

#[test]
fn datagrams_give_way_where_descriptors_are_few_and_names_are_answered_still() {
    run(&[TUN, "prlimit"], || {
        let lab = Topology::with_lan();
        let _sites = Sites::open(&lab);
        let tunproxy = profile().start(&lab.host);
        tunproxy.limit_descriptors(&lab.host, 256);
        // More than there are descriptors: the associations idle longest go.
        assert_eq!(act_in(&lab.host, &format!("datagrams 300 {V4}:7")), Ok("300".to_owned()), "{}", tunproxy.output());
        let from = format!("{HOST_V4}:0").parse().expect("an address");
        let to = format!("{V4}:7").parse().expect("an address");
        let mut sessions: Vec<_> = (0..100).map(|_| Session::open(&lab.host, from, to)).collect();
        for session in &mut sessions {
            assert_eq!(session.alive().map(drop), Ok(()), "{}", tunproxy.output());
        }
        assert_eq!(act_in(&lab.host, &format!("ask {NAME}:7 x")), Ok("x".to_owned()), "{}", tunproxy.output());
        let said = tunproxy.output();
        assert!(said.contains("evicted: no descriptors are left"), "or there were enough of them");
        assert!(!said.contains("reason=connection refused"), "{said}");
    });
}

#[test]
fn every_length_that_a_datagram_can_have_goes_there_and_back() {
    run(&[TUN], || {
        let lab = Topology::with_lan();
        let _sites = Sites::open(&lab);
        let tunproxy = profile().start(&lab.host);
        for ns in [&lab.host, lab.client()] {
            for site in [V4, V6] {
                let longest = if site == V6 { 65_527 } else { 65_507 };
                for length in [0, 1, 511, 512, 513, 1231, 1232, 1233, 1471, 1472, 1473, 9000, 32_768, 65_507, longest] {
                    let outcome = act_in(ns, &format!("echo {site}:7 {length}"));
                    let said = || format!("{length} bytes, {} {site}\n{}", ns.name(), tunproxy.output());
                    assert_eq!(outcome, Ok(length.to_string()), "{}", said());
                }
            }
        }
    });
}

#[test]
fn pieces_in_any_order_make_one_datagram_and_those_that_overlap_make_none() {
    run(&[TUN], || {
        let lab = Topology::with_lan();
        let sites = Sites::open(&lab);
        let tunproxy = profile().start(&lab.host);
        tunproxy.assert_carries(lab.client());
        let (from, to) = (CLIENT_V4.parse().expect("an address"), V4.parse().expect("an address"));
        let pieces = |id: u16, cuts: &[(usize, usize)]| -> Vec<Vec<u8>> {
            let payload = forged::udp(from, to, 4000 + id, 7, &vec![b'p'; 2992]);
            cuts.iter().map(|(start, end)| forged::fragment(from, to, id, &payload, *start, *end)).collect()
        };
        let sent = |packets: Vec<Vec<u8>>| packet::inject(lab.client(), "eth0", &forged::frames(&lab, packets));
        sent(pieces(1, &[(0, 1000), (1000, 2000), (2000, 3000)]));
        sent(pieces(2, &[(2000, 3000), (0, 1000), (1000, 2000)]));
        sent(pieces(3, &[(1000, 2000), (1000, 2000), (2000, 3000), (0, 1000)]));
        let heard = |many: usize| poll_until(PATIENCE, || (sites.datagrams.all().len() >= many).then_some(()));
        assert!(heard(3).is_some(), "{:?}\n{}", sites.datagrams.all(), tunproxy.output());
        // RFC 5722: a packet whose pieces overlap is dropped whole.
        sent(pieces(4, &[(0, 1000), (992, 2000), (2000, 3000)]));
        sent(pieces(5, &[(0, 1000), (1000, 2000), (2000, 3000)]));
        assert!(heard(4).is_some(), "{:?}\n{}", sites.datagrams.all(), tunproxy.output());
        assert_eq!(sites.datagrams.all().len(), 4, "the one with overlapping pieces did not arrive");
    });
}
