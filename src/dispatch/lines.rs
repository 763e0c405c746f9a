//! Those who wait for a descriptor: a line for each client, so that one that waits for much does not wake all the time, and
//! holds nobody up but itself.

use std::cell::RefCell;
use std::collections::HashMap;
use std::net::IpAddr;
use std::rc::Rc;
use std::sync::Arc;

use foldhash::fast::RandomState;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::net::client_of;

/// How many clients of one worker look for descriptors at a time: each look costs the more, the more there is.
const MOST_AT_ONCE: usize = 16;

/// The lines of one worker.
pub(super) struct Lines {
    all: Arc<Semaphore>,
    of: RefCell<HashMap<IpAddr, Arc<Semaphore>, RandomState>>,
}

impl Default for Lines {
    fn default() -> Self {
        Self { all: Arc::new(Semaphore::new(MOST_AT_ONCE)), of: RefCell::default() }
    }
}

/// Somebody in a line. Dropped, it lets the next go on.
pub(super) struct Waiter {
    lines: Rc<Lines>,
    client: IpAddr,
    line: Arc<Semaphore>,
    turn: Option<[OwnedSemaphorePermit; 2]>,
    /// Whether its client has more than its part, once that was looked at.
    pub(super) greedy: Option<bool>,
}

impl Lines {
    /// Enters the line of `client`.
    pub(super) fn enter(self: &Rc<Self>, client: IpAddr) -> Waiter {
        let client = client_of(client);
        let line = Arc::clone(self.of.borrow_mut().entry(client).or_insert_with(|| Arc::new(Semaphore::new(1))));
        Waiter { lines: Rc::clone(self), client, line, turn: None, greedy: None }
    }
}

impl Waiter {
    /// Whether it has its turn without waiting.
    pub(super) fn is_first(&mut self) -> bool {
        if self.turn.is_none()
            && let Ok(own) = Arc::clone(&self.line).try_acquire_owned()
            && let Ok(all) = Arc::clone(&self.lines.all).try_acquire_owned()
        {
            self.turn = Some([own, all]);
        }
        self.turn.is_some()
    }

    /// Waits for its turn.
    pub(super) async fn turn(&mut self) {
        // They are never closed.
        let Ok(own) = Arc::clone(&self.line).acquire_owned().await else { return };
        let Ok(all) = Arc::clone(&self.lines.all).acquire_owned().await else { return };
        self.turn = Some([own, all]);
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        self.turn = None;
        // The map's and ours.
        if Arc::strong_count(&self.line) == 2 {
            self.lines.of.borrow_mut().remove(&self.client);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use futures_util::poll;

    use super::*;

    fn ip(last: u32) -> IpAddr {
        Ipv4Addr::from(last).into()
    }

    #[tokio::test]
    async fn one_of_each_client_has_its_turn_and_the_next_when_it_goes() {
        let lines = Rc::<Lines>::default();
        let (mut first, mut second, mut other) = (lines.enter(ip(1)), lines.enter(ip(1)), lines.enter(ip(2)));
        assert!(first.is_first());
        assert!(!second.is_first());
        assert!(other.is_first());
        {
            let mut turn = Box::pin(second.turn());
            assert!(poll!(&mut turn).is_pending());
            drop(first);
            assert!(poll!(&mut turn).is_ready());
        }
        drop((second, other));
        assert!(lines.of.borrow().is_empty());
        assert_eq!(lines.all.available_permits(), MOST_AT_ONCE);
    }

    #[tokio::test]
    async fn so_many_clients_look_at_a_time_and_no_more() {
        let lines = Rc::<Lines>::default();
        let mut waiters: Vec<_> = (0..100).map(|n| lines.enter(ip(n))).collect();
        let first = waiters.iter_mut().map(Waiter::is_first).filter(|first| *first).count();
        assert_eq!(first, MOST_AT_ONCE);
        // Given up while it waits.
        assert!(poll!(Box::pin(waiters[99].turn())).is_pending());
        drop(waiters);
        assert!(lines.of.borrow().is_empty());
        assert_eq!(lines.all.available_permits(), MOST_AT_ONCE);
    }
}
