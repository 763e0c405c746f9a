//! Tells clients what of their data has come, where that is more than smoltcp says:
//! [`Reception`](super::super::reception) knows.

use smoltcp::socket::tcp::State;

use super::super::Handle;
use super::super::flow::Flow;
use super::super::frame::Transmit;
use super::super::port::Sent;
use super::super::progress::is_ahead;
use super::super::tcp::{Acknowledgement, Segment, with_acknowledgement};
use super::Table;

/// Data that does not simply come next, before smoltcp has seen it.
pub(super) struct Arrival {
    /// Where it begins and ends.
    data: (u32, u32),
    /// Up to there everything had come.
    next: u32,
    /// Up to there smoltcp takes anything.
    edge: u32,
    /// Its acknowledgement is one that smoltcp accepts, and with it the data.
    sane: bool,
}

/// Whether the client may still send data and FIN.
fn receives(state: State) -> bool {
    matches!(state, State::Established | State::FinWait1 | State::FinWait2)
}

impl Flow {
    /// What `segment`, which smoltcp is given next, brings out of order. None: it says nothing of that.
    pub(super) fn arrival(&mut self, segment: &Segment) -> Option<Arrival> {
        let next = self.expects().0;
        let progress = &self.progress;
        let plain = segment.sequence == next && !progress.reception.has_news();
        if plain || segment.payload == 0 || segment.is_reset() || progress.finished {
            return None;
        }
        progress.end()?;
        let (edge, sane) = (progress.edge, self.is_sane(segment));
        Some(Arrival { data: (segment.sequence, segment.end()), next, edge, sane })
    }

    /// `bytes` with a current acknowledgement where `segment`, which they hold, was overtaken on its way. What it
    /// acknowledges is old news; smoltcp would drop its data for that.
    pub(super) fn renewed(&mut self, bytes: &[u8], segment: &Segment) -> Option<Vec<u8>> {
        let content = segment.payload > 0 || segment.is_last();
        if !content || !receives(self.socket().state()) {
            return None;
        }
        let (start, most) = (self.unacknowledged(), self.socket().send_capacity());
        let behind = start.wrapping_sub(segment.acknowledgement?) as usize;
        // RFC 5961 section 5.2: no older than the largest window.
        (1..=most).contains(&behind).then(|| with_acknowledgement(bytes, start, self.progress.window.0))
    }
}

impl Table {
    /// Notes what became of `arrival`, to which smoltcp has `said` something, and tells the client at once (RFC 5681
    /// section 4.2).
    pub(super) fn settle(&self, flow: &mut Flow, arrival: &Arrival, said: Option<Sent>, transmit: &mut dyn Transmit) {
        let next = flow.expects().0;
        let Arrival { data, next: before, edge, sane } = *arrival;
        let reception = &mut flow.progress.reception;
        let beyond = data.0 != before && is_ahead(data.0, before);
        // smoltcp says nothing where it takes nothing for want of a place; the client is to know the rest of it all the
        // same, and that something is missing.
        let full = said.is_none() && beyond && reception.is_full();
        reception.note(data, before, edge, sane && said.is_some());
        reception.advance(next);
        if full || said.is_some_and(|said| said.kept) {
            self.tell(flow, transmit);
        }
    }

    /// The FIN that is to be taken after `segment`: its own, or one that came too early before. It is remembered until
    /// everything before it has come.
    pub(super) fn ending(&self, handle: &Handle, segment: &Segment, transmit: &mut dyn Transmit) -> Option<Segment> {
        let mut guard = handle.borrow_mut();
        let flow = &mut *guard;
        if !segment.is_last() && flow.progress.reception.end.is_none() || !receives(flow.socket().state()) {
            return None;
        }
        let (next, end, edge) = (flow.expects().0, segment.end(), flow.progress.edge);
        let sane = flow.is_sane(segment);
        if segment.is_last() && sane && is_ahead(end, next) && is_ahead(edge, end) {
            flow.progress.reception.end = Some(end);
            if end != next && segment.payload == 0 {
                self.tell(flow, transmit);
            }
        }
        if flow.progress.reception.end != Some(next) {
            return None;
        }
        Some(segment.last(next, flow.unacknowledged(), flow.progress.window.0))
    }

    /// Acknowledges what has come, with the numbers and the window that the flow said last.
    pub(super) fn tell(&self, flow: &mut Flow, transmit: &mut dyn Transmit) {
        if !transmit.ready() {
            return flow.progress.reception.owe();
        }
        let ((end, acknowledgement), window) = (flow.progress.sent, flow.progress.announced);
        let sequence = flow.place_of_bare().unwrap_or(end);
        // A client that does not want the blocks is told as often.
        let blocks = Some(flow.progress.reception.blocks()).filter(|_| flow.progress.selective).unwrap_or_default();
        Acknowledgement { tuple: flow.tuple, sequence, acknowledgement, window, blocks }.send(self.offload, transmit);
    }
}
