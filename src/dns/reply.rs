//! Answers that we write ourselves. Each is far below 512 bytes, so none needs cutting.

use std::net::IpAddr;

use super::wire::{EDNS_SIZE, HEADER, IN, Query, bit, kind, rcode};

/// A pointer to the question's name, which always stands right behind the header (RFC 1035 section 4.1.4).
const QUESTION_NAME: u16 = 0xc000 | HEADER as u16;

/// RFC 8914, the reasons we give with a failure.
pub(super) mod reason {
    /// 0, with a text of ours.
    pub(crate) const OTHER: u16 = 0;
    /// 22: nobody could be reached.
    pub(crate) const NO_REACHABLE_AUTHORITY: u16 = 22;
}

impl Query<'_> {
    /// An answer of one address.
    pub(super) fn address(&self, ip: IpAddr, ttl: u32, out: &mut Vec<u8>) {
        match ip {
            IpAddr::V4(ip) => self.record(kind::A, ttl, &ip.octets(), out),
            IpAddr::V6(ip) => self.record(kind::AAAA, ttl, &ip.octets(), out),
        }
    }

    /// The name behind an address.
    pub(super) fn pointer(&self, name: &str, ttl: u32, out: &mut Vec<u8>) {
        let mut data = Vec::with_capacity(name.len() + 2);
        for label in name.split('.') {
            // `Name` holds labels to 63 bytes.
            data.push(label.len() as u8);
            data.extend_from_slice(label.as_bytes());
        }
        data.push(0);
        self.record(kind::PTR, ttl, &data, out);
    }

    /// The answer to ANY that RFC 8482 section 4.2 lets us give.
    pub(super) fn any(&self, ttl: u32, out: &mut Vec<u8>) {
        self.record(kind::HINFO, ttl, b"\x07RFC8482\x00", out);
    }

    /// No record: `code` says whether the name exists (NODATA) or not, or what went wrong.
    pub(super) fn empty(&self, code: u16, out: &mut Vec<u8>) {
        self.header(code, 0, out);
        self.opt(code, &[], out);
    }

    /// SERVFAIL, with the reason for those who ask with EDNS.
    pub(super) fn failure(&self, code: u16, why: &str, out: &mut Vec<u8>) {
        // The reason shares 512 bytes with a question of up to 259.
        let why = &why.as_bytes()[..why.len().min(120)];
        let mut option = Vec::with_capacity(6 + why.len());
        for word in [EXTENDED_ERROR, 2 + why.len() as u16, code] {
            option.extend_from_slice(&word.to_be_bytes());
        }
        option.extend_from_slice(why);
        self.header(rcode::SERV_FAIL, 0, out);
        self.opt(rcode::SERV_FAIL, &option, out);
    }

    fn record(&self, kind: u16, ttl: u32, data: &[u8], out: &mut Vec<u8>) {
        self.header(rcode::NO_ERROR, 1, out);
        for word in [QUESTION_NAME, kind, IN] {
            out.extend_from_slice(&word.to_be_bytes());
        }
        out.extend_from_slice(&ttl.to_be_bytes());
        // A name of 255 bytes is the longest data written here.
        out.extend_from_slice(&(data.len() as u16).to_be_bytes());
        out.extend_from_slice(data);
        self.opt(rcode::NO_ERROR, &[], out);
    }

    /// Header and question of a reply of ours with `answers` records.
    fn header(&self, code: u16, answers: u16, out: &mut Vec<u8>) {
        let kept = self.bits & (bit::OPCODE | bit::RD | bit::CD);
        let bits = bit::QR | bit::RA | kept | (code & bit::RCODE);
        let questions = u16::from(!self.question.is_empty());
        out.clear();
        for word in [self.id, bits, questions, answers, 0, u16::from(self.edns.is_some())] {
            out.extend_from_slice(&word.to_be_bytes());
        }
        out.extend_from_slice(self.question);
    }

    /// The OPT record that a query with one is owed (RFC 6891 section 6.1.1). Counted in the header already.
    pub(super) fn opt(&self, code: u16, options: &[u8], out: &mut Vec<u8>) {
        let Some(edns) = self.edns else { return };
        out.push(0);
        out.extend_from_slice(&kind::OPT.to_be_bytes());
        out.extend_from_slice(&EDNS_SIZE.to_be_bytes());
        // The upper eight of twelve bits of the code, version 0, DO copied (RFC 3225 section 3).
        let ttl = u32::from(code >> 4) << 24 | u32::from(edns.dnssec_ok) << 15;
        out.extend_from_slice(&ttl.to_be_bytes());
        out.extend_from_slice(&(options.len() as u16).to_be_bytes());
        out.extend_from_slice(options);
    }
}

/// The option code of an extended error (RFC 8914 section 2).
pub(super) const EXTENDED_ERROR: u16 = 15;
/// Bytes of an OPT record without options.
pub(super) const OPT_LEN: usize = 11;
