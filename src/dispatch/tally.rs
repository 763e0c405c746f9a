//! How much each client has of something, so that room is made among what those have who have the most.

use std::collections::HashMap;
use std::net::IpAddr;

use foldhash::fast::RandomState;

use crate::net::client_of;

/// Counts by client: of IPv6 a /64 is one.
#[derive(Debug, Default)]
pub(super) struct Tally {
    of: HashMap<IpAddr, usize, RandomState>,
    all: usize,
}

impl Tally {
    /// `source` has one more.
    pub(super) fn add(&mut self, source: IpAddr) {
        *self.of.entry(client_of(source)).or_default() += 1;
        self.all += 1;
    }

    /// `source` has so many fewer.
    pub(super) fn remove(&mut self, source: IpAddr, many: usize) {
        let client = client_of(source);
        let Some(has) = self.of.get_mut(&client) else { return };
        let many = many.min(*has);
        *has -= many;
        self.all -= many;
        if *has == 0 {
            self.of.remove(&client);
        }
    }

    /// What the client has that `source` is an address of.
    pub(super) fn of(&self, source: IpAddr) -> usize {
        self.of.get(&client_of(source)).copied().unwrap_or_default()
    }

    /// What all have together.
    pub(super) fn all(&self) -> usize {
        self.all
    }

    /// The client that has the most, and how much.
    pub(super) fn biggest(&self) -> Option<(IpAddr, usize)> {
        self.of.iter().max_by_key(|(_, has)| **has).map(|(client, has)| (*client, *has))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_addresses_of_a_64_are_one_client_and_who_has_nothing_is_forgotten() {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        let mut tally = Tally::default();
        for source in ["2001:db8::1", "2001:db8::2", "2001:db8:0:1::1", "192.0.2.1"] {
            tally.add(ip(source));
        }
        assert_eq!((tally.of(ip("2001:db8::3")), tally.all()), (2, 4));
        assert_eq!(tally.biggest(), Some((ip("2001:db8::"), 2)));
        tally.remove(ip("2001:db8::1"), 2);
        tally.remove(ip("192.0.2.1"), 9);
        assert_eq!((tally.biggest(), tally.all()), (Some((ip("2001:db8:0:1::"), 1)), 1));
        tally.remove(ip("2001:db8:0:1::1"), 1);
        assert_eq!((tally.biggest(), tally.of.len()), (None, 0));
    }
}
