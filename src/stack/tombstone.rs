//! What is remembered of a flow that is gone: enough to answer or to ignore its late packets, without its buffers.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use super::Tuple;

/// As long as smoltcp's own TIME-WAIT.
const TIME_WAIT: Duration = Duration::from_secs(10);
/// Linux gives up on an unanswered SYN after 127 s (`tcp_syn_retries` 6).
const SILENCE: Duration = Duration::from_secs(130);
/// The oldest goes when there are more.
const MOST: usize = 32_768;

/// What a late packet of a flow gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Tombstone {
    /// The last acknowledgement again, with these sequence and acknowledgement numbers (RFC 9293, TIME-WAIT).
    TimeWait { sequence: u32, acknowledgement: u32 },
    /// Nothing: the destination did not answer this SYN, so neither do we.
    Silence { initial: u32 },
}

type Stones = HashMap<Tuple, (Tombstone, Instant), foldhash::fast::RandomState>;

/// Tombstones by flow, bounded in number and in time.
#[derive(Default)]
pub(super) struct Graveyard {
    stones: Stones,
    ends: [VecDeque<(Instant, Tuple)>; 2],
}

impl Graveyard {
    pub(super) fn bury(&mut self, tuple: Tuple, stone: Tombstone, now: Instant) {
        self.expire(now);
        let (queue, lifetime) = match stone {
            Tombstone::TimeWait { .. } => (0, TIME_WAIT),
            Tombstone::Silence { .. } => (1, SILENCE),
        };
        // The queues are what is bounded: a tuple that is buried again and again has many entries there.
        if self.ends.iter().map(VecDeque::len).sum::<usize>() >= MOST
            && let Some((end, oldest)) = self.ends[0].pop_front().or_else(|| self.ends[1].pop_front())
        {
            forget(&mut self.stones, &oldest, end);
        }
        self.stones.insert(tuple, (stone, now + lifetime));
        self.ends[queue].push_back((now + lifetime, tuple));
    }

    pub(super) fn find(&self, tuple: &Tuple, now: Instant) -> Option<Tombstone> {
        self.stones.get(tuple).filter(|(_, end)| now < *end).map(|(stone, _)| *stone)
    }

    pub(super) fn remove(&mut self, tuple: &Tuple) {
        self.stones.remove(tuple);
    }

    fn expire(&mut self, now: Instant) {
        for queue in &mut self.ends {
            while let Some((end, tuple)) = queue.front().copied().filter(|(end, _)| *end <= now) {
                queue.pop_front();
                forget(&mut self.stones, &tuple, end);
            }
        }
    }
}

/// Removes the tombstone that ends at `end`; the tuple may have been buried anew since.
fn forget(stones: &mut Stones, tuple: &Tuple, end: Instant) {
    if stones.get(tuple).is_some_and(|(_, known)| *known == end) {
        stones.remove(tuple);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tuple(port: u16) -> Tuple {
        Tuple { client: ([192, 0, 2, 1], port).into(), server: ([198, 51, 100, 1], 80).into() }
    }

    #[test]
    fn a_tombstone_is_forgotten_when_its_time_is_over() {
        let (mut yard, start) = (Graveyard::default(), Instant::now());
        let stone = Tombstone::TimeWait { sequence: 1, acknowledgement: 2 };
        yard.bury(tuple(1), stone, start);
        assert_eq!(yard.find(&tuple(1), start), Some(stone));
        assert_eq!(yard.find(&tuple(1), start + TIME_WAIT), None);
        yard.bury(tuple(2), stone, start + TIME_WAIT);
        assert_eq!(yard.stones.len(), 1);
    }

    #[test]
    fn burying_again_extends_the_rest() {
        let (mut yard, start) = (Graveyard::default(), Instant::now());
        let stone = Tombstone::Silence { initial: 9 };
        yard.bury(tuple(1), stone, start);
        yard.bury(tuple(1), stone, start + Duration::from_secs(60));
        yard.bury(tuple(2), stone, start + SILENCE);
        assert_eq!(yard.find(&tuple(1), start + SILENCE), Some(stone));
    }

    #[test]
    fn the_number_is_bounded() {
        let (mut yard, start) = (Graveyard::default(), Instant::now());
        for port in 0..u16::MAX {
            yard.bury(tuple(port), Tombstone::Silence { initial: 0 }, start);
        }
        assert!(yard.stones.len() <= MOST);
        for _ in 0..2 * MOST {
            yard.bury(tuple(9), Tombstone::Silence { initial: 0 }, start);
        }
        assert!(yard.ends[1].len() <= MOST);
    }
}
