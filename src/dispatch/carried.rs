//! The TCP flows that one worker carries, and which of them give way when no descriptor is left for another.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;
use std::time::Duration;

use foldhash::fast::RandomState;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until, timeout};

/// A flow in which data has moved since then never gives way: most exchanges pause for less, and it is what counts as
/// idle where memory is short.
pub(super) const IDLE: Duration = Duration::from_secs(5);
/// The part of the idle flows that goes at a time, so that the search pays.
const PART: usize = 16;
/// How long flows that give way may take until their descriptors are free: they need one turn each.
const LEAVING: Duration = Duration::from_secs(1);

/// The TCP flows of one worker.
#[derive(Default)]
pub(super) struct Carried {
    flows: RefCell<Flows>,
    /// Told when all that were to give way are gone.
    gone: Notify,
}

#[derive(Default)]
struct Flows {
    /// Those that may be asked to give way.
    flows: HashMap<u64, Rc<Pulse>, RandomState>,
    next: u64,
    /// Flows that were asked to give way and hold their descriptors still.
    leaving: usize,
    /// None can have been idle for long enough before this: flows only become younger.
    not_before: Option<Instant>,
}

/// When data last moved in a flow, and whether it is to give way.
#[derive(Debug)]
pub(super) struct Pulse {
    used: Cell<Instant>,
    leaving: Cell<bool>,
    asked: Notify,
}

impl Pulse {
    /// Data moves.
    pub(super) fn beat(&self) {
        self.used.set(Instant::now());
    }

    fn idle(&self, now: Instant) -> bool {
        self.used.get() + IDLE <= now
    }
}

/// A flow's place among the others, to be held for as long as its descriptors.
pub(super) struct Seat {
    carried: Rc<Carried>,
    number: u64,
    pulse: Rc<Pulse>,
}

/// What came of a search for flows that can give way.
#[derive(Debug, PartialEq, Eq)]
enum Search {
    /// This many were asked to now.
    Asked(usize),
    /// Others were asked before and are about to go.
    Leaving,
    /// None can before then.
    NotBefore(Instant),
    /// There are none.
    Nobody,
}

impl Carried {
    /// Enters a flow that has just been opened.
    pub(super) fn enter(self: &Rc<Self>) -> Seat {
        let now = Instant::now();
        let pulse = Rc::new(Pulse { used: Cell::new(now), leaving: Cell::new(false), asked: Notify::new() });
        let mut flows = self.flows.borrow_mut();
        let number = flows.next;
        flows.next += 1;
        flows.flows.insert(number, Rc::clone(&pulse));
        Seat { carried: Rc::clone(self), number, pulse }
    }

    /// Ends flows that have been idle longest, and returns when their descriptors are free; waits for the first to have
    /// been idle for long enough, until `deadline` at most. `told` hears how many were asked to go. False: none can.
    pub(super) async fn make_room(&self, deadline: Instant, told: impl Fn(usize)) -> bool {
        let now = Instant::now();
        if now >= deadline {
            return false;
        }
        // Made before the search, so that it hears of an end that comes at once.
        let gone = self.gone.notified();
        let search = self.flows.borrow_mut().ask(now);
        match search {
            Search::Nobody => false,
            Search::NotBefore(at) if at > deadline => false,
            Search::NotBefore(at) => {
                sleep_until(at).await;
                true
            }
            Search::Asked(_) | Search::Leaving => {
                if let Search::Asked(many) = search {
                    told(many);
                }
                // Where one takes longer, the next attempt tells whether there is room all the same.
                let _ = timeout(LEAVING, gone).await;
                true
            }
        }
    }

    fn left(&self) {
        let Ok(mut flows) = self.flows.try_borrow_mut() else { return };
        flows.leaving = flows.leaving.saturating_sub(1);
        if flows.leaving == 0 {
            self.gone.notify_waiters();
        }
    }
}

impl Flows {
    /// Asks those that have been idle longest to give way. It looks at every flow, and so not again before it can find
    /// one.
    fn ask(&mut self, now: Instant) -> Search {
        if self.leaving > 0 {
            return Search::Leaving;
        }
        if let Some(at) = self.not_before.filter(|at| *at > now) {
            return Search::NotBefore(at);
        }
        let mut idle: Vec<_> =
            self.flows.iter().filter(|(_, pulse)| pulse.idle(now)).map(|(n, pulse)| (pulse.used.get(), *n)).collect();
        if idle.is_empty() {
            let oldest = self.flows.values().map(|pulse| pulse.used.get()).min();
            self.not_before = oldest.map(|used| used + IDLE);
            return self.not_before.map_or(Search::Nobody, Search::NotBefore);
        }
        let many = (idle.len() / PART).max(1);
        idle.select_nth_unstable(many - 1);
        for (_, number) in &idle[..many] {
            if let Some(pulse) = self.flows.remove(number) {
                pulse.leaving.set(true);
                pulse.asked.notify_one();
                self.leaving += 1;
            }
        }
        Search::Asked(many)
    }
}

impl Seat {
    /// To be told when data moves.
    pub(super) fn pulse(&self) -> Rc<Pulse> {
        Rc::clone(&self.pulse)
    }

    /// Returns when the flow is to give way. One in which data moved after it was asked stays.
    pub(super) async fn asked(&self) {
        loop {
            self.pulse.asked.notified().await;
            if self.pulse.idle(Instant::now()) {
                return;
            }
            if self.pulse.leaving.replace(false) {
                self.carried.flows.borrow_mut().flows.insert(self.number, Rc::clone(&self.pulse));
                self.carried.left();
            }
        }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        if self.pulse.leaving.get() {
            self.carried.left();
        } else if let Ok(mut flows) = self.carried.flows.try_borrow_mut() {
            flows.flows.remove(&self.number);
        }
    }
}

#[cfg(test)]
#[path = "carried_tests.rs"]
mod tests;
