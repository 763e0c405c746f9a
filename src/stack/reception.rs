//! What of a client's data has come beyond a gap or twice, and how the client is told (RFC 2018, RFC 2883).
//!
//! smoltcp holds that data, and its acknowledgements tell of one stretch only. A client that learns of all of them sends
//! again what is missing and nothing else; one that learns what came twice gives late packets more time.

use super::progress::is_ahead;
use super::tcp::Blocks;

/// As many stretches beyond gaps as smoltcp's assembler holds; its feature in Cargo.toml says how many.
const MOST: usize = 32;

/// The receiving side of one flow. Nothing is kept, and nothing is done, while all comes in order.
#[derive(Debug, Default)]
pub(super) struct Reception {
    /// What smoltcp holds beyond a gap: apart from each other, the one that was added to last first.
    held: Vec<(u32, u32)>,
    /// What came twice; it is told once.
    twice: Option<(u32, u32)>,
    /// The device was full when the client was to be told at once.
    owed: bool,
    /// Where a FIN stands that came before all data in front of it. smoltcp forgets such a one, and its client would send
    /// it again only when a timer fires.
    pub(super) end: Option<u32>,
}

impl Reception {
    /// Whether acknowledgements have to say more than up to where everything has come.
    pub(super) fn has_news(&self) -> bool {
        !self.held.is_empty() || self.twice.is_some()
    }

    /// Whether smoltcp takes nothing that begins one more stretch.
    pub(super) fn is_full(&self) -> bool {
        self.held.len() >= MOST
    }

    /// `data` has come while everything before `next` had, and was `taken` as far as the window's `edge` if it lies
    /// beyond a gap.
    pub(super) fn note(&mut self, data: (u32, u32), next: u32, edge: u32, taken: bool) {
        let (left, right) = data;
        if left != next && is_ahead(next, left) {
            self.twice = Some((left, if is_ahead(next, right) { right } else { next }));
            return;
        }
        let right = if is_ahead(right, edge) { edge } else { right };
        if left == next || !taken || left == right || is_ahead(left, right) {
            return;
        }
        let within = |(from, to): &(u32, u32)| is_ahead(left, *from) && is_ahead(*to, right);
        if let Some(at) = self.held.iter().position(within) {
            self.twice = Some((left, right));
            self.held[..=at].rotate_right(1);
            return;
        }
        let mut whole = (left, right);
        self.held.retain(|(from, to)| {
            let apart = to != &left && is_ahead(left, *to) || from != &right && is_ahead(*from, right);
            if !apart {
                whole.0 = if is_ahead(whole.0, *from) { *from } else { whole.0 };
                whole.1 = if is_ahead(*to, whole.1) { *to } else { whole.1 };
            }
            apart
        });
        self.held.insert(0, whole);
        self.held.truncate(MOST);
    }

    /// Everything before `next` has come.
    pub(super) fn advance(&mut self, next: u32) {
        if self.held.is_empty() {
            return;
        }
        self.held.retain(|(_, to)| *to != next && is_ahead(*to, next));
        if self.held.is_empty() {
            self.held = Vec::new();
        }
    }

    /// What the next acknowledgement says: first what came twice, then what was added to last.
    pub(super) fn blocks(&mut self) -> Blocks {
        self.owed = false;
        self.twice.take().into_iter().chain(self.held.iter().copied()).collect()
    }

    /// The client could not be told at once.
    pub(super) fn owe(&mut self) {
        self.owed = true;
    }

    /// Whether the client is to be told as soon as the device takes something.
    pub(super) fn owes(&self) -> bool {
        self.owed
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use smoltcp::storage::Assembler;

    use super::*;

    /// Notes what came and was taken, and says what is told of it.
    fn told(reception: &mut Reception, data: (u32, u32), next: u32) -> Vec<(u32, u32)> {
        reception.note(data, next, next.wrapping_add(1 << 20), true);
        reception.blocks().iter().collect()
    }

    #[test]
    fn the_latest_is_told_first_then_the_others_the_latest_of_them_first() {
        let mut reception = Reception::default();
        told(&mut reception, (20, 30), 10);
        told(&mut reception, (40, 50), 10);
        told(&mut reception, (60, 70), 10);
        assert_eq!(told(&mut reception, (80, 90), 10), [(80, 90), (60, 70), (40, 50), (20, 30)]);
        assert_eq!(told(&mut reception, (100, 110), 10), [(100, 110), (80, 90), (60, 70), (40, 50)], "four at most");
        assert_eq!(told(&mut reception, (30, 40), 10)[..2], [(20, 50), (100, 110)], "what a piece joins is one");
        reception.advance(50);
        assert_eq!(reception.blocks().iter().collect::<Vec<_>>(), [(100, 110), (80, 90), (60, 70)]);
        reception.advance(110);
        assert!(!reception.has_news());
    }

    #[test]
    fn what_came_twice_is_told_once_before_the_stretch_that_holds_it() {
        let mut reception = Reception::default();
        assert_eq!(told(&mut reception, (2, 8), 10), [(2, 8)], "before all that is missing");
        assert!(reception.blocks().iter().next().is_none(), "once");
        assert_eq!(told(&mut reception, (5, 20), 10), [(5, 10)], "the rest of it was new");
        told(&mut reception, (30, 40), 20);
        told(&mut reception, (50, 60), 20);
        assert_eq!(told(&mut reception, (32, 38), 20), [(32, 38), (30, 40), (50, 60)], "beyond a gap");
        assert_eq!(reception.blocks().iter().collect::<Vec<_>>(), [(30, 40), (50, 60)]);
    }

    #[test]
    fn what_was_not_taken_or_lies_beyond_the_window_is_not_told() {
        let mut reception = Reception::default();
        reception.note((20, 30), 10, 100, false);
        reception.note((100, 110), 10, 100, true);
        reception.note((120, 130), 10, 100, true);
        assert!(!reception.has_news());
        reception.note((90, 110), 10, 100, true);
        assert_eq!(reception.blocks().iter().collect::<Vec<_>>(), [(90, 100)], "a part of it was");
    }

    proptest! {
        #[test]
        fn what_is_told_is_what_smoltcp_holds(
            start in any::<u32>(),
            data in prop::collection::vec((0_u32..400, 1_u32..12), 1..200),
        ) {
            let (mut assembler, mut reception) = (Assembler::new(), Reception::default());
            let (mut next, edge) = (0, 380);
            for (left, length) in data {
                let right = left + length;
                let (from, to) = (left.max(next), right.min(edge));
                let before = next;
                let taken = if from < to {
                    assembler.add_then_remove_front((from - next) as usize, (to - from) as usize)
                } else {
                    Ok(0)
                };
                next += taken.unwrap_or(0) as u32;
                let place = |number: u32| start.wrapping_add(number);
                reception.note((place(left), place(right)), place(before), place(edge), taken.is_ok());
                reception.advance(place(next));
                let mut held: Vec<_> = reception.held.iter().map(|(a, b)| (a.wrapping_sub(place(next)), b.wrapping_sub(place(next)))).collect();
                held.sort_unstable();
                let holds: Vec<_> = assembler.iter_data().map(|(a, b)| (a as u32, b as u32)).collect();
                prop_assert_eq!(&held, &holds);
                prop_assert_eq!(taken.is_err(), taken.is_err() && reception.is_full());
                if let Some(first) = reception.held.first().filter(|_| taken.is_ok() && left > before && left < edge && before == next) {
                    prop_assert!(first.0 <= place(left) || first.0.wrapping_sub(place(left)) > 1 << 31, "the latest is first");
                }
            }
        }
    }
}
