//! What was begun through the TUN and lives on when it has gone: none of it goes another way.

mod meanwhile;

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use super::support::client::{act_in, name_of};
use super::support::packet::Packet;
use super::support::program::PATIENCE;
use super::support::sites::{NAME, V4, V6};
use super::support::tunproxy::Place;
use super::support::{Capture, Dump, Netns, Sites, Topology, run};

const TUN: &str = "/dev/net/tun";
/// What is said when nobody is there to carry it.
const SECRET: &[u8] = b"not-for-the-uplink";
/// For so long the connections go on speaking: TCP has tried again several times by then.
const SPOKEN_FOR: Duration = Duration::from_secs(3);

/// `more`: what the profile says about the TUN.
fn profile(more: &str) -> Place {
    Place::new(&format!(
        "
mode: rule
ipv6: true
log-level: info
tun: {{ enable: true{more} }}
dns: {{ enable: true, enhanced-mode: fake-ip, nameserver: [192.168.1.1] }}
rules: ['MATCH,DIRECT']
"
    ))
}

/// Connections of a program on the host to the echo: over both families, to addresses and to a name.
struct Open {
    streams: Vec<TcpStream>,
    datagrams: Vec<UdpSocket>,
    /// That say nothing more and wait for what comes.
    listening: Vec<TcpStream>,
}

impl Open {
    fn through(ns: &Netns) -> Self {
        ns.enter(|| {
            let mut to: Vec<SocketAddr> = [V4, V6].map(|site| format!("{site}:7").parse().expect("an address")).into();
            to.extend((NAME, 7).to_socket_addrs().expect("fake addresses"));
            assert_eq!(to.iter().filter(|to| to.is_ipv6()).count(), 2, "{to:?}");
            let streams = || to.iter().map(|to| stream(*to).unwrap_or_else(|error| panic!("{to}: {error}"))).collect();
            let datagrams =
                to.iter().map(|to| datagrams(*to).unwrap_or_else(|error| panic!("{to}: {error}"))).collect();
            Self { streams: streams(), datagrams, listening: streams() }
        })
    }

    /// Has all of them speak, for as long as it takes.
    fn speak(&mut self) {
        let end = Instant::now() + SPOKEN_FOR;
        while Instant::now() < end {
            self.streams.iter_mut().for_each(|stream| drop(stream.write(SECRET)));
            self.datagrams.iter().for_each(|socket| drop(socket.send(SECRET)));
            thread::sleep(Duration::from_millis(200));
        }
    }

    /// Holds that each connection has ended, and its program hears of that.
    fn assert_ended(&mut self, when: &str) {
        for stream in self.streams.iter_mut().chain(&mut self.listening) {
            let peer = stream.read(&mut [0; 64]).map_err(|error| name_of(&error));
            let hangs = |error: &String| ["EAGAIN", "ETIMEDOUT"].contains(&error.as_str());
            assert!(!peer.as_ref().is_err_and(hangs), "{when}: {stream:?} hangs");
        }
    }

    /// Holds that all of them still carry what is said.
    fn assert_alive(&mut self) {
        for socket in &self.datagrams {
            socket.send(b"hello").expect("a socket that nobody ended");
            socket.recv(&mut [0; 5]).expect("an answer");
        }
        for stream in self.streams.iter_mut().chain(&mut self.listening) {
            stream.write_all(b"hello").expect("a stream that nobody ended");
            stream.read_exact(&mut [0; 5]).expect("an answer");
        }
    }
}

fn stream(to: SocketAddr) -> io::Result<TcpStream> {
    let mut stream = TcpStream::connect_timeout(&to, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_nodelay(true)?;
    stream.write_all(b"hello")?;
    stream.read_exact(&mut [0; 5])?;
    stream.set_write_timeout(Some(Duration::from_millis(1)))?;
    Ok(stream)
}

fn datagrams(to: SocketAddr) -> io::Result<UdpSocket> {
    let socket = UdpSocket::bind(if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" })?;
    socket.connect(to)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.send(b"hello")?;
    socket.recv(&mut [0; 5])?;
    Ok(socket)
}

fn proven_capture(lab: &Topology) -> Capture {
    let mut capture = Capture::start(&lab.host, "eth0");
    for site in [V4, V6] {
        capture.prove(|mark| assert_eq!(act_in(&lab.host, &format!("datagram {site}:7 {mark}")), Ok(mark.to_owned())));
    }
    capture
}

/// Whether it is of a connection that was begun through the TUN, or on its way to a fake address.
fn is_of_the_tun(packet: &Packet) -> bool {
    let ours = |at: SocketAddr| {
        let ip = at.ip().to_string();
        ip.starts_with("198.18.") || ip.starts_with("198.19.") || ip.starts_with("fdfe:dcba:")
    };
    packet.contains(SECRET) || packet.ip.is_some_and(|ip| ours(ip.source) || ours(ip.destination))
}

/// Holds that what is new goes its own way.
fn assert_direct(ns: &Netns) {
    for site in [V4, V6] {
        assert_eq!(act_in(ns, &format!("datagram {site}:7 direct")), Ok("direct".to_owned()));
        assert_eq!(act_in(ns, &format!("ask {site}:7 direct")), Ok("direct".to_owned()));
    }
}

#[test]
fn nothing_of_what_was_begun_through_us_leaves_after_a_kill_nor_after_the_clean_up() {
    run(&[TUN], || {
        let lab = Topology::with_lan();
        let _sites = Sites::open(&lab);
        let before = Dump::take(&lab.host);
        let mut capture = proven_capture(&lab);
        let tunproxy = profile("").start(&lab.host);
        let mut open = Open::through(&lab.host);
        let fake = act_in(lab.client(), &format!("lookup {NAME}")).expect("a fake address");
        let place = tunproxy.kill();
        open.speak();
        for ns in [&lab.host, lab.client()] {
            let refused = act_in(ns, &format!("connect {fake}:80"));
            assert!(refused.as_ref().is_err_and(|error| error.contains("UNREACH")), "{refused:?}");
        }
        assert_direct(&lab.host);
        capture.assert_nothing("after the kill", is_of_the_tun);
        place.clean_up(&lab.host);
        before.assert_same(&Dump::take(&lab.host));
        open.assert_ended("after the clean-up");
        open.speak();
        assert_direct(&lab.host);
        capture.assert_nothing("after the clean-up", is_of_the_tun);
    });
}

fn kill_start_and_stop(more: &str) {
    let lab = Topology::desktop();
    let _sites = Sites::open(&lab);
    let before = Dump::take(&lab.host);
    let mut capture = proven_capture(&lab);
    let tunproxy = profile(more).start(&lab.host);
    let mut first = Open::through(&lab.host);
    let tunproxy = tunproxy.kill().start(&lab.host);
    first.assert_ended("after the next start");
    first.speak();
    capture.assert_nothing("after the next start", is_of_the_tun);
    let mut second = Open::through(&lab.host);
    assert!(tunproxy.stop().success());
    before.assert_same(&Dump::take(&lab.host));
    second.assert_ended("after the stop");
    [first, second].iter_mut().for_each(Open::speak);
    capture.assert_nothing("after the stop", is_of_the_tun);
    assert_direct(&lab.host);
}

#[test]
fn nothing_of_what_was_begun_through_us_leaves_after_a_kill_a_start_and_a_stop() {
    run(&[TUN], || kill_start_and_stop(""));
}

#[test]
fn nothing_of_what_was_begun_through_us_leaves_after_a_kill_a_start_and_a_stop_with_a_kill_switch() {
    run(&[TUN], || kill_start_and_stop(", kill-switch: true"));
}

/// `act` takes the device from the run, and then comes `meanwhile`.
fn lose_the_device(act: &str, meanwhile: impl FnOnce(&mut Open)) {
    let lab = Topology::desktop();
    let _sites = Sites::open(&lab);
    let before = Dump::take(&lab.host);
    let mut capture = proven_capture(&lab);
    let tunproxy = profile("").start(&lab.host);
    let mut open = Open::through(&lab.host);
    lab.host.ip(act);
    meanwhile(&mut open);
    assert!(!tunproxy.wait().success());
    before.assert_same(&Dump::take(&lab.host));
    open.assert_ended(act);
    open.speak();
    capture.assert_nothing(act, is_of_the_tun);
    assert_direct(&lab.host);
}

#[test]
fn nothing_of_what_was_begun_through_us_leaves_when_somebody_deletes_the_device() {
    run(&[TUN], || lose_the_device("link del tunproxy0", Open::speak));
}

#[test]
fn nothing_of_what_was_begun_through_us_leaves_when_somebody_renames_the_device() {
    // Until the run has noticed, it carries on.
    run(&[TUN], || lose_the_device("link set tunproxy0 name other0", |_| {}));
}

#[test]
fn a_run_that_has_crashed_takes_nothing_from_another_with_the_same_addresses() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let before = Dump::take(&lab.host);
        let first = profile("").start(&lab.host);
        let other = profile(", device: other");
        let second = other.start(&lab.host);
        let left = first.kill();
        second.line("ours move from priority");
        let mut open = Open::through(&lab.host);
        left.clean_up(&lab.host);
        second.assert_carries(&lab.host);
        open.assert_alive();
        assert!(second.stop().success());
        let third = other.start(&lab.host);
        assert!(third.stop().success());
        before.assert_same(&Dump::take(&lab.host));
    });
}

#[test]
fn a_run_that_has_crashed_takes_nothing_from_a_later_one_with_the_same_addresses_and_device() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let before = Dump::take(&lab.host);
        let left = profile("").start(&lab.host).kill();
        let second = profile("").start(&lab.host);
        let mut open = Open::through(&lab.host);
        left.clean_up(&lab.host);
        open.assert_alive();
        second.assert_carries(&lab.host);
        assert!(second.stop().success());
        open.assert_ended("after the stop of the other");
        before.assert_same(&Dump::take(&lab.host));
    });
}
