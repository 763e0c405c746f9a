//! Whether a worker has more to do than it should: then who opens more than his part has to wait.

use std::time::{Duration, Instant};

use crate::platform::thread_time;

/// How long is looked at.
const WINDOW: Duration = Duration::from_millis(20);

/// How busy the thread has been of late.
#[derive(Debug)]
pub(super) struct Load {
    since: Instant,
    worked: Duration,
    busy: bool,
}

impl Load {
    pub(super) fn new(now: Instant) -> Self {
        Self { since: now, worked: thread_time().unwrap_or_default(), busy: false }
    }

    /// Whether the worker is behind: more packets wait than it reads at a time, or it has worked for half of the time.
    pub(super) fn is_behind(&mut self, more: bool, now: Instant) -> bool {
        if now >= self.since + WINDOW {
            self.look(thread_time().unwrap_or_default(), now);
        }
        more || self.busy
    }

    /// Notes that the thread has worked for `worked` since it began.
    fn look(&mut self, worked: Duration, now: Instant) {
        self.busy = 2 * worked.saturating_sub(self.worked) >= now.saturating_duration_since(self.since);
        (self.since, self.worked) = (now, worked);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_of_the_time_is_much_and_a_full_device_is_too() {
        let start = Instant::now();
        let mut load = Load { since: start, worked: Duration::ZERO, busy: false };
        assert!(load.is_behind(true, start) && !load.is_behind(false, start));
        let mut at = |millis, worked| {
            load.look(Duration::from_millis(worked), start + Duration::from_millis(millis));
            load.busy
        };
        assert_eq!([at(20, 9), at(40, 19), at(60, 30), at(1060, 60)], [false, true, true, false]);
    }
}
