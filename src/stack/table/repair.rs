//! Sends again what was lost, and keeps smoltcp from sending more than the path takes:
//! [`Recovery`](super::super::recovery) says what and how much.

use std::num::NonZeroU16;
use std::time::Instant;

use smoltcp::socket::tcp::State;

use super::super::flow::Flow;
use super::super::frame::Transmit;
use super::super::progress::is_ahead;
use super::super::recovery::Word;
use super::super::since;
use super::super::tcp::{Data, Segment, acknowledgement};
use super::{Measure, SHARE, Table, contained};

/// What smoltcp makes of a segment, before it has seen it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Welcome {
    /// It lies outside the window; what it says is not read.
    Refused,
    Accepted,
    /// The same, and it begins where the one before it ended, so that it is certain.
    Exact,
}

impl Flow {
    /// Whether something of ours may have to be sent again.
    pub(super) fn repairs(&mut self) -> bool {
        matches!(
            self.socket().state(),
            State::Established | State::CloseWait | State::FinWait1 | State::Closing | State::LastAck
        )
    }

    /// What smoltcp will make of `segment`, which it is given next.
    pub(super) fn welcome(&mut self, segment: &Segment) -> Welcome {
        let (next, room) = self.expects();
        let next = next.wrapping_add(u32::from(self.progress.finished));
        let within = |number: u32| (number.wrapping_sub(next) as usize) < room;
        let exact = segment.sequence == next;
        let accepted = match segment.payload {
            0 => exact || within(segment.sequence),
            _ => room > 0 && (within(segment.sequence) || within(segment.end().wrapping_sub(1))),
        };
        match (accepted, exact) {
            (false, _) => Welcome::Refused,
            (true, false) => Welcome::Accepted,
            (true, true) => Welcome::Exact,
        }
    }

    /// Whether `segment` says no more than that something is missing, which is not for smoltcp to know: to the third such
    /// word it would answer with a whole segment, of data that was never sent and for which a small window has no room.
    pub(super) fn is_echo(&mut self, segment: &Segment) -> bool {
        let owes = match self.socket().state() {
            State::Established | State::CloseWait => self.socket().send_queue() > 0,
            State::FinWait1 | State::Closing => true,
            _ => false,
        };
        owes && segment.is_bare()
            && segment.window > 0
            && self.progress.window.1 == Some(segment.window)
            && segment.acknowledgement == Some(self.unacknowledged())
            && segment.sequence == self.expects().0.wrapping_add(u32::from(self.progress.finished))
    }

    /// Takes note of what `segment`, which smoltcp has just been given, says of our data.
    pub(super) fn hear(&mut self, segment: &Segment, welcome: Welcome, now: Instant) {
        if self.progress.end().is_none() || self.socket().state() == State::SynReceived || segment.is_reset() {
            return;
        }
        let start = self.unacknowledged();
        let (before, _) = self.progress.window;
        // What was overtaken on its way tells of the past, and looks as if it told of data that came twice.
        let refused = welcome == Welcome::Refused
            || welcome == Welcome::Exact && segment.payload > 0 && self.expects().0 == segment.sequence;
        let current = !refused && segment.acknowledgement == Some(start);
        if current {
            self.progress.window.0 = segment.window;
            self.progress.limit = Some(start.wrapping_add(u32::from(segment.window) << self.progress.scale));
        }
        self.progress.window.1 = (current && welcome == Welcome::Exact).then_some(segment.window);
        let bare = current && segment.payload == 0 && !segment.is_last();
        let same = segment.window == before || segment.blocks.iter().next().is_some();
        let blocks = if current { segment.blocks } else { Default::default() };
        let shut = current.then_some(segment.window == 0);
        self.progress.recovery.hear(&Word { start, blocks, bare: bare && same, shut }, now);
    }
}

impl Table {
    /// Sends again what is lost. False: the flow's share is used up or the device is full.
    pub(super) fn repair(&mut self, flow: &mut Flow, now: Instant, transmit: &mut dyn Transmit) -> bool {
        if !flow.repairs() {
            return true;
        }
        flow.progress.recovery.tick(now);
        for _ in 0..SHARE {
            let most = if self.offload { usize::MAX } else { flow.progress.recovery.segment() };
            if !transmit.ready() {
                return false;
            }
            let Some((start, end)) = flow.progress.recovery.next(most) else { return true };
            self.send_again(flow, start, end, transmit);
            flow.progress.recovery.sent_again(start, end, now);
            self.warm_up(flow, now);
        }
        false
    }

    /// Sends what lies between the two numbers as it stands in the ring.
    fn send_again(&self, flow: &Flow, start: u32, end: u32, transmit: &mut dyn Transmit) {
        let written = flow.progress.recovery.written();
        let last = end != written && is_ahead(end, written);
        let payload = end.wrapping_sub(start).wrapping_sub(u32::from(last)) as usize;
        let segment = flow.progress.recovery.segment();
        let data = Data {
            tuple: flow.tuple,
            sequence: start,
            acknowledgement: flow.progress.sent.1,
            window: flow.progress.announced,
            payload,
            last,
            gso: if payload > segment { u16::try_from(segment).ok().and_then(NonZeroU16::new) } else { None },
        };
        let back = written.wrapping_sub(start) as usize;
        data.send(self.offload, transmit, &mut |space| flow.rings.read_back(back, space));
    }

    /// Tells smoltcp of a window that leaves no more than may be sent now, in place of the client.
    pub(super) fn restrain(&mut self, flow: &mut Flow, now: Instant, transmit: &mut dyn Transmit) {
        let (progress, state) =
            (&flow.progress, flow.sockets.get_mut::<smoltcp::socket::tcp::Socket<'static>>(flow.handle).state());
        let (theirs, told) = progress.window;
        let takes = matches!(state, State::Established | State::CloseWait | State::FinWait1 | State::Closing);
        if !takes || theirs == 0 || !progress.recovery.has_unsent() {
            return;
        }
        let Some(reach) = progress.recovery.reach() else { return };
        let units = u16::try_from(reach >> progress.scale).unwrap_or(u16::MAX);
        let window = theirs.min(units.max(1));
        if told == Some(window) {
            return;
        }
        let next = flow.expects().0.wrapping_add(u32::from(flow.progress.finished));
        let bytes = acknowledgement(flow.tuple, next, flow.unacknowledged(), window);
        let side = &mut self.sides[usize::from(flow.tuple.server.is_ipv6())];
        let measure = Measure { cut: flow.cut, end: flow.place_of_bare(), keep: false };
        let sockets = &mut flow.sockets;
        if contained(|| side.ingest(&bytes, measure, sockets, since(self.epoch, now), transmit)).is_none() {
            flow.give_up();
        }
        flow.progress.window.1 = Some(window);
    }
}
