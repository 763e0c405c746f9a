//! Says that memory is short, once and not for every packet.

use std::cell::Cell;
use std::time::{Duration, Instant};

use crate::stack::Counters;

/// Between two lines in the log.
const SILENCE: Duration = Duration::from_secs(60);

/// What was said of it so far.
#[derive(Debug, Default)]
pub(super) struct Shortage {
    /// Flows ended and packets dropped at the last line.
    told: Cell<(u64, u64)>,
    last: Cell<Option<Instant>>,
}

impl Shortage {
    /// Writes a line if memory was short since the last one. True: it did.
    pub(super) fn tell(&self, counters: &Counters, now: Instant) -> bool {
        let seen = (counters.evicted, counters.no_memory);
        let (evicted, dropped) = self.told.get();
        if seen == (evicted, dropped) || self.last.get().is_some_and(|last| now < last + SILENCE) {
            return false;
        }
        self.told.set(seen);
        self.last.set(Some(now));
        tracing::warn!(
            "memory-limit is reached, or the system gives no more: since the last such line {} idle flows were ended and {} packets dropped",
            seen.0 - evicted,
            seen.1 - dropped
        );
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shortage_is_one_line_a_minute_and_none_without_it() {
        let (shortage, now) = (Shortage::default(), Instant::now());
        let short = |no_memory| Counters { no_memory, ..Counters::default() };
        assert!(!shortage.tell(&short(0), now));
        assert!(shortage.tell(&short(1), now));
        assert!(!shortage.tell(&short(9), now + SILENCE / 2));
        assert!(shortage.tell(&short(9), now + SILENCE));
        assert!(!shortage.tell(&short(9), now + 3 * SILENCE));
    }
}
