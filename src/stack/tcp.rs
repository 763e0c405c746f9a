//! Reading TCP headers for demultiplexing, and writing the one segment that needs no socket.

use std::net::SocketAddr;

use super::Tuple;
use super::frame::Transmit;
use super::ip::{self, Malformed, Packet};

const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
const ACK: u8 = 16;

/// What the table must know of a segment.
#[derive(Debug, Clone, Copy)]
pub(super) struct Segment {
    pub(super) tuple: Tuple,
    pub(super) sequence: u32,
    /// Bytes of payload.
    pub(super) payload: usize,
    flags: u8,
}

impl Segment {
    /// Reads the header of a whole packet.
    ///
    /// # Errors
    /// Lengths, checksum, ports or flags that no TCP sends.
    pub(super) fn read(packet: &Packet<'_>, trusted: bool) -> Result<Self, Malformed> {
        let bytes = packet.payload();
        let header = bytes.get(..20).ok_or(Malformed::Length)?;
        let length = usize::from(header[12] >> 4) * 4;
        if length < 20 || length > bytes.len() {
            return Err(Malformed::Length);
        }
        if !trusted && super::checksum::transport(packet.bytes, packet.start, ip::TCP) != 0 {
            return Err(Malformed::Header);
        }
        let word = |at: usize| u16::from_be_bytes([header[at], header[at + 1]]);
        let flags = header[13];
        let nonsense = flags & (FIN | SYN | RST | ACK) == 0
            || flags & SYN != 0 && flags & (FIN | RST) != 0
            || flags & RST != 0 && flags & FIN != 0;
        if word(0) == 0 || word(2) == 0 || nonsense {
            return Err(Malformed::Options);
        }
        Ok(Self {
            tuple: Tuple {
                client: SocketAddr::new(packet.source, word(0)),
                server: SocketAddr::new(packet.destination, word(2)),
            },
            sequence: u32::from_be_bytes([header[4], header[5], header[6], header[7]]),
            payload: bytes.len() - length,
            flags,
        })
    }

    /// Whether it opens a connection.
    pub(super) fn opens(&self) -> bool {
        self.flags & (SYN | ACK | RST | FIN) == SYN
    }

    pub(super) fn is_reset(&self) -> bool {
        self.flags & RST != 0
    }

    /// The sequence number behind its payload.
    pub(super) fn end(&self) -> u32 {
        self.sequence.wrapping_add(super::flow::low_bits(self.payload))
    }
}

/// Sends a bare acknowledgement from the server's end of `tuple`.
pub(super) fn acknowledge(
    tuple: Tuple,
    sequence: u32,
    acknowledgement: u32,
    offload: bool,
    transmit: &mut dyn Transmit,
) {
    if !transmit.ready() {
        return;
    }
    let header = if tuple.server.is_ipv6() { 40 } else { 20 };
    transmit.transmit(header + 20, None, &mut |packet| {
        ip::write_header(packet, tuple.server.ip(), tuple.client.ip(), ip::TCP, 0);
        let tcp = &mut packet[header..];
        tcp.fill(0);
        tcp[..2].copy_from_slice(&tuple.server.port().to_be_bytes());
        tcp[2..4].copy_from_slice(&tuple.client.port().to_be_bytes());
        tcp[4..8].copy_from_slice(&sequence.to_be_bytes());
        tcp[8..12].copy_from_slice(&acknowledgement.to_be_bytes());
        tcp[12] = 5 << 4;
        tcp[13] = ACK;
        if !offload {
            let sum = super::checksum::transport(packet, header, ip::TCP);
            packet[header + 16..header + 18].copy_from_slice(&sum.to_be_bytes());
        }
    });
}
