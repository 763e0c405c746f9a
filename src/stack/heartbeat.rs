//! When something last moved in a flow.

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

/// Set by the worker that has the flow, read by any.
#[derive(Debug)]
pub struct Heartbeat {
    born: Instant,
    /// Microseconds since then.
    last: AtomicU64,
}

impl Heartbeat {
    /// Something moves at its beginning.
    #[must_use]
    pub fn new(now: Instant) -> Self {
        Self { born: now, last: AtomicU64::new(0) }
    }

    /// Something moves. Whoever looked at the clock earlier and comes later changes nothing.
    pub fn beat(&self, now: Instant) {
        let since = now.saturating_duration_since(self.born).as_micros();
        self.last.fetch_max(u64::try_from(since).unwrap_or(u64::MAX), Relaxed);
    }

    /// When something moved last.
    #[must_use]
    pub fn last(&self) -> Instant {
        self.born + Duration::from_micros(self.last.load(Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latest_beat_counts_whoever_told_of_it_first() {
        let born = Instant::now();
        let heartbeat = Heartbeat::new(born);
        heartbeat.beat(born + Duration::from_secs(3));
        heartbeat.beat(born + Duration::from_secs(2));
        assert_eq!(heartbeat.last(), born + Duration::from_secs(3));
    }
}
