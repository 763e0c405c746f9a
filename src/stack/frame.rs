//! What crosses the device: a packet and the virtio header beside it (virtio 1.2, section 5.1.6; `linux/virtio_net.h`).

use std::num::NonZeroU16;

const NEEDS_CSUM: u8 = 1;
const DATA_VALID: u8 = 2;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_UDP_L4: u8 = 5;

/// One packet from the device, and what the kernel left undone in it.
#[derive(Debug, Clone, Copy)]
pub struct Frame<'a> {
    /// The kernel's notes on checksum and segmentation.
    pub header: VirtioHeader,
    /// An IP packet, up to 64 KiB when the kernel coalesced segments.
    pub packet: &'a [u8],
}

/// `struct virtio_net_hdr`, in the byte order of this machine.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct VirtioHeader {
    flags: u8,
    gso_type: u8,
    header_len: u16,
    gso_size: u16,
    checksum_start: u16,
    checksum_offset: u16,
}

impl VirtioHeader {
    /// Its length in bytes.
    pub const LEN: usize = 10;

    /// A header that says nothing: every checksum has to be looked at.
    pub const PLAIN: Self =
        Self { flags: 0, gso_type: 0, header_len: 0, gso_size: 0, checksum_start: 0, checksum_offset: 0 };

    /// Reads the ten bytes before a packet.
    #[must_use]
    pub fn parse(bytes: [u8; Self::LEN]) -> Self {
        let word = |at: usize| u16::from_ne_bytes([bytes[at], bytes[at + 1]]);
        Self {
            flags: bytes[0],
            gso_type: bytes[1],
            header_len: word(2),
            gso_size: word(4),
            checksum_start: word(6),
            checksum_offset: word(8),
        }
    }

    /// The ten bytes to write before a packet.
    #[must_use]
    pub fn bytes(self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        bytes[0] = self.flags;
        bytes[1] = self.gso_type;
        for (at, word) in
            [(2, self.header_len), (4, self.gso_size), (6, self.checksum_start), (8, self.checksum_offset)]
        {
            bytes[at..at + 2].copy_from_slice(&word.to_ne_bytes());
        }
        bytes
    }

    /// Whether the transport checksum needs no check: the kernel checked it, or the packet never left this host.
    #[must_use]
    pub fn checksum_trusted(self) -> bool {
        self.flags & (NEEDS_CSUM | DATA_VALID) != 0
    }

    /// The payload of each datagram when several of one UDP flow came as one packet.
    #[must_use]
    pub fn datagram_size(self) -> Option<NonZeroU16> {
        if self.gso_type & 0x7f == GSO_UDP_L4 { NonZeroU16::new(self.gso_size) } else { None }
    }

    /// Prepares `packet` for a device with offloads. TCP and UDP behind the IP header: the pseudo-header's sum goes into
    /// the checksum field, and the header asks for the rest, and for segments of `gso` payload bytes if given. Anything
    /// else (ICMP, a fragment) is complete as it is.
    #[must_use]
    pub fn seal(packet: &mut [u8], gso: Option<NonZeroU16>) -> Self {
        let v6 = packet[0] >> 4 == 6;
        let start = if v6 { 40 } else { usize::from(packet[0] & 15) * 4 };
        let protocol = if v6 { packet[6] } else { packet[9] };
        let fragment = !v6 && (packet[6] & 0x3f != 0 || packet[7] != 0);
        if fragment || protocol != super::ip::TCP && protocol != super::ip::UDP {
            return Self::PLAIN;
        }
        let tcp = protocol == super::ip::TCP;
        let offset = if tcp { 16 } else { 6 };
        let sum = super::checksum::pseudo(packet, start, protocol);
        packet[start + offset..start + offset + 2].copy_from_slice(&sum.to_be_bytes());
        let transport = if tcp { usize::from(packet[start + 12] >> 4) * 4 } else { 8 };
        Self {
            flags: NEEDS_CSUM,
            gso_type: match (gso, tcp, v6) {
                (None, ..) => 0,
                (_, true, false) => GSO_TCPV4,
                (_, true, true) => GSO_TCPV6,
                (_, false, _) => GSO_UDP_L4,
            },
            header_len: if gso.is_some() { small(start + transport) } else { 0 },
            gso_size: gso.map_or(0, NonZeroU16::get),
            checksum_start: small(start),
            checksum_offset: small(offset),
        }
    }
}

/// Header lengths are at most 60 + 60 bytes.
fn small(length: usize) -> u16 {
    u16::try_from(length).unwrap_or(u16::MAX)
}

/// Where emitted packets go: straight into the device's write buffer.
pub trait Transmit {
    /// Whether a packet can be taken now. While it cannot, flows keep what they have to say.
    fn ready(&mut self) -> bool;

    /// Whether the device cuts UDP packets into datagrams. Asked before each one, as it may turn out not to.
    fn cuts_datagrams(&self) -> bool {
        false
    }

    /// Whether there is a kernel behind the device that cuts IPv4 packets longer than its MTU where it has to.
    fn takes_any_length(&self) -> bool {
        true
    }

    /// Takes one packet of `len` bytes, which `fill` writes; `gso` asks for segmentation into that payload size.
    /// Called only after [`ready`](Self::ready) said yes.
    fn transmit(&mut self, len: usize, gso: Option<NonZeroU16>, fill: &mut dyn FnMut(&mut [u8]));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_survives_its_bytes() {
        let header = VirtioHeader {
            flags: 1,
            gso_type: 4,
            header_len: 60,
            gso_size: 1440,
            checksum_start: 40,
            checksum_offset: 16,
        };
        assert_eq!(VirtioHeader::parse(header.bytes()), header);
    }

    #[test]
    fn a_plain_header_trusts_no_checksum() {
        assert!(!VirtioHeader::PLAIN.checksum_trusted());
        assert!(VirtioHeader { flags: NEEDS_CSUM, ..VirtioHeader::PLAIN }.checksum_trusted());
    }
}
