//! The ids that our own echo requests carry: one for each flow of this process, so that no two are ever mixed up.

use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;

use parking_lot::Mutex;

/// Ids in use, a bit each.
#[derive(Debug)]
pub struct EchoIds {
    used: Mutex<Box<[u64; 1024]>>,
    /// Keyed from the operating system's entropy: who cannot see a request cannot guess its id.
    random: RandomState,
}

/// An id that is ours until it is dropped.
#[derive(Debug)]
pub struct EchoId {
    ids: Arc<EchoIds>,
    number: u16,
}

impl Default for EchoIds {
    fn default() -> Self {
        Self { used: Mutex::new(Box::new([0; 1024])), random: RandomState::new() }
    }
}

impl EchoIds {
    /// An id that nobody has. None: all are in use.
    #[must_use]
    pub fn take(self: &Arc<Self>) -> Option<EchoId> {
        let mut used = self.used.lock();
        let hash = self.random.hash_one((used.as_ptr(), std::time::Instant::now()));
        let (first, turn) = ((hash >> 16) as usize % used.len(), (hash % 64) as u32);
        let at = (0..used.len()).map(|step| (first + step) % used.len()).find(|at| used[*at] != u64::MAX)?;
        // The first free bit from a random one on.
        let bit = ((!used[at]).rotate_right(turn).trailing_zeros() + turn) % 64;
        used[at] |= 1 << bit;
        Some(EchoId { ids: Arc::clone(self), number: u16::try_from(at * 64 + bit as usize).ok()? })
    }
}

impl EchoId {
    /// The id itself.
    #[must_use]
    pub fn number(&self) -> u16 {
        self.number
    }
}

impl Drop for EchoId {
    fn drop(&mut self) {
        let at = usize::from(self.number);
        self.ids.used.lock()[at / 64] &= !(1 << (at % 64));
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_id_is_given_once_and_again_when_it_is_free() {
        let ids = Arc::new(EchoIds::default());
        let mut taken: Vec<EchoId> = std::iter::from_fn(|| ids.take()).collect();
        let numbers: HashSet<u16> = taken.iter().map(EchoId::number).collect();
        assert_eq!((taken.len(), numbers.len()), (65_536, 65_536));
        let given_back = taken.swap_remove(4711).number();
        assert_eq!(ids.take().unwrap().number(), given_back);
        drop(taken);
        assert!(ids.used.lock().iter().all(|word| *word == 0));
    }

    #[test]
    fn ids_are_in_no_order_that_somebody_could_count_on() {
        let ids = Arc::new(EchoIds::default());
        let taken: Vec<EchoId> = (0..100).filter_map(|_| ids.take()).collect();
        let neighbours = taken.windows(2).filter(|pair| pair[0].number.abs_diff(pair[1].number) <= 1).count();
        assert!(neighbours < 20, "{neighbours}");
    }
}
