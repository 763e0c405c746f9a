//! What a question is filed under: its name in lower case, its type, and the bits that change the answer.

use super::wire::{MAX_NAME, Query, bit};
use crate::net::Name;

/// A cache key on the stack: the wire name in lower case, two bytes of type, one of flags.
#[derive(Clone, Copy)]
pub(super) struct Key {
    bytes: [u8; MAX_NAME + 3],
    len: usize,
}

/// DNSSEC records are wanted.
const DNSSEC_OK: u8 = 1;
/// The upstream shall not check signatures itself.
const CHECKING_DISABLED: u8 = 2;

impl Key {
    /// The key of a client's question.
    pub(super) fn of(query: &Query<'_>) -> Self {
        let mut flags = 0;
        if query.dnssec_ok() {
            flags |= DNSSEC_OK;
        }
        if query.bits & bit::CD != 0 {
            flags |= CHECKING_DISABLED;
        }
        Self::build(query.name(), query.kind(), flags)
    }

    /// The key of a question of our own. None: the name has no room on the wire, which is true of no [`Name`].
    pub(super) fn own(name: &Name, kind: u16) -> Option<Self> {
        let mut wire = [0; MAX_NAME];
        let mut at = 0;
        for label in name.as_str().split('.') {
            *wire.get_mut(at)? = u8::try_from(label.len()).ok()?;
            wire.get_mut(at + 1..=at + label.len())?.copy_from_slice(label.as_bytes());
            at += 1 + label.len();
        }
        Some(Self::build(wire.get(..=at)?, kind, 0))
    }

    fn build(name: &[u8], kind: u16, flags: u8) -> Self {
        let mut key = Self { bytes: [0; MAX_NAME + 3], len: name.len() + 3 };
        key.bytes[..name.len()].copy_from_slice(name);
        // Length bytes are at most 63 and so are never letters.
        key.bytes[..name.len()].make_ascii_lowercase();
        key.bytes[name.len()..name.len() + 2].copy_from_slice(&kind.to_be_bytes());
        key.bytes[name.len() + 2] = flags;
        key
    }

    /// The bytes that the cache is indexed by.
    pub(super) fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

/// The parts of a key's bytes again.
#[derive(Clone, Copy)]
pub(super) struct Parts<'a> {
    /// The name in wire form, lower case.
    pub(super) name: &'a [u8],
    pub(super) kind: u16,
    pub(super) dnssec_ok: bool,
    pub(super) checking_disabled: bool,
}

impl<'a> Parts<'a> {
    /// Splits what [`Key::as_bytes`] gave.
    pub(super) fn of(key: &'a [u8]) -> Self {
        let (name, rest) = key.split_at(key.len() - 3);
        Self {
            name,
            kind: u16::from_be_bytes([rest[0], rest[1]]),
            dnssec_ok: rest[2] & DNSSEC_OK != 0,
            checking_disabled: rest[2] & CHECKING_DISABLED != 0,
        }
    }
}

/// A wire name written with dots, in lower case, on the stack.
pub(super) struct Dotted {
    bytes: [u8; MAX_NAME],
    len: usize,
}

impl Dotted {
    /// None for the root and for names with bytes that no host name carries: those are only ever forwarded.
    pub(super) fn new(wire: &[u8]) -> Option<Self> {
        let mut dotted = Self { bytes: [0; MAX_NAME], len: 0 };
        let mut at = 0;
        loop {
            let length = usize::from(*wire.get(at)?);
            if length == 0 {
                break;
            }
            let label = wire.get(at + 1..at + 1 + length)?;
            if dotted.len > 0 {
                dotted.bytes[dotted.len] = b'.';
                dotted.len += 1;
            }
            for byte in label {
                // The same bytes that `Name::new` refuses, and the dot, which would shift the labels.
                if !byte.is_ascii_graphic() || b"/:@[]\\\".".contains(byte) {
                    return None;
                }
                *dotted.bytes.get_mut(dotted.len)? = byte.to_ascii_lowercase();
                dotted.len += 1;
            }
            at += 1 + length;
        }
        (dotted.len > 0).then_some(dotted)
    }

    /// The text, without a trailing dot.
    pub(super) fn as_str(&self) -> &str {
        // Only ASCII went in.
        std::str::from_utf8(&self.bytes[..self.len]).unwrap_or_default()
    }
}
