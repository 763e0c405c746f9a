//! Room for others when the memory is used up.

use std::rc::Rc;
use std::time::{Duration, Instant};

use super::super::budget::FLOW;
use super::Table;

/// A flow in which nothing has moved for so long may be ended to make room for others.
const STALE: Duration = Duration::from_secs(5);
/// Relief is tried at most so often: it looks at every flow.
const AGAIN: Duration = Duration::from_millis(50);

impl Table {
    /// Makes room if somebody found none: rings that happen to be empty give their pages back, and if that is not enough
    /// the flows in which nothing has moved for longest are reset.
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
        let missing = self.budget.reserve().saturating_sub(self.budget.left());
        if missing > 0 {
            self.evict(missing, now);
        }
        self.budget.relieved();
        if self.budget.left() > 0 {
            let starving = std::mem::take(&mut *self.shared.starving.borrow_mut());
            starving.into_iter().for_each(std::task::Waker::wake);
        }
    }

    /// Resets stale flows, the stalest first, until `missing` bytes will be free.
    fn evict(&mut self, missing: usize, now: Instant) {
        let mut stale: Vec<_> = self
            .flows
            .values()
            .filter_map(|handle| {
                let flow = handle.borrow();
                let evictable = flow.held.is_none() && !flow.dead && !flow.evicted;
                (evictable && flow.progress.moved + STALE <= now).then(|| (flow.progress.moved, Rc::clone(handle)))
            })
            .collect();
        stale.sort_unstable_by_key(|(moved, _)| *moved);
        let mut freed = 0;
        for (_, handle) in stale {
            if freed >= missing {
                return;
            }
            let mut flow = handle.borrow_mut();
            freed += FLOW + flow.rings.charged();
            flow.evicted = true;
            flow.socket().abort();
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
