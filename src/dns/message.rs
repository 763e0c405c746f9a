//! An upstream's answer, kept as it came: only id, letter case, TTLs and the OPT record change on the way to a client.

use std::net::IpAddr;
use std::sync::Arc;

use hickory_proto::op::Message as Parsed;
use hickory_proto::rr::RData;

use super::reply::{EXTENDED_ERROR, OPT_LEN};
use super::wire::{HEADER, Malformed, Query, Record, bit, kind, question_end, rcode, u16_at, u32_at};

/// Nothing is kept longer than a day, whatever its TTL says (RFC 8767 section 4 suggests one to three).
const MAX_LIFETIME: u32 = 86_400;
/// How long a failure that an upstream reported is repeated to others who ask, in seconds.
const FAILURE_LIFETIME: u32 = 5;
/// The longest extended error that travels on.
const MAX_EXTENDED_ERROR: usize = 256;
/// How many aliases are followed from the name asked for to an address.
const MAX_ALIASES: usize = 16;

/// Where one record's TTL stands and where the record ends.
#[derive(Debug, Clone, Copy)]
struct Cut {
    ttl_at: u16,
    end: u16,
}

/// One answer, without its OPT record.
#[derive(Debug)]
pub(super) struct Message {
    bytes: Box<[u8]>,
    question_end: usize,
    cuts: Box<[Cut]>,
    /// Records in the answer, authority and additional sections.
    counts: [u16; 3],
    /// All twelve bits.
    pub(super) code: u16,
    extended_error: Box<[u8]>,
    /// Seconds for which the answer may be given again; 0 for not at all.
    pub(super) lifetime: u32,
    /// The addresses it gives to the name asked for, aliases followed.
    pub(super) addresses: Arc<[IpAddr]>,
    /// It only says who would know (RFC 1034 section 4.3.2), as servers do that look nothing up for others.
    pub(super) is_referral: bool,
}

impl Message {
    /// Reads a response whose header and question were checked already.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, Malformed> {
        if bytes.len() > usize::from(u16::MAX) {
            return Err(Malformed);
        }
        let count = |at| u16_at(bytes, at).ok_or(Malformed);
        let question_end = question_end(bytes).ok_or(Malformed)?;
        let mut message = Self {
            bytes: bytes.into(),
            question_end,
            cuts: Box::default(),
            counts: [0; 3],
            code: count(2)? & bit::RCODE,
            extended_error: Box::default(),
            lifetime: 0,
            addresses: Arc::default(),
            is_referral: false,
        };
        let mut records = Vec::new();
        let mut at = question_end;
        'sections: for (section, counted) in [6, 8, 10].into_iter().enumerate() {
            for _ in 0..count(counted)? {
                let record = Record::read(bytes, at).ok_or(Malformed)?;
                match record.kind {
                    // OPT is ours to write, and what follows it may only be a signature of the hop (RFC 8945).
                    kind::OPT | kind::TSIG if section == 2 => {
                        message.read_opt(&record);
                        break 'sections;
                    }
                    kind::OPT | kind::TSIG => return Err(Malformed),
                    _ => records.push(record),
                }
                message.counts[section] += 1;
                at = record.end;
            }
        }
        message.bytes = bytes[..at].into();
        message.cuts = records
            .iter()
            // Offsets into at most 65 535 bytes.
            .map(|record| Cut { ttl_at: record.class_at as u16 + 2, end: record.end as u16 })
            .collect();
        message.lifetime = message.limit_lifetime(&records);
        message.addresses = message.follow(bytes);
        message.is_referral = message.refers(&records);
        Ok(message)
    }

    /// Neither from who knows nor from who would ask, no answer, and nameservers in the place of an SOA (RFC 2308 section 2.2).
    fn refers(&self, records: &[Record]) -> bool {
        let says = |kind| records.iter().take(usize::from(self.counts[1])).any(|record| record.kind == kind);
        let bits = u16_at(&self.bytes, 2).unwrap_or(0);
        self.code == rcode::NO_ERROR
            && bits & (bit::AA | bit::RA) == 0
            && self.counts[0] == 0
            && says(kind::NS)
            && !says(kind::SOA)
    }

    fn read_opt(&mut self, record: &Record) {
        if record.kind != kind::OPT {
            return;
        }
        self.code |= u16::from(self.bytes[record.class_at + 2]) << 4;
        let mut options = &self.bytes[record.data_at..record.end];
        while let (Some(code), Some(length)) = (u16_at(options, 0), u16_at(options, 2)) {
            let end = 4 + usize::from(length);
            let Some(option) = options.get(..end) else { return };
            if code == EXTENDED_ERROR && end <= MAX_EXTENDED_ERROR {
                self.extended_error = option.into();
                return;
            }
            options = &options[end..];
        }
    }

    /// The type that was asked for.
    fn asked(&self) -> u16 {
        u16_at(&self.bytes, self.question_end - 4).unwrap_or(0)
    }

    fn ttl(&self, record: &Record) -> u32 {
        let ttl = u32_at(&self.bytes, record.class_at + 2).unwrap_or(0);
        // RFC 2181 section 8: a TTL with the top bit set counts as zero.
        if ttl > i32::MAX as u32 { 0 } else { ttl }
    }

    /// Works out how long the answer keeps, and writes a negative answer's real TTL into its SOA.
    fn limit_lifetime(&mut self, records: &[Record]) -> u32 {
        if self.code != rcode::NO_ERROR && self.code != rcode::NX_DOMAIN {
            return FAILURE_LIFETIME;
        }
        let (answers, rest) = records.split_at(usize::from(self.counts[0]));
        let authority = &rest[..usize::from(self.counts[1])];
        let asked = self.asked();
        let positive =
            self.code == rcode::NO_ERROR && answers.iter().any(|record| record.kind == asked || asked == kind::ANY);
        let mut lifetime = answers.iter().chain(authority).map(|record| self.ttl(record)).min();
        if !positive {
            // RFC 2308 section 5: the smaller of the SOA's TTL and its last field; without an SOA it is not kept.
            let Some(soa) = authority.iter().find(|record| record.kind == kind::SOA) else { return 0 };
            let minimum = soa.end.checked_sub(4).filter(|at| *at >= soa.data_at);
            let minimum = minimum.and_then(|at| u32_at(&self.bytes, at)).unwrap_or(0);
            let negative = self.ttl(soa).min(minimum).min(MAX_LIFETIME);
            let at = soa.class_at + 2;
            self.bytes[at..at + 4].copy_from_slice(&negative.to_be_bytes());
            lifetime = lifetime.map(|lifetime| lifetime.min(negative));
        }
        lifetime.unwrap_or(0).min(MAX_LIFETIME)
    }

    /// The addresses that the answer section gives to the name asked for, one alias after the other.
    fn follow(&self, bytes: &[u8]) -> Arc<[IpAddr]> {
        if self.code != rcode::NO_ERROR || !matches!(self.asked(), kind::A | kind::AAAA) {
            return Arc::default();
        }
        let Ok(parsed) = Parsed::from_vec(bytes) else { return Arc::default() };
        let Some(question) = parsed.queries.first() else { return Arc::default() };
        let mut owner = question.name().clone();
        let mut addresses = Vec::new();
        for _ in 0..MAX_ALIASES {
            let mut alias = None;
            for record in parsed.answers.iter().filter(|record| record.name == owner) {
                match &record.data {
                    RData::CNAME(target) => alias = Some(target.0.clone()),
                    data => addresses.extend(data.ip_addr().filter(|ip| ip.is_ipv4() == (self.asked() == kind::A))),
                }
            }
            match alias {
                Some(target) if addresses.is_empty() => owner = target,
                _ => break,
            }
        }
        let mut seen = std::collections::HashSet::new();
        addresses.retain(|ip| seen.insert(*ip));
        addresses.into()
    }

    /// Whether it says something of the name: an address, where one was asked for.
    pub(super) fn has_data(&self) -> bool {
        match self.asked() {
            kind::A | kind::AAAA => !self.addresses.is_empty(),
            _ => self.code == rcode::NO_ERROR && self.counts[0] > 0,
        }
    }

    /// Bytes that it takes.
    pub(super) fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether the upstream failed, so that another one should be heard.
    pub(super) fn is_failure(&self) -> bool {
        self.code != rcode::NO_ERROR && self.code != rcode::NX_DOMAIN
    }

    /// Writes the answer for one client, `age` seconds after it came, within the client's limit; the additional
    /// section only with `extras`.
    pub(super) fn fit(&self, client: &Query<'_>, age: u32, extras: bool, out: &mut Vec<u8>) {
        let opt = if client.edns.is_some() { OPT_LEN } else { 0 };
        let (keep, truncated) = self.keep(client, client.limit().saturating_sub(opt), extras);
        let end = keep.checked_sub(1).map_or(self.question_end, |last| usize::from(self.cuts[last].end));
        let mut bits = u16_at(&self.bytes, 2).unwrap_or(0) & !(bit::RCODE | bit::TC | bit::RD | bit::AD | bit::CD);
        bits |= bit::QR | bit::RA | (client.bits & (bit::RD | bit::CD)) | (self.code & bit::RCODE);
        // RFC 6840 section 5.8: AD is for those who asked for it.
        if client.bits & bit::AD != 0 || client.dnssec_ok() {
            bits |= u16_at(&self.bytes, 2).unwrap_or(0) & bit::AD;
        }
        if truncated {
            bits |= bit::TC;
        }
        let counts = self.counts_of(keep);
        out.clear();
        let additional = counts[2] + u16::from(client.edns.is_some());
        for word in [client.id, bits, 1, counts[0], counts[1], additional] {
            out.extend_from_slice(&word.to_be_bytes());
        }
        out.extend_from_slice(&self.bytes[HEADER..end]);
        // The client's own letters (0x20): same length, so that pointers into the question stay right.
        if HEADER + client.question.len() == self.question_end {
            out[HEADER..self.question_end].copy_from_slice(client.question);
        }
        for cut in &self.cuts[..keep] {
            let at = usize::from(cut.ttl_at);
            let ttl = u32_at(&self.bytes, at).unwrap_or(0).saturating_sub(age);
            out[at..at + 4].copy_from_slice(&ttl.to_be_bytes());
        }
        let fits = out.len() + opt + self.extended_error.len() <= client.limit();
        client.opt(self.code, if fits { &self.extended_error } else { &[] }, out);
    }

    /// How many records go out within `budget` bytes, and whether one is missing that the client needs.
    fn keep(&self, client: &Query<'_>, budget: usize, extras: bool) -> (usize, bool) {
        let [answers, authority, _] = self.counts.map(usize::from);
        let all = if extras { self.cuts.len() } else { answers + authority };
        let fitting = self.cuts.partition_point(|cut| usize::from(cut.end) <= budget).min(all);
        if fitting == all {
            (fitting, false)
        } else if fitting >= answers + authority {
            // The additional section is a courtesy (RFC 2181 section 9).
            (answers + authority, false)
        } else if fitting >= answers && answers > 0 && !client.dnssec_ok() {
            // So are the nameservers of an answer, but not the proofs of a signed one.
            (answers, false)
        } else {
            // As many whole records as fit, for stubs that never ask again over TCP.
            (fitting.min(answers), true)
        }
    }

    fn counts_of(&self, keep: usize) -> [u16; 3] {
        let mut left = keep as u16;
        self.counts.map(|count| {
            let kept = count.min(left);
            left -= kept;
            kept
        })
    }
}

#[cfg(test)]
#[path = "message_tests.rs"]
mod tests;
