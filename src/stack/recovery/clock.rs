//! Round trips, and how long to wait for one (RFC 6298).

use std::time::Duration;

/// Before the first measurement.
const INITIAL: Duration = Duration::from_secs(1);
/// The shortest and the longest timeout (the shortest is Linux's).
const SHORTEST: Duration = Duration::from_millis(200);
const LONGEST: Duration = Duration::from_secs(60);

#[derive(Debug, Default)]
pub(super) struct Clock {
    smoothed: Option<Duration>,
    variance: Duration,
    least: Option<Duration>,
    backoff: u32,
}

impl Clock {
    /// What was sent once was acknowledged after so long.
    pub(super) fn sample(&mut self, round_trip: Duration) {
        self.least = self.least.into_iter().chain([round_trip]).min();
        self.smoothed = Some(match self.smoothed {
            None => {
                self.variance = round_trip / 2;
                round_trip
            }
            Some(smoothed) => {
                self.variance = (self.variance * 3 + smoothed.abs_diff(round_trip)) / 4;
                (smoothed * 7 + round_trip) / 8
            }
        });
    }

    pub(super) fn smoothed(&self) -> Option<Duration> {
        self.smoothed
    }

    /// The shortest round trip of all.
    pub(super) fn least(&self) -> Duration {
        self.least.unwrap_or_default()
    }

    /// How long to wait for an acknowledgement.
    pub(super) fn timeout(&self) -> Duration {
        let once = self.smoothed.map_or(INITIAL, |smoothed| smoothed + (self.variance * 4).max(SHORTEST));
        once.saturating_mul(1 << self.backoff.min(16)).min(LONGEST)
    }

    /// How many timeouts in a row there were.
    pub(super) fn timeouts(&self) -> u32 {
        self.backoff
    }

    pub(super) fn timed_out(&mut self) {
        self.backoff += 1;
    }

    /// Something was acknowledged that was sent only once, or the client takes data again.
    pub(super) fn progress(&mut self) {
        self.backoff = 0;
    }
}
