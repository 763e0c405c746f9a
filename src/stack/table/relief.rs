//! Room for others when the memory is used up.

use std::collections::HashSet;
use std::net::IpAddr;
use std::rc::{Rc, Weak};
use std::time::{Duration, Instant};

use super::super::Handle;
use super::super::budget::FLOW;
use super::Table;
use super::choice::{Candidate, Missing, choose};

/// A flow in which nothing has moved for so long may be ended to make room for others.
const STALE: Duration = Duration::from_secs(5);
/// Relief is tried at most so often: it looks at every flow.
const AGAIN: Duration = Duration::from_millis(50);

impl Table {
    /// Makes room if somebody found none: rings that happen to be empty give their pages back, and if that is not enough
    /// flows are reset.
    pub(super) fn relieve(&mut self, now: Instant) {
        let wanted = self.budget.is_short() || !self.shared.starving.borrow().is_empty();
        if !wanted || now < self.relief {
            return;
        }
        self.relief = now + AGAIN;
        for handle in self.flows.values() {
            let mut flow = handle.borrow_mut();
            if flow.rings.charged() > 0 {
                flow.release_if_empty();
            }
        }
        self.evict(now);
        self.budget.relieved();
        if self.budget.left() > 0 {
            self.shared.feed();
        }
    }

    /// Resets flows until enough will be free, those that [`choose`] names.
    fn evict(&mut self, now: Instant) {
        let (left, (idle, moving)) = (self.budget.left(), self.budget.wanted());
        let part = self.budget.part();
        let holdings = self.budget.holdings();
        // Who waits has asked before.
        let waiting = self.shared.starving.borrow();
        let waiting: HashSet<IpAddr, foldhash::fast::RandomState> =
            waiting.iter().filter_map(Weak::upgrade).map(|flow| self.client_of(&flow.borrow().tuple)).collect();
        let modest = holdings.iter().any(|(client, has)| *has <= part && waiting.contains(client));
        let missing = Missing {
            idle: idle.saturating_sub(left),
            moving: moving.saturating_sub(left),
            unfair: modest || self.budget.is_unfair(),
        };
        if missing.idle == 0 {
            return;
        }
        let candidate = |handle: &Handle| {
            let flow = handle.borrow();
            let client = self.client_of(&flow.tuple);
            let evictable = flow.held.is_none() && !flow.dead && !flow.evicted;
            evictable.then(|| Candidate {
                client,
                bytes: FLOW + flow.rings.charged(),
                moved: flow.progress.moved,
                stale: flow.progress.moved + STALE <= now,
                asked: waiting.contains(&client) || self.budget.has_asked(client),
                flow: Rc::clone(handle),
            })
        };
        let candidates = self.flows.values().filter_map(candidate).collect();
        for handle in choose(candidates, &holdings, part, &missing) {
            let mut flow = handle.borrow_mut();
            flow.evicted = true;
            flow.socket().abort();
            // Nobody reads what lies there any more, and others wait for it.
            flow.rings.release();
            self.evicted += 1;
            if !flow.dirty {
                flow.dirty = true;
                self.shared.dirty.borrow_mut().push(Rc::clone(&handle));
            }
        }
    }

    /// When to try again for those who wait for room.
    pub(super) fn relief_due(&self) -> Option<Instant> {
        (!self.shared.starving.borrow().is_empty()).then_some(self.relief)
    }
}
