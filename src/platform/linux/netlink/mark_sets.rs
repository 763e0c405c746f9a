//! Sets and maps of others in which marks stand: alone, or as a part of what is concatenated ("meta mark . ip saddr").

use super::marks;
use super::nftables::{attribute, attributes, number, text};

/// What nft calls the type of marks (`TYPE_MARK`); the kernel only keeps the number.
const TYPE_MARK: u32 = 19;
/// The types in what is concatenated have this many bits each, the first of them the most significant (`TYPE_BITS` of nft).
const TYPE_BITS: u32 = 6;
/// `NFT_SET_INTERVAL`: keys are in network order, so that they can be compared.
const INTERVAL: u32 = 4;
/// `NFT_SET_ELEM_INTERVAL_END`: the first that does not belong to the interval before it.
const INTERVAL_END: u32 = 1;
/// Registers are of four bytes, and so each part begins at a multiple of that.
const ALIGNMENT: usize = 4;

/// Where marks stand in the elements of a set.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct MarkSet {
    pub(super) family: u8,
    pub(super) table: String,
    pub(super) name: String,
    /// In the key, in bytes from its beginning.
    keys: Vec<usize>,
    /// In what a map gives.
    values: Vec<usize>,
    interval: bool,
}

/// One end of a range of marks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Bound {
    at: usize,
    mark: u32,
    /// It is the first beyond.
    beyond: bool,
}

/// What was found in the elements of a set.
#[derive(Debug, Default)]
pub(super) struct Found {
    bits: u32,
    /// Ranges are listed by their ends, in no order that anybody has promised.
    bounds: Vec<Bound>,
}

impl MarkSet {
    /// What the kernel tells of a set, if there are marks in it.
    pub(super) fn read(family: u8, set: &[u8]) -> Option<Self> {
        let lengths: Vec<usize> = attribute(set, 9)
            .and_then(|description| attribute(description, 2))
            .into_iter()
            .flat_map(attributes)
            .filter_map(|(_, field)| usize::try_from(number(field, 1)?).ok())
            .collect();
        let length = |at| number(set, at).and_then(|bytes| usize::try_from(bytes).ok()).unwrap_or_default();
        let keys = places(number(set, 4).unwrap_or_default(), length(5), &lengths);
        let values = places(number(set, 6).unwrap_or_default(), length(7), &[]);
        if keys.is_empty() && values.is_empty() {
            return None;
        }
        let interval = number(set, 3).is_some_and(|flags| flags & INTERVAL != 0);
        Some(Self { family, table: text(set, 1)?, name: text(set, 2)?, keys, values, interval })
    }

    /// Adds what one message tells of the elements.
    pub(super) fn add(&self, found: &mut Found, list: &[u8]) {
        for (_, element) in attribute(list, 3).into_iter().flat_map(attributes) {
            let data = |at| attribute(element, at).and_then(|data| attribute(data, 1));
            let values = data(2).into_iter().flat_map(|value| self.values.iter().filter_map(|at| mark_at(value, *at)));
            found.bits = values.fold(found.bits, |bits, mark| bits | marks::bits(mark));
            let Some(key) = data(1) else { continue };
            let last = data(10);
            let beyond = number(element, 3).is_some_and(|flags| flags & INTERVAL_END != 0);
            for at in self.keys.iter().copied() {
                let Some(mark) = mark_at(key, at) else { continue };
                let mark = self.in_our_order(mark);
                match last.and_then(|last| mark_at(last, at)) {
                    Some(last) => found.bits |= marks::bits_between(mark, self.in_our_order(last)),
                    None if self.interval => found.bounds.push(Bound { at, mark, beyond }),
                    None => found.bits |= marks::bits(mark),
                }
            }
        }
    }

    fn in_our_order(&self, mark: u32) -> u32 {
        if self.interval { u32::from_be(mark) } else { mark }
    }
}

impl Found {
    /// Every bit of a mark that the set knows.
    pub(super) fn bits(mut self) -> u32 {
        self.bounds.sort_unstable();
        let mut next = self.bounds.iter().copied().peekable();
        let mut bits = self.bits;
        while let Some(first) = next.next() {
            if first.beyond {
                continue;
            }
            let end = next.peek().filter(|end| end.beyond && end.at == first.at);
            let last = end.map_or(u32::MAX, |end| end.mark.saturating_sub(1));
            bits |= marks::bits_between(first.mark, last.max(first.mark));
        }
        bits
    }
}

/// Where marks begin in data of the type `kind`, which is `length` bytes long. `lengths`: those of its parts, as far as the
/// kernel has been told. Of more than five parts nft itself knows the types of the last five only.
fn places(kind: u32, length: usize, lengths: &[usize]) -> Vec<usize> {
    let types = (0..u32::BITS / TYPE_BITS).map(|part| kind >> (part * TYPE_BITS) & ((1 << TYPE_BITS) - 1));
    let types = types.take_while(|part| *part != 0);
    let mut known = lengths.iter().rev();
    let mut end = length.next_multiple_of(ALIGNMENT);
    let mut places = Vec::new();
    for part in types {
        let bytes = known.next().copied().unwrap_or_else(|| usual_length(part)).next_multiple_of(ALIGNMENT);
        let Some(start) = end.checked_sub(bytes) else { break };
        if part == TYPE_MARK {
            places.push(start);
        }
        end = start;
    }
    places
}

/// Bytes of what is of this type (`enum datatypes` of nft), for kernels that do not tell.
fn usual_length(kind: u32) -> usize {
    match kind {
        // IPv6 addresses, labels of connections, names of interfaces.
        8 | 30 | 41 => 16,
        // Ethernet addresses, times, dates, control groups.
        9 | 18 | 43 | 46 => 8,
        _ => 4,
    }
}

fn mark_at(data: &[u8], at: usize) -> Option<u32> {
    data.get(at..)?.first_chunk().map(|bytes| u32::from_ne_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    const IPV4: u32 = 7;
    const IPV6: u32 = 8;
    const PORT: u32 = 13;

    fn concatenated(parts: &[u32]) -> u32 {
        parts.iter().fold(0, |kind, part| kind << TYPE_BITS | part)
    }

    #[test]
    fn a_mark_is_found_wherever_it_stands_in_what_is_concatenated() {
        for (parts, length, found) in [
            (&[TYPE_MARK][..], 4, &[0][..]),
            (&[TYPE_MARK, IPV4], 8, &[0]),
            (&[IPV4, TYPE_MARK], 8, &[4]),
            (&[IPV6, TYPE_MARK, PORT], 24, &[16]),
            // An Ethernet address has six bytes and fills eight.
            (&[9, TYPE_MARK], 12, &[8]),
            (&[TYPE_MARK, IPV4, TYPE_MARK], 12, &[8, 0]),
            (&[IPV4, PORT], 8, &[]),
            // What a map of verdicts gives.
            (&[0x3f, 0x3f, 0x3f, 0x3c, 0], 16, &[]),
        ] {
            assert_eq!(places(concatenated(parts), length, &[]), found, "{parts:?}");
        }
    }

    #[test]
    fn lengths_that_the_kernel_was_told_count_and_those_that_contradict_each_other_are_no_panic() {
        // Something of no fixed length ("@nh,0,64"), twice.
        assert_eq!(places(concatenated(&[4, TYPE_MARK, 4]), 20, &[8, 4, 8]), [8]);
        assert_eq!(places(concatenated(&[TYPE_MARK, IPV6]), 4, &[]), [0; 0]);
        // Of six parts the first has no type.
        let many = [4, 4, 4, 4, 4, 4];
        assert_eq!(places(concatenated(&[PORT, PORT, PORT, TYPE_MARK, PORT]), 24, &many), [16]);
    }

    #[test]
    fn an_interval_goes_from_its_first_to_the_one_before_its_end_in_whatever_order_they_are_listed() {
        let bound = |mark, beyond| Bound { at: 0, mark, beyond };
        let of = |bounds: &[Bound]| Found { bits: 0, bounds: bounds.to_vec() }.bits();
        let low = [bound(0x20, true), bound(0x10, false), bound(0, true)];
        assert_eq!(of(&low), 0x1f);
        // Two that touch.
        assert_eq!(of(&[bound(0x12, true), bound(0x11, false), bound(0x11, true), bound(0x10, false)]), 0x11);
        assert_eq!(of(&[bound(0xffff_0000, false)]), marks::bits_between(0xffff_0000, u32::MAX));
        assert_eq!(of(&[bound(0x1000_0000, true), bound(0x0100_0000, false)]), 0x0fff_ffff);
    }
}
