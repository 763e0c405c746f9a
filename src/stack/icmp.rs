//! ICMP and ICMPv6: errors about packets that cannot go on, and echo replies for addresses that are ours.

use std::net::{IpAddr, SocketAddr};
use std::time::Instant;

use super::Tuple;
use super::allowance::Allowance;
use super::echo;
use super::frame::Transmit;
use super::ip::{self, Packet};

/// Code 0 of type 11 (RFC 792) and of type 3 (RFC 4443): the time to live is over.
const EXPIRED: [u8; 2] = [11, 3];

/// An ICMP error, in the terms that IPv4 and IPv6 share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unreachable {
    /// No route to the network: 3/0 (RFC 792), 1/0 (RFC 4443).
    Network,
    /// No such host: 3/1, 1/3.
    Host,
    /// Nobody listens on the port: 3/3, 1/4.
    Port,
    /// Nobody speaks the protocol: 3/2, and in IPv6 a parameter problem (4/1, RFC 4443 section 3.4) that points to the byte
    /// which names it.
    Protocol,
    /// A policy forbids it: 3/13 (RFC 1812), 1/1.
    Prohibited,
    /// Too large for a link with this MTU in bytes: 3/4 (RFC 1191), 2/0.
    TooBig(u32),
    /// Another code of type 3, and in IPv6 what RFC 7915 section 4.2 makes of it.
    Coded(u8),
}

impl Unreachable {
    /// Type, code and the second word of the header, to whoever sent `quoted`.
    fn fields(self, quoted: &[u8]) -> (u8, u8, u32) {
        match (self, quoted[0] >> 4 == 6) {
            (Self::Network, false) => (3, 0, 0),
            (Self::Host, false) => (3, 1, 0),
            (Self::Protocol, false) => (3, 2, 0),
            (Self::Port, false) => (3, 3, 0),
            (Self::Prohibited, false) => (3, 13, 0),
            (Self::TooBig(mtu), false) => (3, 4, mtu.min(0xffff)),
            (Self::Coded(code), false) => (3, code, 0),
            (Self::Network, true) => (1, 0, 0),
            (Self::Host, true) => (1, 3, 0),
            (Self::Protocol, true) => (4, 1, named_at(quoted)),
            (Self::Port, true) => (1, 4, 0),
            (Self::Prohibited | Self::Coded(9 | 10 | 14 | 15), true) => (1, 1, 0),
            (Self::Coded(_), true) => (1, 0, 0),
            (Self::TooBig(mtu), true) => (2, 0, mtu),
        }
    }
}

/// Where the byte stands that names the protocol of an IPv6 packet, of which this may be the beginning.
fn named_at(quoted: &[u8]) -> u32 {
    ip::walk_extensions(quoted).ok().and_then(|walk| u32::try_from(walk.named_at).ok()).unwrap_or_default()
}

/// Tells the sender of `quoted` (an IP packet, or its first bytes) that it cannot reach its destination. The error
/// claims to come from that destination. Nothing is said about packets that must not be answered (RFC 1122 3.2.2,
/// RFC 4443 2.4 e): errors, fragments beyond the first, and what names no single host. False: it was one of these, or the
/// device is full.
pub(super) fn unreachable(quoted: &[u8], why: Unreachable, transmit: &mut dyn Transmit) -> bool {
    let Some((source, destination)) = addresses(quoted) else { return false };
    if ip::is_not_unicast(destination) || ip::is_not_unicast(source) || !may_be_answered(quoted) {
        return false;
    }
    let (kind, code, word) = why.fields(quoted);
    say((destination, source), (kind, code, word), &[quoted], transmit)
}

/// Tells the sender of a packet whose protocol nobody here speaks that it went nowhere: a tunnel's or SCTP's then fails at
/// once and not after minutes. False: it carries a message of ICMP, or nothing, and must not be answered; or there were
/// too many of them.
pub(super) fn unknown_protocol(
    packet: &Packet<'_>,
    errors: &mut Allowance,
    now: Instant,
    transmit: &mut dyn Transmit,
) -> bool {
    let known = [ip::ICMP, ip::ICMPV6, ip::NOTHING].contains(&packet.protocol);
    let may = !known && may_be_answered(packet.bytes) && errors.take(now);
    may && unreachable(packet.bytes, Unreachable::Protocol, transmit)
}

/// Tells the sender of `quoted` that the packet's time was over at `hop`. False: the packet must not be answered, or the
/// device is full.
pub(super) fn time_exceeded(hop: IpAddr, quoted: &[u8], transmit: &mut dyn Transmit) -> bool {
    let Some((source, _)) = addresses(quoted).filter(|_| may_be_answered(quoted)) else { return false };
    say((hop, source), (EXPIRED[usize::from(source.is_ipv6())], 0, 0), &[quoted], transmit)
}

/// An error from the first of two hosts to the other. The packet that it quotes may stand in several places. False: the
/// device is full.
pub(super) fn say(
    (from, to): (IpAddr, IpAddr),
    (kind, code, word): (u8, u8, u32),
    quoted: &[&[u8]],
    transmit: &mut dyn Transmit,
) -> bool {
    let v6 = to.is_ipv6();
    // IPv4: as much as fits into 576 bytes (RFC 1812 4.3.2.3); IPv6: into the minimum MTU (RFC 4443 2.4 c).
    let most = if v6 { 1280 - 48 } else { 576 - 28 };
    let total = quoted.iter().map(|part| part.len()).sum::<usize>().min(most);
    emit(from, to, total, transmit, &mut |body| {
        body[0] = kind;
        body[1] = code;
        body[4..8].copy_from_slice(&word.to_be_bytes());
        let bytes = quoted.iter().copied().flatten();
        body[8..].iter_mut().zip(bytes).for_each(|(to, byte)| *to = *byte);
    })
}

/// What a router says of a TCP segment of ours: its next link carries no packet of that size (RFC 1191, RFC 8201).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TooBig {
    /// The flow, seen from its client.
    pub(super) tuple: Tuple,
    /// Where the segment began.
    pub(super) sequence: u32,
    /// The link's MTU in bytes; 0 if the router does not know.
    pub(super) mtu: u32,
}

impl TooBig {
    /// Reads the message; None if it is another, or speaks of something else than TCP.
    pub(super) fn read(packet: &Packet<'_>) -> Option<Self> {
        let body = packet.payload();
        let (head, quoted) = body.split_at_checked(8)?;
        let word = u32::from_be_bytes([head[4], head[5], head[6], head[7]]);
        let (mtu, start, protocol) = match (packet.protocol, head[0], head[1]) {
            (ip::ICMP, 3, 4) if quoted.len() >= 20 && quoted[0] >> 4 == 4 && is_first(quoted) => {
                (word & 0xffff, usize::from(quoted[0] & 15) * 4, quoted[9])
            }
            // What we send has no extension headers.
            (ip::ICMPV6, 2, _) if quoted.len() >= 40 && quoted[0] >> 4 == 6 => (word, 40, quoted[6]),
            _ => return None,
        };
        let segment = quoted.get(start..start + 8).filter(|_| protocol == ip::TCP)?;
        let port = |at: usize| u16::from_be_bytes([segment[at], segment[at + 1]]);
        let (source, destination) = addresses(quoted)?;
        Some(Self {
            tuple: Tuple { client: SocketAddr::new(destination, port(2)), server: SocketAddr::new(source, port(0)) },
            sequence: u32::from_be_bytes([segment[4], segment[5], segment[6], segment[7]]),
            mtu,
        })
    }
}

/// Whether what begins with `quoted`, an IPv4 header, is whole or a first fragment.
fn is_first(quoted: &[u8]) -> bool {
    quoted[6] & 0x1f == 0 && quoted[7] == 0
}

/// Answers an echo request.
pub(super) fn echo_reply(request: &Packet<'_>, transmit: &mut dyn Transmit) {
    let echo = request.payload();
    emit(request.destination, request.source, echo.len() - 8, transmit, &mut |body| {
        body.copy_from_slice(echo);
        body[0] = if request.source.is_ipv6() { 129 } else { 0 };
        body[2..4].fill(0);
    });
}

/// Whether `packet` is an echo request, of a length that can be answered.
pub(super) fn is_echo_request(packet: &Packet<'_>) -> bool {
    let v6 = packet.source.is_ipv6();
    let protocol = if v6 { ip::ICMPV6 } else { ip::ICMP };
    packet.protocol == protocol && packet.payload().len() >= 8 && echo::is_request(packet.payload()[0], v6)
}

/// Whether the message's checksum is right.
pub(super) fn checksum_holds(packet: &Packet<'_>) -> bool {
    if packet.source.is_ipv6() {
        super::checksum::transport(packet.bytes, packet.start, ip::ICMPV6) == 0
    } else {
        super::checksum::of(packet.payload()) == 0
    }
}

fn emit(
    source: IpAddr,
    destination: IpAddr,
    rest: usize,
    transmit: &mut dyn Transmit,
    write: &mut dyn FnMut(&mut [u8]),
) -> bool {
    if !transmit.ready() {
        return false;
    }
    let v6 = source.is_ipv6();
    let (header, protocol) = if v6 { (40, ip::ICMPV6) } else { (20, ip::ICMP) };
    transmit.transmit(header + 8 + rest, None, &mut |packet| {
        ip::write_header(packet, source, destination, protocol, 0);
        packet[header..header + 8].fill(0);
        write(&mut packet[header..]);
        let sum = if v6 {
            super::checksum::transport(packet, header, protocol)
        } else {
            super::checksum::of(&packet[header..])
        };
        packet[header + 2..header + 4].copy_from_slice(&sum.to_be_bytes());
    });
    true
}

/// Source and destination of what may be only the beginning of a packet.
fn addresses(quoted: &[u8]) -> Option<(IpAddr, IpAddr)> {
    match quoted.first()? >> 4 {
        4 => {
            let octets = |at: usize| Some(IpAddr::from(<[u8; 4]>::try_from(quoted.get(at..at + 4)?).ok()?));
            Some((octets(12)?, octets(16)?))
        }
        6 => {
            let octets = |at: usize| Some(IpAddr::from(<[u8; 16]>::try_from(quoted.get(at..at + 16)?).ok()?));
            Some((octets(8)?, octets(24)?))
        }
        _ => None,
    }
}

/// Whether an error may speak of a packet that begins with `quoted`: neither an ICMP error, nor a fragment other than
/// the first, nor a chain of extension headers that ends nowhere.
fn may_be_answered(quoted: &[u8]) -> bool {
    let kind = |at: usize| quoted.get(at).copied().unwrap_or(0);
    if quoted[0] >> 4 == 6 {
        let Ok(ip::Walk { protocol, start, fragment, .. }) = ip::walk_extensions(quoted) else { return false };
        let first = fragment.is_none_or(|fragment| fragment.offset == 0);
        return first && (protocol != ip::ICMPV6 || kind(start) >= 128);
    }
    let first = kind(6) & 0x1f == 0 && kind(7) == 0;
    let request = matches!(kind(usize::from(quoted[0] & 15) * 4), 0 | 8);
    first && (quoted[9] != ip::ICMP || request)
}
