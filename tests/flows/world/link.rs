//! The wire between client and device: in order and at once, or with a radio's manners.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::{Duration, Instant};

use tunproxy::stack::VirtioHeader;

/// What a link does to packets. Shares are per million.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Weather {
    pub(crate) loss: u32,
    pub(crate) duplicates: u32,
    /// This share is held back by up to three more delays.
    pub(crate) reorder: u32,
    pub(crate) delay: Duration,
}

impl Weather {
    pub(crate) const CALM: Self = Self { loss: 0, duplicates: 0, reorder: 0, delay: Duration::ZERO };
    /// Nothing gets through.
    pub(crate) const DOWN: Self = Self { loss: 1_000_000, ..Self::CALM };
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    ToClient,
    ToStack,
}

pub(super) struct Link {
    pub(super) weather: Weather,
    random: Random,
    under_way: BinaryHeap<Reverse<Parcel>>,
    count: u64,
}

pub(super) struct Parcel {
    due: Instant,
    number: u64,
    pub(super) way: Way,
    pub(super) header: VirtioHeader,
    pub(super) packet: Vec<u8>,
}

impl Link {
    pub(super) fn new(weather: Weather, seed: u64) -> Self {
        Self { weather, random: Random::new(seed), under_way: BinaryHeap::new(), count: 0 }
    }

    pub(super) fn enter(&mut self, way: Way, packet: Vec<u8>, header: VirtioHeader, now: Instant) {
        if self.random.happens(self.weather.loss) {
            return;
        }
        if self.random.happens(self.weather.duplicates) {
            self.queue(way, packet.clone(), header, now);
        }
        self.queue(way, packet, header, now);
    }

    fn queue(&mut self, way: Way, packet: Vec<u8>, header: VirtioHeader, now: Instant) {
        let late = self.random.happens(self.weather.reorder);
        let more = if late { self.weather.delay * (self.random.next() % 4) as u32 } else { Duration::ZERO };
        self.count += 1;
        let due = now + self.weather.delay + more;
        self.under_way.push(Reverse(Parcel { due, number: self.count, way, header, packet }));
    }

    pub(super) fn leave(&mut self, now: Instant) -> Option<Parcel> {
        if self.deadline()? > now {
            return None;
        }
        self.under_way.pop().map(|Reverse(parcel)| parcel)
    }

    pub(super) fn deadline(&self) -> Option<Instant> {
        self.under_way.peek().map(|Reverse(parcel)| parcel.due)
    }
}

impl PartialEq for Parcel {
    fn eq(&self, other: &Self) -> bool {
        self.number == other.number
    }
}

impl Eq for Parcel {}

impl PartialOrd for Parcel {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Parcel {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.due, self.number).cmp(&(other.due, other.number))
    }
}

/// SplitMix64 (Steele, Lea, Flood 2014): the same numbers for the same seed, everywhere.
#[derive(Debug, Clone)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Below `end`.
    pub(crate) fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    pub(super) fn happens(&mut self, per_million: u32) -> bool {
        per_million > 0 && self.next() % 1_000_000 < u64::from(per_million)
    }
}
