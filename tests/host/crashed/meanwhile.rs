//! What begins through the TUN while the run ends: none of it lives on with an address of the TUN's.

use std::collections::VecDeque;
use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Sender};
use std::thread;
use std::time::{Duration, Instant};

use socket2::{Domain, Socket, Type};

use super::{SECRET, SPOKEN_FOR, TUN, assert_direct, is_of_the_tun, profile, proven_capture};
use crate::support::program::PATIENCE;
use crate::support::sites::{NAME, V6};
use crate::support::{Dump, Sites, Topology, run};

/// The TUN's address, which profiles have unless they say otherwise.
const OURS: &str = "fdfe:dcba:9876::1";
/// So many of those that began last are kept, of each kind.
const KEPT: usize = 200;

/// What a program began in a loop.
#[derive(Default)]
struct Begun {
    datagrams: VecDeque<Socket>,
    streams: VecDeque<Socket>,
    /// How many of all had the address of the TUN.
    ours: usize,
    /// How many went their own way.
    direct: usize,
}

impl Begun {
    /// Begins connections until `enough`: streams, and datagrams, to `site` and to a fake address. Tells when it is at it.
    fn until(enough: &AtomicBool, at_it: &Sender<()>, site: SocketAddr, fake: SocketAddr) -> Self {
        let mut begun = Self::default();
        while !enough.load(Ordering::Relaxed) {
            for to in [site, fake] {
                begun.keep(socket(Type::DGRAM, to), |begun| &mut begun.datagrams);
            }
            begun.keep(socket(Type::STREAM, site), |begun| &mut begun.streams);
            if begun.streams.len() == KEPT {
                let _ = at_it.send(());
            }
        }
        begun
    }

    fn keep(&mut self, socket: Option<Socket>, list: impl Fn(&mut Self) -> &mut VecDeque<Socket>) {
        let address = |socket: &Socket| socket.local_addr().ok()?.as_socket_ipv6();
        let Some((address, socket)) = socket.and_then(|socket| Some((address(&socket)?, socket))) else { return };
        if address.ip().to_string() != OURS {
            self.direct += 1;
            return;
        }
        self.ours += 1;
        let list = list(self);
        list.push_back(socket);
        if list.len() > KEPT {
            list.pop_front();
        }
    }

    /// Has those that are left speak, for as long as it takes. Returns how many still have a peer.
    fn speak(&self) -> usize {
        let end = Instant::now() + SPOKEN_FOR;
        let all = || self.datagrams.iter().chain(&self.streams);
        while Instant::now() < end {
            all().for_each(|socket| drop(socket.send(SECRET)));
            thread::sleep(Duration::from_millis(200));
        }
        all().filter(|socket| socket.peer_addr().is_ok()).count()
    }
}

/// A socket on its way to `to`, which nobody waits for.
fn socket(kind: Type, to: SocketAddr) -> Option<Socket> {
    let socket = Socket::new(Domain::for_address(to), kind, None).expect("a socket");
    socket.set_nonblocking(true).expect("a socket that waits for nobody");
    match socket.connect(&to.into()) {
        Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => None,
        _ => Some(socket),
    }
}

/// Stops a run while a program begins one connection after another.
fn begin_while_it_stops(lab: &Topology, more: &str) {
    let _sites = Sites::open(lab);
    let before = Dump::take(&lab.host);
    let mut capture = proven_capture(lab);
    let tunproxy = profile(more).start(&lab.host);
    let site = format!("{V6}:7").parse().expect("an address");
    let fake = lab.host.enter(fake_address);
    let enough = Arc::new(AtomicBool::new(false));
    let asked = Arc::clone(&enough);
    let (at_it, told) = mpsc::channel();
    let program = lab.host.spawn(move || Begun::until(&asked, &at_it, site, fake));
    told.recv_timeout(PATIENCE).expect("a program that begins connections");
    assert!(tunproxy.stop().success());
    enough.store(true, Ordering::Relaxed);
    let begun = program.join().expect("a program");
    assert!(begun.ours > KEPT && begun.direct > 0, "{} through us, {} direct", begun.ours, begun.direct);
    assert_eq!((begun.datagrams.len(), begun.streams.len()), (KEPT, KEPT));
    assert_eq!(begun.speak(), 0, "connections with the address of a TUN that is gone");
    capture.assert_nothing("after the stop", is_of_the_tun);
    before.assert_same(&Dump::take(&lab.host));
    assert_direct(&lab.host);
}

fn fake_address() -> SocketAddr {
    let mut all = (NAME, 7).to_socket_addrs().expect("fake addresses");
    all.find(SocketAddr::is_ipv6).expect("one of IPv6")
}

#[test]
fn nothing_that_begins_while_a_kill_switch_opens_leaves_with_the_tuns_address() {
    run(&[TUN], || begin_while_it_stops(&Topology::desktop(), ", kill-switch: true"));
}

#[test]
fn nothing_that_begins_while_a_run_on_a_gateway_stops_leaves_with_the_tuns_address() {
    run(&[TUN], || begin_while_it_stops(&Topology::with_lan(), ""));
}
