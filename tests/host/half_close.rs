//! A connection of which one half is closed lives as long as the other half wants, with no byte on it meanwhile.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::support::client::{act_in, name_of};
use super::support::lengths::seconds;
use super::support::peers::digest::{Sha256, of_pattern};
use super::support::peers::proxy::Door;
use super::support::peers::tcp::send_pattern;
use super::support::peers::{Peer, Peers, Record};
use super::support::sites::{V4, V6};
use super::support::topology::{HOST_LAN_V4, HOST_V4, HOST_V6};
use super::support::tunproxy::{Place, Tunproxy};
use super::support::world::poll_until;
use super::support::{Capture, Topology, run};

const TUN: &str = "/dev/net/tun";
/// How long nothing is said: an hour by 3600.
const SILENCE: &str = "TUNPROXY_HALF_CLOSE";
/// For what comes after the silence.
const PATIENCE: Duration = Duration::from_secs(30);
/// What travels over the half that is open: more than any buffer on the way holds.
const LENGTH: u64 = 3_000_000;
/// The ways out, by the last digit of a port.
const WAYS: [&str; 3] = ["DIRECT", "socks", "http"];

fn at(host: &str, port: usize) -> SocketAddr {
    format!("{host}:{port}").parse().expect("an address")
}

/// Reads to the client's end, waits, and only then answers.
fn answers_late(sites: &Peers, address: SocketAddr, silence: Duration) -> Peer {
    sites.tcp(address, move |mut stream, _| async move {
        stream.read_to_end(&mut Vec::new()).await?;
        tokio::time::sleep(silence).await;
        send_pattern(&mut stream, LENGTH).await?;
        stream.shutdown().await
    })
}

fn connect(to: SocketAddr, silence: Duration) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&to, PATIENCE)?;
    stream.set_read_timeout(Some(silence + PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// A client that has said all, and waits for the answer: its digest.
fn waits(to: SocketAddr, silence: Duration) -> io::Result<String> {
    let mut stream = connect(to, silence)?;
    stream.write_all(b"a question")?;
    stream.shutdown(Shutdown::Write)?;
    let (mut answer, mut sha) = (Vec::new(), Sha256::new());
    stream.read_to_end(&mut answer)?;
    sha.update(&answer);
    Ok(sha.hex())
}

/// A client that has been told all, and has something to say to that, after a while; returns what it was told.
fn replies_late(to: SocketAddr, silence: Duration, reply: &str) -> io::Result<String> {
    let mut stream = connect(to, silence)?;
    stream.write_all(format!("down {LENGTH}\n").as_bytes())?;
    let (mut told, mut sha) = (Vec::new(), Sha256::new());
    stream.read_to_end(&mut told)?;
    sha.update(&told);
    std::thread::sleep(silence);
    stream.write_all(reply.as_bytes())?;
    stream.shutdown(Shutdown::Write)?;
    // The site has nothing more to say: its end is known, and no reset may come.
    stream.read_to_end(&mut told)?;
    Ok(sha.hex())
}

fn start(lab: &Topology, keys: &str, rules: &str) -> Tunproxy {
    let place = Place::new(&format!(
        "
ipv6: true
log-level: info
tun: {{ enable: true, {keys} }}
dns: {{ enable: true, listen: '{HOST_LAN_V4}:53', enhanced-mode: fake-ip, nameserver: [192.168.1.1] }}
proxies:
- {{ name: socks, type: socks5, server: 203.0.113.3, port: 1080 }}
- {{ name: http, type: http, server: 203.0.113.3, port: 8080 }}
rules: [{rules}]
"
    ));
    let tunproxy = place.start(&lab.host);
    tunproxy.assert_carries(&lab.host);
    tunproxy
}

/// Whom it hears it answers at once, and once more when the kernels on the way have forgotten it.
fn speaks_first_later(sites: &Peers, address: SocketAddr, heard: &Record) -> Peer {
    let heard = heard.clone();
    sites.udp(address, move |socket| async move {
        let mut space = [0; 2048];
        loop {
            let (length, from) = socket.recv_from(&mut space).await?;
            let word = String::from_utf8_lossy(&space[..length]).into_owned();
            heard.note(word.clone());
            socket.send_to(&space[..length], from).await?;
            if word == "first" {
                tokio::time::sleep(Duration::from_secs(5)).await;
                socket.send_to(b"later", from).await?;
            }
        }
    })
}

/// A client that says something only when the site has spoken.
fn talks_again(to: SocketAddr) -> io::Result<()> {
    let socket = UdpSocket::bind(if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" })?;
    socket.connect(to)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    let mut space = [0; 2048];
    let mut hears = |word: &str| match socket.recv(&mut space) {
        Ok(length) if space[..length] == *word.as_bytes() => Ok(()),
        Ok(_) => Err(io::ErrorKind::InvalidData.into()),
        Err(error) => Err(error),
    };
    socket.send(b"first")?;
    hears("first")?;
    hears("later")?;
    socket.send(b"again")?;
    hears("again")
}

fn is_uplink(address: IpAddr) -> bool {
    [HOST_V4, HOST_V6].iter().any(|own| address.to_string() == *own)
}

/// How long a kernel remembers a connection of which nothing is heard, in seconds.
fn remember_for(lab: &Topology, seconds: &str) {
    for ns in [&lab.host, &lab.gateway] {
        for state in
            ["tcp_timeout_established", "tcp_timeout_close_wait", "tcp_timeout_fin_wait", "tcp_timeout_last_ack"]
        {
            ns.sysctl(&format!("net.netfilter.nf_conntrack_{state}"), seconds);
        }
        for state in ["udp_timeout", "udp_timeout_stream"] {
            ns.sysctl(&format!("net.netfilter.nf_conntrack_{state}"), seconds);
        }
    }
}

#[test]
fn datagrams_of_a_flow_that_the_kernel_has_forgotten_stay_inside_when_the_site_speaks_first() {
    run(&[TUN], || {
        for keys in ["", "kill-switch: true"] {
            let lab = Topology::with_lan();
            remember_for(&lab, "2");
            let heard = Record::default();
            let sites = [V4, V6].map(|site| speaks_first_later(&lab.sites, at(site, 9300), &heard));
            let tunproxy = start(&lab, keys, "'MATCH,DIRECT'");
            let mut capture = Capture::start(&lab.host, "eth0");
            let mut clients = Vec::new();
            for ns in [&lab.host, lab.client()] {
                for site in &sites {
                    let to = site.address;
                    clients.push((ns, to, ns.spawn(move || talks_again(to))));
                }
            }
            for (ns, to, client) in clients {
                let outcome = client.join().expect("no panic").map_err(|error| name_of(&error));
                assert_eq!(outcome, Ok(()), "{} to {to}, {keys}\n{}", ns.name(), tunproxy.output());
            }
            // What went through us has left from the uplink's own address.
            capture.prove(|mark| drop(act_in(&lab.host, &format!("datagram {}:9300 {mark} 1", V4))));
            capture.assert_nothing("a client's packet past us", |packet| {
                packet.ip.is_some_and(|ip| ip.destination.port() == 9300 && !is_uplink(ip.source.ip()))
            });
        }
    });
}

#[test]
fn a_half_that_is_closed_leaves_the_other_open_through_a_long_silence() {
    run(&[TUN], || {
        let lab = Topology::with_lan();
        remember_for(&lab, "2");
        let (silence, door, replies) = (seconds(SILENCE, 3), Door::default(), Record::default());
        let mut peers = vec![
            lab.sites.socks5(at("203.0.113.3", 1080), door.clone()),
            lab.sites.http_proxy(at("203.0.113.3", 8080), door),
        ];
        let mut rules = Vec::new();
        for (number, way) in WAYS.iter().enumerate() {
            for site in [V4, V6] {
                peers.push(answers_late(&lab.sites, at(site, 9100 + number), silence));
                peers.push(lab.sites.tcp_exchange(at(site, 9200 + number), &replies));
            }
            rules.push(format!("'DST-PORT,{}/{},{way}'", 9100 + number, 9200 + number));
        }
        let tunproxy = start(&lab, "", &format!("{}, 'MATCH,REJECT'", rules.join(", ")));
        let mut clients = Vec::new();
        for (number, way) in WAYS.iter().enumerate() {
            for ns in [&lab.host, lab.client()] {
                for site in [V4, V6] {
                    let what = format!("{way}, {} to {site}", ns.name());
                    let (late, early, reply) = (at(site, 9100 + number), at(site, 9200 + number), what.clone());
                    let waiting = ns.spawn(move || waits(late, silence));
                    let replying = ns.spawn(move || replies_late(early, silence, &reply));
                    clients.push((what, waiting, replying));
                }
            }
        }
        let digest = of_pattern(LENGTH);
        for (what, waiting, replying) in clients {
            for (half, client) in [("the client's", waiting), ("the site's", replying)] {
                let heard = client.join().expect("no panic").map_err(|error| name_of(&error));
                assert_eq!(heard.as_ref(), Ok(&digest), "{half} half closed, by {what}\n{}", tunproxy.output());
            }
            // The site says so itself, when it has read to the end.
            let heard = || (replies.count(|line| line == format!("down {what}")) == 1).then_some(());
            assert!(poll_until(PATIENCE, heard).is_some(), "{what}: {:?}", replies.all());
        }
    });
}
