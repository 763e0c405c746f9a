//! Oldest-first order over numbered slots, and the bounded map built on it.

use std::borrow::Borrow;
use std::collections::HashMap;
use std::hash::Hash;

use foldhash::fast::RandomState;

/// No slot.
const NONE: u32 = u32::MAX;

#[derive(Clone, Copy)]
struct Link {
    older: u32,
    newer: u32,
}

/// A doubly linked list over slot numbers: every step is O(1) and allocates nothing once a slot is known.
pub(super) struct Order {
    links: Vec<Link>,
    oldest: u32,
    newest: u32,
}

impl Order {
    pub(super) fn new() -> Self {
        Self { links: Vec::new(), oldest: NONE, newest: NONE }
    }

    /// The slot that was pushed longest ago.
    pub(super) fn oldest(&self) -> Option<u32> {
        (self.oldest != NONE).then_some(self.oldest)
    }

    /// Puts a slot that is not in the list at its newest end.
    pub(super) fn push(&mut self, slot: u32) {
        let at = slot as usize;
        if self.links.len() <= at {
            self.links.resize(at + 1, Link { older: NONE, newer: NONE });
        }
        self.links[at] = Link { older: self.newest, newer: NONE };
        match self.newest {
            NONE => self.oldest = slot,
            newest => self.links[newest as usize].newer = slot,
        }
        self.newest = slot;
    }

    /// Takes a slot that is in the list out of it.
    pub(super) fn unlink(&mut self, slot: u32) {
        let Link { older, newer } = self.links[slot as usize];
        match older {
            NONE => self.oldest = newer,
            older => self.links[older as usize].newer = newer,
        }
        match newer {
            NONE => self.newest = older,
            newer => self.links[newer as usize].older = older,
        }
    }

    /// Makes a slot that is in the list the newest.
    pub(super) fn touch(&mut self, slot: u32) {
        if self.newest != slot {
            self.unlink(slot);
            self.push(slot);
        }
    }
}

/// A map of at most `capacity` entries; the one used longest ago makes room.
pub(super) struct Lru<K, V> {
    index: HashMap<K, u32, RandomState>,
    entries: Vec<(K, V)>,
    order: Order,
    capacity: usize,
}

impl<K: Clone + Eq + Hash, V> Lru<K, V> {
    /// An empty map; `capacity` is at least one.
    pub(super) fn new(capacity: usize) -> Self {
        let capacity = capacity.clamp(1, NONE as usize);
        Self { index: HashMap::default(), entries: Vec::new(), order: Order::new(), capacity }
    }

    /// The value of `key`, which becomes the newest entry.
    pub(super) fn get<Q>(&mut self, key: &Q) -> Option<&V>
    where
        K: Borrow<Q>,
        Q: Eq + Hash + ?Sized,
    {
        let slot = *self.index.get(key)?;
        self.order.touch(slot);
        Some(&self.entries[slot as usize].1)
    }

    /// Sets the value of `key`, which becomes the newest entry.
    pub(super) fn insert(&mut self, key: K, value: V) {
        if let Some(&slot) = self.index.get(&key) {
            self.order.touch(slot);
            self.entries[slot as usize].1 = value;
            return;
        }
        let slot = match self.order.oldest() {
            Some(oldest) if self.entries.len() >= self.capacity => {
                self.index.remove(&self.entries[oldest as usize].0);
                self.entries[oldest as usize] = (key.clone(), value);
                self.order.touch(oldest);
                oldest
            }
            _ => {
                // `capacity` is below u32::MAX, so the length fits.
                let slot = self.entries.len() as u32;
                self.entries.push((key.clone(), value));
                self.order.push(slot);
                slot
            }
        };
        self.index.insert(key, slot);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_entry_used_longest_ago_makes_room() {
        let mut map = Lru::new(2);
        map.insert("a", 1);
        map.insert("b", 2);
        assert_eq!(map.get("a"), Some(&1));
        map.insert("c", 3);
        assert_eq!(map.get("a"), Some(&1));
        assert_eq!(map.get("c"), Some(&3));
        assert_eq!(map.get("b"), None);
    }

    proptest! {
        #[test]
        fn it_behaves_as_a_list_that_is_searched_and_cut(
            capacity in 1usize..6, steps in prop::collection::vec((any::<bool>(), 0u8..10, any::<u8>()), 0..200)
        ) {
            let mut map = Lru::new(capacity);
            let mut model: Vec<(u8, u8)> = Vec::new();
            for (write, key, value) in steps {
                let at = model.iter().position(|entry| entry.0 == key);
                if write {
                    at.map(|at| model.remove(at));
                    model.push((key, value));
                    if model.len() > capacity {
                        model.remove(0);
                    }
                    map.insert(key, value);
                } else {
                    let expected = at.map(|at| model.remove(at));
                    expected.into_iter().for_each(|entry| model.push(entry));
                    prop_assert_eq!(map.get(&key).copied(), expected.map(|entry| entry.1));
                }
                prop_assert_eq!(map.entries.len(), model.len());
            }
        }
    }
}
