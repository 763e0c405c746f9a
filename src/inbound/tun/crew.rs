//! How the workers of one device divide its packets.
//!
//! A TCP flow belongs to the worker whose queue brought its SYN; a UDP source to the one that its hash names, because
//! two queues may split one source and two sockets would show its peers two addresses; fragments to the one that
//! their packet's hash names. What comes in on another queue crosses one bounded channel. The owner's first reply
//! teaches the kernel where the flow's later packets go.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hash};
use std::net::SocketAddr;
use std::sync::Arc;

use foldhash::fast::FixedState;
use parking_lot::Mutex;
use tokio::sync::mpsc;

use crate::stack::{Tuple, VirtioHeader};

/// Packets on their way to one worker; more are lost, as on any full link.
const MOST_PARCELS: usize = 1024;
const SHARDS: usize = 64;

/// A packet for another worker.
pub(super) struct Parcel {
    pub(super) header: VirtioHeader,
    pub(super) packet: Box<[u8]>,
}

/// Which worker owns which TCP flow. Asked only about packets of flows that the asker does not know.
struct Directory {
    shards: [Mutex<HashMap<Tuple, usize, FixedState>>; SHARDS],
}

/// One worker's place among the workers of a device.
pub struct Crew {
    me: usize,
    others: Arc<[mpsc::Sender<Parcel>]>,
    directory: Arc<Directory>,
    pub(super) inbox: mpsc::Receiver<Parcel>,
}

impl Crew {
    /// A place for each of `workers` workers.
    #[must_use]
    pub fn of(workers: usize) -> Vec<Self> {
        let (senders, inboxes): (Vec<_>, Vec<_>) = (0..workers).map(|_| mpsc::channel(MOST_PARCELS)).unzip();
        let others: Arc<[_]> = senders.into();
        let directory = Arc::new(Directory { shards: std::array::from_fn(|_| Mutex::default()) });
        let place = |(me, inbox)| Self { me, others: others.clone(), directory: Arc::clone(&directory), inbox };
        inboxes.into_iter().enumerate().map(place).collect()
    }

    /// Whether there is nobody else.
    pub(super) fn is_alone(&self) -> bool {
        self.others.len() == 1
    }

    /// This worker's number.
    pub(super) fn number(&self) -> usize {
        self.me
    }

    /// Whether `worker` is this one.
    pub(super) fn is(&self, worker: usize) -> bool {
        worker == self.me
    }

    /// The owner of a flow that is being opened: whoever claimed it first.
    pub(super) fn claim(&self, tuple: Tuple) -> usize {
        *self.directory.shard(&tuple).lock().entry(tuple).or_insert(self.me)
    }

    /// Gives up a flow of ours that has ended, or was never opened.
    pub(super) fn release(&self, tuple: &Tuple) {
        let mut shard = self.directory.shard(tuple).lock();
        if shard.get(tuple) == Some(&self.me) {
            shard.remove(tuple);
        }
    }

    /// The other worker that owns a flow, if one does.
    pub(super) fn owner(&self, tuple: &Tuple) -> Option<usize> {
        self.directory.shard(tuple).lock().get(tuple).copied().filter(|owner| *owner != self.me)
    }

    /// The other worker that owns a UDP source, if it is not this one.
    pub(super) fn owner_of_source(&self, source: SocketAddr) -> Option<usize> {
        self.by_hash(source)
    }

    /// The other worker that gathers the fragments of a packet, if it is not this one.
    pub(super) fn owner_of_fragments(&self, key: impl Hash) -> Option<usize> {
        self.by_hash(key)
    }

    fn by_hash(&self, key: impl Hash) -> Option<usize> {
        let owner = (FixedState::default().hash_one(key) % self.others.len() as u64) as usize;
        (owner != self.me).then_some(owner)
    }

    /// Hands a packet to `owner`. False: its channel is full, and the packet is lost.
    pub(super) fn hand(&self, owner: usize, header: VirtioHeader, packet: &[u8]) -> bool {
        self.others[owner].try_send(Parcel { header, packet: packet.into() }).is_ok()
    }
}

impl Directory {
    fn shard(&self, tuple: &Tuple) -> &Mutex<HashMap<Tuple, usize, FixedState>> {
        &self.shards[(FixedState::default().hash_one(tuple) % SHARDS as u64) as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tuple(port: u16) -> Tuple {
        Tuple { client: ([192, 0, 2, 1], port).into(), server: ([198, 51, 100, 1], 80).into() }
    }

    #[test]
    fn the_first_to_claim_a_flow_owns_it_until_it_lets_go() {
        let crew = Crew::of(2);
        assert_eq!(crew[0].claim(tuple(1)), 0);
        assert_eq!(crew[1].claim(tuple(1)), 0);
        assert_eq!((crew[0].owner(&tuple(1)), crew[1].owner(&tuple(1))), (None, Some(0)));
        crew[1].release(&tuple(1));
        assert_eq!(crew[1].owner(&tuple(1)), Some(0));
        crew[0].release(&tuple(1));
        assert_eq!(crew[1].claim(tuple(1)), 1);
    }

    #[test]
    fn every_source_has_one_owner_on_whom_all_agree() {
        let crew = Crew::of(3);
        for port in 1..200 {
            let source: SocketAddr = ([192, 0, 2, 1], port).into();
            let elsewhere: Vec<_> = crew.iter().map(|place| place.owner_of_source(source)).collect();
            assert_eq!(elsewhere.iter().filter(|owner| owner.is_none()).count(), 1);
            let owner = elsewhere.iter().position(Option::is_none);
            assert!(elsewhere.iter().flatten().all(|named| Some(*named) == owner));
        }
    }

    #[test]
    fn a_full_channel_loses_packets_and_says_so() {
        let crew = Crew::of(2);
        let sent = (0..2 * MOST_PARCELS).filter(|_| crew[0].hand(1, VirtioHeader::PLAIN, &[0])).count();
        assert_eq!(sent, MOST_PARCELS);
    }
}
