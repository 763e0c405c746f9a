//! What was lost on the way to a client, told from what the client acknowledges (RFC 5681 section 3.2, RFC 6582, RFC 6675).
//!
//! smoltcp sends the earliest unacknowledged segment again after three equal acknowledgements in a row, once. It takes
//! one with another window for none of them, and clients move their windows all the time; and it does not go on where
//! more than one segment is missing. Either costs a retransmission timeout, a second at least. So we count ourselves, and
//! have it do so whenever that is due: see `Table::repair`.

use std::time::{Duration, Instant};

use super::progress::is_ahead;

/// So many acknowledgements of the same that tell of data beyond a gap mean that something is lost.
const DUPLICATES: u8 = 3;
/// After so long without progress smoltcp's own timer has begun from the earliest segment.
const TIMED_OUT: Duration = Duration::from_secs(1);
/// A repaired segment is not repaired again before this, however short the path is.
const SHORTEST: Duration = Duration::from_millis(10);

/// An acknowledgement, and what was known before it came.
#[derive(Debug, Clone, Copy)]
pub(super) struct Acknowledgement {
    /// What it acknowledges.
    pub(super) number: u32,
    /// What was acknowledged before.
    pub(super) before: u32,
    /// The end of what was sent.
    pub(super) end: u32,
    /// It carries nothing else, and tells of data beyond a gap (SACK, RFC 2018).
    pub(super) of_gap: bool,
}

/// The state of one flow.
#[derive(Debug)]
pub(super) struct Recovery {
    duplicates: u8,
    /// While something is missing: the end of what had been sent when that was noticed.
    until: Option<u32>,
    repaired: Instant,
    /// How long a repair takes to be acknowledged.
    round_trip: Duration,
}

impl Recovery {
    pub(super) fn new(now: Instant) -> Self {
        Self { duplicates: 0, until: None, repaired: now, round_trip: TIMED_OUT / 8 }
    }

    /// Takes note of an acknowledgement. True: the earliest unacknowledged segment is to be sent again.
    pub(super) fn note(&mut self, acknowledgement: Acknowledgement, now: Instant) -> bool {
        let Acknowledgement { number, before, end, of_gap } = acknowledgement;
        let since = now.saturating_duration_since(self.repaired);
        if number == before {
            return of_gap && end != before && self.is_lost(end, since, now);
        }
        if !is_ahead(number, before) || !is_ahead(end, number) {
            return false;
        }
        self.duplicates = 0;
        let Some(until) = self.until else { return false };
        if is_ahead(number, until) || since >= TIMED_OUT {
            self.until = None;
            return false;
        }
        // What comes next is missing as well.
        self.round_trip = (self.round_trip * 3 + since) / 4;
        self.repaired = now;
        true
    }

    fn is_lost(&mut self, end: u32, since: Duration, now: Instant) -> bool {
        self.duplicates = self.duplicates.saturating_add(1);
        let due = match self.until {
            None => self.duplicates == DUPLICATES,
            // The repair itself may have been lost.
            Some(_) => since >= (self.round_trip * 3).max(SHORTEST) && since < TIMED_OUT,
        };
        if due {
            self.until.get_or_insert(end);
            self.repaired = now;
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn about(number: u32, before: u32, of_gap: bool) -> Acknowledgement {
        Acknowledgement { number, before, end: 10_000, of_gap }
    }

    #[test]
    fn the_third_word_of_a_gap_repairs_it_and_each_step_forward_the_next_one() {
        let now = Instant::now();
        let mut recovery = Recovery::new(now);
        let gap = about(1000, 1000, true);
        assert_eq!([1, 2, 3, 4].map(|_| recovery.note(gap, now)), [false, false, true, false]);
        let later = now + Duration::from_millis(5);
        assert!(recovery.note(about(3000, 1000, true), later), "more is missing");
        assert!(!recovery.note(about(10_000, 3000, false), later), "all is there");
        assert!(!recovery.note(about(10_000, 10_000, true), later), "and nothing on its way");
    }

    #[test]
    fn a_repair_that_is_lost_is_repeated_after_some_round_trips_and_not_before() {
        let now = Instant::now();
        let mut recovery = Recovery::new(now);
        let gap = about(1000, 1000, true);
        assert_eq!([1, 2, 3].map(|_| recovery.note(gap, now)), [false, false, true]);
        assert!(!recovery.note(gap, now + Duration::from_millis(100)));
        assert!(recovery.note(gap, now + Duration::from_millis(400)));
        assert!(!recovery.note(gap, now + Duration::from_millis(401)));
    }

    #[test]
    fn what_says_nothing_of_a_gap_means_no_loss() {
        let now = Instant::now();
        let mut recovery = Recovery::new(now);
        assert!((0..9).all(|_| !recovery.note(about(1000, 1000, false), now)));
        assert!((0..9).all(|step| !recovery.note(about(2000 + step, 1000 + step, true), now)));
    }

    #[test]
    fn after_a_timeout_everything_is_sent_again_anyway() {
        let now = Instant::now();
        let mut recovery = Recovery::new(now);
        assert_eq!([1, 2, 3].map(|_| recovery.note(about(1000, 1000, true), now)), [false, false, true]);
        assert!(!recovery.note(about(3000, 1000, true), now + TIMED_OUT));
        assert!(!recovery.note(about(4000, 3000, true), now + TIMED_OUT));
    }
}
