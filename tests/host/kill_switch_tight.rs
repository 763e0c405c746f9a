//! The kill switch, and questions to port 53, where others do what they may: they set marks as a whole, hand out networks
//! without a router, stop listening on a port, or keep their next hops in objects.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use socket2::{Domain, Socket, Type};

use super::kill_switch::{assert_closed, escapes_in, profile, proven_capture, tries};
use super::leaks::at;
use super::support::client::act_in;
use super::support::escapes::{self, Attempts, Kind, TARGET_V4, TARGET_V6};
use super::support::packet::Packet;
use super::support::sites::{V4, V6};
use super::support::topology::{HOST_V4, HOST_V6};
use super::support::tunproxy::Place;
use super::support::{Capture, Netns, Sites, Topology, run};

const TUN: &str = "/dev/net/tun";
/// What is tried is refused, and the rest is carried.
const RULES: &str = "'IP-CIDR,203.0.113.77/32,REJECT', 'IP-CIDR6,2001:db8:1::77/128,REJECT', 'MATCH,DIRECT'";
/// Chains of others that give all that is sent a mark of theirs.
const MARKERS: [&str; 5] = [
    "type route hook output priority mangle; meta mark set ct mark;",
    "type route hook output priority -149; meta mark set 0x5;",
    "type filter hook output priority 0; meta mark set 0x5;",
    "type route hook output priority 300; meta mark set 0x5;",
    "type filter hook postrouting priority mangle; meta mark set 0x5;",
];

fn assert_carries(ns: &Netns, when: &str) {
    for site in [V4, V6] {
        assert_eq!(act_in(ns, &format!("ask {site}:7 x")), Ok("x".to_owned()), "our own sockets {when}");
    }
}

#[test]
fn whoever_sets_marks_as_a_whole_opens_nothing_and_cuts_nothing_off() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let mut capture = proven_capture(&lab);
        for marker in MARKERS {
            for before in [true, false] {
                let mark = || lab.host.nft(&format!("table inet others {{ chain marks {{ {marker} }}; }}"));
                if before {
                    mark();
                }
                let tunproxy = profile(RULES).start(&lab.host);
                if !before {
                    mark();
                }
                let already = escapes_in(&mut capture);
                let when = format!("with {marker} (before: {before})");
                lab.host.enter(escapes::all_ways);
                assert_carries(&lab.host, &when);
                assert_closed(&mut capture, already, &when);
                let place = tunproxy.kill();
                lab.host.enter(escapes::all_ways);
                assert_closed(&mut capture, already, &format!("after a kill, {when}"));
                place.clean_up(&lab.host);
                lab.host.nft("delete table inet others");
            }
        }
    });
}

#[test]
fn whoever_sets_marks_as_a_whole_leads_no_question_past_us() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let ask = || {
            for target in [TARGET_V4, TARGET_V6] {
                for tie in escapes::TIES {
                    let to = SocketAddr::new(target.parse().expect("an address"), 53);
                    let _ = escapes::send(Kind::Udp, tie, to, b"a question");
                }
            }
        };
        let mut capture = proven_capture(&lab);
        let already = escapes_in(&mut capture);
        lab.host.enter(ask);
        assert!(escapes_in(&mut capture) > already, "an open host asks");
        for marker in MARKERS {
            lab.host.nft(&format!("table inet others {{ chain marks {{ {marker} }}; }}"));
            let place = Place::new(&format!(
                "
ipv6: true
tun: {{ enable: true }}
dns: {{ enable: true, enhanced-mode: fake-ip, nameserver: ['192.168.1.1:5353'] }}
rules: [{RULES}]
"
            ));
            let tunproxy = place.start(&lab.host);
            let already = escapes_in(&mut capture);
            lab.host.enter(ask);
            assert_carries(&lab.host, marker);
            assert_closed(&mut capture, already, marker);
            assert!(tunproxy.stop().success());
            lab.host.enter(ask);
            assert!(escapes_in(&mut capture) > already, "a stop lets questions go");
            lab.host.nft("delete table inet others");
        }
    });
}

#[test]
fn fake_addresses_in_a_private_range_go_nowhere_else_whoever_knows_a_way_to_that() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let fake: IpAddr = "fdfe:dcba:9877::77".parse().expect("an address");
        let try_all = move || {
            for tie in escapes::TIES {
                for kind in [Kind::Udp, Kind::Tcp, Kind::Ping] {
                    let _ = escapes::send(kind, tie, SocketAddr::new(fake, 4711), b"a name");
                }
            }
        };
        lab.host.ip("-6 rule add pref 1000 to fc00::/7 lookup main");
        let mut capture = proven_capture(&lab);
        let to_fake = |packet: &Packet| packet.ip.is_some_and(|ip| ip.destination.ip() == fake);
        lab.host.enter(try_all);
        assert!(capture.packets().iter().any(to_fake), "an open host lets them out");
        let seen = capture.packets().iter().filter(|packet| to_fake(packet)).count();
        let more = |capture: &mut Capture| capture.packets().iter().filter(|packet| to_fake(packet)).count() - seen;
        let tunproxy = profile(RULES).start(&lab.host);
        lab.host.enter(try_all);
        assert_eq!(more(&mut capture), 0, "while it runs");
        let place = tunproxy.kill();
        lab.host.enter(try_all);
        assert_eq!(more(&mut capture), 0, "after a kill");
        // Whoever comes before ours then.
        lab.host.ip("-6 rule add pref 10 to fc00::/7 lookup main");
        lab.host.enter(try_all);
        assert_eq!(more(&mut capture), 0, "by a rule of others that comes when nobody is there");
        place.clean_up(&lab.host);
    });
}

fn connect_from(ns: &Netns, from: SocketAddr, to: SocketAddr) -> TcpStream {
    let stream = ns.enter(move || -> std::io::Result<TcpStream> {
        let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
        socket.set_reuse_address(true)?;
        socket.bind(&from.into())?;
        socket.connect_timeout(&to.into(), Duration::from_secs(20))?;
        Ok(socket.into())
    });
    let stream = stream.unwrap_or_else(|error| panic!("from {from} to {to}: {error}"));
    stream.set_read_timeout(Some(Duration::from_secs(20))).expect("a time limit");
    stream
}

#[test]
fn a_client_on_a_port_that_was_listened_on_at_the_start_is_captured_from_end_to_end() {
    run(&["conntrack", TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let mut capture = proven_capture(&lab);
        let listeners = ["0.0.0.0:40000", "[::]:40001"].map(|any| lab.host.enter(move || TcpListener::bind(any)));
        assert!(listeners.iter().all(Result::is_ok), "{listeners:?}");
        let tunproxy = profile("'MATCH,DIRECT'").start(&lab.host);
        drop(listeners);
        let ends = [
            (SocketAddr::new(HOST_V4.parse().expect("an address"), 40000), at(&format!("{V4}:7"))),
            (SocketAddr::new(HOST_V6.parse().expect("an address"), 40001), at(&format!("{V6}:7"))),
        ];
        let mut streams = ends.map(|(from, to)| connect_from(&lab.host, from, to));
        for forgotten in [false, true] {
            for stream in &mut streams {
                let mut heard = [0; 5];
                stream.write_all(b"hello").and_then(|()| stream.read_exact(&mut heard)).expect("an echo by the TUN");
                assert_eq!(&heard, b"hello");
            }
            if !forgotten {
                lab.host.run("conntrack", &["-F"]);
            }
        }
        let place = tunproxy.kill();
        for stream in &mut streams {
            let _ = stream.write_all(b"after the kill");
        }
        capture.assert_nothing("a segment of the clients past us", |packet| {
            packet.ip.is_some_and(|ip| ends.iter().any(|(from, _)| ip.source == *from))
        });
        place.clean_up(&lab.host);
    });
}

/// Has the attempts' targets lie on the link of eth0, where a neighbour is known for each.
fn hand_out_their_networks(host: &Netns) {
    host.address("eth0", &["203.0.113.5/24", "2001:db8:1::5/64"]);
    for target in [TARGET_V4, TARGET_V6] {
        host.ip(&format!("neigh replace {target} lladdr 02:00:00:00:00:77 dev eth0 nud permanent"));
    }
}

fn rules_to(host: &Netns, prefix: &str) -> usize {
    let rules = host.ip("rule") + &host.ip("-6 rule");
    rules.lines().filter(|line| line.contains(&format!("to {prefix} lookup main"))).count()
}

#[test]
fn a_network_that_comes_without_a_router_is_no_lan() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let mut capture = {
            let _sites = Sites::open(&lab);
            proven_capture(&lab)
        };
        hand_out_their_networks(&lab.host);
        let already = escapes_in(&mut capture);
        lab.host.enter(escapes::all_ways);
        assert!(escapes_in(&mut capture) > already, "an open host reaches the link");
        // The default route is there at the start, and then is not; or it never was.
        for routes in [&[][..], &["198.51.100.2 via 192.168.1.1", "2001:db8:9::/48 via 2001:db8:2::1"]] {
            lab.host.routes(routes);
            let tunproxy = profile("'MATCH,REJECT'").start(&lab.host);
            let already = escapes_in(&mut capture);
            let attempts = Attempts::from(&lab.host);
            attempts.wait(tries());
            if routes.is_empty() {
                let flap = || ["-4", "-6"].map(|family| lab.host.ip(&format!("{family} route del default")));
                tunproxy.line_after(flap, &["this host has changed"]);
            }
            attempts.wait(tries());
            drop(attempts);
            assert_closed(&mut capture, already, &format!("with {routes:?}"));
            assert!(tunproxy.stop().success());
        }
    });
}

#[test]
fn a_default_route_by_a_next_hop_object_makes_an_uplink() {
    run(&[TUN], || {
        let lab = Topology::with_lan();
        let mut capture = {
            let _sites = Sites::open(&lab);
            proven_capture(&lab)
        };
        let host = &lab.host;
        host.sysctl("net.ipv4.nexthop_compat_mode", "0");
        for (family, object, gateway) in [("-4", 1, "192.168.1.1"), ("-6", 2, "2001:db8:2::1")] {
            host.ip(&format!("{family} route del default"));
            host.ip(&format!("{family} nexthop add id {object} via {gateway} dev eth0"));
            host.ip(&format!("{family} route add default nhid {object}"));
        }
        hand_out_their_networks(host);
        host.address("lan0", &["2001:db8:7::1/64"]);
        let tunproxy = profile("'MATCH,REJECT'").start(host);
        let already = escapes_in(&mut capture);
        host.enter(escapes::all_ways);
        assert_closed(&mut capture, already, "by an object");
        assert_eq!(
            (rules_to(host, "203.0.113.0/24"), rules_to(host, "2001:db8:7::/64")),
            (0, 1),
            "{}",
            host.ip("-6 rule")
        );
        assert!(tunproxy.stop().success());
    });
}
