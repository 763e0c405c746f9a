//! How many flows are being opened, in all and of one source: beyond that SYNs are dropped. Some places are only for those
//! who have been there before, so that a flood of sources that nobody knows shuts none of them out. One that forges
//! theirs takes those places, too. A source is what stands for a client: of IPv6 not a single address.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;

use foldhash::fast::RandomState;

/// In all: each may hold a socket and a resolver's question, or waits for a client that may never have been there.
const MOST: usize = 4096;
/// Places beyond those, for sources that have completed a handshake lately.
const FOR_KNOWN: usize = 1024;
/// Of one source, so that one client's scan leaves room for the others. This host itself has no such limit: its address
/// stands for all its programs, and a burst towards one slow server is no scan.
const MOST_OF_SOURCE: usize = 256;
/// So many sources are kept in mind, twice: the older half goes when the newer one is full.
const MOST_KNOWN: usize = 4096;

/// The count of flows whose handshake is not over: the SYN-ACK is held, or the client has not answered it.
pub(super) struct Held {
    most: usize,
    of_source: usize,
    for_known: usize,
    sources: HashMap<IpAddr, usize, RandomState>,
    total: usize,
    /// Who has completed a handshake: newer and older.
    known: [HashSet<IpAddr, RandomState>; 2],
}

impl Held {
    /// Nobody waits yet; no more than `most` may, and of one source than `of_source`, whatever the limits here say.
    pub(super) fn new(most: usize, of_source: usize) -> Self {
        let for_known = FOR_KNOWN.min(most / 5);
        Self {
            most: MOST.min(most - for_known),
            of_source: of_source.min(MOST_OF_SOURCE),
            for_known,
            sources: HashMap::default(),
            total: 0,
            known: Default::default(),
        }
    }

    /// Whether one more of `source` may wait; `own` says that it is this host.
    pub(super) fn has_room(&self, source: IpAddr, own: bool) -> bool {
        let of_source = || self.sources.get(&source).copied().unwrap_or_default();
        let known = || self.known.iter().any(|known| known.contains(&source));
        let room = self.total < self.most || self.total < self.most + self.for_known && known();
        room && (own || of_source() < self.of_source)
    }

    pub(super) fn enter(&mut self, source: IpAddr) {
        *self.sources.entry(source).or_default() += 1;
        self.total += 1;
    }

    /// A handshake of `source` is complete, which no forger can bring about without seeing our answer.
    pub(super) fn complete(&mut self, source: IpAddr) {
        let [newer, older] = &mut self.known;
        if newer.len() >= MOST_KNOWN {
            *older = std::mem::take(newer);
        }
        newer.insert(source);
    }

    pub(super) fn leave(&mut self, source: IpAddr) {
        let Some(held) = self.sources.get_mut(&source) else { return };
        *held -= 1;
        self.total -= 1;
        if *held == 0 {
            self.sources.remove(&source);
        }
    }
}
