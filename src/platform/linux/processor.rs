//! How much of a processor a thread has had.

use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

/// The time for which the calling thread has run so far. None where the kernel does not say.
#[must_use]
pub fn thread_time() -> Option<Duration> {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).ok().map(Duration::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_takes_time_and_waiting_for_somebody_takes_hardly_any() {
        let work = || {
            let before = thread_time().unwrap();
            while thread_time().unwrap() < before + Duration::from_millis(100) {}
        };
        let (before, worker) = (thread_time().unwrap(), std::thread::spawn(work));
        worker.join().unwrap();
        // The worker had all of its time while this thread waited.
        assert!(thread_time().unwrap() - before < Duration::from_millis(50));
    }
}
