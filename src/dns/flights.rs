//! The questions under way, and whose they are, so that nobody's keep those of others from being asked.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use foldhash::fast::RandomState;
use tokio::sync::watch;

use super::resolver::Outcome;
use crate::net::client_of;

/// Different questions under way at a time; each holds a socket per nameserver. More fail at once.
pub(super) const MOST: usize = 512;
/// Of these, so many are for the names of our own dials alone, and as many for the questions that we are asked.
pub(super) const RESERVED: usize = 128;
/// The host itself, with all its programs, begins no more if it has so many times what is left to those who ask us.
const OF_HOST: usize = 7;
/// Another client begins no more if it has half of what is left: one alone has a third at most, two a quarter each, and who
/// comes then always finds something.
const OF_CLIENT: usize = 2;

/// Hears what came of a question.
pub(super) type Flight = watch::Receiver<Option<Outcome>>;

/// Who began a flight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Whose {
    /// We, for a dial.
    Ours,
    /// A program on this host.
    Host,
    /// A client, as [`client_of`] has it.
    Client(IpAddr),
}

impl Whose {
    /// Of a question that was asked by `client`.
    pub(super) fn of(client: IpAddr, is_host: bool) -> Self {
        if is_host { Self::Host } else { Self::Client(client_of(client)) }
    }
}

/// The flights of one service.
#[derive(Default)]
pub(super) struct Flights {
    under_way: HashMap<Arc<[u8]>, (Flight, Whose), RandomState>,
    ours: usize,
    of_host: usize,
    of_client: HashMap<IpAddr, usize, RandomState>,
}

impl Flights {
    /// The flight of `key`, if there is one. To join it is free.
    pub(super) fn find(&self, key: &[u8]) -> Option<Flight> {
        self.under_way.get(key).map(|(flight, _)| flight.clone())
    }

    /// Whether one more may be begun.
    pub(super) fn has_room_for(&self, whose: Whose) -> bool {
        let all = self.under_way.len();
        let left = (MOST - RESERVED).saturating_sub(all - self.ours).min(MOST.saturating_sub(all));
        match whose {
            Whose::Ours => all < MOST && self.ours < MOST - RESERVED,
            Whose::Host => self.of_host < OF_HOST * left,
            Whose::Client(client) => OF_CLIENT * self.of_client.get(&client).copied().unwrap_or_default() < left,
        }
    }

    /// Adds a flight, for which there is room and which is not under way yet.
    pub(super) fn begin(&mut self, key: Arc<[u8]>, flight: Flight, whose: Whose) {
        match whose {
            Whose::Ours => self.ours += 1,
            Whose::Host => self.of_host += 1,
            Whose::Client(client) => *self.of_client.entry(client).or_default() += 1,
        }
        self.under_way.insert(key, (flight, whose));
    }

    /// The flight has landed.
    pub(super) fn end(&mut self, key: &[u8]) {
        match self.under_way.remove(key) {
            Some((_, Whose::Ours)) => self.ours -= 1,
            Some((_, Whose::Host)) => self.of_host -= 1,
            Some((_, Whose::Client(client))) => match self.of_client.get_mut(&client) {
                Some(count) if *count > 1 => *count -= 1,
                _ => drop(self.of_client.remove(&client)),
            },
            None => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(last: u8) -> Whose {
        Whose::of(IpAddr::from([10, 0, 0, last]), false)
    }

    fn begin(flights: &mut Flights, whose: Whose) -> bool {
        let room = flights.has_room_for(whose);
        if room {
            let key = format!("{}", flights.under_way.len()).into_bytes();
            flights.begin(key.into(), watch::channel(None).1, whose);
        }
        room
    }

    /// Begins as many as there may be.
    fn fill(flights: &mut Flights, whose: Whose) -> usize {
        std::iter::repeat_with(|| begin(flights, whose)).take_while(|begun| *begun).count()
    }

    #[test]
    fn each_client_leaves_something_to_the_next_and_to_the_host() {
        let mut flights = Flights::default();
        let parts: Vec<usize> = (1..=4).map(|last| fill(&mut flights, client(last))).collect();
        assert_eq!(parts, [128, 86, 57, 38]);
        assert!(fill(&mut flights, Whose::Host) > 60);
        assert!(begin(&mut flights, client(5)), "and something to who comes last");
    }

    #[test]
    fn all_addresses_of_a_64_are_one_client() {
        let mut flights = Flights::default();
        let of = |last: u128| Whose::of(IpAddr::from(std::net::Ipv6Addr::from((0x2001_0db8 << 96) + last)), false);
        assert_eq!((0..1000).filter(|last| begin(&mut flights, of(*last))).count(), 128);
    }

    #[test]
    fn the_host_has_most_of_them_and_leaves_some_to_clients() {
        let mut flights = Flights::default();
        assert_eq!(fill(&mut flights, Whose::Host), 336);
        assert!(fill(&mut flights, client(1)) > 10);
    }

    #[test]
    fn neither_questions_nor_dials_keep_the_other_from_being_asked() {
        let mut flights = Flights::default();
        assert_eq!(fill(&mut flights, Whose::Ours), MOST - RESERVED);
        assert!(fill(&mut flights, client(1)) > 40);
        let mut flights = Flights::default();
        for last in 1..100 {
            fill(&mut flights, client(last));
        }
        assert!(fill(&mut flights, Whose::Ours) >= RESERVED);
        assert_eq!(flights.under_way.len(), MOST);
    }

    #[test]
    fn what_has_landed_is_room_again() {
        let mut flights = Flights::default();
        for whose in [client(1), Whose::Host, Whose::Ours] {
            let all = fill(&mut flights, whose);
            flights.end(b"0");
            // Twice is once.
            flights.end(b"0");
            assert_eq!(flights.under_way.len(), all - 1);
            assert!(flights.has_room_for(whose));
            let keys: Vec<_> = flights.under_way.keys().cloned().collect();
            keys.iter().for_each(|key| flights.end(key));
            assert_eq!((flights.ours, flights.of_host, flights.of_client.len()), (0, 0, 0));
        }
    }
}
