//! Putting fragments together (RFC 791, RFC 8200 section 4.5), bounded in number, bytes and time.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use super::ip::{self, Fragment, Malformed, Packet};

/// RFC 8200: 60 s after the first fragment the rest is given up; RFC 1122 allows 60 to 120 s.
const LIFETIME: Duration = Duration::from_secs(60);
/// Packets under way at once; the oldest goes.
const MOST_PACKETS: usize = 64;
/// Pieces of one packet: 65 535 bytes in pieces of 512.
const MOST_PIECES: usize = 128;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    source: IpAddr,
    destination: IpAddr,
    protocol: u8,
    id: u32,
}

/// The pieces of one packet.
struct Partial {
    header: Vec<u8>,
    pieces: BTreeMap<usize, Vec<u8>>,
    total: Option<usize>,
    started: Instant,
    /// Overlapping pieces: the packet is dropped, and so are its later pieces (RFC 5722).
    spoilt: bool,
}

/// Packets of which some pieces are still missing.
#[derive(Default)]
pub(super) struct Reassembly {
    partial: HashMap<Key, Partial, foldhash::fast::RandomState>,
    order: VecDeque<Key>,
}

impl Reassembly {
    /// Adds a piece; returns the whole packet when it was the last one missing.
    ///
    /// # Errors
    /// The piece is dropped: its length or place cannot be, or it overlaps another.
    pub(super) fn add(
        &mut self,
        packet: &Packet<'_>,
        fragment: Fragment,
        now: Instant,
    ) -> Result<Option<Vec<u8>>, Malformed> {
        self.expire(now);
        let payload = packet.payload();
        // All but the last piece are multiples of eight bytes, and none reaches beyond what a length field can say.
        if payload.is_empty()
            || (fragment.more && !payload.len().is_multiple_of(8))
            || fragment.offset + payload.len() > longest(packet, fragment)
        {
            return Err(Malformed::Length);
        }
        let (source, destination) = (packet.source, packet.destination);
        let key = Key { source, destination, protocol: packet.protocol, id: fragment.id };
        let partial = self.entry(key, now);
        partial.insert(packet, fragment, payload)?;
        if !partial.is_complete() {
            return Ok(None);
        }
        self.order.retain(|other| *other != key);
        self.partial.remove(&key).map(|whole| whole.assemble(packet.protocol)).transpose()
    }

    fn entry(&mut self, key: Key, now: Instant) -> &mut Partial {
        if !self.partial.contains_key(&key) {
            if self.order.len() >= MOST_PACKETS
                && let Some(oldest) = self.order.pop_front()
            {
                self.partial.remove(&oldest);
            }
            self.order.push_back(key);
        }
        self.partial.entry(key).or_insert_with(|| Partial {
            header: Vec::new(),
            pieces: BTreeMap::new(),
            total: None,
            started: now,
            spoilt: false,
        })
    }

    fn expire(&mut self, now: Instant) {
        while let Some(oldest) = self.order.front() {
            if self.partial.get(oldest).is_some_and(|partial| now < partial.started + LIFETIME) {
                break;
            }
            self.partial.remove(oldest);
            self.order.pop_front();
        }
    }
}

/// What all pieces together may come to: the length field of IPv4 counts the header, that of IPv6 does not.
fn longest(packet: &Packet<'_>, fragment: Fragment) -> usize {
    65_535 - if packet.source.is_ipv6() { 0 } else { fragment.unfragmentable }
}

impl Partial {
    fn insert(&mut self, packet: &Packet<'_>, fragment: Fragment, payload: &[u8]) -> Result<(), Malformed> {
        let (start, end) = (fragment.offset, fragment.offset + payload.len());
        if self.pieces.get(&start).is_some_and(|known| known == payload) {
            return Ok(()); // A plain duplicate, as networks make them.
        }
        let before = self.pieces.range(..=start).next_back().map_or(0, |(at, piece)| at + piece.len());
        let after = self.pieces.range(start..).next().map_or(usize::MAX, |(at, _)| *at);
        let beyond = self.total.is_some_and(|total| end > total);
        let contradicts = !fragment.more && self.total.is_some_and(|total| total != end);
        if before > start || after < end || beyond || contradicts || self.pieces.len() >= MOST_PIECES {
            self.spoilt = true;
            self.pieces.clear();
        }
        if self.spoilt {
            return Err(Malformed::Options);
        }
        if start == 0 {
            self.header = packet.bytes[..fragment.unfragmentable].to_vec();
        }
        if !fragment.more {
            self.total = Some(end);
        }
        self.pieces.insert(start, payload.to_vec());
        Ok(())
    }

    fn is_complete(&self) -> bool {
        let Some(total) = self.total else { return false };
        !self.spoilt && !self.header.is_empty() && self.pieces.values().map(Vec::len).sum::<usize>() == total
    }

    /// The packet as it was before it was cut, and fit to be cut again: IPv4 loses "don't fragment", and a datagram of
    /// IPv6 keeps a fragment header that says "all of it" (RFC 6946), as it can say so in no other way, unless
    /// there is no room for one: what is that long was cut for sure. IPv6 extension headers of the unfragmentable part are left
    /// out.
    ///
    /// # Errors
    /// The first piece had options that the last one did not leave room for.
    fn assemble(self, protocol: u8) -> Result<Vec<u8>, Malformed> {
        let v6 = self.header[0] >> 4 == 6;
        let header = if v6 { 40 } else { self.header.len() };
        let mut whole = self.header[..header].to_vec();
        // What TCP sends never needs to be cut, and its stack reads no extension headers.
        let room = 65_535 - 8 >= self.pieces.values().map(Vec::len).sum::<usize>();
        let atomic = v6 && protocol != ip::TCP && room;
        if atomic {
            whole.extend_from_slice(&[protocol, 0, 0, 0, 0, 0, 0, 0]);
        }
        for piece in self.pieces.into_values() {
            whole.extend_from_slice(&piece);
        }
        let total = whole.len();
        if total > 65_535 + if v6 { 40 } else { 0 } {
            return Err(Malformed::Length);
        }
        if v6 {
            whole[4..6].copy_from_slice(&((total - 40) as u16).to_be_bytes());
            whole[6] = if atomic { ip::FRAGMENT } else { protocol };
        } else {
            whole[2..4].copy_from_slice(&(total as u16).to_be_bytes());
            whole[6..8].fill(0);
            whole[10..12].fill(0);
            let sum = super::checksum::of(&whole[..header]);
            whole[10..12].copy_from_slice(&sum.to_be_bytes());
        }
        Ok(whole)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::ip::{UDP, write_header};
    use super::*;

    fn piece(body: &[u8], start: usize, end: usize) -> Vec<u8> {
        let mut packet = vec![0; 20 + end - start];
        write_header(&mut packet, "192.0.2.1".parse().unwrap(), "192.0.2.2".parse().unwrap(), UDP, 77);
        let word = (start / 8) as u16 | if end < body.len() { 0x2000 } else { 0 };
        packet[6..8].copy_from_slice(&word.to_be_bytes());
        packet[10..12].fill(0);
        let sum = super::super::checksum::of(&packet[..20]);
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
        packet[20..].copy_from_slice(&body[start..end]);
        packet
    }

    /// The same over IPv6.
    fn piece_v6(body: &[u8], start: usize, end: usize) -> Vec<u8> {
        let mut packet = vec![0; 48 + end - start];
        let (source, destination) = ("2001:db8::1".parse().unwrap(), "2001:db8::2".parse().unwrap());
        write_header(&mut packet, source, destination, ip::FRAGMENT, 0);
        packet[40] = UDP;
        let word = start as u16 | u16::from(end < body.len());
        packet[42..44].copy_from_slice(&word.to_be_bytes());
        packet[48..].copy_from_slice(&body[start..end]);
        packet
    }

    fn add(reassembly: &mut Reassembly, bytes: &[u8], now: Instant) -> Option<Vec<u8>> {
        let packet = Packet::parse(bytes).unwrap();
        reassembly.add(&packet, packet.fragment.unwrap(), now).unwrap_or_default()
    }

    proptest! {
        #[test]
        fn pieces_in_any_order_make_the_packet_again(
            body in proptest::collection::vec(any::<u8>(), 100..4000),
            cuts in proptest::collection::btree_set(1usize..12, 1..6),
            seed in any::<u64>(),
        ) {
            let mut edges: Vec<usize> = cuts.iter().map(|cut| cut * 8).filter(|cut| *cut < body.len()).collect();
            edges.insert(0, 0);
            edges.push(body.len());
            let mut pieces: Vec<_> = edges.windows(2).map(|edge| piece(&body, edge[0], edge[1])).collect();
            let turn = (seed as usize) % pieces.len();
            pieces.rotate_left(turn);
            let mut reassembly = Reassembly::default();
            let now = Instant::now();
            let last = pieces.pop().unwrap();
            for bytes in &pieces {
                prop_assert!(add(&mut reassembly, bytes, now).is_none());
                prop_assert!(add(&mut reassembly, bytes, now).is_none());
            }
            let whole = add(&mut reassembly, &last, now).unwrap();
            let packet = Packet::parse(&whole).unwrap();
            prop_assert!(packet.fragment.is_none());
            prop_assert_eq!(packet.payload(), &body[..]);
            prop_assert!(reassembly.partial.is_empty() && reassembly.order.is_empty());
        }
    }

    #[test]
    fn what_its_source_cut_may_be_cut_again() {
        let body: Vec<u8> = (0..200).collect();
        for piece in [piece, piece_v6] {
            let (mut reassembly, now) = (Reassembly::default(), Instant::now());
            let mut first = piece(&body, 0, 104);
            if first[0] >> 4 == 4 {
                // "Don't fragment" on a fragment: do not cut this piece further.
                first[6] |= 0x40;
                first[10..12].fill(0);
                let sum = super::super::checksum::of(&first[..20]);
                first[10..12].copy_from_slice(&sum.to_be_bytes());
            }
            assert!(add(&mut reassembly, &first, now).is_none());
            let whole = add(&mut reassembly, &piece(&body, 104, 200), now).unwrap();
            let packet = Packet::parse(&whole).unwrap();
            assert_eq!((packet.protocol, packet.payload()), (UDP, &body[..]));
            assert!(packet.fragment.is_none() && !packet.dont_fragment);
        }
    }

    #[test]
    fn overlapping_pieces_spoil_the_packet() {
        let body = vec![7; 64];
        let (mut reassembly, now) = (Reassembly::default(), Instant::now());
        assert!(add(&mut reassembly, &piece(&body, 0, 32), now).is_none());
        assert!(add(&mut reassembly, &piece(&body, 24, 48), now).is_none());
        assert!(add(&mut reassembly, &piece(&body, 32, 64), now).is_none());
        assert!(add(&mut reassembly, &piece(&body, 0, 32), now).is_none());
    }

    #[test]
    fn what_stays_incomplete_is_given_up_after_its_time() {
        let body = vec![7; 64];
        let (mut reassembly, now) = (Reassembly::default(), Instant::now());
        assert!(add(&mut reassembly, &piece(&body, 0, 32), now).is_none());
        assert!(add(&mut reassembly, &piece(&body, 32, 64), now + LIFETIME).is_none());
        assert_eq!(reassembly.order.len(), 1);
    }

    #[test]
    fn the_number_of_packets_under_way_is_bounded() {
        let body = vec![7; 64];
        let (mut reassembly, now) = (Reassembly::default(), Instant::now());
        for id in 0..1000u16 {
            let mut bytes = piece(&body, 0, 32);
            bytes[4..6].copy_from_slice(&id.to_be_bytes());
            bytes[10..12].fill(0);
            let sum = super::super::checksum::of(&bytes[..20]);
            bytes[10..12].copy_from_slice(&sum.to_be_bytes());
            add(&mut reassembly, &bytes, now);
        }
        assert!(reassembly.partial.len() <= MOST_PACKETS);
    }
}
