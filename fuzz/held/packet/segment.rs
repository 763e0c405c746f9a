//! Packets made from few bytes: what a fuzzer would hardly find, right headers and sums, and numbers near the window.

use super::bytes::Bytes;
use super::device::{Said, pseudo, sum};

/// Clients and servers. The last client is the host itself.
pub(crate) const CLIENTS: [[u8; 4]; 3] = [[10, 0, 0, 5], [10, 0, 0, 6], [198, 18, 0, 1]];
pub(crate) const SERVERS: [[u8; 4]; 3] = [[203, 0, 113, 7], [198, 18, 0, 2], [198, 18, 3, 4]];

/// Addresses of IPv6 with the same last bytes.
pub(crate) fn v6(four: [u8; 4]) -> [u8; 16] {
    let mut address = [0; 16];
    address[..2].copy_from_slice(if four[0] == 198 { &[0xfd, 0] } else { &[0x20, 1] });
    address[12..].copy_from_slice(&four);
    address
}

/// An IP packet around `body`, whose checksum stands at `sum_at` in it.
fn packet(six: bool, client: u8, server: u8, protocol: u8, mut body: Vec<u8>, sum_at: usize) -> Vec<u8> {
    let (from, to) = (CLIENTS[usize::from(client) % 3], SERVERS[usize::from(server) % 3]);
    let length = body.len() as u16;
    let mut bytes = if six {
        let mut header = vec![0x60, 0, 0, 0];
        header.extend(length.to_be_bytes());
        header.extend([protocol, 64]);
        header.extend(v6(from));
        header.extend(v6(to));
        header
    } else {
        let mut header = vec![0x45, 0];
        header.extend((length + 20).to_be_bytes());
        header.extend([0, 7, 0x40, 0, 64, protocol, 0, 0]);
        header.extend(from);
        header.extend(to);
        header
    };
    if !six {
        let header = !sum(&bytes, 0);
        bytes[10..12].copy_from_slice(&header.to_be_bytes());
    }
    let start = if protocol == 1 { 0 } else { pseudo(&bytes, six, protocol, body.len()) };
    let check = !sum(&body, start);
    body[sum_at..sum_at + 2].copy_from_slice(&check.to_be_bytes());
    bytes.extend(body);
    bytes
}

/// A TCP segment, to a flow that `said` something if there is one.
pub(crate) fn tcp(bytes: &mut Bytes<'_>, said: &[Said]) -> Vec<u8> {
    let kind = bytes.byte();
    let (six, follow) = (kind & 1 != 0, kind & 2 != 0);
    let (client, server) = (kind >> 2 & 3, kind >> 4 & 3);
    let flags = bytes.byte();
    let known = said.get(usize::from(kind >> 6) % said.len().max(1)).filter(|_| follow);
    let near = |bytes: &mut Bytes<'_>| match bytes.byte() {
        offset @ 0..=0x7f => u32::from(offset),
        0x80..=0xbf => u32::from(bytes.word()).wrapping_neg(),
        0xc0..=0xef => u32::from(bytes.word()) << 5,
        _ => u32::from(bytes.word()) << 16 | u32::from(bytes.word()),
    };
    let (sequence, acknowledgement) = match known {
        Some(said) => (said.acknowledged.wrapping_add(near(bytes)), said.next.wrapping_add(near(bytes))),
        None => (near(bytes), near(bytes)),
    };
    let ports = known.map_or((1000 + u16::from(bytes.byte() & 7), 80), |said| (said.client_port, said.server_port));
    let window = bytes.word();
    let options = bytes.take(usize::from(kind >> 7) * 8).to_vec();
    let options = [options.clone(), vec![1; options.len().next_multiple_of(4) - options.len()]].concat();
    let length = usize::from(bytes.word()) % 4096;
    let mut body = Vec::new();
    body.extend(ports.0.to_be_bytes());
    body.extend(ports.1.to_be_bytes());
    body.extend(sequence.to_be_bytes());
    body.extend(acknowledgement.to_be_bytes());
    body.extend([((5 + options.len() / 4) as u8) << 4, flags]);
    body.extend(window.to_be_bytes());
    body.extend([0; 4]);
    body.extend(options);
    body.resize(body.len() + length, kind);
    packet(six, client, server, 6, body, 16)
}

/// A UDP datagram, an echo request or an ICMP error.
pub(crate) fn other(bytes: &mut Bytes<'_>, last: &[u8]) -> Vec<u8> {
    let kind = bytes.byte();
    let six = kind & 1 != 0;
    let (client, server) = (kind >> 2 & 3, kind >> 4 & 3);
    let length = usize::from(bytes.byte());
    let payload = bytes.take(length).to_vec();
    if kind & 2 != 0 {
        let length = payload.len() as u16 + 8;
        let mut body = 4000_u16.to_be_bytes().to_vec();
        body.extend(53_u16.to_be_bytes());
        body.extend(length.to_be_bytes());
        body.extend([0; 2]);
        body.extend(payload);
        return packet(six, client, server, 17, body, 6);
    }
    let (types, protocol) = if six { ([128, 2], 58) } else { ([8, 3], 1) };
    let error = kind & 0x80 != 0;
    let mut body = vec![types[usize::from(error)], if error && !six { 4 } else { 0 }, 0, 0];
    body.extend(u32::from(bytes.word()).to_be_bytes());
    body.extend(if error { last } else { &payload });
    packet(six, client, server, protocol, body, 2)
}

/// Makes the lengths and sums of the headers right, where there is enough of a packet.
pub(crate) fn repaired(mut packet: Vec<u8>) -> Vec<u8> {
    match packet.first().map(|byte| byte >> 4) {
        Some(4) if packet.len() >= 20 => {
            let start = (usize::from(packet[0] & 15) * 4).clamp(20, packet.len());
            let total = packet.len() as u16;
            packet[2..4].copy_from_slice(&total.to_be_bytes());
            packet[10..12].fill(0);
            let check = !sum(&packet[..start], 0);
            packet[10..12].copy_from_slice(&check.to_be_bytes());
        }
        Some(6) if packet.len() >= 40 => {
            let length = (packet.len() - 40) as u16;
            packet[4..6].copy_from_slice(&length.to_be_bytes());
        }
        _ => {}
    }
    packet
}
