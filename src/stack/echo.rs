//! Echo requests that are somebody else's to answer: reading them, and writing what came back (RFC 792, RFC 4443).

use std::net::IpAddr;

use super::datagram::{Link, longest, write_pieces};
use super::frame::Transmit;
use super::icmp;
use super::ip::{self, Packet};

/// Type numbers of request and reply, IPv4 and IPv6.
const REQUEST: [u8; 2] = [8, 128];
const REPLY: [u8; 2] = [0, 129];

/// An echo request from a client.
#[derive(Debug, Clone, Copy)]
pub struct Echo<'a> {
    /// The client.
    pub source: IpAddr,
    /// Whom it asks.
    pub destination: IpAddr,
    /// The client's id for the program that asks.
    pub id: u16,
    /// The number of the request.
    pub sequence: u16,
    /// What the reply has to repeat.
    pub payload: &'a [u8],
    /// Time to live, or hop limit, as it came: at least 2.
    pub ttl: u8,
    /// Type of service, or traffic class.
    pub tos: u8,
    /// Routers must not cut it.
    pub dont_fragment: bool,
    /// The packet up to where the payload begins.
    pub head: &'a [u8],
    /// The whole packet.
    pub packet: &'a [u8],
}

/// A reply to a client.
#[derive(Debug, Clone, Copy)]
pub struct EchoReply<'a> {
    /// The client's id.
    pub id: u16,
    /// The number of the request.
    pub sequence: u16,
    /// What the request held.
    pub payload: &'a [u8],
    /// Time to live, or hop limit.
    pub ttl: u8,
    /// Type of service, or traffic class.
    pub tos: u8,
}

/// An ICMP error about a request of a client, by the numbers of the client's family.
#[derive(Debug, Clone, Copy)]
pub struct EchoError<'a> {
    /// The type.
    pub kind: u8,
    /// The code.
    pub code: u8,
    /// What follows the checksum.
    pub word: u32,
    /// The beginning of the client's packet, up to the payload.
    pub head: &'a [u8],
    /// The packet's time to live when the error was made, if it is known.
    pub ttl: Option<u8>,
    /// As much of the payload as is quoted.
    pub payload: &'a [u8],
}

/// Reads an echo request of a length that can be answered; None: it is none.
pub(super) fn read<'a>(packet: &Packet<'a>) -> Option<Echo<'a>> {
    if !icmp::is_echo_request(packet) {
        return None;
    }
    let message = packet.payload();
    let payload = message.get(8..).filter(|payload| payload.len() <= longest(packet.source.is_ipv6()))?;
    let word = |at: usize| u16::from_be_bytes([message[at], message[at + 1]]);
    let bytes = packet.bytes;
    let (ttl, tos) =
        if packet.source.is_ipv6() { (bytes[7], bytes[0] << 4 | bytes[1] >> 4) } else { (bytes[8], bytes[1]) };
    Some(Echo {
        source: packet.source,
        destination: packet.destination,
        id: word(4),
        sequence: word(6),
        payload,
        ttl,
        tos,
        dont_fragment: packet.dont_fragment,
        head: &bytes[..packet.start + 8],
        packet: bytes,
    })
}

/// Writes a reply from one host to the other. False: the device was full, or the payload is too long, and it was
/// dropped.
pub(super) fn write_reply(
    (from, to): (IpAddr, IpAddr),
    reply: &EchoReply<'_>,
    link: Link,
    id: u32,
    transmit: &mut dyn Transmit,
) -> bool {
    if !transmit.ready() || reply.payload.len() > longest(to.is_ipv6()) {
        return false;
    }
    let header = if to.is_ipv6() { 40 } else { 20 };
    let total = header + 8 + reply.payload.len();
    if total > link.mtu && (to.is_ipv6() || !transmit.takes_any_length()) {
        let mut whole = vec![0; total];
        fill(&mut whole, (from, to), reply, id);
        return write_pieces(&whole, link.mtu, id, transmit);
    }
    transmit.transmit(total, None, &mut |packet| fill(packet, (from, to), reply, id));
    true
}

fn fill(packet: &mut [u8], (from, to): (IpAddr, IpAddr), reply: &EchoReply<'_>, id: u32) {
    let v6 = to.is_ipv6();
    let protocol = if v6 { ip::ICMPV6 } else { ip::ICMP };
    let start = ip::write_header(packet, from, to, protocol, (id & 0xffff) as u16);
    if v6 {
        packet[0] |= reply.tos >> 4;
        packet[1] = reply.tos << 4;
        packet[7] = reply.ttl;
    } else {
        (packet[1], packet[8]) = (reply.tos, reply.ttl);
        ip::seal_header(&mut packet[..20]);
    }
    let message = &mut packet[start..];
    message[0] = REPLY[usize::from(v6)];
    message[1..4].fill(0);
    message[4..6].copy_from_slice(&reply.id.to_be_bytes());
    message[6..8].copy_from_slice(&reply.sequence.to_be_bytes());
    message[8..].copy_from_slice(reply.payload);
    let sum = if v6 { super::checksum::transport(packet, start, protocol) } else { super::checksum::of(message) };
    packet[start + 2..start + 4].copy_from_slice(&sum.to_be_bytes());
}

/// Writes an error from a router to a client. It quotes the client's own packet, as that was when it left the client but
/// for the time to live.
pub(super) fn write_error((from, to): (IpAddr, IpAddr), error: &EchoError<'_>, transmit: &mut dyn Transmit) {
    let mut head = error.head.to_vec();
    let v6 = to.is_ipv6();
    if let (Some(ttl), Some(place)) = (error.ttl, head.get_mut(if v6 { 7 } else { 8 })) {
        *place = ttl;
    }
    let header = head.first().map_or(0, |first| usize::from(first & 15) * 4);
    if let Some(header) = head.get_mut(..header).filter(|header| !v6 && header.len() >= 20) {
        ip::seal_header(header);
    }
    icmp::say((from, to), (error.kind, error.code, error.word), &[&head, error.payload], transmit);
}

/// Whether `message` is an echo request, by its type.
pub(super) fn is_request(kind: u8, v6: bool) -> bool {
    kind == REQUEST[usize::from(v6)]
}
