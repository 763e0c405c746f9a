//! How much memory the flows of one stack may take, and what each of them has of it.
//!
//! A flow pays for its place in the table as long as it lives, and for its rings only while data moves through them: idle
//! rings give their pages back. Where nothing is left, [`Table::relieve`](super::table::Table) makes room.

use std::cell::Cell;
use std::rc::Rc;

/// What a flow costs beside its rings: its socket, its task, its upstream and its places in tables.
pub(super) const FLOW: usize = 4 << 10;
/// Flows that are being opened may take this part of the budget, lest a flood of them drives out those that are open.
const OPENING: usize = 8;

/// The memory of one stack.
pub(super) struct Budget {
    limit: usize,
    used: Cell<usize>,
    /// Somebody found no room since the last relief.
    short: Cell<bool>,
}

/// A part of the budget, given back when dropped.
pub(super) struct Share {
    budget: Rc<Budget>,
    bytes: usize,
}

impl Budget {
    /// All flows together may take `limit` bytes.
    pub(super) fn new(limit: usize) -> Rc<Self> {
        Rc::new(Self { limit, used: Cell::new(0), short: Cell::new(false) })
    }

    /// Takes `bytes`. None: there is no room, which is remembered.
    pub(super) fn take(self: &Rc<Self>, bytes: usize) -> Option<Share> {
        if bytes > self.left() {
            self.short.set(true);
            return None;
        }
        self.used.set(self.used.get() + bytes);
        Some(Share { budget: Rc::clone(self), bytes })
    }

    /// What there is in all.
    pub(super) fn limit(&self) -> usize {
        self.limit
    }

    /// Bytes that nobody has.
    pub(super) fn left(&self) -> usize {
        self.limit - self.used.get()
    }

    /// Bytes that somebody has.
    pub(super) fn used(&self) -> usize {
        self.used.get()
    }

    /// What the rings of one more flow beside `live` others may take: so little that thousands which all move data at
    /// once fit, and so much that few are not held up.
    pub(super) fn fair(&self, live: usize) -> usize {
        self.limit / 4 / (live + 8)
    }

    /// How many flows may be opening at a time.
    pub(super) fn openings(&self) -> usize {
        self.limit / OPENING / FLOW
    }

    /// As much as a relief makes free.
    pub(super) fn reserve(&self) -> usize {
        self.limit / 32
    }

    pub(super) fn is_short(&self) -> bool {
        self.short.get()
    }

    pub(super) fn relieved(&self) {
        self.short.set(false);
    }
}

impl Share {
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.budget.used.set(self.budget.used.get() - self.bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_gets_what_is_not_there_and_what_is_dropped_is_there_again() {
        let budget = Budget::new(100);
        let first = budget.take(60).unwrap();
        assert!(budget.take(41).is_none() && budget.is_short());
        budget.relieved();
        let second = budget.take(40).unwrap();
        assert_eq!((budget.left(), budget.is_short()), (0, false));
        drop((first, second));
        assert_eq!(budget.used(), 0);
    }

    #[test]
    fn what_is_fair_adds_up_to_no_more_than_there_is() {
        let limit = 24 << 20;
        let budget = Budget::new(limit);
        let all: usize = (0..600).map(|live| FLOW + budget.fair(live)).sum();
        assert!(all <= limit * 5 / 4, "{all}");
        assert!(budget.fair(0) >= limit / 32);
    }
}
