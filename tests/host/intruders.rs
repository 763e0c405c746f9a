//! A neighbour who looks for what is inside: the device's address, the fake range, a flow.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use super::leaks::{at, profile, seen, send_all};
use super::support::client::Session;
use super::support::escapes::{self, Kind, Tie};
use super::support::frames::{self, arp_question, segment};
use super::support::packet::{Ip, Packet, inject};
use super::support::peers::{Peers, Record};
use super::support::sites::V4;
use super::support::topology::{CLIENT_V4, GATEWAY_V4, HOST_LAN_V4, HOST_LAN_V6, HOST_V4, HOST_V6};
use super::support::{Capture, Netns, Sites, Topology, run, world};

const TUN: &str = "/dev/net/tun";
/// Of the device by default, where names are answered, and of the fake range.
const INNER: [&str; 6] =
    ["198.18.0.1", "198.18.0.2", "198.18.77.77", "fdfe:dcba:9876::1", "fdfe:dcba:9876::2", "fdfe:dcba:9877::77"];

/// What the host says to a neighbour from an address that is inside, over `device`.
fn answers_from_inside(packet: &Packet) -> bool {
    let inside = |ip: Ip| INNER.contains(&ip.source.ip().to_string().as_str());
    // Sender of an ARP answer: bytes 28 to 31 of the frame, operation in bytes 20 and 21.
    let arp = packet.ether_type == 0x0806
        && packet.bytes.get(20..22) == Some(&[0, 2])
        && packet.bytes.get(28..30) == Some(&[198, 18]);
    packet.ip.is_some_and(inside) || arp
}

fn is_arp_answer(packet: &Packet) -> bool {
    packet.ether_type == 0x0806 && packet.bytes.get(20..22) == Some(&[0, 2])
}

/// A neighbour on `device` of `ns` asks for everything inside, and gets nothing; for the host itself, and gets it.
fn probe(ns: &Netns, device: &str, own: Ipv4Addr, host: Ipv4Addr, gateways: [&str; 2], inner: &[&str]) {
    for (prefix, via) in [("198.18.0.0/15", gateways[0]), ("fdfe:dcba:9876::/63", gateways[1])] {
        ns.routes(&[&format!("{prefix} via {via}")]);
    }
    let mut capture = Capture::start(ns, device);
    capture.prove(|mark| {
        let mark = mark.to_owned();
        let to = SocketAddr::new(host.into(), 9);
        ns.enter(move || escapes::send(Kind::Udp, Tie::Free, to, mark.as_bytes()).expect("it is sent"));
    });
    let mac = frames::mac(ns, device);
    let inside_v4: Vec<Ipv4Addr> = inner.iter().filter_map(|address| address.parse().ok()).collect();
    let questions: Vec<Vec<u8>> =
        inside_v4.iter().chain([&host]).map(|wanted| arp_question(mac, own, *wanted)).collect();
    inject(ns, device, &questions);
    let targets: Vec<String> = inner
        .iter()
        .map(|address| if address.contains(':') { format!("[{address}]:80") } else { format!("{address}:80") })
        .collect();
    send_all(ns, &[Tie::Free], &targets.iter().map(String::as_str).collect::<Vec<_>>());
    // What the host answers for itself comes after what it would have answered for the rest.
    assert!(ns.run("ping", &["-c1", "-W20", &host.to_string()]).contains("1 received"));
    let answered =
        world::poll_until(Duration::from_secs(10), || (!seen(&mut capture, is_arp_answer).is_empty()).then_some(()));
    assert!(answered.is_some(), "the host answers for its own address");
    capture.assert_nothing("an answer from inside", answers_from_inside);
}

#[test]
fn a_neighbour_on_the_uplink_learns_nothing_of_what_is_inside() {
    run(&["ping", TUN], || {
        for keys in ["", ", kill-switch: true"] {
            let lab = Topology::desktop();
            let _sites = Sites::open(&lab);
            let tunproxy = profile(keys, "", "'MATCH,DIRECT'").start(&lab.host);
            tunproxy.assert_carries(&lab.host);
            let own = GATEWAY_V4.parse().expect("an address");
            probe(&lab.gateway, "eth1", own, HOST_V4.parse().expect("an address"), [HOST_V4, HOST_V6], &INNER);
            tunproxy.assert_carries(&lab.host);
        }
    });
}

#[test]
fn a_lan_client_learns_nothing_of_the_devices_own_address() {
    run(&["ping", TUN], || {
        let lab = Topology::with_lan();
        let _sites = Sites::open(&lab);
        let tunproxy = profile(", auto-forward: true", "", "'MATCH,DIRECT'").start(&lab.host);
        // Fake addresses are for clients to use.
        tunproxy.assert_carries(lab.client());
        let (own, host) = (CLIENT_V4.parse().expect("an address"), HOST_LAN_V4.parse().expect("an address"));
        let device = [INNER[0], INNER[3]];
        probe(lab.client(), "eth0", own, host, [HOST_LAN_V4, HOST_LAN_V6], &device);
    });
}

#[test]
fn segments_that_a_neighbour_forges_for_a_flow_inside_get_no_answer() {
    run(&[TUN], || {
        for keys in ["", ", kill-switch: true"] {
            let lab = Topology::desktop();
            let _sites = Sites::open(&lab);
            let tunproxy = profile(keys, "", "'MATCH,DIRECT'").start(&lab.host);
            let mut session = Session::open(&lab.host, at("0.0.0.0:0"), at(&format!("{V4}:7")));
            assert_eq!(session.alive().map(drop), Ok(()));
            let mut capture = Capture::start(&lab.gateway, "eth1");
            let link = (frames::mac(&lab.host, "eth0"), frames::mac(&lab.gateway, "eth1"));
            let (site, port) = (V4.parse().expect("an address"), session.port());
            let forged = |to: Ipv4Addr, port: u16| -> Vec<Vec<u8>> {
                // SYN, ACK, SYN+ACK, RST, FIN+ACK.
                [0x02, 0x10, 0x12, 0x04, 0x11].map(|flags| segment(link, (site, 7), (to, port), flags)).into()
            };
            inject(&lab.gateway, "eth1", &forged(Ipv4Addr::new(198, 18, 0, 1), port));
            // The host's own stack does answer what it is sent: so would the flow's.
            inject(&lab.gateway, "eth1", &forged(HOST_V4.parse().expect("an address"), 4242));
            let reset =
                |packet: &Packet| packet.ip.is_some_and(|ip| ip.source.to_string() == format!("{HOST_V4}:4242"));
            let answered =
                world::poll_until(Duration::from_secs(10), || (!seen(&mut capture, reset).is_empty()).then_some(()));
            assert!(answered.is_some(), "an answer of the host can be seen");
            assert_eq!(seen(&mut capture, answers_from_inside), Vec::<String>::new(), "{keys}");
            let of_the_flow = |packet: &Packet| packet.ip.is_some_and(|ip| ip.source.port() == port);
            assert_eq!(seen(&mut capture, of_the_flow), Vec::<String>::new(), "{keys}");
            assert_eq!(session.alive().map(drop), Ok(()), "and the flow lives on");
            assert!(tunproxy.stop().success());
        }
    });
}

#[test]
fn a_datagram_that_a_neighbour_forges_pulls_no_flow_out_of_a_closed_host() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        // A server without an address of its own is there before; its answers leave as they were asked for.
        let at_host = Peers::new(&lab.host);
        let _server = at_host.udp_echo(at("0.0.0.0:5000"), &Record::default());
        let _tunproxy = profile(", kill-switch: true", "", "'MATCH,DIRECT'").start(&lab.host);
        let asked = lab.internet.enter(|| {
            let socket = UdpSocket::bind("203.0.113.50:0").expect("an address of the internet");
            socket.set_read_timeout(Some(Duration::from_secs(20))).expect("a time-out");
            socket.connect(format!("{HOST_V4}:5000")).expect("a peer, from which alone answers are taken");
            socket.send(b"ask").expect("a question");
            socket.recv(&mut [0; 16])
        });
        assert_eq!(asked.ok(), Some(3), "a server of the host is still one");
        let socket = lab.host.enter(|| UdpSocket::bind("0.0.0.0:0").expect("a socket"));
        socket.set_read_timeout(Some(Duration::from_secs(20))).expect("a time-out");
        let port = socket.local_addr().expect("an address").port();
        let echo = |word: &str| {
            socket.send_to(word.as_bytes(), format!("{V4}:7")).expect("it is sent");
            let length = socket.recv(&mut [0; 64]).expect("an echo");
            assert_eq!(length, word.len());
        };
        echo("before");
        let mut capture = Capture::start(&lab.gateway, "eth1");
        let link = (frames::mac(&lab.host, "eth0"), frames::mac(&lab.gateway, "eth1"));
        let (site, host) = (V4.parse().expect("an address"), HOST_V4.parse().expect("an address"));
        inject(&lab.gateway, "eth1", &[frames::datagram(link, (site, 7), (host, port), b"forged")]);
        let mut forged = [0; 64];
        assert_eq!(socket.recv(&mut forged).ok(), Some(6), "it comes, since the socket takes from anybody");
        capture.prove(|mark| echo(mark));
        let of_the_flow =
            |packet: &Packet| packet.ip.is_some_and(|ip| ip.source.to_string() == format!("{HOST_V4}:{port}"));
        assert_eq!(seen(&mut capture, of_the_flow), Vec::<String>::new(), "DIRECT leaves from a port of ours");
    });
}

/// Whom a socket of the client's hears from, and what it says; it waits for one datagram.
fn hear(socket: &UdpSocket) -> (String, SocketAddr) {
    let mut buffer = [0; 64];
    let (length, from) = socket.recv_from(&mut buffer).expect("a datagram");
    (String::from_utf8_lossy(&buffer[..length]).into_owned(), from)
}

#[test]
fn a_forged_question_to_the_port_of_a_connected_client_does_not_make_it_a_server() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let tunproxy = profile("", "", "'MATCH,DIRECT'").start(&lab.host);
        for (site, host) in [(format!("{V4}:9999"), HOST_V4), ("[2001:db8:1::10]:9999".to_owned(), HOST_V6)] {
            let peer = at(&site);
            let bound = move |address: SocketAddr| {
                let socket = UdpSocket::bind(address).expect("a socket");
                socket.set_read_timeout(Some(Duration::from_secs(30))).expect("a time limit");
                socket
            };
            let site = lab.internet.enter(move || bound(peer));
            let any = SocketAddr::new(if peer.is_ipv4() { [0; 4].into() } else { [0; 16].into() }, 0);
            let client = lab.host.enter(move || {
                let client = bound(any);
                client.connect(peer).map(|()| client).expect("a peer")
            });
            client.send(b"first").expect("it is sent");
            let (said, ours) = hear(&site);
            let port = client.local_addr().expect("an address").port();
            assert!(said == "first" && ours.port() != port, "it went through the TUN: {ours}");
            // The peer's own address and port, to the client's, past the flow. Another one behind it shows that it has come.
            let probe = lab.host.enter(move || bound(any));
            let outside = |port: u16| SocketAddr::new(host.parse().expect("an address"), port);
            site.send_to(b"forged", outside(port)).expect("it is sent");
            site.send_to(b"behind", outside(probe.local_addr().expect("an address").port())).expect("it is sent");
            assert_eq!(hear(&probe).0, "behind");
            client.send(b"second").expect("it is sent");
            assert_eq!(hear(&site), ("second".to_owned(), ours), "it stays inside\n{}", tunproxy.output());
            // A server on the wildcard address is asked from outside and answers as such.
            let answer_to = site.local_addr().expect("an address");
            probe.send_to(b"answer", answer_to).expect("it is sent");
            let (said, from) = hear(&site);
            assert_eq!((said.as_str(), from), ("answer", outside(probe.local_addr().expect("an address").port())));
        }
    });
}
