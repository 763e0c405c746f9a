//! What our own sockets send to: so that it is known when it comes back to us by the TUN instead of leaving.
//!
//! The mark of a packet is not seen on the device. But no two sockets of a host have the same addresses and ports at
//! once, so a flow that has those of a socket of ours is of that socket. Were it dialled anew, that would come back too,
//! until no descriptors are left.

mod detour;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::{Dialer, Fwmark};

/// Between two lines in the log.
const SILENCE: Duration = Duration::from_secs(60);

/// The sockets of ours that send to somebody, on the host whose traffic we carry.
#[derive(Debug)]
pub struct OwnSockets {
    tun: String,
    mark: Option<Fwmark>,
    /// With how many of one way there are: by far most have one.
    ways: Mutex<HashMap<Way, u32>>,
    told: Mutex<Option<Instant>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Way {
    /// A connection that is being made: from, to. Only a SYN can begin a flow.
    Stream(SocketAddr, SocketAddr),
    /// From a port of an unbound socket, to.
    Datagrams(u16, SocketAddr),
}

/// Holds that a socket of ours sends somewhere; until it is dropped.
#[derive(Debug)]
pub struct Sending {
    sockets: Arc<OwnSockets>,
    way: Way,
}

impl OwnSockets {
    /// Those that carry `mark`, beside the device `tun`.
    #[must_use]
    pub fn new(tun: &str, mark: Option<Fwmark>) -> Arc<Self> {
        Arc::new(Self { tun: tun.to_owned(), mark, ways: Mutex::default(), told: Mutex::default() })
    }

    /// A connection is being made.
    #[must_use]
    pub fn connects(self: &Arc<Self>, from: SocketAddr, to: SocketAddr) -> Sending {
        self.enter(Way::Stream(plain(from), plain(to)))
    }

    /// Datagrams leave by `port` for `to`.
    #[must_use]
    pub fn sends(self: &Arc<Self>, port: u16, to: SocketAddr) -> Sending {
        self.enter(Way::Datagrams(port, plain(to)))
    }

    fn enter(self: &Arc<Self>, way: Way) -> Sending {
        *self.ways.lock().entry(way).or_default() += 1;
        Sending { sockets: Arc::clone(self), way }
    }

    /// Whether a connection from `source` to `destination`, which begins on the TUN, is one that we are making.
    #[must_use]
    pub fn is_our_connection(&self, source: SocketAddr, destination: SocketAddr) -> bool {
        self.ways.lock().contains_key(&Way::Stream(source, destination))
    }

    /// Whether datagrams from `source` to `destination` that come by the TUN are ours.
    #[must_use]
    pub fn is_our_datagram(&self, source: SocketAddr, destination: SocketAddr) -> bool {
        let known = self.ways.lock().contains_key(&Way::Datagrams(source.port(), destination));
        // A host behind us may have the port; the address that we send from it has not.
        known && self.dialer().source_for(destination) == Some(source.ip())
    }

    /// Says what came back and why, but not for each.
    pub fn tell(self: &Arc<Self>, destination: SocketAddr, now: Instant) {
        let mut told = self.told.lock();
        if told.is_some_and(|told| now < told + SILENCE) {
            return;
        }
        *told = Some(now);
        let sockets = Arc::clone(self);
        // The look at rules and routes may take a while, and flows do not wait for it.
        let telling = move || tracing::warn!("{}", sockets.words(destination));
        if std::thread::Builder::new().name("detour".to_owned()).spawn(telling).is_err() {
            tracing::warn!("our own packets for {destination} come back by {}", self.tun);
        }
    }

    fn dialer(&self) -> Dialer {
        Dialer { mark: self.mark, ..Dialer::default() }
    }
}

impl Sending {
    /// The datagrams leave by `port` from now on.
    pub fn follow(&mut self, port: u16) {
        if let Way::Datagrams(before, to) = self.way
            && before != port
        {
            *self = self.sockets.sends(port, to);
        }
    }
}

impl Drop for Sending {
    fn drop(&mut self) {
        let mut ways = self.sockets.ways.lock();
        match ways.get_mut(&self.way) {
            Some(many) if *many > 1 => *many -= 1,
            _ => drop(ways.remove(&self.way)),
        }
    }
}

/// Interface and flow label are not seen in a packet of a flow.
fn plain(at: SocketAddr) -> SocketAddr {
    SocketAddr::new(at.ip(), at.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    #[test]
    fn a_connection_is_ours_while_it_is_made_and_by_all_four_parts() {
        let own = OwnSockets::new("tun7", None);
        let (from, to) = (at("192.0.2.2:40000"), at("203.0.113.10:80"));
        let sending = [own.connects(from, to), own.connects(from, to)];
        assert!(own.is_our_connection(from, to));
        assert!(
            !own.is_our_connection(at("198.18.0.1:40000"), to) && !own.is_our_connection(from, at("203.0.113.10:81"))
        );
        let [one, other] = sending;
        drop(one);
        assert!(own.is_our_connection(from, to));
        drop(other);
        assert!(!own.is_our_connection(from, to));
        assert!(own.ways.lock().is_empty());
    }

    #[test]
    fn datagrams_are_ours_by_port_and_peer_and_by_the_address_that_we_would_send_from() {
        let own = OwnSockets::new("tun7", None);
        let to = at("127.0.0.9:7");
        let mut sending = own.sends(40000, to);
        assert!(own.is_our_datagram(at("127.0.0.1:40000"), to));
        assert!(!own.is_our_datagram(at("10.0.0.7:40000"), to), "another host has the same port");
        assert!(!own.is_our_datagram(at("127.0.0.1:40001"), to));
        assert!(!own.is_our_datagram(at("127.0.0.1:40000"), at("127.0.0.9:8")));
        sending.follow(40001);
        assert!(own.is_our_datagram(at("127.0.0.1:40001"), to), "it has another socket now");
        assert!(!own.is_our_datagram(at("127.0.0.1:40000"), to));
        drop(sending);
        assert!(own.ways.lock().is_empty());
    }
}
