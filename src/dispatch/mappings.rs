//! By which ports of this host the clients behind the TUN send, so that what one of them writes to the outer address of
//! another bears its own outer address and port too (RFC 4787 REQ-9).
//!
//! The kernel hands such a datagram to the other client's association past the TUN, with the address that the sender has on
//! its own network. There the other client would answer it, if it can at all: a datagram from its own address to itself no
//! host takes from the wire.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering::Relaxed};

use foldhash::fast::RandomState;
use parking_lot::Mutex;
use tokio::time::Instant;

use super::Core;
use super::link::Link;
use crate::net::Address;
use crate::session::{Inbound, Session};

/// The outer ports of all clients, on all workers.
#[derive(Debug, Default)]
pub struct Mappings(Mutex<HashMap<SocketAddr, Arc<Outer>, RandomState>>);

/// One of them, and when its client last wrote to a neighbour's.
#[derive(Debug)]
struct Outer {
    port: AtomicU16,
    used: Mutex<Instant>,
}

/// The outer port of one client for as long as its association lives.
#[derive(Debug)]
pub(super) struct Mapping {
    all: Arc<Mappings>,
    client: SocketAddr,
    outer: Arc<Outer>,
}

impl Mappings {
    /// Notes that datagrams of `client` leave by `port`. None: they leave by another already, which all peers know.
    pub(super) fn enter(self: &Arc<Self>, client: SocketAddr, port: u16, now: Instant) -> Option<Mapping> {
        let outer = Arc::new(Outer { port: AtomicU16::new(port), used: Mutex::new(now) });
        let mut known = self.0.lock();
        if known.contains_key(&client) {
            return None;
        }
        known.insert(client, Arc::clone(&outer));
        Some(Mapping { all: Arc::clone(self), client, outer })
    }

    /// What stands for `from` outside, if it is a client: at this host's address `at`, to which it has sent just now.
    pub(super) fn outer(&self, from: SocketAddr, at: IpAddr, now: Instant) -> Option<SocketAddr> {
        let known = self.0.lock();
        // A program of this host has that address only where nothing goes by the TUN.
        let own = || known.get(&of_this_host(from)).filter(|_| from.ip() == at);
        let outer = known.get(&from).or_else(own)?;
        // It sends: that keeps the mapping (RFC 4787 REQ-6).
        *outer.used.lock() = now;
        Some(SocketAddr::new(at, outer.port.load(Relaxed)))
    }
}

impl Mapping {
    /// Its datagrams leave by `port` from now on.
    pub(super) fn follow(&self, port: u16) {
        self.outer.port.store(port, Relaxed);
    }

    /// When the client last wrote to the outer address of another.
    pub(super) fn used(&self) -> Instant {
        *self.outer.used.lock()
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        self.all.0.lock().remove(&self.client);
    }
}

/// What a program of this host is known by, whatever address it has from where it sends to.
fn of_this_host(source: SocketAddr) -> SocketAddr {
    let any = if source.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    SocketAddr::new(any, source.port())
}

impl Core {
    /// Notes by which port the client's datagrams leave, where it can write to others past the TUN: its own family's port is
    /// the one that it and they write to.
    pub(super) fn map(&self, session: &Session, link: &Link, to: &Address) {
        let same_family = to.socket().is_some_and(|to| to.is_ipv4() == session.source.is_ipv4());
        if self.own.is_none() || session.inbound != Inbound::Tun || !same_family || link.is_mapped() {
            return;
        }
        let Some(port) = link.port_towards(to) else { return };
        let source = session.source;
        let client = if link.back.is_paced(source.ip()) { source } else { of_this_host(source) };
        link.map(self.mappings.enter(client, port, Instant::now()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    #[tokio::test]
    async fn a_client_is_known_by_where_its_datagrams_leave_until_its_association_ends() {
        let (all, now) = (Arc::<Mappings>::default(), Instant::now());
        let (client, host) = (at("10.7.0.2:5000"), at("192.0.2.1:40000").ip());
        let mapping = all.enter(client, 40001, now).unwrap();
        assert!(all.enter(client, 40002, now).is_none(), "its peers know the first");
        assert_eq!(all.outer(client, host, now), Some(at("192.0.2.1:40001")));
        assert_eq!(all.outer(at("10.7.0.2:5001"), host, now), None);
        mapping.follow(40003);
        assert_eq!(all.outer(client, host, now), Some(at("192.0.2.1:40003")));
        drop(mapping);
        assert_eq!(all.outer(client, host, now), None);
    }

    #[tokio::test]
    async fn a_program_of_this_host_is_known_by_its_port_where_it_writes_to_its_own_host() {
        let (all, now) = (Arc::<Mappings>::default(), Instant::now());
        let _mapping = all.enter(of_this_host(at("198.18.0.1:5000")), 40001, now).unwrap();
        let own = at("192.0.2.1:5000");
        assert_eq!(all.outer(own, own.ip(), now), Some(at("192.0.2.1:40001")));
        assert_eq!(all.outer(at("192.0.2.9:5000"), own.ip(), now), None, "another host has that port too");
        assert_eq!(all.outer(at("[2001:db8::1]:5000"), at("[2001:db8::1]:5000").ip(), now), None);
    }
}
