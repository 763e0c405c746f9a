//! Whoever uses this host as a gateway under an address that is not his: nobody else gets the answers.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, Type};

use super::leaks::{profile, seen};
use super::support::client::{Session, act_in};
use super::support::forged;
use super::support::netns::veth;
use super::support::packet::{Packet, inject, protocol};
use super::support::sites::{NAME, V4, V6};
use super::support::topology::{CLIENT_V4, GATEWAY_V4, HOST_LAN_V4, HOST_LAN_V6, HOST_V4, HOST_V6};
use super::support::tunproxy::{Place, Tunproxy};
use super::support::{Capture, Netns, Sites, Topology, run, world};

const TUN: &str = "/dev/net/tun";
/// Somebody on the internet, who has nothing to do with any of this.
const STRANGERS: [&str; 2] = ["203.0.113.66", "2001:db8:1::66"];

fn site(ip: IpAddr, port: u16) -> SocketAddr {
    SocketAddr::new(if ip.is_ipv4() { V4 } else { "2001:db8:1::10" }.parse().expect("an address"), port)
}

/// Gives `device` of `ns` an address that nobody routes there.
fn pretend(ns: &Netns, device: &str, address: &str) {
    let length = if address.contains(':') { 128 } else { 32 };
    ns.address(device, &[&format!("{address}/{length}")]);
}

/// Has `ns` send from one of its addresses: a datagram to an echo server, a SYN to an open port, one to a closed port,
/// and an echo request. Each would be answered.
fn speak_as(ns: &Netns, source: &str) {
    let source: IpAddr = source.parse().expect("an address");
    ns.enter(move || {
        let bound = |kind: Type, protocol: Protocol| {
            let socket = Socket::new(Domain::for_address(site(source, 0)), kind, Some(protocol)).expect("a socket");
            socket.set_nonblocking(true).expect("our own socket");
            socket.bind(&SocketAddr::new(source, 0).into()).expect("an address of its own");
            socket
        };
        let datagram = bound(Type::DGRAM, Protocol::UDP);
        datagram.send_to(b"forged", &site(source, 7).into()).expect("it is sent");
        for port in [80, 81] {
            let segment = bound(Type::STREAM, Protocol::TCP);
            let _ = segment.connect(&site(source, port).into());
        }
        let (ping, request) = match source {
            IpAddr::V4(_) => (Protocol::ICMPV4, [8, 0, 0xf7, 0xfc, 0, 1, 0, 2]),
            IpAddr::V6(_) => (Protocol::ICMPV6, [128, 0, 0, 0, 0, 1, 0, 2]),
        };
        bound(Type::RAW, ping).send_to(&request, &site(source, 0).into()).expect("it is sent");
    });
}

/// How many packets the chain has dropped.
fn dropped(host: &Netns) -> u64 {
    let chain = host.nft("list chain inet tunproxy forged");
    let counts = chain.lines().filter_map(|line| line.split_once("counter packets ")?.1.split(' ').next());
    counts.filter_map(|count| count.parse::<u64>().ok()).sum()
}

fn await_drops(host: &Netns, count: u64, tunproxy: &Tunproxy) {
    let found = world::poll_until(Duration::from_secs(20), || (dropped(host) >= count).then_some(()));
    let chain = || host.nft("list chain inet tunproxy forged");
    assert!(found.is_some(), "{count} drops: {}\n{}", chain(), tunproxy.output());
}

fn is_for(packet: &Packet, addresses: &[&str]) -> bool {
    packet.ip.is_some_and(|ip| addresses.contains(&ip.destination.ip().to_string().as_str()))
}

/// A capture on the uplink that sees what is sent to a stranger.
fn capture_on_uplink(lab: &Topology) -> Capture {
    let mut capture = Capture::start(&lab.gateway, "eth1");
    for stranger in STRANGERS {
        let to = SocketAddr::new(stranger.parse().expect("an address"), 9);
        capture.prove(|mark| {
            let mark = mark.to_owned();
            lab.host.enter(move || {
                let own = if to.is_ipv4() { HOST_V4 } else { HOST_V6 }.parse().expect("an address");
                let socket = UdpSocket::bind(SocketAddr::new(own, 0)).expect("an address of its own");
                socket.send_to(mark.as_bytes(), to).expect("it is sent");
            });
        });
    }
    capture
}

/// Holds that nothing goes out to the strangers, while clients under their own addresses are carried.
fn assert_unseen(capture: &mut Capture, what: &str) {
    // The marks that proved the capture went to the port for discarding.
    let answer = |packet: &Packet| is_for(packet, &STRANGERS) && packet.ip.is_some_and(|ip| ip.destination.port() != 9);
    assert_eq!(seen(capture, answer), Vec::<String>::new(), "{what}");
}

#[test]
fn who_forges_an_address_behind_the_uplink_sends_nobody_our_answers() {
    run(&[TUN], || {
        for keys in ["", ", kill-switch: true"] {
            for rp_filter in ["0", "1"] {
                let lab = Topology::with_lan().rp_filter(rp_filter);
                let _sites = Sites::open(&lab);
                let mut capture = capture_on_uplink(&lab);
                let tunproxy = profile(&format!(", auto-forward: true{keys}"), "", "'MATCH,DIRECT'").start(&lab.host);
                for stranger in STRANGERS {
                    pretend(lab.client(), "lo", stranger);
                    speak_as(lab.client(), stranger);
                }
                // A strict filter drops those of IPv4 before us.
                await_drops(&lab.host, if rp_filter == "1" { 4 } else { 8 }, &tunproxy);
                assert_unseen(&mut capture, &format!("rp_filter {rp_filter}{keys}"));
                for site in [V4, V6] {
                    assert_eq!(act_in(lab.client(), &format!("ask {site}:7 x")), Ok("x".to_owned()), "{site}");
                    assert_eq!(act_in(lab.client(), &format!("datagram {site}:7 x")), Ok("x".to_owned()), "{site}");
                }
                assert!(tunproxy.stop().success());
            }
        }
    });
}

#[test]
fn what_is_written_to_the_device_itself_sends_nobody_our_answers() {
    run(&[TUN], || {
        let lab = Topology::with_lan();
        let _sites = Sites::open(&lab);
        let mut capture = capture_on_uplink(&lab);
        let tunproxy = profile(", auto-forward: true", "", "'MATCH,DIRECT'").start(&lab.host);
        let (stranger, site) = (STRANGERS[0].parse().expect("an address"), V4.parse().expect("an address"));
        let segment = |port: u16| {
            let ports = [4000_u16.to_be_bytes(), port.to_be_bytes()].concat();
            [&ports[..], &[0, 0, 0, 1, 0, 0, 0, 0, 0x50, 2, 0x20, 0, 0, 0, 0, 0]].concat()
        };
        let packets = [
            forged::ipv4(stranger, site, protocol::TCP, &segment(80)),
            forged::ipv4(stranger, site, protocol::TCP, &segment(81)),
            forged::ipv4(stranger, site, protocol::UDP, &forged::udp(stranger, site, 4000, 7, b"forged")),
        ];
        inject(&lab.host, "tunproxy0", &packets);
        await_drops(&lab.host, 3, &tunproxy);
        assert_unseen(&mut capture, "from a packet socket");
    });
}

#[test]
fn addresses_of_our_own_are_nobodys_source_on_a_lan() {
    run(&[TUN], || {
        let lab = Topology::with_lan();
        let _sites = Sites::open(&lab);
        let mut capture = capture_on_uplink(&lab);
        let tunproxy = profile(", auto-forward: true, inet6-address: ['fdfe:dcba:9876::1/126']", "", "'MATCH,DIRECT'")
            .start(&lab.host);
        // The kernel itself takes no IPv4 packet from an address of its own.
        let own = [HOST_V6, HOST_LAN_V6, "fdfe:dcba:9876::1", "fdfe:dcba:9877::77"];
        for (count, source) in (1..).zip(own) {
            pretend(lab.client(), "lo", source);
            speak_as(lab.client(), source);
            await_drops(&lab.host, count * 4, &tunproxy);
            lab.client().ip(&format!("addr del {source}/128 dev lo"));
        }
        for source in [HOST_V4, HOST_LAN_V4, "198.18.0.1", "198.18.77.77"] {
            pretend(lab.client(), "lo", source);
            speak_as(lab.client(), source);
            lab.client().ip(&format!("addr del {source}/32 dev lo"));
        }
        tunproxy.assert_carries(lab.client());
        // What the host would say of its own accord, to an answer that it does not expect.
        let ports = [7, 80, 81];
        let forged_flow = |packet: &Packet| {
            packet.ip.is_some_and(|ip| {
                let to_site = ip.destination == site(ip.destination.ip(), ip.destination.port());
                to_site && ports.contains(&ip.destination.port()) && ip.source.ip().to_string() != CLIENT_V4
            })
        };
        assert_eq!(seen(&mut capture, forged_flow), Vec::<String>::new());
    });
}

#[test]
fn a_network_behind_another_router_and_one_with_two_links_are_carried() {
    run(&[TUN], || {
        let lab = Topology::with_lan().rp_filter("0");
        let _sites = Sites::open(&lab);
        // Behind the client: static routes.
        let far = ["10.8.0.5", "fd00:8::5"];
        lab.host.routes(&[&format!("10.8.0.0/24 via {CLIENT_V4}"), "fd00:8::/64 via fd00:7::2"]);
        // Beside it: a second link into the same network, by which the client sends and nobody answers.
        veth(&lab.host, "lan1", lab.client(), "eth1");
        lab.host.address("lan1", &["10.7.0.3/24", "fd00:7::3/64"]);
        lab.client().address("eth1", &["10.7.0.4/24", "fd00:7::4/64"]);
        lab.host.sysctl("net.ipv4.conf.lan1.rp_filter", "0");
        let tunproxy = profile(", auto-forward: true", "", "'MATCH,DIRECT'").start(&lab.host);
        for address in far {
            pretend(lab.client(), "lo", address);
        }
        let ask = |what: &str, sources: [&'static str; 2]| {
            for source in sources {
                let source: IpAddr = source.parse().expect("an address");
                let heard = lab.client().enter(move || {
                    let socket = UdpSocket::bind(SocketAddr::new(source, 0)).expect("an address of its own");
                    socket.set_read_timeout(Some(Duration::from_secs(20))).expect("a time limit");
                    socket.send_to(b"word", site(source, 7)).expect("it is sent");
                    socket.recv(&mut [0; 16]).ok()
                });
                assert_eq!(heard, Some(4), "{what} {source}: {}\n{}", dropped(&lab.host), tunproxy.output());
            }
        };
        ask("behind a router", far);
        lab.client().ip("route replace default via 10.7.0.3 dev eth1");
        lab.client().ip("-6 route replace default via fd00:7::3 dev eth1");
        ask("by the second link", [CLIENT_V4, "fd00:7::2"]);
        assert_eq!(dropped(&lab.host), 0);
    });
}

#[test]
fn a_port_forward_to_a_name_answers_whoever_comes_by_the_uplink_and_nobody_who_pretends_to() {
    run(&["dig", TUN], || {
        let lab = Topology::with_lan().rp_filter("0");
        let _sites = Sites::open(&lab);
        let mut capture = capture_on_uplink(&lab);
        let place = Place::new(
            "tun: { enable: true, auto-forward: true }
dns: { enable: true, enhanced-mode: fake-ip, nameserver: [192.168.1.1] }
rules: ['MATCH,DIRECT']
",
        );
        let tunproxy = place.start(&lab.host);
        let fake = lab.host.run("dig", &["+short", &format!("@{GATEWAY_V4}"), NAME, "A"]).trim().to_owned();
        assert!(fake.starts_with("198.18."), "{fake}");
        lab.host.nft("add table ip administrator");
        lab.host.nft("add chain ip administrator forwards { type nat hook prerouting priority dstnat; }");
        for (device, port) in [("eth0", 7007), ("lan0", 7008)] {
            let forward = format!("iifname {device} meta l4proto {{ tcp, udp }} th dport {port} dnat to {fake}:7");
            lab.host.nft(&format!("add rule ip administrator forwards {forward}"));
        }
        let to = |host: &str, port: u16| SocketAddr::new(host.parse().expect("an address"), port);
        let mut stranger = Session::open(&lab.internet, to("203.0.113.50", 0), to(HOST_V4, 7007));
        assert_eq!(stranger.alive().map(drop), Ok(()), "{}", tunproxy.output());
        let mut client = Session::open(lab.client(), to(CLIENT_V4, 0), to(HOST_LAN_V4, 7008));
        assert_eq!(client.alive().map(drop), Ok(()), "{}", tunproxy.output());
        assert_eq!(dropped(&lab.host), 0);
        pretend(lab.client(), "lo", STRANGERS[0]);
        let (source, target) = (to(STRANGERS[0], 0), to(HOST_LAN_V4, 7008));
        lab.client().enter(move || {
            let socket = UdpSocket::bind(source).expect("an address of its own");
            socket.send_to(b"forged", target).expect("it is sent");
        });
        await_drops(&lab.host, 1, &tunproxy);
        assert_unseen(&mut capture, "by a port forward");
    });
}

/// A client on the uplink's link that has the host as its gateway: a single interface for both.
fn one_armed() -> (Topology, Netns) {
    let (lab, client) = (Topology::desktop(), Netns::new("client"));
    lab.gateway.ip("link add link eth1 name arm0 type macvlan mode bridge");
    lab.gateway.ip(&format!("link set arm0 netns {} name eth0", client.name()));
    client.ip("link set eth0 up");
    client.address("eth0", &["192.168.1.20/24", "2001:db8:2::20/64"]);
    client.routes(&[&format!("default via {HOST_V4}"), &format!("default via {HOST_V6}")]);
    (lab, client)
}

#[test]
fn a_gateway_with_one_interface_carries_those_on_its_link_and_nobody_else() {
    run(&[TUN], || {
        for keys in ["", ", kill-switch: true"] {
            let (lab, client) = one_armed();
            let _sites = Sites::open(&lab);
            let mut capture = capture_on_uplink(&lab);
            let tunproxy = profile(&format!(", auto-forward: true{keys}"), "", "'MATCH,DIRECT'").start(&lab.host);
            for site in [V4, V6] {
                assert_eq!(act_in(&client, &format!("ask {site}:7 x")), Ok("x".to_owned()), "{site}");
                assert_eq!(act_in(&client, &format!("datagram {site}:7 x")), Ok("x".to_owned()), "{site}");
            }
            tunproxy.assert_carries(&client);
            assert_eq!(dropped(&lab.host), 0, "{}", lab.host.nft("list chain inet tunproxy forged"));
            for stranger in STRANGERS {
                pretend(&client, "lo", stranger);
                speak_as(&client, stranger);
            }
            await_drops(&lab.host, 8, &tunproxy);
            // From the host: the strangers' own packets pass the same wire.
            let answers = |packet: &Packet| {
                is_for(packet, &STRANGERS) && packet.bytes[6..12] == super::support::frames::mac(&lab.host, "eth0")
            };
            let marks = |packet: &Packet| packet.ip.is_some_and(|ip| ip.destination.port() == 9);
            assert_eq!(seen(&mut capture, |packet| answers(packet) && !marks(packet)), Vec::<String>::new(), "{keys}");
        }
    });
}
