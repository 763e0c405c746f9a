//! Packets by hand, read and written without the code under test.

use std::net::{IpAddr, SocketAddr};

pub(crate) const FIN: u8 = 1;
pub(crate) const SYN: u8 = 2;
pub(crate) const RST: u8 = 4;
pub(crate) const PSH: u8 = 8;
pub(crate) const ACK: u8 = 16;

pub(crate) const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;

/// The ones' complement of the ones' complement sum (RFC 1071), byte pair by byte pair.
pub(crate) fn sum(bytes: &[u8]) -> u16 {
    let mut sum = 0u32;
    for pair in bytes.chunks(2) {
        sum += u32::from(pair[0]) << 8 | pair.get(1).copied().map_or(0, u32::from);
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// Where the transport header begins; no extension headers here.
pub(crate) fn header_length(packet: &[u8]) -> usize {
    if packet[0] >> 4 == 6 { 40 } else { usize::from(packet[0] & 15) * 4 }
}

pub(crate) fn protocol(packet: &[u8]) -> u8 {
    if packet[0] >> 4 == 6 { packet[6] } else { packet[9] }
}

pub(crate) fn source(packet: &[u8]) -> IpAddr {
    if packet[0] >> 4 == 6 { address(&packet[8..24]) } else { address(&packet[12..16]) }
}

pub(crate) fn destination(packet: &[u8]) -> IpAddr {
    if packet[0] >> 4 == 6 { address(&packet[24..40]) } else { address(&packet[16..20]) }
}

/// The window of a TCP segment as it stands there.
pub(crate) fn window(packet: &[u8]) -> u16 {
    let start = header_length(packet);
    u16::from_be_bytes([packet[start + 14], packet[start + 15]])
}

/// The blocks of a TCP segment's SACK option.
pub(crate) fn blocks(packet: &[u8]) -> Vec<(u32, u32)> {
    let start = header_length(packet);
    let options = &packet[start + 20..start + usize::from(packet[start + 12] >> 4) * 4];
    let mut at = 0;
    while at < options.len() && options[at] != 0 {
        let length = if options[at] == 1 { 1 } else { usize::from(options[at + 1]) };
        if options[at] == 5 {
            let word = |bytes: &[u8]| u32::from_be_bytes(bytes.try_into().unwrap());
            let blocks = options[at + 2..at + length].chunks(8);
            return blocks.map(|block| (word(&block[..4]), word(&block[4..]))).collect();
        }
        at += length;
    }
    Vec::new()
}

fn address(bytes: &[u8]) -> IpAddr {
    match <[u8; 4]>::try_from(bytes) {
        Ok(four) => four.into(),
        Err(_) => <[u8; 16]>::try_from(bytes).unwrap().into(),
    }
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

/// The checksum of the transport header at `start` with its pseudo-header: zero if the field is right.
pub(crate) fn transport_checksum(packet: &[u8], start: usize) -> u16 {
    let mut bytes = octets(source(packet));
    bytes.extend(octets(destination(packet)));
    bytes.extend([0, protocol(packet)]);
    bytes.extend(((packet.len() - start) as u16).to_be_bytes());
    bytes.extend(&packet[start..]);
    sum(&bytes)
}

/// Writes the length field of the IP header, and its checksum.
pub(crate) fn set_length(packet: &mut [u8], total: usize) {
    if packet[0] >> 4 == 6 {
        packet[4..6].copy_from_slice(&((total - 40) as u16).to_be_bytes());
    } else {
        packet[2..4].copy_from_slice(&(total as u16).to_be_bytes());
        seal_v4(packet);
    }
}

/// Makes the checksum of an IPv4 header right.
pub(crate) fn seal_v4(packet: &mut [u8]) {
    let header = usize::from(packet[0] & 15) * 4;
    packet[10..12].fill(0);
    let sum = sum(&packet[..header.min(packet.len())]);
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
}

/// An IP packet around `body`.
pub(crate) fn ip(from: IpAddr, to: IpAddr, protocol: u8, body: &[u8]) -> Vec<u8> {
    let mut packet = if from.is_ipv6() {
        [&[0x60, 0, 0, 0, 0, 0, protocol, 64][..], &octets(from), &octets(to)].concat()
    } else {
        [&[0x45, 0, 0, 0, 0x12, 0x34, 0, 0, 64, protocol, 0, 0][..], &octets(from), &octets(to)].concat()
    };
    packet.extend_from_slice(body);
    let total = packet.len();
    set_length(&mut packet, total);
    packet
}

/// Makes the transport checksum right.
pub(crate) fn seal(packet: &mut [u8]) {
    let start = header_length(packet);
    let at = start
        + match protocol(packet) {
            TCP => 16,
            UDP => 6,
            58 | 1 => 2,
            _ => return,
        };
    if packet.len() < at + 2 {
        return;
    }
    packet[at..at + 2].fill(0);
    let sum = if protocol(packet) == 1 { sum(&packet[start..]) } else { transport_checksum(packet, start) };
    packet[at..at + 2].copy_from_slice(&sum.to_be_bytes());
}

/// The fields of a TCP segment.
#[derive(Debug, Clone)]
pub(crate) struct Tcp {
    pub(crate) from: SocketAddr,
    pub(crate) to: SocketAddr,
    pub(crate) flags: u8,
    pub(crate) sequence: u32,
    pub(crate) acknowledgement: u32,
    pub(crate) window: u16,
    pub(crate) options: Vec<u8>,
    pub(crate) payload: Vec<u8>,
}

impl Tcp {
    pub(crate) fn new(from: SocketAddr, to: SocketAddr, flags: u8) -> Self {
        Self {
            from,
            to,
            flags,
            sequence: 0,
            acknowledgement: 0,
            window: 65_535,
            options: Vec::new(),
            payload: Vec::new(),
        }
    }

    pub(crate) fn packet(&self) -> Vec<u8> {
        let mut body = [self.from.port().to_be_bytes(), self.to.port().to_be_bytes()].concat();
        body.extend(self.sequence.to_be_bytes());
        body.extend(self.acknowledgement.to_be_bytes());
        let mut options = self.options.clone();
        options.resize(options.len().next_multiple_of(4), 0);
        body.extend([(((20 + options.len()) / 4) << 4) as u8, self.flags]);
        body.extend(self.window.to_be_bytes());
        body.extend([0; 4]);
        body.extend(options);
        body.extend(&self.payload);
        let mut packet = ip(self.from.ip(), self.to.ip(), TCP, &body);
        seal(&mut packet);
        packet
    }
}

/// A whole UDP datagram.
pub(crate) fn udp(from: SocketAddr, to: SocketAddr, payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() + 8) as u16;
    let mut body = [from.port(), to.port(), length, 0].map(u16::to_be_bytes).concat();
    body.extend_from_slice(payload);
    let mut packet = ip(from.ip(), to.ip(), UDP, &body);
    seal(&mut packet);
    packet
}

/// A packet that crossed the link, read.
#[derive(Debug, Clone)]
pub(crate) struct Seen {
    pub(crate) to_client: bool,
    pub(crate) from: SocketAddr,
    pub(crate) to: SocketAddr,
    pub(crate) protocol: u8,
    pub(crate) flags: u8,
    pub(crate) sequence: u32,
    pub(crate) acknowledgement: u32,
    pub(crate) payload: Vec<u8>,
    /// The packet from its IP header on.
    pub(crate) bytes: Vec<u8>,
}

impl Seen {
    pub(crate) fn read(bytes: &[u8], to_client: bool) -> Self {
        let start = header_length(bytes);
        let protocol = protocol(bytes);
        let body = &bytes[start..];
        let word = |at: usize| body.get(at..at + 2).map_or(0, |word| u16::from_be_bytes([word[0], word[1]]));
        let long = |at: usize| u32::from(word(at)) << 16 | u32::from(word(at + 2));
        let ports = protocol == TCP || protocol == UDP;
        let tcp = protocol == TCP;
        let header = if tcp { usize::from(body[12] >> 4) * 4 } else { 8 };
        Self {
            to_client,
            from: SocketAddr::new(source(bytes), if ports { word(0) } else { 0 }),
            to: SocketAddr::new(destination(bytes), if ports { word(2) } else { 0 }),
            protocol,
            flags: if tcp { body[13] } else { 0 },
            sequence: if tcp { long(4) } else { 0 },
            acknowledgement: if tcp { long(8) } else { 0 },
            payload: body.get(header..).unwrap_or_default().to_vec(),
            bytes: bytes.to_vec(),
        }
    }

    pub(crate) fn is(&self, flags: u8) -> bool {
        self.protocol == TCP && self.flags & (FIN | SYN | RST | ACK) == flags
    }

    /// The ICMP message's type and code.
    pub(crate) fn icmp(&self) -> Option<(u8, u8)> {
        let start = header_length(&self.bytes);
        matches!(self.protocol, 1 | 58).then(|| (self.bytes[start], self.bytes[start + 1]))
    }
}

/// An echo request.
pub(crate) fn echo(from: IpAddr, to: IpAddr, sequence: u16, payload: &[u8]) -> Vec<u8> {
    let (kind, protocol) = if from.is_ipv6() { (128, 58) } else { (8, 1) };
    let mut body = vec![kind, 0, 0, 0, 0xbe, 0xef];
    body.extend(sequence.to_be_bytes());
    body.extend_from_slice(payload);
    let mut packet = ip(from, to, protocol, &body);
    seal(&mut packet);
    packet
}

/// The message of a router whose next link carries `mtu` bytes, about a packet that begins with `quoted`.
pub(crate) fn too_big(quoted: &[u8], mtu: u16) -> Vec<u8> {
    let v6 = quoted[0] >> 4 == 6;
    let router = if v6 { "2001:db8:1::ff" } else { "192.0.2.254" }.parse().unwrap();
    let mut body = if v6 { vec![2, 0, 0, 0, 0, 0] } else { vec![3, 4, 0, 0, 0, 0] };
    body.extend(mtu.to_be_bytes());
    // As little as a router may quote.
    body.extend(&quoted[..header_length(quoted) + 8]);
    let mut message = ip(router, source(quoted), if v6 { 58 } else { 1 }, &body);
    seal(&mut message);
    message
}
