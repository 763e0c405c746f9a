//! How much of what is bounded one client of `dns.listen` may take.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use foldhash::fast::RandomState;
use parking_lot::Mutex;

use crate::net::client_of;

/// Whether a client that asked us at `asked` is this host itself, whose address stands for all its programs, and for all
/// whose questions a resolver here passes on.
pub(super) type IsOwn = fn(client: IpAddr, asked: IpAddr) -> bool;

/// Somebody on this host: who asks at an address of its own has that address, unless it is a loopback one.
pub(super) fn is_own(client: IpAddr, asked: IpAddr) -> bool {
    client.is_loopback() || client == asked
}

/// What each client has, of IPv6 each /64. What all have together is bounded where they are served.
pub(super) struct Places {
    most: usize,
    is_own: IsOwn,
    taken: Mutex<HashMap<IpAddr, usize, RandomState>>,
}

/// One of them; dropping it makes room.
pub(super) struct Place(Option<(Arc<Places>, IpAddr)>);

impl Places {
    /// Each client but our own has `most`.
    pub(super) fn new(most: usize, is_own: IsOwn) -> Arc<Self> {
        Arc::new(Self { most, is_own, taken: Mutex::default() })
    }

    /// One more for `client`, which asked us at `asked`, if it has one left.
    pub(super) fn enter(self: &Arc<Self>, client: IpAddr, asked: IpAddr) -> Option<Place> {
        if (self.is_own)(client.to_canonical(), asked.to_canonical()) {
            return Some(Place(None));
        }
        let client = client_of(client);
        let mut taken = self.taken.lock();
        let count = taken.entry(client).or_default();
        // Who is not in the map yet has at least one place.
        if *count >= self.most {
            return None;
        }
        *count += 1;
        Some(Place(Some((Arc::clone(self), client))))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let Some((places, client)) = self.0.take() else { return };
        let mut taken = places.taken.lock();
        match taken.get_mut(&client) {
            Some(count) if *count > 1 => *count -= 1,
            _ => drop(taken.remove(&client)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn a_client_has_its_part_whatever_address_of_its_64_it_uses_and_this_host_all() {
        let (places, asked) = (Places::new(3, is_own), ip("::ffff:192.168.1.1"));
        let enter = |client: &str| places.enter(ip(client), asked);
        let mut held: Vec<_> = (1..=5).filter_map(|n| enter(&format!("2001:db8::{n}"))).collect();
        assert_eq!(held.len(), 3);
        held.extend((0..9).filter_map(|_| enter("192.168.1.7")));
        assert_eq!(held.len(), 6);
        assert!(["192.168.1.1", "::ffff:127.0.0.1", "127.0.0.53", "::1"].iter().all(|own| {
            let all: Vec<_> = (0..9).filter_map(|_| enter(own)).collect();
            all.len() == 9
        }));
        assert!(enter("2001:db8::77").is_none());
        held.remove(0);
        assert!(enter("2001:db8::77").is_some(), "what is given up is free again");
        drop(held);
        assert!(places.taken.lock().is_empty());
    }
}
