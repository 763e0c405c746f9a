//! How many flows are being opened, in all and of one source: beyond that SYNs are dropped.

use std::collections::HashMap;
use std::net::IpAddr;

/// In all: each may hold a socket and a resolver's question, or waits for a client that may never have been there.
const MOST: usize = 4096;
/// Of one source, so that one client's scan leaves room for the others. This host itself has no such limit: its address
/// stands for all its programs, and a burst towards one slow server is no scan.
const MOST_OF_SOURCE: u32 = 256;

/// The count of flows whose handshake is not over: the SYN-ACK is held, or the client has not answered it.
pub(super) struct Held {
    most: usize,
    sources: HashMap<IpAddr, u32, foldhash::fast::RandomState>,
    total: usize,
}

impl Held {
    /// Nobody waits yet; no more than `most` may, whatever the limits here say.
    pub(super) fn new(most: usize) -> Self {
        Self { most: most.min(MOST), sources: HashMap::default(), total: 0 }
    }

    /// Whether one more of `source` may wait; `own` says that it is this host.
    pub(super) fn has_room(&self, source: IpAddr, own: bool) -> bool {
        let of_source = || self.sources.get(&source).copied().unwrap_or_default();
        self.total < self.most && (own || of_source() < MOST_OF_SOURCE)
    }

    pub(super) fn enter(&mut self, source: IpAddr) {
        *self.sources.entry(source).or_default() += 1;
        self.total += 1;
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
