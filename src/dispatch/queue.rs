//! What waits in memory of ours: datagrams, for their association to be opened or for its transport, and the buffers of
//! proxy clients; and how many bytes of it there may be.

use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use super::live::Counters;

/// What a datagram costs beside its payload.
const OVERHEAD: usize = 128;

/// The bytes of all that waits, on whatever worker. Without a limit until one is set.
#[derive(Debug, Default)]
pub struct Queue {
    bytes: AtomicUsize,
    /// The part of them that is payload of datagrams.
    payload: AtomicUsize,
    most: OnceLock<usize>,
}

impl Queue {
    /// Sets the limit, once.
    pub fn limit(&self, most: usize) {
        let _ = self.most.set(most);
    }

    /// Bytes of memory that all that waits takes, and what is kept for it.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes.load(Relaxed)
    }

    /// Bytes of datagrams that wait.
    #[must_use]
    pub fn payload(&self) -> usize {
        self.payload.load(Relaxed)
    }

    /// Whether `bytes` more may wait, where one part in `share` of the limit is open to them; then they count.
    fn enter(&self, bytes: usize, share: usize) -> bool {
        let most = self.most.get().copied().unwrap_or(usize::MAX) / share;
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
    place: Place,
}

impl Waiting {
    /// Lets a datagram wait. None: there is no room for it, and it is counted as dropped.
    pub(super) fn new(payload: &[u8], dont_fragment: bool, counters: &Arc<Counters>) -> Option<Self> {
        let Some(place) = Place::take(payload.len() + OVERHEAD, 1, counters) else {
            counters.datagrams_dropped.fetch_add(1, Relaxed);
            return None;
        };
        counters.queue.payload.fetch_add(payload.len(), Relaxed);
        Some(Self { payload: payload.into(), dont_fragment, place })
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.place.counters.queue.payload.fetch_sub(self.payload.len(), Relaxed);
    }
}

/// Bytes that count in [`Counters::queue`] as long as it is there.
pub(super) struct Place {
    bytes: usize,
    counters: Arc<Counters>,
}

impl Place {
    /// Room for `bytes`, as long as one part in `share` of the limit is not used up.
    pub(super) fn take(bytes: usize, share: usize, counters: &Arc<Counters>) -> Option<Self> {
        counters.queue.enter(bytes, share).then(|| Self { bytes, counters: Arc::clone(counters) })
    }

    /// A place for two buffers of a proxy client, and how large each may be: little where memory is scarce. None: there
    /// is none at all.
    pub(super) fn for_buffers(counters: &Arc<Counters>) -> Option<(Self, usize)> {
        // Half is left for datagrams, which do not stay.
        let sizes = [(64 << 10, 4), (4 << 10, 2)];
        sizes.into_iter().find_map(|(size, share)| Some((Self::take(2 * size, share, counters)?, size)))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.counters.queue.bytes.fetch_sub(self.bytes, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn proxy_clients_get_small_buffers_where_memory_is_scarce_and_then_none() {
        let counters = Arc::new(Counters::default());
        counters.queue.limit(512 << 10);
        let places: Vec<_> = std::iter::from_fn(|| Place::for_buffers(&counters)).collect();
        let large = places.iter().filter(|(_, size)| *size == 64 << 10).count();
        assert_eq!((large, places.len()), (1, 1 + 16));
        drop(places);
        assert_eq!(counters.queue.bytes(), 0);
    }

    #[test]
    fn no_more_bytes_wait_than_may_and_what_is_too_much_is_counted() {
        let counters = Arc::new(Counters::default());
        counters.queue.limit(3 * (1000 + OVERHEAD));
        let mut waiting: Vec<_> = (0..5).map(|_| Waiting::new(&[0; 1000], false, &counters)).collect();
        assert_eq!(waiting.iter().flatten().count(), 3);
        assert_eq!(counters.datagrams_dropped.load(Relaxed), 2);
        waiting.truncate(1);
        assert_eq!((counters.queue.bytes(), counters.queue.payload()), (1000 + OVERHEAD, 1000));
        assert!(Waiting::new(&[0; 2000], false, &counters).is_some());
        drop(waiting);
        assert_eq!((counters.queue.bytes(), counters.queue.payload()), (0, 0));
        let _kept = Place::take(1500, 1, &counters).unwrap();
        assert_eq!(counters.queue.payload(), 0, "what is kept for flows is no datagram that waits");
    }
}
