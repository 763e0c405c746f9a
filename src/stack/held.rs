//! How many flows wait for their dial, in all and of one source: beyond that SYNs are dropped.

use std::collections::HashMap;
use std::net::IpAddr;

/// In all: each may hold a socket and a resolver's question.
const MOST: usize = 4096;
/// Of one source, so that one client's scan leaves room for the others.
const MOST_OF_SOURCE: u32 = 256;

/// The count of flows whose SYN-ACK is held.
#[derive(Default)]
pub(super) struct Held {
    sources: HashMap<IpAddr, u32, foldhash::fast::RandomState>,
    total: usize,
}

impl Held {
    /// Whether one more of `source` may wait.
    pub(super) fn has_room(&self, source: IpAddr) -> bool {
        self.total < MOST && self.sources.get(&source).is_none_or(|held| *held < MOST_OF_SOURCE)
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
