//! What the DNS service did, counted.

use std::sync::atomic::{AtomicU64, Ordering};

/// Events since the start. Each only ever grows; read them with [`Counters::snapshot`].
#[derive(Debug, Default)]
pub struct Counters {
    pub(super) queries: AtomicU64,
    pub(super) faked: AtomicU64,
    pub(super) local: AtomicU64,
    pub(super) cached: AtomicU64,
    pub(super) forwarded: AtomicU64,
    pub(super) dropped: AtomicU64,
    pub(super) exhausted: AtomicU64,
    pub(super) upstream_queries: AtomicU64,
    pub(super) upstream_failures: AtomicU64,
    pub(super) garbage: AtomicU64,
}

/// The counters at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
pub struct Counts {
    /// Messages from clients, whatever became of them.
    pub queries: u64,
    /// Answered with a fake address.
    pub faked: u64,
    /// Answered by us in another way: errors, names that are ours to answer, PTR of fake addresses.
    pub local: u64,
    /// Answered from the cache.
    pub cached: u64,
    /// Handed on to the nameservers, or waiting for the same question of another client.
    pub forwarded: u64,
    /// Not queries, or more than we can keep waiting: no answer.
    pub dropped: u64,
    /// Refused because every fake address was in use.
    pub exhausted: u64,
    /// Exchanges begun with a nameserver.
    pub upstream_queries: u64,
    /// Exchanges that ended without a usable answer.
    pub upstream_failures: u64,
    /// Datagrams and messages from nameservers that were malformed or answered something else.
    pub garbage: u64,
}

impl Counters {
    /// The counters now.
    #[must_use]
    pub fn snapshot(&self) -> Counts {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counts {
            queries: read(&self.queries),
            faked: read(&self.faked),
            local: read(&self.local),
            cached: read(&self.cached),
            forwarded: read(&self.forwarded),
            dropped: read(&self.dropped),
            exhausted: read(&self.exhausted),
            upstream_queries: read(&self.upstream_queries),
            upstream_failures: read(&self.upstream_failures),
            garbage: read(&self.garbage),
        }
    }
}

/// Adds one.
pub(super) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}
