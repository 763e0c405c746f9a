//! How often, and with how many words, what somebody removes is put back.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Removing so often within [`SPAN`] is no accident.
const MOST: usize = 20;
const SPAN: Duration = Duration::from_secs(10);
/// Then it is put back this often.
const SLOW: Duration = Duration::from_secs(1);
/// And told this often.
const REMINDER: Duration = Duration::from_secs(60);

/// What the log is to hold of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Tell {
    /// A line for each.
    Each,
    /// One line: so many have been put back since the last one.
    Sum(usize),
    /// Nothing.
    Nothing,
}

/// Tells an accident from a quarrel.
#[derive(Debug, Default)]
pub(super) struct Pace {
    /// When something was put back, within the last [`SPAN`], and how many things.
    rounds: VecDeque<(Instant, usize)>,
    /// When the quarrel was told of last, and what has been put back since.
    quarrel: Option<(Instant, usize)>,
}

impl Pace {
    /// Notes that `many` things were put back at `now`.
    pub(super) fn restored(&mut self, now: Instant, many: usize) -> Tell {
        self.forget(now);
        if many == 0 {
            return Tell::Nothing;
        }
        self.rounds.push_back((now, many));
        match &mut self.quarrel {
            Some((told, since)) => {
                *since += many;
                if now.saturating_duration_since(*told) < REMINDER {
                    return Tell::Nothing;
                }
                let sum = std::mem::take(since);
                *told = now;
                Tell::Sum(sum)
            }
            None if self.rounds.len() > MOST => {
                self.quarrel = Some((now, 0));
                Tell::Sum(self.rounds.iter().map(|(_, many)| many).sum())
            }
            None => Tell::Each,
        }
    }

    /// How long to leave things as they are.
    pub(super) fn rest(&self, now: Instant) -> Duration {
        let last = self.rounds.back().filter(|_| self.quarrel.is_some());
        last.map_or(Duration::ZERO, |(last, _)| (*last + SLOW).saturating_duration_since(now))
    }

    fn forget(&mut self, now: Instant) {
        while self.rounds.front().is_some_and(|(at, _)| now.saturating_duration_since(*at) >= SPAN) {
            self.rounds.pop_front();
        }
        if self.rounds.is_empty() {
            self.quarrel = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(seconds: f64) -> Duration {
        Duration::from_secs_f64(seconds)
    }

    #[test]
    fn what_is_removed_now_and_then_comes_back_at_once_with_a_line_each() {
        let (mut pace, start) = (Pace::default(), Instant::now());
        for n in 0..100 {
            let now = start + seconds(2.5 * f64::from(n));
            assert_eq!(pace.restored(now, 3), Tell::Each);
            assert_eq!(pace.rest(now), Duration::ZERO);
        }
    }

    #[test]
    fn a_quarrel_is_told_once_a_minute_and_slows_down() {
        let (mut pace, start) = (Pace::default(), Instant::now());
        let mut told = Vec::new();
        for n in 0..MOST {
            told.push(pace.restored(start, 2));
            assert_eq!(pace.rest(start), Duration::ZERO, "{n}");
        }
        assert_eq!(told, [Tell::Each; MOST]);
        assert_eq!(pace.restored(start, 2), Tell::Sum(2 * (MOST + 1)));
        told.clear();
        for n in 1..=130 {
            let now = start + seconds(f64::from(n));
            told.push(pace.restored(now, 2));
            assert_eq!(pace.rest(now), SLOW, "{n}");
        }
        assert_eq!((told[58], told[59]), (Tell::Nothing, Tell::Sum(120)));
        assert_eq!(told.iter().filter(|it| **it == Tell::Sum(120)).count(), 2);
        assert_eq!(told.iter().filter(|it| **it == Tell::Nothing).count(), 128);
    }

    #[test]
    fn looks_that_find_nothing_missing_end_a_quarrel() {
        let (mut pace, start) = (Pace::default(), Instant::now());
        for n in 0..30 {
            pace.restored(start + seconds(0.1 * f64::from(n)), 1);
        }
        let later = start + seconds(20.0);
        assert_eq!(pace.restored(later, 0), Tell::Nothing);
        assert_eq!(pace.rest(later), Duration::ZERO);
        assert_eq!(pace.restored(later, 1), Tell::Each);
    }
}
