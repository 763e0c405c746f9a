//! The device, which looks at every packet that the stack has it send.

use std::net::{IpAddr, Ipv6Addr};
use std::num::NonZeroU16;

use tunproxy::stack::{Config, Transmit, VirtioHeader};

/// The only thing known of a TCP segment of the stack: enough to answer it.
#[derive(Clone, Copy)]
pub(crate) struct Said {
    pub(crate) server_port: u16,
    pub(crate) client_port: u16,
    /// The sequence number behind it.
    pub(crate) next: u32,
    pub(crate) acknowledged: u32,
}

pub(crate) struct Device {
    pub(crate) offload: bool,
    /// Packets that it still takes.
    pub(crate) room: usize,
    pub(crate) cuts_datagrams: bool,
    pub(crate) sent: u64,
    /// The last segments of flows.
    pub(crate) said: Vec<Said>,
    mtu: usize,
    own: Vec<IpAddr>,
    reserved: Vec<(IpAddr, u8)>,
}

impl Device {
    pub(crate) fn new(config: &Config) -> Self {
        let reserved = config.reserved.iter().map(|range| (range.network(), range.prefix_len())).collect();
        let (offload, mtu, own) = (config.offload, config.mtu, config.own.clone());
        Self { offload, room: usize::MAX, cuts_datagrams: offload, sent: 0, said: Vec::new(), mtu, own, reserved }
    }

    fn check(&mut self, bytes: &[u8], gso: Option<NonZeroU16>) {
        let v6 = match bytes[0] >> 4 {
            4 => false,
            6 => true,
            other => panic!("a packet of version {other}"),
        };
        let word = |at: usize| usize::from(u16::from_be_bytes([bytes[at], bytes[at + 1]]));
        let start = if v6 { 40 } else { usize::from(bytes[0] & 15) * 4 };
        let total = if v6 { word(4) + 40 } else { word(2) };
        assert_eq!(total, bytes.len(), "the length that the header names");
        assert!(start >= 20 && start <= total);
        if !v6 {
            assert_eq!(sum(&bytes[..start], 0), 0xffff, "the checksum of the header");
        }
        let (source, destination) = addresses(bytes, v6);
        assert!(is_unicast(destination) && is_unicast(source), "{source} -> {destination}");
        let reserved = self.reserved.iter().any(|range| within(destination, *range));
        assert!(!reserved || self.own.contains(&destination), "nobody is at {destination}");
        let protocol = if v6 { bytes[6] } else { bytes[9] };
        let fragment = if v6 { protocol == 44 } else { word(6) & 0x3fff != 0 };
        match gso {
            None => assert!(
                bytes.len() <= self.mtu || (!v6 && matches!(protocol, 1 | 17)),
                "{} bytes are too long",
                bytes.len()
            ),
            Some(size) => {
                let transport = if protocol == 6 { usize::from(bytes[start + 12] >> 4) * 4 } else { 8 };
                assert!(self.offload, "only a device with offloads cuts");
                assert!(start + transport + usize::from(size.get()) <= self.mtu, "a segment fits");
                assert!(start + transport < bytes.len(), "something is to be cut");
            }
        }
        if fragment {
            return;
        }
        let transport = &bytes[start..];
        // With offloads the device does the sums of TCP and UDP, and only those.
        let theirs = self.offload && matches!(protocol, 6 | 17);
        let none = protocol == 17 && !v6 && word(start + 6) == 0;
        if !theirs && !none {
            let pseudo = if protocol == 1 { 0 } else { pseudo(bytes, v6, protocol, transport.len()) };
            assert_eq!(sum(transport, pseudo), 0xffff, "the checksum of protocol {protocol}");
        }
        match protocol {
            6 => self.hear(transport),
            17 => assert!(transport.len() >= 8 && (gso.is_some() || word(start + 4) == transport.len())),
            1 | 58 => assert!(transport.len() >= 8),
            other => panic!("nobody here speaks protocol {other}"),
        }
    }

    fn hear(&mut self, tcp: &[u8]) {
        let header = usize::from(tcp[12] >> 4) * 4;
        assert!(header >= 20 && header <= tcp.len(), "a TCP header of {header} bytes");
        let long = |at: usize| u32::from_be_bytes([tcp[at], tcp[at + 1], tcp[at + 2], tcp[at + 3]]);
        let port = |at: usize| u16::from_be_bytes([tcp[at], tcp[at + 1]]);
        let length = (tcp.len() - header) as u32 + u32::from(tcp[13] & 1) + u32::from(tcp[13] >> 1 & 1);
        let said = Said {
            server_port: port(0),
            client_port: port(2),
            next: long(4).wrapping_add(length),
            acknowledged: long(8),
        };
        self.said.retain(|old| (old.server_port, old.client_port) != (said.server_port, said.client_port));
        self.said.push(said);
        if self.said.len() > 16 {
            self.said.remove(0);
        }
    }
}

impl Transmit for Device {
    fn ready(&mut self) -> bool {
        self.room > 0
    }

    fn cuts_datagrams(&self) -> bool {
        self.cuts_datagrams
    }

    fn transmit(&mut self, len: usize, gso: Option<NonZeroU16>, fill: &mut dyn FnMut(&mut [u8])) {
        assert!(self.room > 0, "written to a device that takes nothing");
        assert!((20..=65_535 + 40).contains(&len), "{len} bytes");
        self.room -= 1;
        self.sent += 1;
        // What lies in the buffer from before must not shine through.
        let mut bytes = vec![0xa5; len];
        fill(&mut bytes);
        self.check(&bytes, gso);
        if self.offload {
            let header = VirtioHeader::seal(&mut bytes, gso);
            assert_eq!(VirtioHeader::parse(header.bytes()), header);
        }
    }
}

fn addresses(bytes: &[u8], v6: bool) -> (IpAddr, IpAddr) {
    let four = |at: usize| IpAddr::from(<[u8; 4]>::try_from(&bytes[at..at + 4]).expect("four bytes"));
    let six = |at: usize| IpAddr::from(<[u8; 16]>::try_from(&bytes[at..at + 16]).expect("sixteen bytes"));
    if v6 { (six(8), six(24)) } else { (four(12), four(16)) }
}

fn is_unicast(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => !address.is_multicast() && !address.is_broadcast() && !address.is_unspecified(),
        IpAddr::V6(address) => !address.is_multicast() && address != Ipv6Addr::UNSPECIFIED,
    }
}

fn within(address: IpAddr, (network, length): (IpAddr, u8)) -> bool {
    let bits = |address: IpAddr| match address {
        IpAddr::V4(address) => (u128::from(u32::from(address)) << 96, 4),
        IpAddr::V6(address) => (u128::from(address), 6),
    };
    let ((a, family), (b, other)) = (bits(address), bits(network));
    family == other && (length == 0 || a >> (128 - u32::from(length)) == b >> (128 - u32::from(length)))
}

/// The Internet checksum's sum (RFC 1071), written without a look at the stack's own.
pub(crate) fn sum(bytes: &[u8], start: u32) -> u16 {
    let mut sum = u64::from(start);
    for pair in bytes.chunks(2) {
        sum += u64::from(pair[0]) << 8 | u64::from(pair.get(1).copied().unwrap_or_default());
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

pub(crate) fn pseudo(bytes: &[u8], v6: bool, protocol: u8, length: usize) -> u32 {
    let addresses = if v6 { &bytes[8..40] } else { &bytes[12..20] };
    u32::from(sum(addresses, 0)) + u32::from(protocol) + length as u32
}
