//! The lines of a journal, as text. From version 3 on each bears the checksum of the one that it follows, and the first
//! line has one too: whatever is changed, taken out or put elsewhere, a later line tells of it. Only what is missing at the
//! end is missed by none.

use std::io;

use super::{Place, Record};

/// The version that this program writes. One that only knew the first would pass over a kill switch's table; up to the
/// second a line says nothing of the others, and the first line has no checksum.
pub(super) const VERSION: u32 = 3;
/// The oldest that it reads, and all between.
pub(super) const OLDEST: u32 = 1;
/// The first in which the lines are a chain.
const CHAINED: u32 = 3;
pub(super) const MAGIC: &str = "tunproxy-journal";

/// Where a journal goes on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct End {
    /// What the file is written in, and goes on in.
    pub(super) version: u32,
    /// The checksum of its last whole line.
    pub(super) sum: u64,
    /// Where that line ends, in bytes from the beginning; 0 where a new file is to be made.
    pub(super) whole: u64,
    /// That line has its line break.
    pub(super) broken: bool,
}

impl Default for End {
    fn default() -> Self {
        Self { version: VERSION, sum: 0, whole: 0, broken: true }
    }
}

impl End {
    /// Whether each line names the one that it follows.
    pub(super) fn is_chained(&self) -> bool {
        self.version >= CHAINED
    }

    /// The first line of a new journal, which goes on behind it.
    ///
    /// # Errors
    /// `place` cannot be said in JSON.
    pub(super) fn first(place: &Place) -> io::Result<(String, Self)> {
        let json = serde_json::to_string(place).map_err(io::Error::other)?;
        let sum = first_sum(VERSION, &json);
        let text = format!("{MAGIC} {VERSION} {sum:016x} {json}\n");
        let whole = text.len() as u64;
        Ok((text, Self { sum, whole, ..Self::default() }))
    }

    /// The lines of `records`, each with its line break, behind which it goes on then.
    pub(super) fn add(&mut self, records: &[Record]) -> String {
        let mut text = if self.broken { String::new() } else { "\n".to_owned() };
        for record in records {
            // These types have nothing that JSON cannot say; a line without a record would be refused.
            let json = serde_json::to_string(record).unwrap_or_default();
            let said = if self.is_chained() { format!("{:016x} {json}", self.sum) } else { json };
            self.sum = checksum(said.as_bytes());
            text.push_str(&format!("{:016x} {said}\n", self.sum));
        }
        self.broken = true;
        self.whole += text.len() as u64;
        text
    }
}

/// One line of a journal, without its line break.
pub(super) enum Line {
    Empty,
    Whole(Record, Link),
    /// A part of a line, or nothing of ours.
    Broken,
    /// A line from beginning to end, but not as it was written.
    Changed(&'static str),
}

/// The place of a line in the chain.
pub(super) struct Link {
    /// Its own checksum.
    pub(super) sum: u64,
    /// That of the line before it; `None` where a line says nothing of others.
    pub(super) follows: Option<u64>,
}

impl Line {
    /// Reads `line` of a journal that is a chain, or is none.
    pub(super) fn of(line: &[u8], chained: bool) -> Self {
        let Ok(text) = std::str::from_utf8(line) else { return Self::Broken };
        match text {
            "" => Self::Empty,
            text if chained => Self::linked(text),
            text => Self::alone(text),
        }
    }

    fn linked(text: &str) -> Self {
        let split = || {
            let (sum, said) = text.split_once(' ')?;
            let (follows, json) = said.split_once(' ')?;
            Some((digits(sum)?, digits(follows)?, said, json))
        };
        match split() {
            Some((sum, follows, said, json)) if sum == checksum(said.as_bytes()) => {
                Self::known(json, Link { sum, follows: Some(follows) })
            }
            Some((.., json)) if is_json(json) => Self::Changed(WRONG_SUM),
            _ => Self::Broken,
        }
    }

    fn alone(text: &str) -> Self {
        let parts = text.split_once(' ').and_then(|(sum, json)| Some((u64::from_str_radix(sum, 16).ok()?, json)));
        match parts {
            // No beginning of an object is an object: what is torn is no JSON.
            Some((sum, json)) if is_json(json) => match sum == checksum(json.as_bytes()) {
                true => Self::known(json, Link { sum, follows: None }),
                false => Self::Changed(WRONG_SUM),
            },
            _ => Self::Broken,
        }
    }

    fn known(json: &str, link: Link) -> Self {
        match serde_json::from_str(json) {
            Ok(record) => Self::Whole(record, link),
            Err(_) => Self::Changed("is nothing that this version knows"),
        }
    }
}

const WRONG_SUM: &str = "does not have the checksum that it was written with";

/// Whether `line` may be what a crash left of a line of a chain: it begins as one, and does not come to its end.
pub(super) fn is_beginning(line: &[u8]) -> bool {
    let (sums, json) = line.split_at(line.len().min(34));
    let right = |(at, byte): (usize, &u8)| match at {
        16 | 33 => *byte == b' ',
        _ => matches!(byte, b'0'..=b'9' | b'a'..=b'f'),
    };
    // It may end within a character.
    let text = match std::str::from_utf8(json) {
        Ok(text) => Some(text),
        Err(error) if error.error_len().is_none() => std::str::from_utf8(&json[..error.valid_up_to()]).ok(),
        Err(_) => None,
    };
    let ends_early = |text: &str| {
        let read = serde_json::from_str::<serde::de::IgnoredAny>(text);
        text.is_empty() || text.starts_with('{') && read.is_err_and(|error| error.is_eof())
    };
    sums.iter().enumerate().all(right) && text.is_some_and(ends_early)
}

fn is_json(text: &str) -> bool {
    serde_json::from_str::<serde::de::IgnoredAny>(text).is_ok()
}

/// The checksum of a chain's first line, which says `json`.
pub(super) fn first_sum(version: u32, json: &str) -> u64 {
    checksum(format!("{MAGIC} {version} {json}").as_bytes())
}

/// A checksum exactly as it is written: no other digits stand for the same.
pub(super) fn digits(text: &str) -> Option<u64> {
    let sum = u64::from_str_radix(text, 16).ok()?;
    (format!("{sum:016x}") == text).then_some(sum)
}

/// FNV-1a, 64 bits: enough to tell a torn or an edited line from a whole one. It is no signature.
pub(super) fn checksum(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}
