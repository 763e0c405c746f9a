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
    if !transmit.ready() || payload.len() > 65_507 {
        return false;
    }
    let header = if to.is_ipv6() { 40 } else { 20 };
    let total = header + 8 + payload.len();
    if to.is_ipv6() && total > link.mtu {
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
    // At most 65 515, checked by the caller.
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
    let mut whole = vec![0; 40 + 8 + payload.len()];
    ip::write_header(&mut whole, from.ip(), to.ip(), ip::UDP, 0);
    write_udp(&mut whole[40..], from.port(), to.port(), payload);
    let sum = super::checksum::transport(&whole, 40, ip::UDP);
    whole[46..48].copy_from_slice(&nonzero(sum).to_be_bytes());
    let piece = (mtu.max(1280) - 48) / 8 * 8;
    let body = &whole[40..];
    let mut offset = 0;
    for part in body.chunks(piece) {
        if !transmit.ready() {
            return false;
        }
        let more = offset + part.len() < body.len();
        transmit.transmit(48 + part.len(), None, &mut |packet| {
            ip::write_header(packet, from.ip(), to.ip(), 44, 0);
            packet[40] = ip::UDP;
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
