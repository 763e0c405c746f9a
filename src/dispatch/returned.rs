//! What comes back: packets of our own sockets that a rule or route of another program leads into the TUN. They are refused
//! at once, which whoever sends them hears: dialled anew they would come back again, until no descriptors are left.

use std::io;
use std::net::SocketAddr;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use super::Core;
use super::link::Link;
use crate::net::{Address, DialError};
use crate::platform::Sending;
use crate::session::{Inbound, Network, Session};

/// A connection hears that there is no way; a datagram that nobody is there, since of other errors it hears nothing.
pub(super) fn refusal() -> DialError {
    DialError::Io(io::Error::new(io::ErrorKind::NetworkUnreachable, "a packet of our own, come back by the TUN"))
}

impl Core {
    /// Whether a flow that begins is one of our own sockets, come back. Then it was counted, and told.
    pub(super) fn has_come_back(&self, session: &Session) -> bool {
        let Some(to) = session.destination.socket().filter(|_| session.inbound == Inbound::Tun) else { return false };
        self.has_question_come_back(session.network, session.source, to)
    }

    /// The same for a question to `to`, which no flow is made of, or for the stream on which it is asked.
    #[must_use]
    pub fn has_question_come_back(&self, network: Network, from: SocketAddr, to: SocketAddr) -> bool {
        let came_back = self.own.as_ref().is_some_and(|own| match network {
            Network::Tcp => own.is_our_connection(from, to),
            Network::Udp => own.is_our_datagram(from, to),
            // Each round takes one from its time to live.
            Network::Icmp => false,
        });
        if came_back {
            self.tell_return(to);
        }
        came_back
    }

    fn tell_return(&self, to: SocketAddr) {
        self.counters.returned.fetch_add(1, Relaxed);
        if let Some(own) = &self.own {
            own.tell(to, Instant::now());
        }
    }

    /// Notes that an association sends to `to`.
    pub(super) fn sends(&self, link: &Link, to: &Address) -> Option<Sending> {
        let (own, real) = self.own.as_ref().zip(to.socket())?;
        Some(own.sends(link.port_towards(to)?, real))
    }
}
