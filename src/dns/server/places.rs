//! Room for the clients of `dns.listen`, limited in all and for each of them.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use foldhash::fast::RandomState;

use crate::net::client_of;

/// Places that are counted by client; programs of this host that ask a loopback address have no limit of their own.
pub(super) struct Places {
    most: usize,
    most_of_client: usize,
    /// Each place is one more owner.
    by_client: HashMap<IpAddr, Arc<()>, RandomState>,
}

/// One of them; dropping it makes room for its client.
pub(super) type Place = Arc<()>;

impl Places {
    pub(super) fn new(most: usize, most_of_client: usize) -> Self {
        Self { most, most_of_client, by_client: HashMap::default() }
    }

    /// One more for `client` where so many are `taken` in all, if there is one.
    pub(super) fn enter(&mut self, client: IpAddr, taken: usize) -> Option<Place> {
        if taken >= self.most {
            return None;
        }
        if self.by_client.len() > 2 * self.most {
            self.by_client.retain(|_, places| Arc::strong_count(places) > 1);
        }
        let places = self.by_client.entry(client_of(client)).or_default();
        let has_room = client.to_canonical().is_loopback() || Arc::strong_count(places) <= self.most_of_client;
        has_room.then(|| Arc::clone(places))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn enter(places: &mut Places, client: [u8; 4], held: &mut Vec<Place>) -> bool {
        let place = places.enter(client.into(), held.len());
        let entered = place.is_some();
        held.extend(place);
        entered
    }

    #[test]
    fn one_client_cannot_take_all_places_unless_it_is_this_host() {
        let (mut places, mut held) = (Places::new(100, 10), Vec::new());
        assert_eq!((0..50).filter(|_| enter(&mut places, [192, 168, 1, 66], &mut held)).count(), 10);
        assert_eq!((0..200).filter(|_| enter(&mut places, [127, 0, 0, 1], &mut held)).count(), 90);
        assert!(!enter(&mut places, [192, 168, 1, 20], &mut held));
        held.remove(0);
        assert!(enter(&mut places, [192, 168, 1, 66], &mut held), "what it gave back is room for it");
        assert!(!enter(&mut places, [192, 168, 1, 66], &mut held));
    }

    #[test]
    fn clients_that_have_gone_are_not_kept_in_mind() {
        let mut places = Places::new(100, 10);
        let kept = places.enter(IpAddr::from([10, 0, 0, 1]), 0);
        for client in 0..10_000u32 {
            assert!(places.enter(IpAddr::from((0x0a07_0000 + client).to_be_bytes()), 1).is_some());
        }
        assert!(places.by_client.len() <= 201, "{}", places.by_client.len());
        drop(kept);
    }
}
