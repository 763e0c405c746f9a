//! Frames that no program of a host would send: a neighbour's, made by hand.

use std::net::{Ipv4Addr, Ipv6Addr};

use super::Netns;

/// A hardware address.
pub(crate) type Mac = [u8; 6];

/// The hardware address of `device`.
///
/// # Panics
/// If there is no such device.
pub(crate) fn mac(ns: &Netns, device: &str) -> Mac {
    let listed = ns.ip(&format!("-o link show dev {device}"));
    let text = listed.split_whitespace().skip_while(|word| *word != "link/ether").nth(1).expect("an Ethernet device");
    let octets: Vec<u8> = text.split(':').map(|octet| u8::from_str_radix(octet, 16).expect("an octet")).collect();
    octets.try_into().expect("six octets")
}

fn ethernet(to: Mac, from: Mac, kind: u16, payload: &[u8]) -> Vec<u8> {
    [&to[..], &from, &kind.to_be_bytes(), payload].concat()
}

/// Asks everybody on the link who has `wanted` (RFC 826).
pub(crate) fn arp_question(from: Mac, source: Ipv4Addr, wanted: Ipv4Addr) -> Vec<u8> {
    let body = [&[0, 1, 8, 0, 6, 4, 0, 1][..], &from, &source.octets(), &[0; 6], &wanted.octets()].concat();
    ethernet([0xff; 6], from, 0x0806, &body)
}

/// A TCP segment that claims to come from somebody else.
pub(crate) fn segment(
    (to, from): (Mac, Mac),
    (source, source_port): (Ipv4Addr, u16),
    (destination, port): (Ipv4Addr, u16),
    flags: u8,
) -> Vec<u8> {
    let (source, destination) = (source.octets(), destination.octets());
    let mut tcp = [&source_port.to_be_bytes()[..], &port.to_be_bytes(), &0x1234_5678_u32.to_be_bytes()].concat();
    tcp.extend([0x23, 0x45, 0x67, 0x89, 0x50, flags, 0x20, 0, 0, 0, 0, 0]);
    let pseudo = [&source[..], &destination, &[0, 6], &(tcp.len() as u16).to_be_bytes()].concat();
    let sum = checksum(&[pseudo.as_slice(), &tcp].concat());
    tcp[16..18].copy_from_slice(&sum.to_be_bytes());
    let length = (20 + tcp.len()) as u16;
    let mut ip = [&[0x45, 0][..], &length.to_be_bytes(), &[0, 1, 0x40, 0, 64, 6, 0, 0], &source, &destination].concat();
    let sum = checksum(&ip);
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    ip.extend(tcp);
    ethernet(to, from, 0x0800, &ip)
}

/// A datagram that claims to come from somebody else.
pub(crate) fn datagram(
    (to, from): (Mac, Mac),
    (source, source_port): (Ipv4Addr, u16),
    (destination, port): (Ipv4Addr, u16),
    payload: &[u8],
) -> Vec<u8> {
    let length = (8 + payload.len()) as u16;
    // Without a checksum of its own, as IPv4 allows (RFC 768).
    let mut udp = [source_port, port, length, 0].map(u16::to_be_bytes).concat();
    udp.extend(payload);
    let (source, destination) = (source.octets(), destination.octets());
    let total = (20 + udp.len()) as u16;
    let mut ip = [&[0x45, 0][..], &total.to_be_bytes(), &[0, 1, 0x40, 0, 64, 17, 0, 0], &source, &destination].concat();
    let sum = checksum(&ip);
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    ip.extend(udp);
    ethernet(to, from, 0x0800, &ip)
}

/// What a router says of a prefix of 64 bits, from which hosts make addresses.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Prefix {
    /// The prefix.
    pub(crate) prefix: Ipv6Addr,
    /// For how many seconds its addresses are valid.
    pub(crate) valid: u32,
    /// For how many of these they are used for what is new.
    pub(crate) preferred: u32,
}

/// A router advertisement (RFC 4861 sections 4.2 and 4.6.2). A router with a `lifetime` of 0 seconds is none any more.
pub(crate) fn router_advertisement(from: Mac, router: Ipv6Addr, lifetime: u16, prefixes: &[Prefix]) -> Vec<u8> {
    const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
    // Hop limit 64, no flags, times unspecified.
    let [high, low] = lifetime.to_be_bytes();
    let mut icmp = vec![134, 0, 0, 0, 64, 0, high, low, 0, 0, 0, 0, 0, 0, 0, 0];
    for Prefix { prefix, valid, preferred } in prefixes {
        // On-link and autonomous.
        icmp.extend([3, 4, 64, 0xc0]);
        icmp.extend(valid.to_be_bytes());
        icmp.extend(preferred.to_be_bytes());
        icmp.extend([0; 4]);
        icmp.extend(prefix.octets());
    }
    let length = icmp.len() as u16;
    let pseudo = [&router.octets()[..], &ALL_NODES.octets(), &u32::from(length).to_be_bytes(), &[0, 0, 0, 58]].concat();
    let sum = checksum(&[pseudo.as_slice(), &icmp].concat());
    icmp[2..4].copy_from_slice(&sum.to_be_bytes());
    let ip = [&[0x60, 0, 0, 0][..], &length.to_be_bytes(), &[58, 255], &router.octets(), &ALL_NODES.octets(), &icmp];
    ethernet([0x33, 0x33, 0, 0, 0, 1], from, 0x86dd, &ip.concat())
}

/// The checksum of the internet, RFC 1071.
pub(crate) fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 =
        bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}
