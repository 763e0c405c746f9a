//! The kernel forgets its connections, all at once, as `conntrack -F` and some firewalls' reloads make it.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use socket2::{Domain, Socket, Type};

use super::leaks::at;
use super::support::client::name_of;
use super::support::peers::Peer;
use super::support::peers::proxy::Door;
use super::support::topology::{CLIENT_V4, CLIENT_V6, HOST_V4, HOST_V6};
use super::support::tunproxy::{Place, Tunproxy};
use super::support::{Capture, Netns, Topology, run};

const TUN: &str = "/dev/net/tun";
const PATIENCE: Duration = Duration::from_secs(30);
/// Where the sites listen, and nobody else.
const SITE_PORT: u16 = 9400;
/// Where the servers of the host and of the LAN client listen.
const SERVICE_PORT: u16 = 6000;

fn profile(keys: &str) -> Place {
    Place::new(&format!(
        "
mode: rule
ipv6: true
log-level: info
tun: {{ enable: true, auto-forward: true{keys} }}
dns: {{ enable: true, enhanced-mode: fake-ip, nameserver: ['192.168.1.1:5353'] }}
proxies: [{{ name: up, type: socks5, server: 203.0.113.3, port: 1080, udp: true }}]
rules: ['DST-PORT,{SITE_PORT},up', 'MATCH,REJECT']
"
    ))
}

/// A connection with both its ends in hand.
struct Pair {
    what: String,
    dialled: TcpStream,
    accepted: TcpStream,
}

fn listen(ns: &Netns, address: SocketAddr) -> TcpListener {
    ns.enter(move || TcpListener::bind(address)).expect("a listener")
}

impl Pair {
    fn open(what: &str, listener: &TcpListener, from: (&Netns, SocketAddr), to: SocketAddr) -> Self {
        let (ns, source) = from;
        let dialled = ns.enter(move || -> io::Result<TcpStream> {
            let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
            socket.bind(&source.into())?;
            socket.connect_timeout(&to.into(), PATIENCE)?;
            Ok(socket.into())
        });
        let dialled = dialled.unwrap_or_else(|error| panic!("{what}: {error}"));
        let accepted = listener.accept().expect("a connection").0;
        for end in [&dialled, &accepted] {
            end.set_read_timeout(Some(PATIENCE)).expect("a time limit");
        }
        let pair = Self { what: format!("{what} to {to}"), dialled, accepted };
        assert_eq!((pair.up(), pair.down()), (Ok(()), Ok(())), "{}", pair.what);
        pair
    }

    /// Whoever dialled speaks, and is heard.
    fn up(&self) -> Result<(), String> {
        says(&self.dialled, &self.accepted)
    }

    /// Whoever was dialled speaks.
    fn down(&self) -> Result<(), String> {
        says(&self.accepted, &self.dialled)
    }
}

fn says(mut from: &TcpStream, mut to: &TcpStream) -> Result<(), String> {
    let mut heard = [0; 4];
    let passed = from.write_all(b"word").and_then(|()| to.read_exact(&mut heard));
    passed.map_err(|error| name_of(&error))
}

/// What goes out, from the host and from its LAN client: two connections of each, and where they end.
fn outwards(lab: &Topology, listeners: &[TcpListener]) -> Vec<Pair> {
    let mut pairs = Vec::new();
    for listener in listeners {
        let to = listener.local_addr().expect("its address");
        let any = at(if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" });
        for ns in [&lab.host, &lab.host, lab.client(), lab.client()] {
            pairs.push(Pair::open(ns.name(), listener, (ns, any), to));
        }
    }
    pairs
}

/// What comes in: to servers of the host, or of the LAN client.
fn inwards(lab: &Topology, listener: &TcpListener, addresses: [&str; 2]) -> Vec<Pair> {
    let outside = [at("203.0.113.50:0"), at("[2001:db8:1::50]:0")];
    let pair = |(address, source): (&str, SocketAddr)| {
        let to = SocketAddr::new(address.parse().expect("an address"), SERVICE_PORT);
        [(); 2].map(|()| Pair::open("the internet", listener, (&lab.internet, source), to))
    };
    addresses.into_iter().zip(outside).flat_map(pair).collect()
}

fn forget(ns: &Netns) {
    ns.run("conntrack", &["-F"]);
}

/// Somebody outside who asks a server of the host.
fn asks(socket: &UdpSocket, server: &UdpSocket, to: SocketAddr) -> Result<(), String> {
    let mut heard = [0; 16];
    let answered = socket.send_to(b"question", to).and_then(|_| server.recv_from(&mut heard)).and_then(|(_, from)| {
        server.send_to(b"answer", from)?;
        let (length, from) = socket.recv_from(&mut heard)?;
        if (&heard[..length], from) == (b"answer", to) { Ok(()) } else { Err(io::ErrorKind::InvalidData.into()) }
    });
    answered.map_err(|error| name_of(&error))
}

fn datagrams(ns: &Netns, address: &'static str) -> UdpSocket {
    let socket = ns.enter(move || UdpSocket::bind(at(address))).expect("a socket");
    socket.set_read_timeout(Some(PATIENCE)).expect("a time limit");
    socket
}

fn assert_goes_on(pairs: &[Pair], tunproxy: &Tunproxy, keys: &str) {
    // Of each two connections, one hears from the one end first, and the other from the other.
    for (number, pair) in pairs.iter().enumerate() {
        let heard = if number % 2 == 0 { [pair.up(), pair.down()] } else { [pair.down(), pair.up()] };
        assert_eq!(heard, [Ok(()), Ok(())], "{} ({number}) {keys}\n{}", pair.what, tunproxy.output());
    }
}

fn site_peers(lab: &Topology) -> Peer {
    lab.sites.socks5(at("203.0.113.3:1080"), Door::default())
}

#[test]
fn connections_that_the_kernel_forgets_go_on_and_leave_as_they_came() {
    run(&["conntrack", TUN], || {
        for keys in ["", ", kill-switch: true"] {
            let lab = Topology::with_lan();
            let _proxy = site_peers(&lab);
            let sites = ["203.0.113.10", "2001:db8:1::10"]
                .map(|site| listen(&lab.internet, SocketAddr::new(site.parse().expect("an address"), SITE_PORT)));
            let services = [&lab.host, lab.client()].map(|ns| listen(ns, at(&format!("[::]:{SERVICE_PORT}"))));
            let server = datagrams(&lab.host, "[::]:6001");
            let mut capture = Capture::start(&lab.host, "eth0");
            for site in &sites {
                let to = site.local_addr().expect("its address");
                let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
                capture.prove(|mark| drop(datagrams(&lab.host, any).send_to(mark.as_bytes(), to)));
            }
            let older = inwards(&lab, &services[0], [HOST_V4, HOST_V6]);
            let tunproxy = profile(keys).start(&lab.host);
            tunproxy.assert_carries(lab.client());
            let out = outwards(&lab, &sites);
            let to_host = inwards(&lab, &services[0], [HOST_V4, HOST_V6]);
            let to_lan = inwards(&lab, &services[1], [CLIENT_V4, CLIENT_V6]);
            let askers = [("203.0.113.50:0", HOST_V4), ("[2001:db8:1::50]:0", HOST_V6)].map(|(from, to)| {
                (datagrams(&lab.internet, from), SocketAddr::new(to.parse().expect("an address"), 6001))
            });
            for round in 0..3 {
                for pairs in [&out, &to_host, &older] {
                    forget(&lab.host);
                    assert_goes_on(pairs, &tunproxy, &format!("{round}{keys}"));
                }
                forget(&lab.host);
                for (asker, to) in &askers {
                    assert_eq!(asks(asker, &server, *to), Ok(()), "{to} {round}{keys}\n{}", tunproxy.output());
                }
            }
            forget(&lab.host);
            for (number, pair) in to_lan.iter().enumerate() {
                if number % 2 == 0 {
                    assert_eq!([pair.up(), pair.down()], [Ok(()), Ok(())], "{}", pair.what);
                } else {
                    // Nobody can tell it from a question of the client's own. It ends, and each end hears of it when it speaks.
                    for mut end in [&pair.accepted, &pair.dialled] {
                        end.write_all(b"word").expect("it is sent");
                        let heard = end.read(&mut [0]).map_err(|error| name_of(&error));
                        assert_eq!(heard, Err("ECONNRESET".to_owned()), "{} {keys}", pair.what);
                    }
                }
            }
            capture.assert_nothing("past the proxy", |packet| {
                let marked = packet.contains(b"marked-payload");
                !marked && packet.ip.is_some_and(|ip| ip.destination.port() == SITE_PORT)
            });
            assert!(tunproxy.stop().success());
        }
    });
}
