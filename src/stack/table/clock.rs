//! What time does to flows: timers, patience that runs out, pages given back, and silent clients asked for a sign.

use std::rc::Rc;
use std::time::{Duration, Instant};

use super::super::flow::Flow;
use super::super::since;
use super::Table;

/// A flow without data for so long gives its pages back.
const COLD: Duration = Duration::from_secs(5);
/// A second later than the first is due, so that one wake-up serves many.
const SLACK: Duration = Duration::from_secs(1);
/// A client that has said nothing for so long is asked for a sign of life (RFC 5382 REQ-5: not before 2 h 4 min).
const SILENT: Duration = Duration::from_secs(2 * 3600 + 4 * 60);
/// The question is repeated after this time until the client is given up as deaf (Linux: `tcp_keepalive_intvl`).
const ASK_AGAIN: Duration = Duration::from_secs(75);
/// Silent flows are looked for at most so often, whatever their number: one wake-up serves all of them.
const LOOK: Duration = Duration::from_secs(600);

impl Table {
    /// Data has moved.
    pub(super) fn warm_up(&mut self, flow: &mut Flow, now: Instant) {
        flow.progress.moved = now;
        self.keep_warm(flow, now);
    }

    /// Sees to it that the pages of `flow` are looked at when it may have gone cold.
    pub(super) fn keep_warm(&mut self, flow: &mut Flow, now: Instant) {
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
        let repair = flow.progress.recovery.deadline().filter(|_| flow.repairs());
        let Some(due) =
            at.into_iter().chain(end).chain(repair).min().map(|due| due.max(now + Duration::from_millis(1)))
        else {
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
            let cold = flow.progress.moved + COLD;
            if cold <= now + SLACK {
                // If something lies in its rings, it is warm again as soon as that moves on.
                flow.progress.warm = None;
                flow.release_if_empty();
            } else {
                flow.progress.warm = Some(cold);
                self.warm.push_back((cold, tuple));
            }
        }
    }

    /// Asks clients that have been silent for very long for a sign of life. One that has vanished without a word would
    /// otherwise keep its flow and its upstream for ever; one that is there answers, and nothing else happens.
    pub(super) fn look_for_silent(&mut self, now: Instant) {
        if self.flows.is_empty() || now < self.look {
            return;
        }
        let mut next = now + SILENT;
        for handle in self.flows.values() {
            let mut flow = handle.borrow_mut();
            let due = flow.progress.heard + SILENT;
            if due > now {
                next = next.min(due);
            } else if flow.ask_for_sign(ASK_AGAIN) && !flow.dirty {
                flow.dirty = true;
                self.shared.dirty.borrow_mut().push(Rc::clone(handle));
            }
        }
        self.look = next.max(now + LOOK);
    }

    /// The first flow of an empty table is silent no earlier than this.
    pub(super) fn start_looking(&mut self, now: Instant) {
        if self.flows.is_empty() {
            self.look = now + SILENT;
        }
    }

    pub(in super::super) fn deadline(&self) -> Option<Instant> {
        let timer = self.timers.first();
        let warm = self.warm.front().map(|(due, _)| *due + SLACK);
        let look = (!self.flows.is_empty()).then_some(self.look);
        [timer, warm, look, self.relief_due()].into_iter().flatten().min()
    }
}
