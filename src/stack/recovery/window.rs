//! How much may be on its way to a client: slow start and CUBIC (RFC 9438), for links that lose packets without being
//! crowded.
//!
//! A lost packet alone says nothing of a queue on the last link to a client, which more often than not is a radio. The
//! window is cut where there is evidence of one: the least round trip of a whole round has grown (the sign of HyStart++,
//! RFC 9406), or so much of a round is lost as only a full queue loses. It is cut once in an episode (RFC 6582), and as
//! it was before if what was taken for lost turns out to have been late (RFC 3708).

use std::time::{Duration, Instant};

/// Segments of the first window (RFC 6928).
const INITIAL: usize = 10;
/// What a cut leaves (RFC 9438 section 4.6), and its constant C.
const BETA: f64 = 0.7;
const CUBIC: f64 = 0.4;
/// A queue delays a whole round by at least this, or by a quarter of the least round trip.
const QUEUED: Duration = Duration::from_millis(2);
/// Slow start goes on by a part while rounds are delayed, and ends after so many of them (RFC 9406 section 4.2).
const CAUTION: usize = 4;
const PROOF: u32 = 5;
/// One in so many lost in a round, and at least [`SEVERAL`] segments of them: more than a radio loses.
const HEAVY: usize = 8;
const SEVERAL: usize = 4;
/// No more than any ring holds.
const MOST: usize = 1 << 20;

#[derive(Debug)]
pub(super) struct Window {
    segment: usize,
    /// Bytes that may be flying.
    pub(super) bytes: usize,
    /// Below this it grows by what arrives, above it by CUBIC.
    pub(super) threshold: usize,
    /// Where it was cut last, and when it began to grow from what that left.
    highest: usize,
    since: Option<Instant>,
    /// Seconds that CUBIC takes to come back to `highest`: its K.
    origin: f64,
    round: Round,
    /// How many whole rounds in a row were delayed by a queue.
    queued: u32,
    /// Bytes that came twice in the round before this.
    returned: usize,
    undo: Option<Undo>,
}

/// How it was before it was cut, and the evidence for that.
#[derive(Debug, Clone, Copy)]
struct Undo {
    bytes: usize,
    threshold: usize,
    highest: usize,
    /// Bytes that seemed lost, of so many.
    lost: usize,
    of: usize,
    /// Rounds until that evidence is all there; None: the episode in which it was cut goes on.
    rounds: Option<u32>,
}

/// Whether no radio loses so much.
fn is_heavy(lost: usize, of: usize, segment: usize) -> bool {
    lost >= SEVERAL * segment && lost * HEAVY > of
}

/// What is counted from when some data is sent until it has arrived.
#[derive(Debug, Default)]
struct Round {
    least: Option<Duration>,
    arrived: usize,
    lost: usize,
    /// Came twice, so that it was not lost.
    returned: usize,
}

impl Window {
    pub(super) fn new(segment: usize) -> Self {
        Self {
            segment,
            bytes: INITIAL * segment,
            threshold: usize::MAX,
            highest: 0,
            since: None,
            origin: 0.0,
            round: Round::default(),
            queued: 0,
            returned: 0,
            undo: None,
        }
    }

    /// `bytes` have arrived, the latest after `round_trip` where that is known. It grows only where it was `used` up.
    pub(super) fn arrived(&mut self, bytes: usize, round_trip: Option<Duration>, used: bool, now: Instant) {
        self.round.arrived += bytes;
        self.round.least = self.round.least.into_iter().chain(round_trip).min();
        if !used {
            self.since = None;
        } else if self.bytes < self.threshold {
            self.bytes += if self.queued > 0 { bytes / CAUTION } else { bytes };
        } else {
            self.bytes += self.growth(bytes, now);
        }
        self.bytes = self.bytes.min(MOST);
    }

    /// By how much CUBIC grows for `bytes` that have arrived, and no less than Reno.
    fn growth(&mut self, bytes: usize, now: Instant) -> usize {
        let since = *self.since.get_or_insert(now);
        let segment = self.segment as f64;
        let (window, highest) = (self.bytes as f64 / segment, self.highest as f64 / segment);
        let time = now.saturating_duration_since(since).as_secs_f64();
        let target = (CUBIC * (time - self.origin).powi(3) + highest).clamp(window, 1.5 * window);
        let gain = ((target - window) / window).max(1.0 / window) * bytes as f64;
        gain as usize
    }

    /// What was sent at the beginning of the round has arrived. `least` is the least round trip of this path.
    pub(super) fn round_over(&mut self, least: Duration) {
        let round = std::mem::take(&mut self.round);
        if let Some(rounds) = self.undo.as_mut().and_then(|undo| undo.rounds.as_mut()) {
            *rounds -= 1;
        }
        self.undo = self.undo.filter(|undo| undo.rounds != Some(0));
        self.returned = round.returned;
        let slack = (least / 4).max(QUEUED);
        let queued = round.least.is_some_and(|of_round| of_round > least + slack);
        self.queued = if queued { self.queued + 1 } else { 0 };
        if self.queued >= PROOF && self.bytes < self.threshold {
            (self.threshold, self.highest, self.origin) = (self.bytes, self.bytes, 0.0);
        }
    }

    pub(super) fn lost(&mut self, bytes: usize) {
        self.round.lost += bytes;
    }

    /// Whether what is lost tells of a full queue.
    pub(super) fn is_crowded(&self) -> bool {
        let Round { arrived, lost, returned, .. } = self.round;
        // It takes a round trip to learn that something was late, so that the word is of the round before.
        let gone = lost.saturating_sub(returned + self.returned);
        self.queued > 0 || is_heavy(gone, arrived + lost, self.segment)
    }

    /// `bytes` that were sent again came twice: they had been late.
    pub(super) fn returned(&mut self, bytes: usize) {
        self.round.returned += bytes;
        let Some(undo) = &mut self.undo else { return };
        undo.lost = undo.lost.saturating_sub(bytes);
        if !is_heavy(undo.lost, undo.of, self.segment) {
            (self.bytes, self.threshold) = (self.bytes.max(undo.bytes), undo.threshold);
            (self.highest, self.since, self.undo) = (undo.highest.max(self.bytes), None, None);
            self.origin = self.way_back();
        }
    }

    /// A queue has overflowed.
    pub(super) fn cut(&mut self) {
        let (lost, of) = (self.round.lost, self.round.arrived + self.round.lost);
        let now = Undo { bytes: self.bytes, threshold: self.threshold, highest: self.highest, lost, of, rounds: None };
        let undo = self.undo.map_or(now, |before| Undo {
            lost: before.lost + lost,
            of: before.of + of,
            rounds: None,
            ..before
        });
        self.undo = (self.queued == 0).then_some(undo);
        self.highest = self.bytes;
        self.bytes = ((self.bytes as f64 * BETA) as usize).max(2 * self.segment);
        self.threshold = self.bytes;
        self.origin = self.way_back();
        self.since = None;
    }

    /// Everything that was on its way when it was cut has arrived. What was sent again may still come twice: the word of
    /// that is on its way in the round that goes on, and in the one behind it.
    pub(super) fn episode_over(&mut self) {
        if let Some(undo) = &mut self.undo {
            undo.rounds = Some(2);
        }
    }

    /// Seconds from here to `highest` (RFC 9438 section 4.2).
    fn way_back(&self) -> f64 {
        (self.highest.saturating_sub(self.bytes) as f64 / self.segment as f64 / CUBIC).cbrt()
    }

    /// Nothing has arrived for long (RFC 5681 section 3.1). `missing`: bytes that have not arrived; None: the same was
    /// sent again before, which changes the threshold no more.
    pub(super) fn timed_out(&mut self, missing: Option<usize>) {
        if let Some(missing) = missing {
            self.threshold = (missing / 2).max(2 * self.segment);
            (self.highest, self.origin) = (self.threshold, 0.0);
        }
        self.bytes = self.segment;
        (self.since, self.undo) = (None, None);
    }

    /// Nothing was sent for longer than the retransmission timeout (RFC 5681 section 4.1).
    pub(super) fn idle(&mut self) {
        self.bytes = self.bytes.min(INITIAL * self.segment);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEGMENT: usize = 1000;
    const TRIP: Duration = Duration::from_millis(100);

    /// A window of a hundred segments that was cut for ten of them.
    fn cut() -> Window {
        let mut window = Window::new(SEGMENT);
        window.bytes = 100 * SEGMENT;
        window.highest = 300 * SEGMENT;
        window.threshold = 80 * SEGMENT;
        window.lost(30 * SEGMENT);
        window.cut();
        window
    }

    #[test]
    fn a_cut_that_is_taken_back_leaves_the_curve_as_it_was() {
        let (mut window, now) = (cut(), Instant::now());
        window.returned(30 * SEGMENT);
        assert_eq!((window.bytes, window.highest), (100 * SEGMENT, 300 * SEGMENT));
        // K is the cube root of 200 / 0.4: near its beginning the curve grows by less than a half in a round trip.
        assert!((window.origin - 500.0_f64.cbrt()).abs() < 0.001, "{}", window.origin);
        window.arrived(100 * SEGMENT, Some(TRIP), true, now);
        window.arrived(100 * SEGMENT, Some(TRIP), true, now + TRIP);
        assert!(window.bytes < 120 * SEGMENT, "{}", window.bytes);
    }

    #[test]
    fn a_cut_is_taken_back_no_more_when_the_word_of_it_must_have_come() {
        for (rounds, back) in [(1, true), (2, false)] {
            let mut window = cut();
            window.round_over(TRIP);
            window.round_over(TRIP);
            window.episode_over();
            (0..rounds).for_each(|_| window.round_over(TRIP));
            window.returned(30 * SEGMENT);
            assert_eq!(window.bytes == 100 * SEGMENT, back, "{rounds} rounds later: {}", window.bytes);
        }
    }
}
