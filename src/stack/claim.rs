//! Which worker's stack a packet belongs to, found without one.

use std::net::IpAddr;

use super::ip::{self, Packet};
use super::{Tuple, tcp};

/// What a packet needs before it is ingested, where several stacks share a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Claim {
    /// It opens this flow, which must have one owner.
    Flow(Tuple),
    /// It is a piece of this packet, whose pieces must come together.
    Piece(IpAddr, IpAddr, u32),
}

/// Says what `packet` needs before it is ingested. Nearly always nothing, which costs a few comparisons.
#[must_use]
pub fn claim(packet: &[u8]) -> Option<Claim> {
    let syn = |at: usize| packet.get(at + 13).is_some_and(|flags| flags & 2 != 0);
    let look = match packet.first()? >> 4 {
        4 if packet.len() >= 20 => {
            packet[6] & 0x3f != 0 || packet[7] != 0 || packet[9] == ip::TCP && syn(usize::from(packet[0] & 15) * 4)
        }
        6 if packet.len() >= 40 => packet[6] != ip::UDP && (packet[6] != ip::TCP || syn(40)),
        _ => false,
    };
    if !look {
        return None;
    }
    let packet = Packet::parse(packet).ok()?;
    if let Some(fragment) = packet.fragment {
        return Some(Claim::Piece(packet.source, packet.destination, fragment.id));
    }
    if packet.protocol != ip::TCP {
        return None;
    }
    // The checksum is looked at when the packet is ingested.
    tcp::Segment::read(&packet, true).ok().filter(tcp::Segment::opens).map(|segment| Claim::Flow(segment.tuple))
}
