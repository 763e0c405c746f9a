//! A client made of hand-written segments, for what no honest TCP sends and for numbers that must be exact.

use std::net::SocketAddr;

use super::packet::{ACK, SYN, Tcp};
use super::{Seen, World};

pub(crate) struct Peer {
    pub(crate) world: World,
    pub(crate) local: SocketAddr,
    pub(crate) server: SocketAddr,
    /// The next sequence number to send.
    pub(crate) next: u32,
    /// The next sequence number expected.
    pub(crate) expected: u32,
}

impl Peer {
    pub(crate) fn new(world: &World, port: u16, initial: u32) -> Self {
        let (local, server) = (SocketAddr::new(world.net().peer(), port), SocketAddr::new(world.net().server(), 80));
        Self { world: world.clone(), local, server, next: initial, expected: 0 }
    }

    /// A segment with this peer's numbers.
    pub(crate) fn segment(&self, flags: u8, payload: &[u8]) -> Tcp {
        let mut tcp = Tcp::new(self.local, self.server, flags);
        tcp.sequence = self.next;
        tcp.acknowledgement = if flags & ACK == 0 { 0 } else { self.expected };
        tcp.payload = payload.to_vec();
        tcp
    }

    /// Sends at once, without moving on.
    pub(crate) fn send(&self, flags: u8, payload: &[u8]) {
        self.world.inject(&self.segment(flags, payload).packet());
    }

    /// A SYN with the options of a modern client: MSS 1460, SACK permitted, window scale 7.
    pub(crate) fn syn(&self) {
        let mut syn = self.segment(SYN, &[]);
        syn.options = vec![2, 4, 5, 0xb4, 4, 2, 1, 3, 3, 7];
        self.world.inject(&syn.packet());
    }

    /// What was sent to this peer until now. Everything else that waits is thrown away.
    pub(crate) async fn replies(&self) -> Vec<Seen> {
        self.world.settle().await;
        std::iter::from_fn(|| self.world.inbox()).filter(|seen| seen.to.ip() == self.local.ip()).collect()
    }

    /// Completes the handshake of a SYN that was accepted.
    pub(crate) async fn finish_handshake(&mut self) {
        let replies = self.replies().await;
        let answer = replies.iter().find(|seen| seen.is(SYN | ACK)).expect("a SYN-ACK came");
        self.next = self.next.wrapping_add(1);
        assert_eq!(answer.acknowledgement, self.next);
        self.expected = answer.sequence.wrapping_add(1);
        self.send(ACK, &[]);
        self.world.settle().await;
    }

    /// Opens a connection.
    pub(crate) async fn open(&mut self) -> super::Flow {
        self.syn();
        let flow = self.world.arrival().await;
        flow.accept();
        self.finish_handshake().await;
        flow
    }

    /// Sends data and moves on.
    pub(crate) fn data(&mut self, payload: &[u8]) {
        self.send(ACK, payload);
        self.next = self.next.wrapping_add(payload.len() as u32);
    }
}
