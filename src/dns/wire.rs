//! A client's query, read in place: no allocation, every byte bounds-checked.

use super::Transport;

/// Record types that the code tells apart (RFC 1035, 3596, 6891, 9460).
pub(super) mod kind {
    pub(crate) const A: u16 = 1;
    pub(crate) const NS: u16 = 2;
    pub(crate) const SOA: u16 = 6;
    pub(crate) const PTR: u16 = 12;
    pub(crate) const HINFO: u16 = 13;
    pub(crate) const AAAA: u16 = 28;
    pub(crate) const OPT: u16 = 41;
    pub(crate) const SVCB: u16 = 64;
    pub(crate) const HTTPS: u16 = 65;
    pub(crate) const TKEY: u16 = 249;
    pub(crate) const TSIG: u16 = 250;
    pub(crate) const IXFR: u16 = 251;
    pub(crate) const AXFR: u16 = 252;
    pub(crate) const ANY: u16 = 255;
}

/// Response codes (RFC 1035 section 4.1.1, RFC 6891 section 9).
pub(super) mod rcode {
    pub(crate) const NO_ERROR: u16 = 0;
    pub(crate) const FORM_ERR: u16 = 1;
    pub(crate) const SERV_FAIL: u16 = 2;
    pub(crate) const NX_DOMAIN: u16 = 3;
    pub(crate) const NOT_IMP: u16 = 4;
    pub(crate) const REFUSED: u16 = 5;
    pub(crate) const BAD_VERS: u16 = 16;
}

/// The class IN.
pub(super) const IN: u16 = 1;
/// Bytes of a message's header.
pub(super) const HEADER: usize = 12;
/// The longest name on the wire, its root label included (RFC 1035 section 2.3.4).
pub(super) const MAX_NAME: usize = 255;
/// What we let clients and upstreams send us over UDP: fits any path without fragments (DNS flag day 2020).
pub(super) const EDNS_SIZE: u16 = 1232;

/// Header bits, as they stand in the second 16-bit word.
pub(super) mod bit {
    pub(crate) const QR: u16 = 0x8000;
    pub(crate) const OPCODE: u16 = 0x7800;
    pub(crate) const AA: u16 = 0x0400;
    pub(crate) const TC: u16 = 0x0200;
    pub(crate) const RD: u16 = 0x0100;
    pub(crate) const RA: u16 = 0x0080;
    pub(crate) const AD: u16 = 0x0020;
    pub(crate) const CD: u16 = 0x0010;
    pub(crate) const RCODE: u16 = 0x000f;
}

/// What a query's OPT record says (RFC 6891 section 6.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Edns {
    /// The UDP payload that the client can take.
    pub(super) size: u16,
    /// 0 is the only one that exists.
    pub(super) version: u8,
    /// DNSSEC OK.
    pub(super) dnssec_ok: bool,
}

/// Everything a reply needs to know of its query.
#[derive(Debug, Clone, Copy)]
pub(super) struct Query<'a> {
    pub(super) id: u16,
    /// The header's second word.
    pub(super) bits: u16,
    /// Name, type and class, byte for byte as sent (letter case included); empty if it could not be read.
    pub(super) question: &'a [u8],
    pub(super) edns: Option<Edns>,
    pub(super) transport: Transport,
}

/// Why a message gets no ordinary answer.
#[derive(Debug, Clone, Copy)]
pub(super) enum Fault<'a> {
    /// Not a query at all; answering could start a loop of two servers.
    Silence,
    /// A query that is refused with this code.
    Refused(Query<'a>, u16),
}

impl<'a> Query<'a> {
    /// Reads a message that arrived over `transport`.
    pub(super) fn parse(message: &'a [u8], transport: Transport) -> Result<Self, Fault<'a>> {
        let (Some(id), Some(bits)) = (u16_at(message, 0), u16_at(message, 2)) else { return Err(Fault::Silence) };
        if message.len() < HEADER || bits & bit::QR != 0 {
            return Err(Fault::Silence);
        }
        let mut query = Self { id, bits, question: &[], edns: None, transport };
        if bits & bit::OPCODE != 0 {
            return Err(Fault::Refused(query, rcode::NOT_IMP));
        }
        // RFC 9619: a query has exactly one question.
        if u16_at(message, 4) != Some(1) {
            return Err(Fault::Refused(query, rcode::FORM_ERR));
        }
        let end = question_end(message).ok_or(Fault::Refused(query, rcode::FORM_ERR))?;
        query.question = &message[HEADER..end];
        query.edns = edns(message, end).map_err(|Malformed| Fault::Refused(query, rcode::FORM_ERR))?;
        match query.edns {
            Some(edns) if edns.version != 0 => Err(Fault::Refused(query, rcode::BAD_VERS)),
            _ if query.class() != IN => Err(Fault::Refused(query, rcode::NOT_IMP)),
            _ => match query.kind() {
                kind::AXFR | kind::IXFR => Err(Fault::Refused(query, rcode::REFUSED)),
                kind::OPT | kind::TKEY | kind::TSIG => Err(Fault::Refused(query, rcode::NOT_IMP)),
                _ => Ok(query),
            },
        }
    }

    /// The name in wire form, root label included.
    pub(super) fn name(&self) -> &'a [u8] {
        &self.question[..self.question.len().saturating_sub(4)]
    }

    /// The record type asked for.
    pub(super) fn kind(&self) -> u16 {
        u16_at(self.question, self.name().len()).unwrap_or(0)
    }

    /// The class asked for.
    pub(super) fn class(&self) -> u16 {
        u16_at(self.question, self.name().len() + 2).unwrap_or(0)
    }

    /// Whether the client wants DNSSEC records.
    pub(super) fn dnssec_ok(&self) -> bool {
        self.edns.is_some_and(|edns| edns.dnssec_ok)
    }

    /// How many bytes the answer may have.
    pub(super) fn limit(&self) -> usize {
        match (self.transport, self.edns) {
            (Transport::Tcp, _) => usize::from(u16::MAX),
            (Transport::Udp, None) => 512,
            // RFC 6891 section 6.2.3: below 512 counts as 512.
            (Transport::Udp, Some(edns)) => usize::from(edns.size.clamp(512, EDNS_SIZE)),
        }
    }
}

/// A message that breaks the format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Malformed;

/// Two bytes in network order.
pub(super) fn u16_at(message: &[u8], at: usize) -> Option<u16> {
    message.get(at..at + 2).map(|bytes| u16::from_be_bytes([bytes[0], bytes[1]]))
}

/// Four bytes in network order.
pub(super) fn u32_at(message: &[u8], at: usize) -> Option<u32> {
    message.get(at..at + 4).map(|bytes| u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
}

/// Where the first question ends. Its name has nothing before it to point to, so a pointer is an error.
pub(super) fn question_end(message: &[u8]) -> Option<usize> {
    let mut at = HEADER;
    loop {
        match usize::from(*message.get(at)?) {
            0 => break,
            length @ 1..=63 => at += 1 + length,
            _ => return None,
        }
        if at + 1 - HEADER > MAX_NAME {
            return None;
        }
    }
    let end = at + 1 + 4;
    (end <= message.len()).then_some(end)
}

/// Where the name that begins at `at` ends. Follows no pointer, but takes only those that look backwards.
pub(super) fn name_end(message: &[u8], mut at: usize) -> Option<usize> {
    let start = at;
    loop {
        match *message.get(at)? {
            0 => return Some(at + 1),
            length @ 1..=63 => at += 1 + usize::from(length),
            0xc0.. => {
                let to = usize::from(u16_at(message, at)? & 0x3fff);
                return (HEADER..start.max(HEADER + 1)).contains(&to).then_some(at + 2);
            }
            _ => return None,
        }
        if at + 1 - start > MAX_NAME {
            return None;
        }
    }
}

/// One resource record, as offsets into its message.
#[derive(Debug, Clone, Copy)]
pub(super) struct Record {
    pub(super) start: usize,
    pub(super) kind: u16,
    /// Where class (2 bytes) and TTL (4) stand.
    pub(super) class_at: usize,
    pub(super) data_at: usize,
    pub(super) end: usize,
}

impl Record {
    /// Reads the record that begins at `start`.
    pub(super) fn read(message: &[u8], start: usize) -> Option<Self> {
        let at = name_end(message, start)?;
        let (kind, length) = (u16_at(message, at)?, u16_at(message, at + 8)?);
        let (data_at, end) = (at + 10, at + 10 + usize::from(length));
        (end <= message.len()).then_some(Self { start, kind, class_at: at + 2, data_at, end })
    }

    /// Reads this record as an OPT.
    pub(super) fn edns(&self, message: &[u8]) -> Option<Edns> {
        let (size, ttl) = (u16_at(message, self.class_at)?, u32_at(message, self.class_at + 2)?);
        Some(Edns { size, version: (ttl >> 16) as u8, dnssec_ok: ttl & 0x8000 != 0 })
    }
}

/// Finds the OPT record of a query; two of them, or one outside the additional section, are malformed.
fn edns(message: &[u8], mut at: usize) -> Result<Option<Edns>, Malformed> {
    let count = |at| u16_at(message, at).map_or(0, usize::from);
    let (before, all) = (count(6) + count(8), count(6) + count(8) + count(10));
    let mut found = None;
    for number in 0..all {
        let record = Record::read(message, at).ok_or(Malformed)?;
        if record.kind == kind::OPT {
            // RFC 6891 section 6.1.1: at most one, owned by the root.
            if found.is_some() || number < before || message[record.start] != 0 {
                return Err(Malformed);
            }
            options_are_sound(&message[record.data_at..record.end])?;
            found = record.edns(message);
        }
        at = record.end;
    }
    Ok(found)
}

fn options_are_sound(mut options: &[u8]) -> Result<(), Malformed> {
    while !options.is_empty() {
        let length = u16_at(options, 2).ok_or(Malformed)?;
        options = options.get(4 + usize::from(length)..).ok_or(Malformed)?;
    }
    Ok(())
}

#[cfg(test)]
#[path = "wire_tests.rs"]
mod tests;
