//! Has smoltcp send the earliest unacknowledged segment again, when [`Recovery`](super::super::recovery) says so.

use std::time::Instant;

use super::super::flow::Flow;
use super::super::frame::Transmit;
use super::super::recovery::Acknowledgement;
use super::super::tcp::{Segment, acknowledgement};
use super::super::{Handle, since};
use super::{Table, contained};

impl Flow {
    /// Whether `segment`, which is still to be given to smoltcp, shows that something was lost.
    pub(super) fn misses(&mut self, segment: &Segment, now: Instant) -> bool {
        let (Some(number), Some(end)) = (segment.acknowledgement, self.progress.end()) else { return false };
        let of_gap = segment.selective && segment.payload == 0 && !segment.is_last();
        let known = Acknowledgement { number, before: self.progress.acknowledged, end, of_gap };
        self.progress.recovery.note(known, now)
    }
}

impl Table {
    /// Brings about a fast retransmission: three acknowledgements in a row of what `segment` acknowledges, with a window
    /// that is not the client's, so that they count from one; then one with the client's own window.
    pub(super) fn repair(&mut self, handle: &Handle, segment: &Segment, now: Instant, transmit: &mut dyn Transmit) {
        let Some(number) = segment.acknowledgement else { return };
        // A shut window takes no repair.
        let Some(other) = segment.window.checked_sub(1) else { return };
        let time = since(self.epoch, now);
        let mut flow = handle.borrow_mut();
        let flow = &mut *flow;
        let next = flow.expects().0;
        let side = &mut self.sides[usize::from(flow.tuple.server.is_ipv6())];
        for window in [other, other, other, other, segment.window] {
            let bytes = acknowledgement(flow.tuple, next, number, window);
            let (measure, sockets) = ((flow.cut, flow.progress.end()), &mut flow.sockets);
            if contained(|| side.ingest(&bytes, measure, sockets, time, transmit)).is_none() {
                flow.give_up();
                return;
            }
        }
    }
}
