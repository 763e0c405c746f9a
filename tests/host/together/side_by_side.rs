//! Two runs that both take all traffic: who was there first has it, flows and names, and the other leaves it to that one.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs, UdpSocket};
use std::time::Duration;

use super::without_nft::WithoutNft;
use super::{TUN, end};
use crate::support::sites::{NAME, V4, V6};
use crate::support::tunproxy::{Place, Tunproxy};
use crate::support::{Dump, Netns, Sites, Topology, client, run};

/// Ranges that are nobody's else.
pub(super) const APART: Ranges =
    Ranges { fake: "198.19.0.1/16", fake6: "fdfe:dcba:9887::/64", device6: "fdfe:dcba:9886::1/126" };
/// The usual ones.
pub(super) const USUAL: Ranges =
    Ranges { fake: "198.18.0.1/16", fake6: "fdfe:dcba:9877::/64", device6: "fdfe:dcba:9876::1/126" };
/// Of IPv4 alone others than the usual.
const HALF: Ranges = Ranges { fake: APART.fake, ..USUAL };

/// With fake ranges that those apart lie within.
const WIDE: Ranges = Ranges { fake: "198.18.0.1/15", fake6: "fdfe:dcba:9880::/44", device6: USUAL.device6 };

#[derive(Clone, Copy)]
pub(super) struct Ranges {
    pub(super) fake: &'static str,
    fake6: &'static str,
    device6: &'static str,
}

pub(super) fn place(device: &str, ranges: Ranges, more: &str) -> Place {
    let Ranges { fake, fake6, device6 } = ranges;
    Place::new(&format!(
        "
mode: rule
ipv6: true
log-level: info
tun: {{ enable: true, auto-route: true, device: {device}, inet6-address: ['{device6}'], dns-hijack: ['any:53']{more} }}
dns:
  enable: true
  enhanced-mode: fake-ip
  fake-ip-range: {fake}
  fake-ip-range6: '{fake6}'
  nameserver: [192.168.1.1]
rules: ['MATCH,DIRECT']
"
    ))
}

/// Asks for the name several times, since what two do to each other need not happen each time; by an address in the LAN,
/// one beyond it, and over both transports.
fn assert_names_from(host: &Netns, ranges: Ranges) {
    let fake = &ranges.fake[..7];
    for _ in 0..3 {
        for server in ["192.168.1.1", "203.0.113.10", "2001:db8:1::10"] {
            for transport in ["+notcp", "+tcp"] {
                let at = format!("@{server}");
                let words = ["+tries=1", "+timeout=10", "+short", transport, &at, NAME, "A"];
                let answer = host.run("dig", &words);
                assert!(answer.starts_with(fake), "{words:?}: {answer}");
            }
        }
    }
}

/// A flow to an echo, which counts as one of that run's if it is open still when others have come and gone.
pub(super) struct Held(TcpStream);

impl Held {
    pub(super) fn open(host: &Netns, to: &str) -> Self {
        let to = to.to_owned();
        let stream = host.enter(move || TcpStream::connect(to)).expect("a flow");
        stream.set_read_timeout(Some(Duration::from_secs(20))).expect("a timeout");
        let mut held = Self(stream);
        held.assert_answers();
        held
    }

    pub(super) fn assert_answers(&mut self) {
        let mut answer = [0; 5];
        self.0.write_all(b"still").and_then(|()| self.0.read_exact(&mut answer)).expect("an echo");
        assert_eq!(&answer, b"still");
    }
}

/// Sockets of datagrams with a peer, at an address and behind a name, over both families.
struct Connected(Vec<UdpSocket>);

impl Connected {
    fn open(host: &Netns) -> Self {
        Self(host.enter(|| {
            let mut to: Vec<SocketAddr> = [V4, V6].map(|site| format!("{site}:7").parse().expect("an address")).into();
            to.extend((NAME, 7).to_socket_addrs().expect("fake addresses"));
            assert_eq!(to.iter().filter(|to| to.is_ipv6()).count(), 2, "{to:?}");
            to.into_iter().map(connected).collect()
        }))
    }

    fn assert_answers(&self) {
        for socket in &self.0 {
            socket
                .send(b"still")
                .and_then(|_| socket.recv(&mut [0; 5]))
                .unwrap_or_else(|error| panic!("{socket:?}: {error}"));
        }
    }

    /// Those of one family that the kernel has taken their peer from.
    fn ended(&self, ipv6: bool) -> usize {
        let of_family = |socket: &&UdpSocket| socket.local_addr().is_ok_and(|at| at.is_ipv6() == ipv6);
        self.0.iter().filter(of_family).filter(|socket| socket.peer_addr().is_err()).count()
    }
}

fn connected(to: SocketAddr) -> UdpSocket {
    let socket = UdpSocket::bind(if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }).expect("a socket");
    socket.connect(to).expect("a way");
    socket.set_read_timeout(Some(Duration::from_secs(20))).expect("a timeout");
    socket
}

/// Has a host use the sites, by address and by name, and holds that all of it went through `taking`.
fn assert_takes(host: &Netns, taking: &Tunproxy, other: Option<&Tunproxy>) {
    for (act, answer) in [
        (format!("ask {V4}:7 words"), "words"),
        (format!("ask {V6}:7 words"), "words"),
        (format!("datagram {V4}:7 words"), "words"),
        (format!("datagram {V6}:7 words"), "words"),
        (format!("ask {NAME}:7 words"), "words"),
    ] {
        assert_eq!(client::act_in(host, &act).as_deref(), Ok(answer), "{act}\n{}", taking.output());
    }
    for site in [V4, V6] {
        let words = format!("destination={site}:7001 ");
        let (said, _) = taking.line_after(|| client::act_in(host, &format!("ask {site}:7001 words")), &[&words]);
        assert_eq!(said.as_deref(), Ok("words"), "{}", taking.output());
    }
    let others = other.map(Tunproxy::output).unwrap_or_default();
    assert!(!others.contains("INFO flow:"), "{others}");
}

fn side_by_side(ranges: [Ranges; 2], more: &str) {
    let lab = Topology::desktop();
    let _sites = Sites::open(&lab);
    let before = Dump::take(&lab.host);
    hand_over(&lab.host, ranges, more);
    before.assert_same(&Dump::take(&lab.host));
}

/// One starts, then another; the first makes room and comes back, and then the second does.
fn hand_over(host: &Netns, ranges: [Ranges; 2], more: &str) {
    let places = [place("tun1", ranges[0], more), place("tun2", ranges[1], more)];
    let (mut taking, mut turn) = (places[0].start(host), 0);
    for _ in 0..3 {
        let mut held = [V4, V6].map(|site| Held::open(host, &format!("{site}:7")));
        let other = places[1 - turn].start(host);
        assert_names_from(host, ranges[turn]);
        assert_takes(host, &taking, Some(&other));
        held.iter_mut().for_each(Held::assert_answers);
        drop(held);
        end(taking);
        (taking, turn) = (other, 1 - turn);
        assert_names_from(host, ranges[turn]);
        assert_takes(host, &taking, None);
        assert!(!taking.output().contains("it is back"), "nobody took anything of its: {}", taking.output());
        assert!(!taking.output().contains("overlaps"), "{}", taking.output());
    }
    end(taking);
}

#[test]
fn with_the_same_ranges_the_first_answers_names_and_carries_flows() {
    run(&[TUN, "dig"], || side_by_side([USUAL, USUAL], ""));
}

#[test]
fn with_ranges_apart_the_first_answers_names_and_carries_flows() {
    run(&[TUN, "dig"], || side_by_side([USUAL, APART], ""));
}

#[test]
fn with_ranges_that_are_equal_in_part_the_first_answers_names_and_carries_flows() {
    run(&[TUN, "dig"], || side_by_side([USUAL, HALF], ""));
}

#[test]
fn with_kill_switches_and_ranges_apart_the_first_answers_names_and_carries_flows() {
    run(&[TUN, "dig"], || side_by_side([USUAL, APART], ", kill-switch: true"));
}

#[test]
fn with_kill_switches_and_the_same_ranges_the_first_answers_names_and_carries_flows() {
    run(&[TUN, "dig"], || side_by_side([USUAL, USUAL], ", kill-switch: true"));
}

fn without_nftables(ranges: [Ranges; 2]) {
    let lab = Topology::desktop();
    let _sites = Sites::open(&lab);
    let before = Dump::take(&lab.host);
    let hidden = WithoutNft::hide();
    hand_over(&lab.host, ranges, "");
    hidden.assert_was_hidden(&lab.host);
    drop(hidden);
    before.assert_same(&Dump::take(&lab.host));
}

#[test]
fn without_nftables_and_with_the_same_ranges_the_first_answers_names_and_carries_flows() {
    run(&[TUN, "dig"], || without_nftables([USUAL, USUAL]));
}

#[test]
fn without_nftables_and_with_ranges_apart_the_first_answers_names_and_carries_flows() {
    run(&[TUN, "dig"], || without_nftables([USUAL, APART]));
}

#[test]
fn without_nftables_and_with_ranges_that_are_equal_in_part_the_first_answers_names_and_carries_flows() {
    run(&[TUN, "dig"], || without_nftables([USUAL, HALF]));
}

#[test]
fn the_end_of_a_run_ends_nothing_of_one_whose_fake_range_lies_within_its_own() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let host = &lab.host;
        let before = Dump::take(host);
        let taking = place("tun1", APART, "").start(host);
        let wide = place("tun2", WIDE, "").start(host);
        let mut held = [V4, V6, NAME].map(|site| Held::open(host, &format!("{site}:7")));
        let connected = Connected::open(host);
        connected.assert_answers();
        end(wide);
        connected.assert_answers();
        held.iter_mut().for_each(Held::assert_answers);
        end(taking);
        assert_eq!((connected.ended(false), connected.ended(true)), (2, 2));
        before.assert_same(&Dump::take(host));
    });
}

#[test]
fn the_end_of_a_run_ends_what_is_its_alone_though_another_has_one_address_of_its() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let host = &lab.host;
        let before = Dump::take(host);
        let taking = place("tun1", USUAL, "").start(host);
        let other = place("tun2", HALF, "").start(host);
        let connected = Connected::open(host);
        connected.assert_answers();
        end(taking);
        // Of IPv6 both have the same: nobody can tell whose it is, and it goes on by the other.
        assert_eq!((connected.ended(false), connected.ended(true)), (2, 0));
        end(other);
        assert_eq!((connected.ended(false), connected.ended(true)), (2, 2));
        before.assert_same(&Dump::take(host));
    });
}
