//! Datagrams that wait, for their association to be opened or for its transport, and how many bytes of them there may be.

use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use super::live::Counters;

/// What a datagram costs beside its payload.
const OVERHEAD: usize = 128;

/// The bytes of all datagrams that wait, on whatever worker. Without a limit until one is set.
#[derive(Debug, Default)]
pub struct Queue {
    bytes: AtomicUsize,
    most: OnceLock<usize>,
}

impl Queue {
    /// Sets the limit, once.
    pub fn limit(&self, most: usize) {
        let _ = self.most.set(most);
    }

    /// Bytes that wait.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes.load(Relaxed)
    }

    /// Whether `bytes` more may wait; then they count.
    fn enter(&self, bytes: usize) -> bool {
        let most = self.most.get().copied().unwrap_or(usize::MAX);
        let fits = self.bytes.fetch_add(bytes, Relaxed).saturating_add(bytes) <= most;
        if !fits {
            self.bytes.fetch_sub(bytes, Relaxed);
        }
        fits
    }
}

/// A datagram that waits. It counts in [`Counters::queue`] as long as it is there.
pub(super) struct Waiting {
    pub(super) payload: Box<[u8]>,
    pub(super) dont_fragment: bool,
    counters: Arc<Counters>,
}

impl Waiting {
    /// Lets a datagram wait. None: there is no room for it, and it is counted as dropped.
    pub(super) fn new(payload: &[u8], dont_fragment: bool, counters: &Arc<Counters>) -> Option<Self> {
        if !counters.queue.enter(payload.len() + OVERHEAD) {
            counters.datagrams_dropped.fetch_add(1, Relaxed);
            return None;
        }
        Some(Self { payload: payload.into(), dont_fragment, counters: Arc::clone(counters) })
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.counters.queue.bytes.fetch_sub(self.payload.len() + OVERHEAD, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_bytes_wait_than_may_and_what_is_too_much_is_counted() {
        let counters = Arc::new(Counters::default());
        counters.queue.limit(3 * (1000 + OVERHEAD));
        let mut waiting: Vec<_> = (0..5).map(|_| Waiting::new(&[0; 1000], false, &counters)).collect();
        assert_eq!(waiting.iter().flatten().count(), 3);
        assert_eq!(counters.datagrams_dropped.load(Relaxed), 2);
        waiting.truncate(1);
        assert_eq!(counters.queue.bytes(), 1000 + OVERHEAD);
        assert!(Waiting::new(&[0; 2000], false, &counters).is_some());
        drop(waiting);
        assert_eq!(counters.queue.bytes(), 0);
    }
}
