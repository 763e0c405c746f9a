//! What the DNS service did, counted.

use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// Between two lines in the log that say that a client gets no address.
const SILENCE: Duration = Duration::from_secs(60);

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
    pub(super) looped: AtomicU64,
    /// When somebody was last told that a client gets no address.
    told: Mutex<Option<Instant>>,
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
    /// Not queries, or more than we can keep waiting: no answer, or over TCP SERVFAIL.
    pub dropped: u64,
    /// Refused because the fake addresses were in use, or the client's part of them.
    pub exhausted: u64,
    /// Exchanges begun with a nameserver.
    pub upstream_queries: u64,
    /// Exchanges that ended without a usable answer.
    pub upstream_failures: u64,
    /// Datagrams and messages from nameservers that were malformed or answered something else.
    pub garbage: u64,
    /// Answers of nameservers that bore fake addresses of ours: their questions come to us.
    pub looped: u64,
}

impl Counters {
    /// A question found no room to wait in.
    pub fn drop_question(&self) {
        count(&self.dropped);
    }

    /// A name that `client` asked for got no address.
    pub(super) fn exhausted(&self, client: IpAddr, now: Instant) {
        count(&self.exhausted);
        let mut told = self.told.lock();
        if told.is_none_or(|told| now >= told + SILENCE) {
            *told = Some(now);
            tracing::warn!(
                "{client} asks for so many names that it gets no more fake addresses for now: the others are in use, or left \
                 to other clients (counted as `exhausted` in `tunproxy status`; a larger fake-ip-range helps)"
            );
        }
    }

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
            looped: read(&self.looped),
        }
    }
}

/// Adds one.
pub(super) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}
