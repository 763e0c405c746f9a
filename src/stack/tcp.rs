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
    /// The MSS option's value.
    mss: Option<u16>,
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
            mss: if flags & SYN == 0 { None } else { read_mss(&bytes[20..length]) },
        })
    }

    /// Whether it opens a connection.
    pub(super) fn opens(&self) -> bool {
        self.flags & (SYN | ACK | RST | FIN) == SYN
    }

    /// The largest segment that its sender takes (RFC 9293 section 3.7.1: a default where it does not say).
    pub(super) fn mss(&self) -> u16 {
        let default = if self.tuple.client.is_ipv6() { 1220 } else { 536 };
        self.mss.filter(|mss| *mss > 0).unwrap_or(default)
    }

    pub(super) fn is_reset(&self) -> bool {
        self.flags & RST != 0
    }

    /// The sequence number behind its payload.
    pub(super) fn end(&self) -> u32 {
        self.sequence.wrapping_add(super::flow::low_bits(self.payload))
    }
}

fn read_mss(options: &[u8]) -> Option<u16> {
    let at = mss_option(options)?;
    Some(u16::from_be_bytes([options[at], options[at + 1]]))
}

/// Where the value of the MSS option stands among TCP options.
pub(super) fn mss_option(options: &[u8]) -> Option<usize> {
    let mut at = 0;
    loop {
        match options.get(at)? {
            0 => return None,
            1 => at += 1,
            2 if options.get(at + 1) == Some(&4) && options.len() >= at + 4 => return Some(at + 2),
            _ => at += usize::from(*options.get(at + 1)?).max(2),
        }
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
