//! How many errors may be said of what strangers send (RFC 4443 section 2.4 f).

use std::time::{Duration, Instant};

/// One in so long for ever, and so many at once.
const INTERVAL: Duration = Duration::from_millis(1);
const BURST: u32 = 50;

/// A bucket that fills by itself.
#[derive(Debug)]
pub(super) struct Allowance {
    /// When it is full.
    full: Instant,
}

impl Allowance {
    pub(super) fn new(now: Instant) -> Self {
        Self { full: now }
    }

    /// Whether one more may be said.
    pub(super) fn take(&mut self, now: Instant) -> bool {
        let full = self.full.max(now);
        let some = full.duration_since(now) <= INTERVAL * (BURST - 1);
        if some {
            self.full = full + INTERVAL;
        }
        some
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_goes_at_once_and_what_follows_at_its_rate() {
        let now = Instant::now();
        let mut allowance = Allowance::new(now);
        let mut taken = |at: Instant| (0..1000).filter(|_| allowance.take(at)).count();
        assert_eq!(taken(now), 50);
        assert_eq!(taken(now + INTERVAL * 10), 10);
        assert_eq!(taken(now + Duration::from_secs(60)), 50, "it holds no more than that");
    }
}
