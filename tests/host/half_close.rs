//! A connection of which one half is closed lives as long as the other half wants, with no byte on it meanwhile.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::support::client::name_of;
use super::support::lengths::seconds;
use super::support::peers::digest::{Sha256, of_pattern};
use super::support::peers::proxy::Door;
use super::support::peers::tcp::send_pattern;
use super::support::peers::{Peer, Peers, Record};
use super::support::sites::{V4, V6};
use super::support::topology::HOST_LAN_V4;
use super::support::tunproxy::Place;
use super::support::world::poll_until;
use super::support::{Topology, run};

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

#[test]
fn a_half_that_is_closed_leaves_the_other_open_through_a_long_silence() {
    run(&[TUN], || {
        let lab = Topology::with_lan();
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
        let tunproxy = Place::new(&format!(
            "
ipv6: true
log-level: info
tun: {{ enable: true }}
dns: {{ enable: true, listen: '{HOST_LAN_V4}:53', enhanced-mode: fake-ip, nameserver: [192.168.1.1] }}
proxies:
- {{ name: socks, type: socks5, server: 203.0.113.3, port: 1080 }}
- {{ name: http, type: http, server: 203.0.113.3, port: 8080 }}
rules: [{}, 'MATCH,REJECT']
",
            rules.join(", ")
        ))
        .start(&lab.host);
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
