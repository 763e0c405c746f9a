//! What a service manager is told (sd_notify(3)). Where there is none, these do nothing.

use std::rc::Rc;
use std::time::Duration;

use futures_util::future::join_all;
use sd_notify::NotifyState;

use super::worker::Worker;

/// Of the time within which a sign is wanted: one may come late, and one may be lost.
const SIGNS: u32 = 3;
/// A shorter time than this between two signs is a mistake of whoever asks.
const SHORTEST: Duration = Duration::from_millis(10);

/// Traffic flows; `status` says what of.
pub(super) fn ready(status: &str) {
    tell(&[NotifyState::Ready, NotifyState::Status(status)]);
}

/// The stop has begun.
pub(super) fn stopping() {
    tell(&[NotifyState::Stopping, NotifyState::Status("stopping: open flows may finish")]);
}

/// Gives the signs of life that the service manager wants (`WatchdogSec=`), each once every thread has answered: one that
/// hangs ends the run from outside. Never returns where nobody asks for any.
pub(super) async fn give_signs(workers: Rc<Vec<Worker>>) {
    let Some(limit) = sd_notify::watchdog_enabled() else { return std::future::pending().await };
    let mut turns = tokio::time::interval((limit / SIGNS).max(SHORTEST));
    loop {
        turns.tick().await;
        // A worker that has ended is nobody's hang: its end is told by other means.
        join_all(workers.iter().map(Worker::pulse)).await;
        tell(&[NotifyState::Watchdog]);
    }
}

/// A manager that does not listen is no reason to fail.
fn tell(states: &[NotifyState<'_>]) {
    let _ = sd_notify::notify(states);
}
