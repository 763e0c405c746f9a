//! UDP as a game or a call sees it (RFC 4787): one outer port for all peers, open to all of them, and for each other.

use std::net::{SocketAddr, UdpSocket};
use std::time::Duration;

use super::support::Netns;
use super::support::netns::veth;
use super::support::peers::Record;
use super::support::peers::proxy::Door;
use super::support::topology::{HOST_LAN_V4, HOST_V4};
use super::support::tunproxy::{Place, Tunproxy};
use super::support::{Topology, run};

const TUN: &str = "/dev/net/tun";
const PROXY: &str = "203.0.113.3";
/// The second server of a test for the kind of a NAT (RFC 5780).
const OTHER: &str = "203.0.113.11";
/// Only silence ever takes that long.
const PATIENCE: Duration = Duration::from_secs(10);

fn start(lab: &Topology, outbound: &str) -> Tunproxy {
    let profile = format!(
        "
mode: rule
ipv6: true
log-level: info
tun: {{ enable: true, auto-route: true, dns-hijack: ['any:53'] }}
dns: {{ enable: true, listen: '{HOST_LAN_V4}:53', enhanced-mode: fake-ip, nameserver: [192.168.1.1] }}
proxies: [{{ name: socks, type: socks5, server: {PROXY}, port: 1080, udp: true }}]
rules: ['MATCH,{outbound}']
"
    );
    let tunproxy = Place::new(&profile).start(&lab.host);
    tunproxy.assert_carries(&lab.host);
    tunproxy
}

fn socket(ns: &Netns, at: &str) -> UdpSocket {
    let at = at.to_owned();
    let socket = ns.enter(move || UdpSocket::bind(&at)).expect("a socket");
    socket.set_read_timeout(Some(PATIENCE)).expect("our own socket");
    socket
}

fn heard(socket: &UdpSocket) -> Option<(String, SocketAddr)> {
    let mut space = [0; 2048];
    let (length, from) = socket.recv_from(&mut space).ok()?;
    Some((String::from_utf8_lossy(&space[..length]).into_owned(), from))
}

/// Servers that note from where they are asked, at two addresses and two ports.
struct Stun {
    seen: Record,
    _peers: Vec<super::support::peers::Peer>,
    door: Door,
}

impl Stun {
    const SERVERS: [&str; 4] = ["203.0.113.10:3478", "203.0.113.10:3479", "203.0.113.11:3478", "203.0.113.11:3479"];

    fn open(lab: &Topology) -> Self {
        let (seen, door) = (Record::default(), Door::default());
        let mut peers: Vec<_> =
            Self::SERVERS.iter().map(|at| lab.sites.udp_echo(at.parse().expect("an address"), &seen)).collect();
        peers.push(lab.sites.socks5(format!("{PROXY}:1080").parse().expect("an address"), door.clone()));
        Self { seen, _peers: peers, door }
    }

    /// Asks all servers from `socket`; returns the port that they saw, which must be one.
    fn outer_port(&self, socket: &UdpSocket) -> u16 {
        let before = self.seen.all().len();
        for server in Self::SERVERS {
            socket.send_to(b"who am I?", server).expect("sent");
            assert_eq!(heard(socket).map(|(_, from)| from.to_string()).as_deref(), Some(server));
        }
        let seen = self.seen.all();
        let ports: Vec<u16> =
            seen[before..].iter().map(|from| from.parse::<SocketAddr>().expect("an address").port()).collect();
        assert!(ports.len() == 4 && ports.iter().all(|port| *port == ports[0]), "{:?}", &seen[before..]);
        ports[0]
    }
}

/// Where the world sees a client's socket: at this host, or at the proxy.
fn outer(outbound: &str, port: u16) -> String {
    // The lab's proxy sends from whatever address is asked: those of its peers, which are its own as well.
    let host = if outbound == "DIRECT" { HOST_V4 } else { OTHER };
    format!("{host}:{port}")
}

#[test]
fn the_outer_port_is_one_for_all_peers_and_anybody_may_write_to_it() {
    run(&[TUN], || {
        let lab = Topology::with_lan();
        let stun = Stun::open(&lab);
        for outbound in ["DIRECT", "socks"] {
            let tunproxy = start(&lab, outbound);
            for ns in [&lab.host, lab.client()] {
                let client = socket(ns, "0.0.0.0:0");
                let to = outer(outbound, stun.outer_port(&client));
                // Somebody whom the client never wrote to, from another address and port.
                let stranger = socket(&lab.internet, "203.0.113.99:9999");
                stranger.send_to(b"hello", &to).expect("sent");
                let said = || format!("{outbound} {} {to}\n{}", ns.name(), tunproxy.output());
                let (words, from) = heard(&client).unwrap_or_else(|| panic!("{}", said()));
                assert_eq!((words.as_str(), from.to_string().as_str()), ("hello", "203.0.113.99:9999"), "{}", said());
                client.send_to(b"hello yourself", from).expect("sent");
                assert_eq!(heard(&stranger).map(|(words, _)| words).as_deref(), Some("hello yourself"), "{}", said());
                assert_eq!(outer(outbound, stun.outer_port(&client)), to, "{}", said());
            }
        }
        assert!(stun.door.requests.count(|line| line.starts_with("udp ")) > 0, "the proxy carried its part");
    });
}

/// Another client on a network of its own behind the host.
fn second_client(lab: &Topology) -> Netns {
    let second = Netns::new("second");
    veth(&lab.host, "lan1", &second, "eth0");
    lab.host.address("lan1", &["10.8.0.1/24"]);
    second.address("eth0", &["10.8.0.2/24"]);
    second.routes(&["default via 10.8.0.1"]);
    second
}

#[test]
fn two_clients_behind_us_reach_each_other_by_their_outer_addresses() {
    run(&[TUN], || {
        let lab = Topology::with_lan();
        let second = second_client(&lab);
        let stun = Stun::open(&lab);
        for outbound in ["DIRECT", "socks"] {
            let tunproxy = start(&lab, outbound);
            for (first, other) in [(&second, lab.client()), (&lab.host, lab.client()), (&lab.host, &lab.host)] {
                let (one, two) = (socket(first, "0.0.0.0:0"), socket(other, "0.0.0.0:0"));
                let (to_one, to_two) = (stun.outer_port(&one), stun.outer_port(&two));
                let said = |what: &str| {
                    format!("{outbound}, {} and {}: {what}\n{}", first.name(), other.name(), tunproxy.output())
                };
                one.send_to(b"one to two", outer(outbound, to_two)).expect("sent");
                let (words, from) = heard(&two).unwrap_or_else(|| panic!("{}", said("two hears nothing")));
                assert_eq!(words, "one to two");
                two.send_to(b"two answers", from).expect("sent");
                let (words, _) = heard(&one).unwrap_or_else(|| panic!("{}", said("one hears no answer")));
                assert_eq!(words, "two answers");
                two.send_to(b"two to one", outer(outbound, to_one)).expect("sent");
                let (words, _) = heard(&one).unwrap_or_else(|| panic!("{}", said("one hears nothing")));
                assert_eq!(words, "two to one");
            }
        }
    });
}

#[test]
fn who_writes_to_a_neighbours_outer_address_does_so_from_its_own_outer_address() {
    run(&[TUN], || {
        let lab = Topology::with_lan();
        let (second, stun) = (second_client(&lab), Stun::open(&lab));
        let tunproxy = start(&lab, "DIRECT");
        let (host, client) = (&lab.host, lab.client());
        for (first, other) in [(client, client), (&second, client), (host, client), (client, host), (host, host)] {
            let (one, two) = (socket(first, "0.0.0.0:0"), socket(other, "0.0.0.0:0"));
            let outer = [&one, &two].map(|socket| outer("DIRECT", stun.outer_port(socket)));
            for (from, to, sender, words) in [(&one, &two, 0, "one to two"), (&two, &one, 1, "two to one")] {
                from.send_to(words.as_bytes(), &outer[1 - sender]).expect("sent");
                let said = || format!("{} and {}: {words}\n{}", first.name(), other.name(), tunproxy.output());
                let heard = heard(to).unwrap_or_else(|| panic!("{}", said()));
                assert_eq!((heard.0.as_str(), heard.1.to_string()), (words, outer[sender].clone()), "{}", said());
            }
        }
    });
}

#[test]
fn neighbours_write_to_each_others_outer_addresses_in_ipv6_too() {
    run(&[TUN], || {
        let lab = Topology::with_lan();
        let seen = Record::default();
        let server = "[2001:db8:1::10]:3478";
        let _server = lab.sites.udp_echo(server.parse().expect("an address"), &seen);
        let tunproxy = start(&lab, "DIRECT");
        let sockets = [(); 2].map(|()| socket(lab.client(), "[::]:0"));
        let outer = [0, 1].map(|at| {
            sockets[at].send_to(b"who am I?", server).expect("sent");
            assert!(heard(&sockets[at]).is_some(), "{}", tunproxy.output());
            seen.all()[at].clone()
        });
        sockets[0].connect(&outer[1]).expect("a route");
        sockets[1].connect(&outer[0]).expect("a route");
        for (from, to) in [(0, 1), (1, 0)] {
            sockets[from].send(b"hello").expect("sent");
            assert!(heard(&sockets[to]).is_some(), "{from} to {to}\n{}", tunproxy.output());
        }
    });
}
