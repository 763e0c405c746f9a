//! UDP (RFC 768) on the device's side: reading datagrams in place and writing answers.

use std::net::SocketAddr;
use std::num::NonZeroU16;

use super::frame::Transmit;
use super::ip::{self, Packet};

/// One UDP datagram from a client, or several of one size in one packet.
#[derive(Debug)]
pub struct Datagram<'a> {
    /// The client.
    pub source: SocketAddr,
    /// The peer it addressed.
    pub destination: SocketAddr,
    /// The payload.
    pub payload: &'a [u8],
    /// The payload is to be cut into datagrams of this size, the last may be shorter.
    pub size: Option<NonZeroU16>,
    /// The client asked routers not to cut it.
    pub dont_fragment: bool,
    /// The whole packet.
    pub packet: &'a [u8],
}

/// Reads the UDP header of a whole packet; None if its lengths are wrong or a port is zero.
pub(super) fn read<'a>(packet: &Packet<'a>, size: Option<NonZeroU16>) -> Option<Datagram<'a>> {
    let bytes = packet.payload();
    let header = bytes.get(..8)?;
    let word = |at: usize| u16::from_be_bytes([header[at], header[at + 1]]);
    let length = usize::from(word(4));
    // The length field of a coalesced packet speaks of its first datagram alone.
    let payload = if size.is_some() { &bytes[8..] } else { bytes.get(8..length)? };
    if word(0) == 0 || word(2) == 0 {
        return None;
    }
    Some(Datagram {
        source: SocketAddr::new(packet.source, word(0)),
        destination: SocketAddr::new(packet.destination, word(2)),
        payload,
        size,
        dont_fragment: packet.dont_fragment,
        packet: packet.bytes,
    })
}

/// Whether the checksum is right, or absent where IPv4 allows that.
pub(super) fn checksum_holds(packet: &Packet<'_>) -> bool {
    let Some(field) = packet.payload().get(6..8) else { return false };
    if field == [0, 0] {
        return packet.source.is_ipv4();
    }
    // UDP's own length counts: what an IP packet has behind the datagram is padding.
    let length = packet.payload().get(4..6).map_or(0, |length| usize::from(u16::from_be_bytes([length[0], length[1]])));
    let end = if (8..=packet.payload().len()).contains(&length) { packet.start + length } else { packet.bytes.len() };
    super::checksum::transport(&packet.bytes[..end], packet.start, ip::UDP) == 0
}

/// Writes one datagram from `from` to `to`. `mtu` is the device's: a larger IPv6 packet leaves in fragments, because
/// nobody behind us may cut it; a larger IPv4 packet is cut by the kernel where it has to.
pub(super) fn write(
    from: SocketAddr,
    to: SocketAddr,
    payload: &[u8],
    link: Link,
    id: u32,
    transmit: &mut dyn Transmit,
) -> bool {
    if !transmit.ready() || payload.len() > longest(to.is_ipv6()) {
        return false;
    }
    let header = if to.is_ipv6() { 40 } else { 20 };
    let total = header + 8 + payload.len();
    if total > link.mtu && (to.is_ipv6() || !transmit.takes_any_length()) {
        return write_fragments(from, to, payload, link.mtu, id, transmit);
    }
    transmit.transmit(total, None, &mut |packet| {
        ip::write_header(packet, from.ip(), to.ip(), ip::UDP, (id & 0xffff) as u16);
        write_udp(&mut packet[header..], from.port(), to.port(), payload);
        if !link.offload {
            let sum = super::checksum::transport(packet, header, ip::UDP);
            packet[header + 6..header + 8].copy_from_slice(&nonzero(sum).to_be_bytes());
        }
    });
    true
}

/// Bytes behind the eight of UDP or of an echo message in the longest packet: the length field of IPv4 counts the IP header
/// too, that of IPv6 does not.
pub(super) fn longest(v6: bool) -> usize {
    if v6 { 65_535 - 8 } else { 65_535 - 20 - 8 }
}

/// Bytes of one packet of several datagrams, and how many of them: what every kernel that cuts such packets takes.
const LONGEST_PACKET: usize = 64_000;
pub(super) const MOST_SEGMENTS: u32 = 64;

/// The payload bytes to put into one packet for `to` when datagrams have `size` bytes: those of one where the device does
/// not cut, or would have to make fragments, of which IPv6 allows it none.
pub(super) fn longest_train(to: SocketAddr, size: NonZeroU16, link: Link, transmit: &dyn Transmit) -> usize {
    let headers = if to.is_ipv6() { 48 } else { 28 };
    let size = usize::from(size.get());
    if !link.offload || !transmit.cuts_datagrams() || headers + size > link.mtu {
        return size;
    }
    ((LONGEST_PACKET - headers) / size).clamp(1, MOST_SEGMENTS as usize) * size
}

/// Writes as one packet what the device cuts into datagrams of `size` bytes: no more than [`longest_train`] allows.
pub(super) fn write_train(
    from: SocketAddr,
    to: SocketAddr,
    train: &[u8],
    size: NonZeroU16,
    id: u32,
    transmit: &mut dyn Transmit,
) -> bool {
    if !transmit.ready() {
        return false;
    }
    let header = if to.is_ipv6() { 40 } else { 20 };
    transmit.transmit(header + 8 + train.len(), Some(size), &mut |packet| {
        ip::write_header(packet, from.ip(), to.ip(), ip::UDP, (id & 0xffff) as u16);
        write_udp(&mut packet[header..], from.port(), to.port(), train);
    });
    true
}

/// What the writer must know of the device.
#[derive(Debug, Clone, Copy)]
pub(super) struct Link {
    pub(super) mtu: usize,
    /// The device completes checksums.
    pub(super) offload: bool,
}

fn write_udp(out: &mut [u8], from: u16, to: u16, payload: &[u8]) {
    out[..2].copy_from_slice(&from.to_be_bytes());
    out[2..4].copy_from_slice(&to.to_be_bytes());
    // At most 65 535, checked by the caller.
    out[4..6].copy_from_slice(&((payload.len() + 8) as u16).to_be_bytes());
    out[6..8].fill(0);
    out[8..].copy_from_slice(payload);
}

/// A computed checksum of zero is sent as all ones (RFC 768).
fn nonzero(sum: u16) -> u16 {
    if sum == 0 { 0xffff } else { sum }
}

fn write_fragments(
    from: SocketAddr,
    to: SocketAddr,
    payload: &[u8],
    mtu: usize,
    id: u32,
    transmit: &mut dyn Transmit,
) -> bool {
    let header = if to.is_ipv6() { 40 } else { 20 };
    let mut whole = vec![0; header + 8 + payload.len()];
    ip::write_header(&mut whole, from.ip(), to.ip(), ip::UDP, (id & 0xffff) as u16);
    write_udp(&mut whole[header..], from.port(), to.port(), payload);
    let sum = super::checksum::transport(&whole, header, ip::UDP);
    whole[header + 6..header + 8].copy_from_slice(&nonzero(sum).to_be_bytes());
    write_pieces(&whole, mtu, id, transmit)
}

/// Writes a packet without extension headers or options in fragments that fit into `mtu`. False: some were dropped.
pub(super) fn write_pieces(whole: &[u8], mtu: usize, id: u32, transmit: &mut dyn Transmit) -> bool {
    if whole[0] >> 4 == 4 {
        return write_pieces_v4(whole, mtu, transmit);
    }
    let piece = (mtu.max(1280) - 48) / 8 * 8;
    let body = &whole[40..];
    let mut offset = 0;
    for part in body.chunks(piece) {
        if !transmit.ready() {
            return false;
        }
        let more = offset + part.len() < body.len();
        transmit.transmit(48 + part.len(), None, &mut |packet| {
            packet[..40].copy_from_slice(&whole[..40]);
            packet[4..6].copy_from_slice(&((8 + part.len()) as u16).to_be_bytes());
            packet[6] = ip::FRAGMENT;
            packet[40] = whole[6];
            packet[41] = 0;
            let word = (offset as u16) | u16::from(more);
            packet[42..44].copy_from_slice(&word.to_be_bytes());
            packet[44..48].copy_from_slice(&id.to_be_bytes());
            packet[48..].copy_from_slice(part);
        });
        offset += part.len();
    }
    true
}

/// Fragments of RFC 791, which keep the packet's own id.
fn write_pieces_v4(whole: &[u8], mtu: usize, transmit: &mut dyn Transmit) -> bool {
    let piece = (mtu.max(576) - 20) / 8 * 8;
    let body = &whole[20..];
    let mut offset = 0;
    for part in body.chunks(piece) {
        if !transmit.ready() {
            return false;
        }
        let more = offset + part.len() < body.len();
        transmit.transmit(20 + part.len(), None, &mut |packet| {
            packet[..20].copy_from_slice(&whole[..20]);
            packet[2..4].copy_from_slice(&((20 + part.len()) as u16).to_be_bytes());
            let word = (offset / 8) as u16 | u16::from(more) << 13;
            packet[6..8].copy_from_slice(&word.to_be_bytes());
            ip::seal_header(&mut packet[..20]);
            packet[20..].copy_from_slice(part);
        });
        offset += part.len();
    }
    true
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::super::{Config, Stack, VirtioHeader};
    use super::*;

    /// What was written, sealed as the device's writer does, and the segment size that was asked for.
    struct Device {
        offload: bool,
        cuts: bool,
        written: Vec<(Vec<u8>, VirtioHeader, Option<NonZeroU16>)>,
    }

    impl Transmit for Device {
        fn ready(&mut self) -> bool {
            true
        }

        fn cuts_datagrams(&self) -> bool {
            self.cuts
        }

        fn transmit(&mut self, len: usize, gso: Option<NonZeroU16>, fill: &mut dyn FnMut(&mut [u8])) {
            let mut packet = vec![0xa5; len];
            fill(&mut packet);
            let header = if self.offload { VirtioHeader::seal(&mut packet, gso) } else { VirtioHeader::PLAIN };
            self.written.push((packet, header, gso));
        }
    }

    fn sent(to: &str, train: &[u8], size: u16, offload: bool, cuts: bool) -> Device {
        let config = Config {
            mtu: 1500,
            offload,
            own: Vec::new(),
            echo: Vec::new(),
            carry_echo: true,
            reserved: Vec::new(),
            ipv6: true,
            seed: 1,
            memory: usize::MAX,
            client: |ip| ip,
            handshakes: usize::MAX,
            tell_ended: false,
        };
        let to: SocketAddr = to.parse().unwrap();
        let from = if to.is_ipv6() { "[2001:db8::1]:53" } else { "192.0.2.1:53" };
        let mut device = Device { offload, cuts, written: Vec::new() };
        let mut stack = Stack::new(config, Instant::now());
        assert!(stack.send_train(from.parse().unwrap(), to, train, NonZeroU16::new(size).unwrap(), &mut device));
        device
    }

    fn pattern(length: usize) -> Vec<u8> {
        (0..length).map(|at| (at % 251) as u8).collect()
    }

    fn word(packet: &[u8], at: usize) -> usize {
        usize::from(u16::from_be_bytes([packet[at], packet[at + 1]]))
    }

    #[test]
    fn where_no_kernel_cuts_ipv4_a_long_datagram_leaves_in_pieces_that_make_it_up_again() {
        struct Wire(Vec<Vec<u8>>);
        impl Transmit for Wire {
            fn ready(&mut self) -> bool {
                true
            }
            fn takes_any_length(&self) -> bool {
                false
            }
            fn transmit(&mut self, len: usize, _: Option<NonZeroU16>, fill: &mut dyn FnMut(&mut [u8])) {
                let mut packet = vec![0xa5; len];
                fill(&mut packet);
                assert_eq!(VirtioHeader::seal(&mut packet.clone(), None), VirtioHeader::PLAIN, "it is whole as it is");
                self.0.push(packet);
            }
        }
        let payload: Vec<u8> = (0..4000_u32).map(|n| n as u8).collect();
        let (from, to) = ("203.0.113.9:53".parse().unwrap(), "10.0.0.5:4000".parse().unwrap());
        let mut wire = Wire(Vec::new());
        assert!(write(from, to, &payload, Link { mtu: 1500, offload: true }, 7, &mut wire));
        assert!(wire.0.len() == 3 && wire.0.iter().all(|packet| packet.len() <= 1500));
        let mut body: Vec<u8> = Vec::new();
        for packet in &wire.0 {
            let read = crate::stack::ip::Packet::parse(packet).expect("a header that holds");
            let word = usize::from(u16::from_be_bytes([packet[6], packet[7]]));
            assert_eq!(((word & 0x1fff) * 8, read.fragment.is_some()), (body.len(), true));
            assert_eq!(word >> 13 & 1 == 0, body.len() + packet.len() - 20 == 8 + payload.len(), "the last says so");
            body.extend(&packet[20..]);
        }
        assert_eq!(body[8..], payload);
    }

    #[test]
    fn a_train_is_one_packet_that_asks_to_be_cut() {
        let train = pattern(2 * 1200 + 7);
        for (to, start) in [("192.0.2.9:4000", 20), ("[2001:db8::9]:4000", 40)] {
            let device = sent(to, &train, 1200, true, true);
            let [(packet, header, gso)] = &device.written[..] else { panic!("{} packets", device.written.len()) };
            assert_eq!(gso.map(NonZeroU16::get), Some(1200));
            assert_eq!(packet[start + 8..], train);
            assert_eq!(word(packet, start + 4), 8 + train.len());
            let total = if start == 20 { word(packet, 2) } else { 40 + word(packet, 4) };
            assert_eq!(total, packet.len());
            assert_eq!(word(packet, start + 6), usize::from(super::super::checksum::pseudo(packet, start, ip::UDP)));
            let raw = header.bytes();
            let native = |at: usize| usize::from(u16::from_ne_bytes([raw[at], raw[at + 1]]));
            // NEEDS_CSUM, GSO_UDP_L4, the headers' length, the size, where the sum begins and where it goes.
            let fields = (raw[0], raw[1], native(2), native(4), native(6), native(8));
            assert_eq!(fields, (1, 5, start + 8, 1200, start, 6));
        }
    }

    #[test]
    fn no_packet_has_more_than_the_kernel_takes() {
        for (size, parts) in [(100, 200), (1200, 130), (1472, 50)] {
            let train = pattern(size * parts - 1);
            let device = sent("192.0.2.9:4000", &train, size as u16, true, true);
            let mut whole = Vec::new();
            for (packet, ..) in &device.written {
                assert!(packet.len() <= LONGEST_PACKET);
                assert!((packet.len() - 28).div_ceil(size) <= MOST_SEGMENTS as usize);
                whole.extend_from_slice(&packet[28..]);
            }
            assert_eq!(whole, train);
            let numbers: Vec<_> = device.written.iter().map(|(packet, ..)| word(packet, 4)).collect();
            assert!(numbers.windows(2).all(|pair| pair[1] >= pair[0] + 64), "numbers overlap: {numbers:?}");
        }
    }

    #[test]
    fn a_device_that_cuts_nothing_gets_every_datagram_by_itself() {
        let train = pattern(2 * 300 + 1);
        for offload in [false, true] {
            let device = sent("192.0.2.9:4000", &train, 300, offload, false);
            let payloads: Vec<_> = device.written.iter().map(|(packet, ..)| packet[28..].to_vec()).collect();
            assert_eq!(payloads, train.chunks(300).collect::<Vec<_>>());
            assert!(device.written.iter().all(|(.., gso)| gso.is_none()));
            for (packet, ..) in device.written.iter().filter(|_| !offload) {
                assert_eq!(super::super::checksum::transport(packet, 20, ip::UDP), 0);
            }
        }
    }

    #[test]
    fn datagrams_beyond_the_mtu_are_never_left_to_the_device() {
        let train = pattern(3 * 1453);
        let device = sent("[2001:db8::9]:4000", &train, 1453, true, true);
        // Two fragments each.
        assert_eq!(device.written.len(), 6);
        assert!(device.written.iter().all(|(packet, _, gso)| gso.is_none() && packet[6] == 44 && packet.len() <= 1500));
        let device = sent("192.0.2.9:4000", &pattern(3 * 1473), 1473, true, true);
        assert_eq!(device.written.iter().map(|(packet, ..)| packet.len()).collect::<Vec<_>>(), [1501; 3]);
        assert!(device.written.iter().all(|(.., gso)| gso.is_none()));
    }
}
