//! What time does to flows: timers, patience that runs out, and pages given back.

use std::rc::Rc;
use std::time::{Duration, Instant};

use super::super::flow::Flow;
use super::super::since;
use super::Table;

/// A flow without data for so long gives its pages back.
const COLD: Duration = Duration::from_secs(5);

impl Table {
    pub(super) fn warm_up(&mut self, flow: &mut Flow, now: Instant) {
        flow.progress.moved = now;
        if flow.progress.warm.is_none() {
            flow.progress.warm = Some(now + COLD);
            self.warm.push_back((now + COLD, flow.tuple));
        }
    }

    /// Makes sure that the timer queue wakes the flow in time. An entry that is too early is harmless.
    pub(super) fn arm(&mut self, flow: &mut Flow, now: Instant) {
        if flow.held.is_some() {
            return; // `poll_at` of a held socket is always "now".
        }
        let (state, unsent, orphan) = (flow.socket().state(), flow.socket().send_queue(), flow.orphan);
        let end = flow.progress.patience(state, unsent, orphan, now);
        if end.is_some_and(|end| end <= now) {
            flow.socket().abort();
        }
        let side = &mut self.sides[usize::from(flow.tuple.server.is_ipv6())];
        let at = side.interface.poll_at(since(self.epoch, now), &flow.sockets);
        let at = at.map(|at| self.epoch + Duration::from_micros(u64::try_from(at.total_micros()).unwrap_or(0)));
        // Whatever is due now was just served; a millisecond keeps a mistake from spinning.
        let Some(due) = at.into_iter().chain(end).min().map(|due| due.max(now + Duration::from_millis(1))) else {
            return;
        };
        if flow.armed.is_none_or(|armed| due < armed) {
            flow.armed = Some(due);
            self.timers.push(due, flow.tuple);
        }
    }

    pub(super) fn fire_timers(&mut self, now: Instant) {
        while let Some((due, tuple)) = self.timers.pop(now) {
            let Some(handle) = self.flows.get(&tuple) else { continue };
            let mut flow = handle.borrow_mut();
            if flow.armed != Some(due) {
                continue;
            }
            flow.armed = None;
            if !flow.dirty {
                flow.dirty = true;
                self.shared.dirty.borrow_mut().push(Rc::clone(handle));
            }
        }
    }

    /// Gives back the pages of flows that have fallen idle. Runs only while there are warm flows.
    pub(super) fn cool_down(&mut self, now: Instant) {
        while self.warm.front().is_some_and(|(due, _)| *due <= now) {
            let Some((due, tuple)) = self.warm.pop_front() else { return };
            let Some(handle) = self.flows.get(&tuple) else { continue };
            let mut flow = handle.borrow_mut();
            if flow.progress.warm != Some(due) {
                continue; // Of an earlier flow with this tuple.
            }
            let idle = now.saturating_duration_since(flow.progress.moved) >= COLD;
            if idle && flow.release_if_empty() {
                flow.progress.warm = None;
                continue;
            }
            flow.progress.warm = Some(now + COLD);
            self.warm.push_back((now + COLD, tuple));
        }
    }

    pub(in super::super) fn deadline(&self) -> Option<Instant> {
        let timer = self.timers.first();
        // A second later than the first is due, so that one wake-up serves many.
        let warm = self.warm.front().map(|(due, _)| *due + Duration::from_secs(1));
        timer.into_iter().chain(warm).min()
    }
}
