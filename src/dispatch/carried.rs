//! The TCP flows that the workers carry and the dials that are to become flows, and which of them give way when no
//! descriptor is left for another. Descriptors belong to the process, so that the one that goes may be another worker's.

mod choice;

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use foldhash::fast::RandomState;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until, timeout};

use crate::net::client_of;
use crate::stack::Heartbeat;
pub(super) use choice::IDLE;
use choice::{Candidate, Choice, STALE, choose};

/// How long flows that give way may take until their descriptors are free: they need one turn each.
const LEAVING: Duration = Duration::from_secs(1);
/// A search that found nobody is not repeated for so long, whoever asks: it looks at every flow.
const AGAIN: Duration = Duration::from_millis(20);
/// How long one that has to wait does so before it tries again: a descriptor may have become free by itself.
const PAUSE: Duration = Duration::from_millis(100);

/// The TCP flows and dials of all workers.
#[derive(Default)]
pub struct Carried {
    flows: Mutex<Flows>,
    /// Told when all that were to give way are gone.
    gone: Notify,
}

#[derive(Default)]
struct Flows {
    /// Those that may be asked to give way.
    flows: HashMap<u64, Place, RandomState>,
    next: u64,
    /// Flows that were asked to give way and hold their descriptors still.
    leaving: usize,
    /// Nobody searches before this.
    not_before: Option<Instant>,
}

/// A flow or a dial, and whose it is.
#[derive(Clone)]
struct Place {
    client: IpAddr,
    dial: bool,
    pulse: Arc<Pulse>,
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
}

/// A flow's or a dial's place among the others, to be held for as long as its descriptors.
pub(super) struct Seat {
    carried: Arc<Carried>,
    number: u64,
    place: Place,
}

/// How many were asked to give way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Asked {
    pub(super) flows: u64,
    pub(super) dials: u64,
}

/// What came of a search for flows that can give way.
#[derive(Debug, PartialEq, Eq)]
enum Search {
    /// These were asked to now.
    Asked(Asked),
    /// Others were asked before and are about to go.
    Leaving,
    /// None can before then.
    NotBefore(Instant),
    /// There are none.
    Nobody,
}

impl Carried {
    /// Enters a flow of `client` that has just been opened.
    pub(super) fn enter(self: &Arc<Self>, client: IpAddr) -> Seat {
        self.seat(client, false)
    }

    /// Enters a dial for `client` that begins.
    pub(super) fn dial(self: &Arc<Self>, client: IpAddr) -> Seat {
        self.seat(client, true)
    }

    fn seat(self: &Arc<Self>, client: IpAddr, dial: bool) -> Seat {
        let heartbeat = Arc::new(Heartbeat::new(Instant::now().into_std()));
        let pulse = Arc::new(Pulse { heartbeat, leaving: AtomicBool::new(false), asked: Notify::new() });
        let place = Place { client: client_of(client), dial, pulse };
        let mut flows = self.flows.lock();
        let number = flows.next;
        flows.next += 1;
        flows.flows.insert(number, place.clone());
        Seat { carried: Arc::clone(self), number, place }
    }

    /// Whether `client` has more than an equal part of all flows and dials, and more than a few.
    pub(super) fn has_more_than_a_part(&self, client: IpAddr) -> bool {
        choice::has_more_than_a_part(self.flows.lock().candidates(), client_of(client))
    }

    /// Ends flows or dials for a new one of `client`, those that [`choose`] names, and returns when their descriptors are
    /// free; waits a while where the first may be ended later, but before `deadline`. `told` hears how many were asked to
    /// go. False: none can.
    pub(super) async fn make_room(&self, client: IpAddr, deadline: Instant, told: impl Fn(Asked)) -> bool {
        let now = Instant::now();
        if now >= deadline {
            return false;
        }
        // Made before the search, so that it hears of an end that comes at once.
        let gone = self.gone.notified();
        let search = self.flows.lock().ask(client_of(client), now);
        match search {
            Search::Nobody => false,
            Search::NotBefore(at) if at > deadline => false,
            Search::NotBefore(_) => {
                sleep_until((now + PAUSE).min(deadline)).await;
                true
            }
            Search::Asked(_) | Search::Leaving => {
                if let Search::Asked(asked) = search {
                    told(asked);
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
    fn candidates(&self) -> impl Iterator<Item = Candidate> + Clone {
        self.flows.iter().map(|(number, Place { client, dial, pulse })| Candidate {
            number: *number,
            client: *client,
            dial: *dial,
            since: pulse.used(),
        })
    }

    /// Asks those to give way that are to go for `client`.
    fn ask(&mut self, client: IpAddr, now: Instant) -> Search {
        if self.leaving > 0 {
            return Search::Leaving;
        }
        if let Some(at) = self.not_before.filter(|at| *at > now) {
            return Search::NotBefore(at);
        }
        let chosen = match choose(self.candidates(), client, now) {
            Choice::These(chosen) => chosen,
            Choice::NotBefore(at) => {
                self.not_before = Some(at.min(now + AGAIN));
                return Search::NotBefore(at);
            }
            Choice::Nobody => return Search::Nobody,
        };
        let mut asked = Asked::default();
        for number in chosen {
            let Some(Place { dial, pulse, .. }) = self.flows.remove(&number) else { continue };
            pulse.leaving.store(true, Relaxed);
            pulse.asked.notify_one();
            self.leaving += 1;
            *(if dial { &mut asked.dials } else { &mut asked.flows }) += 1;
        }
        Search::Asked(asked)
    }
}

impl Seat {
    /// To be told when data moves.
    pub(super) fn pulse(&self) -> Arc<Pulse> {
        Arc::clone(&self.place.pulse)
    }

    /// The same for who knows no more than the stack.
    pub(super) fn heartbeat(&self) -> Arc<Heartbeat> {
        Arc::clone(&self.place.pulse.heartbeat)
    }

    /// Returns when the flow is to give way. One in which data moved after it was asked stays.
    pub(super) async fn asked(&self) {
        loop {
            self.place.pulse.asked.notified().await;
            // None that is asked is younger.
            if self.place.pulse.used() + STALE <= Instant::now() {
                return;
            }
            if self.place.pulse.leaving.swap(false, Relaxed) {
                self.carried.flows.lock().flows.insert(self.number, self.place.clone());
                self.carried.left();
            }
        }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        // Under the lock: another worker may be asking it just now.
        let known = self.carried.flows.lock().flows.remove(&self.number).is_some();
        if !known && self.place.pulse.leaving.load(Relaxed) {
            self.carried.left();
        }
    }
}

#[cfg(test)]
#[path = "carried_tests.rs"]
mod tests;
