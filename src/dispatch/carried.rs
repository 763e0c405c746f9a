//! The TCP flows that the workers carry, and which of them give way when no descriptor is left for another. Descriptors
//! belong to the process, so that the flow that goes may be another worker's.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use foldhash::fast::RandomState;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until, timeout};

use crate::stack::Heartbeat;

/// A flow in which data has moved since then never gives way: most exchanges pause for less, and it is what counts as
/// idle where memory is short.
pub(super) const IDLE: Duration = Duration::from_secs(5);
/// The part of the idle flows that goes at a time, so that the search pays.
const PART: usize = 16;
/// How long flows that give way may take until their descriptors are free: they need one turn each.
const LEAVING: Duration = Duration::from_secs(1);

/// The TCP flows of all workers.
#[derive(Default)]
pub struct Carried {
    flows: Mutex<Flows>,
    /// Told when all that were to give way are gone.
    gone: Notify,
}

#[derive(Default)]
struct Flows {
    /// Those that may be asked to give way.
    flows: HashMap<u64, Arc<Pulse>, RandomState>,
    next: u64,
    /// Flows that were asked to give way and hold their descriptors still.
    leaving: usize,
    /// None can have been idle for long enough before this: flows only become younger.
    not_before: Option<Instant>,
}

/// When data last moved in a flow, and whether it is to give way.
#[derive(Debug)]
pub(super) struct Pulse {
    heartbeat: Arc<Heartbeat>,
    leaving: AtomicBool,
    asked: Notify,
}

impl Pulse {
    /// Data moves.
    pub(super) fn beat(&self) {
        self.heartbeat.beat(Instant::now().into_std());
    }

    fn used(&self) -> Instant {
        Instant::from_std(self.heartbeat.last())
    }

    fn idle(&self, now: Instant) -> bool {
        self.used() + IDLE <= now
    }
}

/// A flow's place among the others, to be held for as long as its descriptors.
pub(super) struct Seat {
    carried: Arc<Carried>,
    number: u64,
    pulse: Arc<Pulse>,
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
    pub(super) fn enter(self: &Arc<Self>) -> Seat {
        let heartbeat = Arc::new(Heartbeat::new(Instant::now().into_std()));
        let pulse = Arc::new(Pulse { heartbeat, leaving: AtomicBool::new(false), asked: Notify::new() });
        let mut flows = self.flows.lock();
        let number = flows.next;
        flows.next += 1;
        flows.flows.insert(number, Arc::clone(&pulse));
        Seat { carried: Arc::clone(self), number, pulse }
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
        let search = self.flows.lock().ask(now);
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
        let mut flows = self.flows.lock();
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
            self.flows.iter().filter(|(_, pulse)| pulse.idle(now)).map(|(n, pulse)| (pulse.used(), *n)).collect();
        if idle.is_empty() {
            let oldest = self.flows.values().map(|pulse| pulse.used()).min();
            self.not_before = oldest.map(|used| used + IDLE);
            return self.not_before.map_or(Search::Nobody, Search::NotBefore);
        }
        let many = (idle.len() / PART).max(1);
        idle.select_nth_unstable(many - 1);
        for (_, number) in &idle[..many] {
            if let Some(pulse) = self.flows.remove(number) {
                pulse.leaving.store(true, Relaxed);
                pulse.asked.notify_one();
                self.leaving += 1;
            }
        }
        Search::Asked(many)
    }
}

impl Seat {
    /// To be told when data moves.
    pub(super) fn pulse(&self) -> Arc<Pulse> {
        Arc::clone(&self.pulse)
    }

    /// The same for who knows no more than the stack.
    pub(super) fn heartbeat(&self) -> Arc<Heartbeat> {
        Arc::clone(&self.pulse.heartbeat)
    }

    /// Returns when the flow is to give way. One in which data moved after it was asked stays.
    pub(super) async fn asked(&self) {
        loop {
            self.pulse.asked.notified().await;
            if self.pulse.idle(Instant::now()) {
                return;
            }
            if self.pulse.leaving.swap(false, Relaxed) {
                self.carried.flows.lock().flows.insert(self.number, Arc::clone(&self.pulse));
                self.carried.left();
            }
        }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        // Under the lock: another worker may be asking it just now.
        let known = self.carried.flows.lock().flows.remove(&self.number).is_some();
        if !known && self.pulse.leaving.load(Relaxed) {
            self.carried.left();
        }
    }
}

#[cfg(test)]
#[path = "carried_tests.rs"]
mod tests;
