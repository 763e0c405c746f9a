//! Room for what is begun without a dial that could say no, limited in all and for each client.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::net::IpAddr;
use std::rc::Rc;

use crate::net::client_of;

/// The places of one worker, counted by client: of IPv6 a /64 is one.
pub(super) struct Places {
    /// This host: its address stands for all its programs, so it alone has no limit of its own.
    own: Vec<IpAddr>,
    most: usize,
    most_of_source: usize,
    taken: Cell<usize>,
    by_source: RefCell<HashMap<IpAddr, usize>>,
}

/// One of them; dropping it makes room.
pub(super) struct Place {
    places: Rc<Places>,
    source: IpAddr,
}

impl Places {
    /// `most` places, of which a source that is not `own` gets `most_of_source`.
    pub(super) fn new(own: Vec<IpAddr>, most: usize, most_of_source: usize) -> Rc<Self> {
        Rc::new(Self { own, most, most_of_source, taken: Cell::new(0), by_source: RefCell::default() })
    }

    /// Whether `source` is this host.
    pub(super) fn is_own(&self, source: IpAddr) -> bool {
        self.own.contains(&source)
    }

    /// One more for `source`, if there is one.
    pub(super) fn enter(self: &Rc<Self>, source: IpAddr) -> Option<Place> {
        let own = self.is_own(source);
        // This host is no part of the /64 that it shares with others.
        let source = if own { source } else { client_of(source) };
        let mut by_source = self.by_source.borrow_mut();
        let count = by_source.get(&source).copied().unwrap_or_default();
        if self.taken.get() >= self.most || count >= self.most_of_source && !own {
            return None;
        }
        by_source.insert(source, count + 1);
        self.taken.set(self.taken.get() + 1);
        Some(Place { places: Rc::clone(self), source })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.places.taken.set(self.places.taken.get().saturating_sub(1));
        let mut by_source = self.places.by_source.borrow_mut();
        match by_source.get_mut(&self.source) {
            Some(count) if *count > 1 => *count -= 1,
            _ => drop(by_source.remove(&self.source)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(last: u32) -> IpAddr {
        std::net::Ipv4Addr::from(last).into()
    }

    #[test]
    fn one_source_cannot_take_all_places_unless_it_is_this_host() {
        let places = Places::new(vec![ip(1)], 512, 64);
        let others: Vec<_> = std::iter::from_fn(|| places.enter(ip(2))).collect();
        assert_eq!(others.len(), 64);
        let own: Vec<_> = std::iter::from_fn(|| places.enter(ip(1))).collect();
        assert_eq!(own.len(), 512 - 64);
        assert!(places.enter(ip(3)).is_none());
    }

    #[test]
    fn all_addresses_of_a_64_are_one_source_and_this_host_is_none_of_them() {
        let ip = |last: u128| IpAddr::from(std::net::Ipv6Addr::from((0x2001_0db8 << 96) + last));
        let places = Places::new(vec![ip(1)], 512, 64);
        let others: Vec<_> = (2..1000).filter_map(|last| places.enter(ip(last))).collect();
        assert_eq!(others.len(), 64);
        let own: Vec<_> = std::iter::from_fn(|| places.enter(ip(1))).collect();
        assert_eq!(own.len(), 512 - 64);
    }

    #[test]
    fn a_place_that_is_given_up_is_free_again() {
        let places = Places::new(Vec::new(), 512, 64);
        let mut held: Vec<_> = (0..512).map(|n| places.enter(ip(n % 100)).unwrap()).collect();
        assert!(places.enter(ip(5)).is_none());
        held.pop();
        assert!(places.enter(ip(5)).is_some());
        drop(held);
        assert!(places.by_source.borrow().is_empty());
        assert_eq!(places.taken.get(), 0);
    }
}
