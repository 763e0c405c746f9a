//! Reading IP headers: what a packet is, before anything is made of it (RFC 791, RFC 8200).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Protocol number of ICMP.
pub const ICMP: u8 = 1;
/// Protocol number of TCP.
pub const TCP: u8 = 6;
/// Protocol number of UDP.
pub const UDP: u8 = 17;
/// Number of the end of an IPv6 packet that carries nothing (RFC 8200 section 4.7).
pub const NOTHING: u8 = 59;
/// Number of the fragment header of IPv6.
pub const FRAGMENT: u8 = 44;
/// Protocol number of ICMPv6.
pub const ICMPV6: u8 = 58;

/// More extension headers than this are an attack or a mistake.
const MAX_EXTENSIONS: usize = 8;

/// One IP packet, whole or a fragment, cut to the length that its header names.
#[derive(Debug, Clone, Copy)]
pub struct Packet<'a> {
    /// The packet from its first header byte on.
    pub bytes: &'a [u8],
    /// Who sent it.
    pub source: IpAddr,
    /// Where it goes.
    pub destination: IpAddr,
    /// The protocol of what follows the IP headers.
    pub protocol: u8,
    /// Where that begins.
    pub start: usize,
    /// Set when this is one piece of a larger packet.
    pub fragment: Option<Fragment>,
    /// Routers must not cut it: DF in IPv4, always so in IPv6.
    pub dont_fragment: bool,
}

/// A piece's place in its packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fragment {
    /// Tells the packets of one source apart.
    pub id: u32,
    /// Bytes of payload before this piece.
    pub offset: usize,
    /// Whether another piece follows.
    pub more: bool,
    /// Where the unfragmentable part ends: the piece's payload begins behind the fragment header.
    pub unfragmentable: usize,
}

/// Why a packet is dropped unread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Malformed {
    /// Shorter than its headers or its length field say.
    Length,
    /// Not IPv4 or IPv6, or a header checksum that is wrong.
    Header,
    /// A source route, or a chain of extension headers that makes no sense.
    Options,
    /// A source that no packet may carry here.
    Martian,
}

impl<'a> Packet<'a> {
    /// Reads the headers of `bytes`.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, Malformed> {
        let packet = match bytes.first().map(|byte| byte >> 4) {
            Some(4) => Self::parse_v4(bytes)?,
            Some(6) => Self::parse_v6(bytes)?,
            Some(_) => return Err(Malformed::Header),
            None => return Err(Malformed::Length),
        };
        if is_martian(packet.source) { Err(Malformed::Martian) } else { Ok(packet) }
    }

    fn parse_v4(bytes: &'a [u8]) -> Result<Self, Malformed> {
        if bytes.len() < 20 {
            return Err(Malformed::Length);
        }
        let start = usize::from(bytes[0] & 15) * 4;
        let total = usize::from(u16::from_be_bytes([bytes[2], bytes[3]]));
        if start < 20 || total < start || total > bytes.len() {
            return Err(Malformed::Length);
        }
        if super::checksum::of(&bytes[..start]) != 0 {
            return Err(Malformed::Header);
        }
        if has_source_route(&bytes[20..start]) {
            return Err(Malformed::Options);
        }
        let flags = u16::from_be_bytes([bytes[6], bytes[7]]);
        let (more, offset) = (flags & 0x2000 != 0, usize::from(flags & 0x1fff) * 8);
        let id = u32::from(u16::from_be_bytes([bytes[4], bytes[5]]));
        Ok(Self {
            bytes: &bytes[..total],
            source: IpAddr::V4(Ipv4Addr::new(bytes[12], bytes[13], bytes[14], bytes[15])),
            destination: IpAddr::V4(Ipv4Addr::new(bytes[16], bytes[17], bytes[18], bytes[19])),
            protocol: bytes[9],
            start,
            fragment: (more || offset > 0).then_some(Fragment { id, offset, more, unfragmentable: start }),
            dont_fragment: flags & 0x4000 != 0,
        })
    }

    fn parse_v6(bytes: &'a [u8]) -> Result<Self, Malformed> {
        if bytes.len() < 40 {
            return Err(Malformed::Length);
        }
        let total = 40 + usize::from(u16::from_be_bytes([bytes[4], bytes[5]]));
        if total > bytes.len() {
            return Err(Malformed::Length);
        }
        let bytes = &bytes[..total];
        let Walk { protocol, start, fragment, atomic, .. } = walk_extensions(bytes)?;
        Ok(Self {
            bytes,
            source: IpAddr::V6(address_v6(&bytes[8..24])),
            destination: IpAddr::V6(address_v6(&bytes[24..40])),
            protocol,
            start,
            fragment,
            // Nobody cuts IPv6 on its way, but its source has where there is a fragment header, and what no device takes in
            // one piece.
            dont_fragment: fragment.is_none() && !atomic && total <= 65_535,
        })
    }

    /// What follows the IP headers.
    #[must_use]
    pub fn payload(&self) -> &'a [u8] {
        &self.bytes[self.start..]
    }
}

fn address_v6(bytes: &[u8]) -> Ipv6Addr {
    let mut octets = [0; 16];
    octets.copy_from_slice(bytes);
    Ipv6Addr::from(octets)
}

/// What the extension headers led to.
pub(super) struct Walk {
    pub(super) protocol: u8,
    /// Which byte of the packet says so.
    pub(super) named_at: usize,
    pub(super) start: usize,
    pub(super) fragment: Option<Fragment>,
    /// A fragment header said that nothing is missing.
    pub(super) atomic: bool,
}

/// Follows the chain of extension headers (RFC 8200 section 4) to the transport or to a fragment header.
pub(super) fn walk_extensions(bytes: &[u8]) -> Result<Walk, Malformed> {
    let (mut next, mut named_at, mut at, mut atomic) = (bytes[6], 6, 40, false);
    for _ in 0..MAX_EXTENSIONS {
        match next {
            // Hop-by-hop, routing and destination options share one shape.
            0 | 43 | 60 => {
                let header = bytes.get(at..at + 8).ok_or(Malformed::Length)?;
                // A routing header with segments left would send the packet elsewhere (RFC 5095).
                if (next == 0 && at != 40) || (next == 43 && header[3] != 0) {
                    return Err(Malformed::Options);
                }
                (next, named_at, at) = (header[0], at, at + 8 + usize::from(header[1]) * 8);
                if at > bytes.len() {
                    return Err(Malformed::Length);
                }
            }
            FRAGMENT => {
                let header = bytes.get(at..at + 8).ok_or(Malformed::Length)?;
                let word = u16::from_be_bytes([header[2], header[3]]);
                let id = u32::from_be_bytes([header[4], header[5], header[6], header[7]]);
                let (offset, more) = (usize::from(word & 0xfff8), word & 1 != 0);
                // An atomic fragment (RFC 6946) is a whole packet.
                if offset == 0 && !more {
                    (next, named_at, at, atomic) = (header[0], at, at + 8, true);
                    continue;
                }
                let fragment = Some(Fragment { id, offset, more, unfragmentable: at });
                return Ok(Walk { protocol: header[0], named_at: at, start: at + 8, fragment, atomic });
            }
            _ => return Ok(Walk { protocol: next, named_at, start: at, fragment: None, atomic }),
        }
    }
    Err(Malformed::Options)
}

/// Whether IPv4 options hold a loose or strict source route (RFC 7126 sections 4.3 and 4.4), or are cut short.
fn has_source_route(mut options: &[u8]) -> bool {
    while let Some(kind) = options.first() {
        match kind {
            0 => return false,
            1 => options = &options[1..],
            131 | 137 => return true,
            _ => match options.get(1).map(|length| usize::from(*length)) {
                Some(length) if length >= 2 && length <= options.len() => options = &options[length..],
                _ => return true,
            },
        }
    }
    false
}

fn is_martian(source: IpAddr) -> bool {
    match source {
        IpAddr::V4(ip) => ip.is_multicast() || ip.is_broadcast() || ip.is_unspecified() || ip.is_loopback(),
        IpAddr::V6(ip) => ip.is_multicast() || ip.is_unspecified() || ip.is_loopback() || ip.to_ipv4_mapped().is_some(),
    }
}

/// Whether `ip` names more than one host, or nobody.
#[must_use]
pub fn is_not_unicast(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_multicast() || ip.is_broadcast() || ip.is_unspecified() || ip.is_loopback(),
        IpAddr::V6(ip) => ip.is_multicast() || ip.is_unspecified() || ip.is_loopback() || ip.to_ipv4_mapped().is_some(),
    }
}

/// Writes the checksum of an IPv4 header.
pub(super) fn seal_header(header: &mut [u8]) {
    header[10..12].fill(0);
    let sum = super::checksum::of(header);
    header[10..12].copy_from_slice(&sum.to_be_bytes());
}

/// Writes an IPv4 header without options or an IPv6 header over the first bytes of `packet`; returns its length.
/// `id` is used by IPv4 packets that routers may cut.
pub(super) fn write_header(packet: &mut [u8], source: IpAddr, destination: IpAddr, protocol: u8, id: u16) -> usize {
    let total = packet.len();
    match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            packet[..20].fill(0);
            packet[0] = 0x45;
            packet[2..4].copy_from_slice(&length(total));
            packet[4..6].copy_from_slice(&id.to_be_bytes());
            // A TCP learns the path's MTU (RFC 1191); its number then does not matter (RFC 6864).
            packet[6] = if protocol == TCP { 0x40 } else { 0 };
            packet[8] = 64;
            packet[9] = protocol;
            packet[12..16].copy_from_slice(&source.octets());
            packet[16..20].copy_from_slice(&destination.octets());
            let sum = super::checksum::of(&packet[..20]);
            packet[10..12].copy_from_slice(&sum.to_be_bytes());
            20
        }
        (source, destination) => {
            packet[..40].fill(0);
            packet[0] = 0x60;
            packet[4..6].copy_from_slice(&length(total - 40));
            packet[6] = protocol;
            packet[7] = 64;
            packet[8..24].copy_from_slice(&mapped(source).octets());
            packet[24..40].copy_from_slice(&mapped(destination).octets());
            40
        }
    }
}

/// Where the transport header begins in a packet without IPv6 extension headers.
pub(super) fn header_length(packet: &[u8]) -> usize {
    if packet[0] >> 4 == 6 { 40 } else { usize::from(packet[0] & 15) * 4 }
}

/// Makes the length field of a packet that was cut say what is left. The transport checksum is not touched.
pub(super) fn shorten(packet: &mut [u8]) {
    let total = packet.len();
    if packet[0] >> 4 == 6 {
        packet[4..6].copy_from_slice(&length(total - 40));
    } else {
        packet[2..4].copy_from_slice(&length(total));
        packet[10..12].fill(0);
        let sum = super::checksum::of(&packet[..header_length(packet)]);
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
    }
}

fn length(bytes: usize) -> [u8; 2] {
    u16::try_from(bytes).unwrap_or(u16::MAX).to_be_bytes()
}

fn mapped(ip: IpAddr) -> Ipv6Addr {
    match ip {
        IpAddr::V4(ip) => ip.to_ipv6_mapped(),
        IpAddr::V6(ip) => ip,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn v4(payload: usize) -> Vec<u8> {
        let mut packet = vec![0; 20 + payload];
        write_header(&mut packet, "192.0.2.1".parse().unwrap(), "198.51.100.2".parse().unwrap(), UDP, 7);
        packet
    }

    fn v6(next: u8, rest: &[u8]) -> Vec<u8> {
        let mut packet = vec![0; 40];
        packet.extend_from_slice(rest);
        write_header(&mut packet, "2001:db8::1".parse().unwrap(), "2001:db8::2".parse().unwrap(), next, 0);
        packet
    }

    #[test]
    fn what_was_written_is_read_back() {
        let bytes = v4(12);
        let packet = Packet::parse(&bytes).unwrap();
        assert_eq!((packet.source, packet.protocol), ("192.0.2.1".parse().unwrap(), UDP));
        assert_eq!(packet.payload().len(), 12);
        assert!(packet.fragment.is_none() && !packet.dont_fragment);
    }

    #[test]
    fn bytes_behind_the_total_length_are_cut_off_and_missing_ones_are_an_error() {
        let mut bytes = v4(12);
        bytes.extend_from_slice(b"padding");
        assert_eq!(Packet::parse(&bytes).unwrap().payload().len(), 12);
        assert_eq!(Packet::parse(&bytes[..30]).unwrap_err(), Malformed::Length);
    }

    #[test]
    fn a_wrong_header_checksum_is_dropped() {
        let mut bytes = v4(12);
        bytes[8] ^= 1;
        assert_eq!(Packet::parse(&bytes).unwrap_err(), Malformed::Header);
    }

    #[test]
    fn extension_headers_are_walked_to_the_transport() {
        let bytes = v6(0, &[60, 0, 1, 4, 0, 0, 0, 0, TCP, 0, 1, 4, 0, 0, 0, 0, 1, 2, 3]);
        let packet = Packet::parse(&bytes).unwrap();
        assert_eq!((packet.protocol, packet.start), (TCP, 56));
    }

    #[test]
    fn a_routing_header_with_segments_left_is_dropped() {
        let bytes = v6(43, &[TCP, 0, 0, 1, 0, 0, 0, 0]);
        assert_eq!(Packet::parse(&bytes).unwrap_err(), Malformed::Options);
    }

    #[test]
    fn an_atomic_fragment_is_a_whole_packet() {
        let bytes = v6(44, &[UDP, 0, 0, 0, 0, 0, 0, 9, 1, 2, 3, 4, 0, 8, 0, 0]);
        let packet = Packet::parse(&bytes).unwrap();
        assert_eq!((packet.protocol, packet.start, packet.fragment), (UDP, 48, None));
    }

    #[test]
    fn sources_that_no_host_has_are_martians() {
        for source in ["127.0.0.1", "224.0.0.1", "0.0.0.0", "255.255.255.255"] {
            let mut packet = vec![0; 28];
            write_header(&mut packet, source.parse().unwrap(), "192.0.2.1".parse().unwrap(), UDP, 0);
            assert_eq!(Packet::parse(&packet).unwrap_err(), Malformed::Martian, "{source}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), version in prop_oneof![Just(0x45u8), Just(0x60), any::<u8>()]) {
            let mut bytes = bytes;
            if let Some(first) = bytes.first_mut() { *first = version; }
            if let Ok(packet) = Packet::parse(&bytes) {
                prop_assert!(packet.start <= packet.bytes.len());
            }
        }
    }
}
