//! When flows want to be polled. Entries are not removed: one that no longer fits its flow is skipped when it is due.

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;
use std::time::Instant;

use super::Tuple;

#[derive(Default)]
pub(super) struct Timers(BinaryHeap<Reverse<Timer>>);

struct Timer {
    due: Instant,
    tuple: Tuple,
}

impl Timers {
    pub(super) fn push(&mut self, due: Instant, tuple: Tuple) {
        self.0.push(Reverse(Timer { due, tuple }));
    }

    /// The next entry that is due.
    pub(super) fn pop(&mut self, now: Instant) -> Option<(Instant, Tuple)> {
        if self.first()? > now {
            return None;
        }
        self.0.pop().map(|Reverse(timer)| (timer.due, timer.tuple))
    }

    pub(super) fn first(&self) -> Option<Instant> {
        self.0.peek().map(|Reverse(timer)| timer.due)
    }
}

impl PartialEq for Timer {
    fn eq(&self, other: &Self) -> bool {
        self.due == other.due
    }
}

impl Eq for Timer {}

impl PartialOrd for Timer {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Timer {
    fn cmp(&self, other: &Self) -> Ordering {
        self.due.cmp(&other.due)
    }
}
