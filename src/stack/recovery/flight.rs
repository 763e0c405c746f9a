//! What is on its way to a client, stretch by stretch: what of it has arrived, what is lost, what was sent again (the
//! scoreboard of RFC 6675 with the times of RFC 8985).

use std::collections::VecDeque;
use std::ops::Range;
use std::time::Instant;

use super::super::progress::is_ahead;

/// What is known of a stretch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    Flying,
    /// To be sent again.
    Lost,
    /// Beyond a gap (SACK, RFC 2018).
    Arrived,
}

/// Sequence numbers that have the same story.
#[derive(Debug, Clone, Copy)]
pub(super) struct Part {
    pub(super) start: u32,
    pub(super) end: u32,
    /// When it was sent last, and after how many repairs, since a burst has one time.
    pub(super) sent: (Instant, u32),
    pub(super) fate: Fate,
    /// It was sent more than once, so that nobody knows which of them arrived (Karn).
    pub(super) again: bool,
}

impl Part {
    pub(super) fn bytes(&self) -> usize {
        self.end.wrapping_sub(self.start) as usize
    }

    /// Whether it left before the one that was sent at `sent` and ends at `end`; within a burst the numbers tell.
    pub(super) fn is_before(&self, (sent, end): ((Instant, u32), u32)) -> bool {
        self.sent < sent || self.sent == sent && is_ahead(end, self.end)
    }

    fn goes_on_in(&self, next: &Self) -> bool {
        let alike = self.fate == next.fate && self.again == next.again && self.sent == next.sent;
        self.fate == next.fate && (alike || self.fate == Fate::Arrived)
    }
}

/// Everything between the last acknowledgement and the end of what was sent, without a gap.
#[derive(Debug)]
pub(super) struct Flight {
    /// The earliest number that is not acknowledged.
    pub(super) start: u32,
    /// The end of what was sent.
    pub(super) end: u32,
    pub(super) parts: VecDeque<Part>,
    /// The list grows no longer than this, whatever the client says.
    most: usize,
    repairs: u32,
}

impl Flight {
    pub(super) fn new(start: u32, most: usize) -> Self {
        Self { start, end: start, parts: VecDeque::new(), most, repairs: 0 }
    }

    /// Notes what was sent for the first time; what of it was sent before is left as it is.
    pub(super) fn extend(&mut self, end: u32, now: Instant) {
        if end == self.end || !is_ahead(end, self.end) {
            return;
        }
        let now = (now, self.repairs);
        let part = Part { start: self.end, end, sent: now, fate: Fate::Flying, again: false };
        self.end = end;
        let full = self.parts.len() >= self.most;
        match self.parts.back_mut() {
            // At the bound the story is told less exactly, and of a later time, which loses nothing before its time.
            Some(last) if last.goes_on_in(&part) || full && last.fate == Fate::Flying => {
                (last.end, last.sent) = (end, now);
            }
            _ => self.parts.push_back(part),
        }
    }

    /// Takes everything before `number` out, and tells `of` each part.
    pub(super) fn acknowledge(&mut self, number: u32, mut of: impl FnMut(&Part)) {
        if !is_ahead(number, self.start) {
            return;
        }
        while let Some(part) = self.parts.front_mut() {
            if number == part.start || !is_ahead(number, part.start) {
                break;
            }
            let gone = Part { end: if is_ahead(number, part.end) { part.end } else { number }, ..*part };
            of(&gone);
            if gone.end == part.end {
                self.parts.pop_front();
            } else {
                part.start = gone.end;
            }
        }
        self.start = number;
        if is_ahead(number, self.end) {
            self.end = number;
        }
        if self.parts.is_empty() && self.parts.capacity() > 16 {
            self.parts = VecDeque::new();
        }
    }

    /// Puts back what was taken out too early.
    pub(super) fn put_back(&mut self, number: u32, now: Instant) {
        if number != self.start && is_ahead(self.start, number) {
            let sent = (now, self.repairs);
            let part = Part { start: number, end: self.start, sent, fate: Fate::Flying, again: true };
            self.parts.push_front(part);
            self.start = number;
        }
    }

    /// Marks what lies between the two numbers as arrived, and tells `of` each part of which that is news.
    pub(super) fn arrive(&mut self, left: u32, right: u32, mut of: impl FnMut(&Part)) {
        let covers = |part: &Part| is_ahead(left, part.start) && is_ahead(part.end, right);
        let known = self.parts.iter().any(|part| part.fate == Fate::Arrived && covers(part));
        if known || !self.is_within(left, right) || !self.cut(left) || !self.cut(right) {
            return;
        }
        let places = self.places(left, right);
        for part in self.parts.range_mut(places.clone()).filter(|part| part.fate != Fate::Arrived) {
            of(part);
            part.fate = Fate::Arrived;
        }
        self.join(places);
    }

    /// Marks what of `[start, end)` is flying or lost as sent just now.
    pub(super) fn resend(&mut self, start: u32, end: u32, now: Instant) {
        if !self.is_within(start, end) {
            return;
        }
        self.repairs = self.repairs.wrapping_add(1);
        let sent = (now, self.repairs);
        // Where the list is full, more is taken for sent than was; it is found lost later.
        self.cut(start);
        self.cut(end);
        let places = self.places(start, end);
        for part in self.parts.range_mut(places.clone()).filter(|part| part.fate != Fate::Arrived) {
            (part.fate, part.sent, part.again) = (Fate::Flying, sent, true);
        }
        self.join(places);
    }

    /// Marks everything as lost; what has arrived only if it may have been thrown away since (RFC 2018 section 8).
    pub(super) fn lose_everything(&mut self, even_arrived: bool) {
        for part in &mut self.parts {
            if even_arrived || part.fate != Fate::Arrived {
                part.fate = Fate::Lost;
            }
        }
        self.join(0..self.parts.len());
    }

    /// Marks the first `bytes` as lost. Returns how many bytes that is news of.
    pub(super) fn lose_first(&mut self, bytes: usize) -> usize {
        let bytes = super::super::flow::low_bits(bytes.min(self.bytes()));
        let end = self.start.wrapping_add(bytes);
        if bytes == 0 || !self.cut(end) {
            return 0;
        }
        let mut lost = 0;
        for part in self.parts.iter_mut().take_while(|part| is_ahead(end, part.end)) {
            if part.fate == Fate::Flying {
                lost += part.bytes();
                part.fate = Fate::Lost;
            }
        }
        lost
    }

    /// The first stretch that is to be sent again.
    pub(super) fn lost(&self) -> Option<(u32, u32)> {
        self.parts.iter().find(|part| part.fate == Fate::Lost).map(|part| (part.start, part.end))
    }

    /// Bytes that are believed to be on their way.
    pub(super) fn flying(&self) -> usize {
        self.count(Fate::Flying)
    }

    /// The same where each stretch that was sent again weighs as much as a whole segment at least: a client that tells of
    /// gaps of a byte has a packet sent for each.
    pub(super) fn burden(&self, segment: usize) -> usize {
        let weight = |part: &Part| if part.again { part.bytes().max(segment) } else { part.bytes() };
        self.parts.iter().filter(|part| part.fate == Fate::Flying).map(weight).sum()
    }

    /// Bytes that have arrived beyond a gap.
    pub(super) fn arrived(&self) -> usize {
        self.count(Fate::Arrived)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.start == self.end
    }

    pub(super) fn bytes(&self) -> usize {
        self.end.wrapping_sub(self.start) as usize
    }

    fn count(&self, fate: Fate) -> usize {
        self.parts.iter().filter(|part| part.fate == fate).map(Part::bytes).sum()
    }

    fn is_within(&self, left: u32, right: u32) -> bool {
        left != right && is_ahead(right, left) && is_ahead(left, self.start) && is_ahead(self.end, right)
    }

    /// Where those parts stand of which something lies between the two numbers.
    fn places(&self, left: u32, right: u32) -> Range<usize> {
        let offset = |number: u32| number.wrapping_sub(self.start);
        let first = self.parts.partition_point(|part| offset(part.end) <= offset(left));
        let past = self.parts.partition_point(|part| offset(part.start) < offset(right));
        first..past.max(first)
    }

    /// Sees to it that a part begins at `number`. False: there are as many as there may be.
    fn cut(&mut self, number: u32) -> bool {
        let at = self.places(number, number).start;
        let full = self.parts.len() >= self.most;
        let Some(part) = self.parts.get_mut(at).filter(|part| part.start != number) else { return true };
        if full {
            return false;
        }
        let second = Part { start: number, ..*part };
        part.end = number;
        self.parts.insert(at + 1, second);
        true
    }

    /// Makes one of neighbours with the same story, of which one stands in `places`.
    fn join(&mut self, places: Range<usize>) {
        for at in (places.start.saturating_sub(1)..places.end).rev() {
            let Some(next) = self.parts.get(at + 1).copied() else { continue };
            let Some(part) = self.parts.get_mut(at).filter(|part| part.goes_on_in(&next)) else { continue };
            part.end = next.end;
            self.parts.remove(at + 1);
        }
    }
}
