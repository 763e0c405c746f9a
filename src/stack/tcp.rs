//! Reading TCP headers for demultiplexing, and writing the one segment that needs no socket.

use std::net::SocketAddr;
use std::num::NonZeroU16;

use super::Tuple;
use super::frame::Transmit;
use super::ip::{self, Malformed, Packet};

const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
const PSH: u8 = 8;
const ACK: u8 = 16;

/// What the table must know of a segment.
#[derive(Debug, Clone, Copy)]
pub(super) struct Segment {
    pub(super) tuple: Tuple,
    pub(super) sequence: u32,
    /// What it acknowledges, if it does.
    pub(super) acknowledgement: Option<u32>,
    /// Bytes of payload.
    pub(super) payload: usize,
    /// The window as it stands there, not scaled.
    pub(super) window: u16,
    /// What it says of data that has come beyond a gap (RFC 2018).
    pub(super) blocks: Blocks,
    /// It permits the other side to say so.
    pub(super) selective: bool,
    /// The shift of the windows that it will announce; None: it takes no shifted ones either (RFC 7323).
    pub(super) scale: Option<u8>,
    /// The maximum segment size that it announces.
    pub(super) segment_size: Option<u16>,
    flags: u8,
}

/// At most four stretches of sequence numbers.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Blocks {
    list: [(u32, u32); 4],
    count: usize,
}

impl Blocks {
    fn read(option: &[u8]) -> Self {
        let mut blocks = Self::default();
        for (place, pair) in blocks.list.iter_mut().zip(option.as_chunks::<8>().0) {
            let [a, b, c, d, e, f, g, h] = *pair;
            *place = (u32::from_be_bytes([a, b, c, d]), u32::from_be_bytes([e, f, g, h]));
            blocks.count += 1;
        }
        blocks
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (u32, u32)> + '_ {
        self.list[..self.count].iter().copied()
    }

    /// Writes the option, if there is anything to tell, behind two bytes that align it.
    fn write(&self, options: &mut [u8]) {
        let Some((head, places)) = options.split_first_chunk_mut::<4>() else { return };
        *head = [1, 1, 5, (2 + 8 * self.count) as u8];
        for (place, (left, right)) in places.as_chunks_mut::<8>().0.iter_mut().zip(self.iter()) {
            place[..4].copy_from_slice(&left.to_be_bytes());
            place[4..].copy_from_slice(&right.to_be_bytes());
        }
    }
}

/// The first four.
impl FromIterator<(u32, u32)> for Blocks {
    fn from_iter<T: IntoIterator<Item = (u32, u32)>>(given: T) -> Self {
        let mut blocks = Self::default();
        for (place, block) in blocks.list.iter_mut().zip(given) {
            *place = block;
            blocks.count += 1;
        }
        blocks
    }
}

#[cfg(test)]
impl<const N: usize> From<[(u32, u32); N]> for Blocks {
    fn from(given: [(u32, u32); N]) -> Self {
        given.into_iter().collect()
    }
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
        let word = |at: usize| u16::from_be_bytes([bytes[at], bytes[at + 1]]);
        let flags = header[13];
        let nonsense = flags & (FIN | SYN | RST | ACK) == 0
            || flags & SYN != 0 && flags & (FIN | RST) != 0
            || flags & RST != 0 && flags & FIN != 0;
        if word(0) == 0 || word(2) == 0 || nonsense {
            return Err(Malformed::Options);
        }
        let options = read_options(&bytes[20..length])?;
        let segment_size = options.segment_size.map(|at| word(20 + at + 2));
        Ok(Self {
            tuple: Tuple {
                client: SocketAddr::new(packet.source, word(0)),
                server: SocketAddr::new(packet.destination, word(2)),
            },
            sequence: u32::from_be_bytes([header[4], header[5], header[6], header[7]]),
            acknowledgement: (flags & ACK != 0)
                .then(|| u32::from_be_bytes([header[8], header[9], header[10], header[11]])),
            payload: bytes.len() - length,
            window: word(14),
            blocks: options.blocks,
            selective: options.selective,
            scale: options.scale,
            segment_size,
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

    pub(super) fn is_last(&self) -> bool {
        self.flags & FIN != 0
    }

    /// Whether it does nothing but acknowledge.
    pub(super) fn is_bare(&self) -> bool {
        self.payload == 0 && self.flags & (FIN | SYN | RST | ACK) == ACK
    }

    /// The same with the last `excess` bytes of its payload left out.
    pub(super) fn shortened(&self, excess: usize) -> Self {
        Self { payload: self.payload - excess, ..*self }
    }

    /// The FIN alone that stands at `sequence`, of the same client, with this acknowledgement and window.
    pub(super) fn last(&self, sequence: u32, acknowledgement: u32, window: u16) -> Self {
        let (blocks, flags) = (Blocks::default(), FIN | ACK);
        Self { sequence, acknowledgement: Some(acknowledgement), payload: 0, window, blocks, flags, ..*self }
    }

    /// It as smoltcp reads it, for one that has neither payload nor options: without checksums.
    pub(super) fn packet(&self) -> Vec<u8> {
        let header = if self.tuple.client.is_ipv6() { 40 } else { 20 };
        let mut packet = acknowledgement(self.tuple, self.sequence, self.acknowledgement.unwrap_or(0), self.window);
        packet[header + 13] = self.flags;
        packet
    }

    /// The sequence number behind its payload.
    pub(super) fn end(&self) -> u32 {
        self.sequence.wrapping_add(super::flow::low_bits(self.payload))
    }
}

/// What a segment's options say.
#[derive(Default)]
struct Options {
    /// Where the maximum segment size stands among them.
    segment_size: Option<usize>,
    /// SACK is permitted.
    selective: bool,
    blocks: Blocks,
    scale: Option<u8>,
}

/// Walks TCP options (RFC 9293 section 3.1).
///
/// # Errors
/// One that smoltcp could not read. It drops a segment for that, so such a one must neither open a flow nor go uncounted.
fn read_options(options: &[u8]) -> Result<Options, Malformed> {
    let (mut at, mut found) = (0, Options::default());
    while let Some(kind) = options.get(at) {
        let left = options.len() - at;
        let length = match kind {
            0 => break,
            1 => 1,
            _ => options.get(at + 1).map_or(0, |length| usize::from(*length)),
        };
        let fits = match kind {
            1 => true,
            2 => length == 4,
            3 => length == 3,
            4 => length == 2,
            5 => length >= 10 && (length - 2).is_multiple_of(8),
            _ => length >= 2,
        };
        if !fits || length > left {
            return Err(Malformed::Options);
        }
        match kind {
            2 => found.segment_size = Some(at),
            3 => found.scale = Some(options[at + 2].min(14)),
            4 => found.selective = true,
            5 => found.blocks = Blocks::read(&options[at + 2..at + length]),
            _ => {}
        }
        at += length;
    }
    Ok(found)
}

/// Lowers the maximum segment size that a SYN without IPv6 extension headers announces to `most`. Its checksum is left
/// as it was.
pub(super) fn clamp_segment_size(packet: &mut [u8], most: u16) {
    let start = ip::header_length(packet);
    let Some(header) = packet.get(start..start + 20) else { return };
    if header[13] & SYN == 0 {
        return;
    }
    let end = start + usize::from(header[12] >> 4) * 4;
    let Some(Ok(options)) = packet.get(start + 20..end).map(read_options) else { return };
    let Some(at) = options.segment_size else { return };
    let field = &mut packet[start + 20 + at + 2..start + 20 + at + 4];
    let announced = u16::from_be_bytes([field[0], field[1]]);
    field.copy_from_slice(&announced.min(most).to_be_bytes());
}

/// The part of `packet`, a whole one without IPv6 extension headers, that holds the first `payload` bytes of its data,
/// without FIN.
pub(super) fn without_fin(packet: &[u8], payload: usize) -> Vec<u8> {
    let start = ip::header_length(packet);
    let header = start + usize::from(packet[start + 12] >> 4) * 4;
    let mut bytes = packet[..header + payload].to_vec();
    bytes[start + 13] &= !FIN;
    ip::shorten(&mut bytes);
    bytes
}

/// `packet`, a whole one without IPv6 extension headers, with another acknowledgement and window. Its checksum is left
/// as it was.
pub(super) fn with_acknowledgement(packet: &[u8], acknowledgement: u32, window: u16) -> Vec<u8> {
    let mut bytes = packet.to_vec();
    let start = ip::header_length(&bytes);
    bytes[start + 8..start + 12].copy_from_slice(&acknowledgement.to_be_bytes());
    bytes[start + 14..start + 16].copy_from_slice(&window.to_be_bytes());
    bytes
}

/// Cuts `packet`, a whole one without IPv6 extension headers, into segments of at most `most` bytes of payload, as a
/// device with offloads does.
pub(super) fn pieces(packet: &[u8], most: usize) -> impl Iterator<Item = Vec<u8>> {
    let start = ip::header_length(packet);
    let (head, payload) = packet.split_at(start + usize::from(packet[start + 12] >> 4) * 4);
    payload.chunks(most.max(1)).enumerate().map(move |(number, part)| {
        let mut piece = [head, part].concat();
        let at = number * most;
        let sequence = u32::from_be_bytes([head[start + 4], head[start + 5], head[start + 6], head[start + 7]]);
        let sequence = sequence.wrapping_add(super::flow::low_bits(at));
        piece[start + 4..start + 8].copy_from_slice(&sequence.to_be_bytes());
        if at + part.len() < payload.len() {
            // These belong to the last one.
            piece[start + 13] &= !(FIN | PSH);
        }
        ip::shorten(&mut piece);
        piece[start + 16..start + 18].fill(0);
        let sum = super::checksum::transport(&piece, start, ip::TCP);
        piece[start + 16..start + 18].copy_from_slice(&sum.to_be_bytes());
        piece
    })
}

/// For a segment that acknowledges nothing, a SYN that takes up the last of its sequence numbers: smoltcp answers that alone
/// with the reset that each of them should get, which acknowledges all of it (RFC 9293 section 3.10.7.1).
pub(super) fn unacknowledging(packet: &Packet<'_>) -> Option<Vec<u8>> {
    let segment = Segment::read(packet, true).ok()?;
    let alone = segment.acknowledgement.is_none() && !segment.is_reset() && !segment.opens();
    let sequence = segment.end().wrapping_add(u32::from(segment.is_last())).wrapping_sub(1);
    alone.then(|| Segment { sequence, payload: 0, flags: SYN, ..segment }.packet())
}

/// A bare acknowledgement from the client's end of `tuple`, as smoltcp reads it: without checksums.
pub(super) fn acknowledgement(tuple: Tuple, sequence: u32, acknowledgement: u32, window: u16) -> Vec<u8> {
    let header = if tuple.client.is_ipv6() { 40 } else { 20 };
    let mut packet = vec![0; header + 20];
    ip::write_header(&mut packet, tuple.client.ip(), tuple.server.ip(), ip::TCP, 0);
    let tcp = &mut packet[header..];
    tcp[..2].copy_from_slice(&tuple.client.port().to_be_bytes());
    tcp[2..4].copy_from_slice(&tuple.server.port().to_be_bytes());
    tcp[4..8].copy_from_slice(&sequence.to_be_bytes());
    tcp[8..12].copy_from_slice(&acknowledgement.to_be_bytes());
    (tcp[12], tcp[13]) = (5 << 4, ACK);
    tcp[14..16].copy_from_slice(&window.to_be_bytes());
    packet
}

/// A segment with data from the server's end of a flow.
#[derive(Debug, Clone, Copy)]
pub(super) struct Data {
    pub(super) tuple: Tuple,
    pub(super) sequence: u32,
    pub(super) acknowledgement: u32,
    /// As it stands there, scaled.
    pub(super) window: u16,
    /// Bytes of payload.
    pub(super) payload: usize,
    pub(super) last: bool,
    /// How the device is to cut it.
    pub(super) gso: Option<NonZeroU16>,
}

impl Data {
    /// Sends it; `fill` writes the payload. The checksum is the device's affair with `offload`.
    pub(super) fn send(&self, offload: bool, transmit: &mut dyn Transmit, fill: &mut dyn FnMut(&mut [u8])) {
        let header = if self.tuple.server.is_ipv6() { 40 } else { 20 };
        transmit.transmit(header + 20 + self.payload, self.gso, &mut |packet| {
            ip::write_header(packet, self.tuple.server.ip(), self.tuple.client.ip(), ip::TCP, 0);
            let tcp = &mut packet[header..];
            tcp[..20].fill(0);
            tcp[..2].copy_from_slice(&self.tuple.server.port().to_be_bytes());
            tcp[2..4].copy_from_slice(&self.tuple.client.port().to_be_bytes());
            tcp[4..8].copy_from_slice(&self.sequence.to_be_bytes());
            tcp[8..12].copy_from_slice(&self.acknowledgement.to_be_bytes());
            tcp[12] = 5 << 4;
            tcp[13] = ACK | if self.payload > 0 { PSH } else { 0 } | if self.last { FIN } else { 0 };
            tcp[14..16].copy_from_slice(&self.window.to_be_bytes());
            fill(&mut tcp[20..]);
            if !offload {
                let sum = super::checksum::transport(packet, header, ip::TCP);
                packet[header + 16..header + 18].copy_from_slice(&sum.to_be_bytes());
            }
        });
    }
}

/// A bare acknowledgement from the server's end of a flow.
#[derive(Debug, Clone, Copy)]
pub(super) struct Acknowledgement {
    pub(super) tuple: Tuple,
    pub(super) sequence: u32,
    pub(super) acknowledgement: u32,
    /// As it stands there, scaled.
    pub(super) window: u16,
    pub(super) blocks: Blocks,
}

impl Acknowledgement {
    /// Sends it if the device takes it. The checksum is the device's affair with `offload`.
    pub(super) fn send(&self, offload: bool, transmit: &mut dyn Transmit) {
        if !transmit.ready() {
            return;
        }
        let header = if self.tuple.server.is_ipv6() { 40 } else { 20 };
        let options = if self.blocks.count > 0 { 4 + 8 * self.blocks.count } else { 0 };
        transmit.transmit(header + 20 + options, None, &mut |packet| {
            ip::write_header(packet, self.tuple.server.ip(), self.tuple.client.ip(), ip::TCP, 0);
            let tcp = &mut packet[header..];
            tcp.fill(0);
            tcp[..2].copy_from_slice(&self.tuple.server.port().to_be_bytes());
            tcp[2..4].copy_from_slice(&self.tuple.client.port().to_be_bytes());
            tcp[4..8].copy_from_slice(&self.sequence.to_be_bytes());
            tcp[8..12].copy_from_slice(&self.acknowledgement.to_be_bytes());
            tcp[12] = (((20 + options) / 4) << 4) as u8;
            tcp[13] = ACK;
            tcp[14..16].copy_from_slice(&self.window.to_be_bytes());
            self.blocks.write(&mut tcp[20..]);
            if !offload {
                let sum = super::checksum::transport(packet, header, ip::TCP);
                packet[header + 16..header + 18].copy_from_slice(&sum.to_be_bytes());
            }
        });
    }
}
