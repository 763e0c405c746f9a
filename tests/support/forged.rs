//! Packets made by hand, for what no kernel sends.

use std::net::Ipv4Addr;

use super::packet::protocol;
use super::{Netns, Topology};

/// Frames from the LAN client to the host's device, one for each packet.
///
/// # Panics
/// In a topology without a LAN.
pub(crate) fn frames(lab: &Topology, packets: impl IntoIterator<Item = Vec<u8>>) -> Vec<Vec<u8>> {
    let mac = |ns: &Netns, device: &str| -> Vec<u8> {
        let shown = ns.ip(&format!("-o link show {device}"));
        let (_, behind) = shown.split_once("link/ether ").expect("an Ethernet device");
        behind[..17].split(':').map(|byte| u8::from_str_radix(byte, 16).expect("a byte")).collect()
    };
    let header = [mac(&lab.host, "lan0"), mac(lab.client(), "eth0"), vec![8, 0]].concat();
    packets.into_iter().map(|packet| [&header[..], &packet].concat()).collect()
}

/// An IPv4 packet, whole and right; the checksum of TCP is filled in.
///
/// # Panics
/// If the payload is too long.
pub(crate) fn ipv4(from: Ipv4Addr, to: Ipv4Addr, kind: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = header(from, to, kind, 0, 0x4000, payload.len());
    packet.extend_from_slice(payload);
    if kind == protocol::TCP {
        let sum = transport_checksum(from, to, kind, payload).to_be_bytes();
        packet[36..38].copy_from_slice(&sum);
    }
    packet
}

/// A UDP datagram with its checksum, without the IP header.
///
/// # Panics
/// If the payload is too long.
pub(crate) fn udp(from: Ipv4Addr, to: Ipv4Addr, source: u16, destination: u16, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(8 + payload.len()).expect("a datagram's length");
    let header = [source.to_be_bytes(), destination.to_be_bytes(), length.to_be_bytes(), [0, 0]].concat();
    let mut datagram = [&header[..], payload].concat();
    let sum = transport_checksum(from, to, protocol::UDP, &datagram).to_be_bytes();
    datagram[6..8].copy_from_slice(&sum);
    datagram
}

/// The piece of a UDP datagram from `start` to `end`; all but the last are multiples of eight bytes.
///
/// # Panics
/// If there is no such piece.
pub(crate) fn fragment(from: Ipv4Addr, to: Ipv4Addr, id: u16, whole: &[u8], start: usize, end: usize) -> Vec<u8> {
    let more = if end < whole.len() { 0x2000 } else { 0 };
    let place = more | u16::try_from(start / 8).expect("an offset");
    let mut packet = header(from, to, protocol::UDP, id, place, end - start);
    packet.extend_from_slice(&whole[start..end]);
    packet
}

fn header(from: Ipv4Addr, to: Ipv4Addr, kind: u8, id: u16, place: u16, payload: usize) -> Vec<u8> {
    let length = u16::try_from(20 + payload).expect("a packet's length");
    let mut header = vec![0x45, 0];
    for word in [length, id, place] {
        header.extend_from_slice(&word.to_be_bytes());
    }
    header.extend_from_slice(&[64, kind, 0, 0]);
    header.extend_from_slice(&from.octets());
    header.extend_from_slice(&to.octets());
    let sum = checksum(&header).to_be_bytes();
    header[10..12].copy_from_slice(&sum);
    header
}

fn transport_checksum(from: Ipv4Addr, to: Ipv4Addr, kind: u8, payload: &[u8]) -> u16 {
    let length = u16::try_from(payload.len()).expect("a packet's length").to_be_bytes();
    checksum(&[&from.octets()[..], &to.octets(), &[0, kind], &length, payload].concat())
}

/// RFC 1071.
fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0)));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap_or_default()
}
