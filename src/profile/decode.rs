//! How YAML scalars become Rust values, as forgiving as mihomo: numbers may be quoted, one value may stand for a list.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::num::NonZeroU16;

use ipnet::IpNet;

use super::node::{Node, Value};
use super::report::Report;
use crate::net::{Host, Name};
use crate::rules::ascii;

/// A value that can be read from a [`Node`].
pub trait Decode: Sized {
    /// Reads `node`, which stands at the key path `path`. Whoever returns `None` has said why in `report`.
    fn decode(node: &Node, path: &str, report: &mut Report) -> Option<Self>;
}

/// Says in `report` that `node` is not what was `expected`.
pub fn mismatch(node: &Node, path: &str, report: &mut Report, expected: &str) {
    report.error(node, path, format!("expected {expected}, found {}", node.found()));
}

/// Reads a scalar with `read`, or says what was `expected`.
pub fn scalar<T>(
    node: &Node,
    path: &str,
    report: &mut Report,
    expected: &str,
    read: impl FnOnce(&str) -> Option<T>,
) -> Option<T> {
    let value = node.text().and_then(|text| read(text.trim()));
    if value.is_none() {
        mismatch(node, path, report, expected);
    }
    value
}

/// Implements [`Decode`] for types read from a scalar's text.
macro_rules! decode_scalar {
    ($($type:ty, $expected:expr, $read:expr;)*) => {$(
        impl Decode for $type {
            fn decode(node: &Node, path: &str, report: &mut Report) -> Option<Self> {
                scalar(node, path, report, &$expected, $read)
            }
        }
    )*};
}

decode_scalar! {
    bool, "true or false", boolean;
    u8, format!("a whole number from 0 to {}", u8::MAX), |text| integer(text)?.try_into().ok();
    u16, format!("a whole number from 0 to {}", u16::MAX), |text| integer(text)?.try_into().ok();
    u32, format!("a whole number from 0 to {}", u32::MAX), |text| integer(text)?.try_into().ok();
    u64, "a whole number that is not negative", |text| integer(text)?.try_into().ok();
    i64, "a whole number", |text| integer(text)?.try_into().ok();
    NonZeroU16, "a port from 1 to 65535", |text| NonZeroU16::new(integer(text)?.try_into().ok()?);
    IpAddr, "an IP address", |text| text.parse().ok();
    Ipv4Addr, "an IPv4 address", |text| text.parse().ok();
    Ipv6Addr, "an IPv6 address", |text| text.parse().ok();
    IpNet, "a prefix such as 192.168.0.0/16 or fd00::/8", prefix;
    Name, "a domain name", |text| Name::new(&ascii(text)).ok();
    Host, "a domain name or an IP address", host;
}

impl Decode for String {
    fn decode(node: &Node, path: &str, report: &mut Report) -> Option<Self> {
        if node.text().is_none() {
            mismatch(node, path, report, "a text");
        }
        node.text().map(ToOwned::to_owned)
    }
}

impl Decode for Node {
    fn decode(node: &Node, _: &str, _: &mut Report) -> Option<Self> {
        Some(node.clone())
    }
}

impl<T: Decode> Decode for Vec<T> {
    /// Every item is read, so that every wrong one is reported.
    fn decode(node: &Node, path: &str, report: &mut Report) -> Option<Self> {
        let Value::Sequence(items) = &node.value else {
            return if node.is_null() {
                Some(Vec::new())
            } else {
                T::decode(node, path, report).map(|item| vec![item])
            };
        };
        let read: Vec<Option<T>> = items
            .iter()
            .enumerate()
            .map(|(index, item)| T::decode(item, &format!("{path}[{index}]"), report))
            .collect();
        read.into_iter().collect()
    }
}

/// The booleans of YAML 1.1, which mihomo takes where it wants one.
fn boolean(text: &str) -> Option<bool> {
    match text.to_ascii_lowercase().as_str() {
        "true" | "yes" | "y" | "on" | "1" => Some(true),
        "false" | "no" | "n" | "off" | "0" => Some(false),
        _ => None,
    }
}

/// A whole number as YAML writes it: decimal, `0x`, `0o` or `0b`, with `_` between digits.
pub(super) fn integer(text: &str) -> Option<i128> {
    let (negative, digits) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    let (radix, digits) = match digits.get(..2) {
        Some("0x" | "0X") => (16, &digits[2..]),
        Some("0o" | "0O") => (8, &digits[2..]),
        Some("0b" | "0B") => (2, &digits[2..]),
        _ => (10, digits),
    };
    if !digits.starts_with(|c: char| c.is_digit(radix)) {
        return None;
    }
    let number = i128::from_str_radix(&digits.replace('_', ""), radix).ok()?;
    Some(if negative { -number } else { number })
}

/// A host as people write it: names that are not ASCII in the form that the DNS knows, and no mistyped address.
pub(super) fn host(text: &str) -> Option<Host> {
    let host = Host::parse(&ascii(text)).ok()?;
    let plausible = match &host {
        Host::Ip(_) => true,
        Host::Name(name) => !ends_in_a_number(name.as_str()) && !name.as_str().contains('*'),
    };
    plausible.then_some(host)
}

/// Whether the last label is a number, as in `256.1.1.1` and `0x7f.1`: no top-level domain is one, and programs read
/// such a text as an address (RFC 3696 section 2, the URL standard's IPv4 parser).
fn ends_in_a_number(name: &str) -> bool {
    let last = name.rsplit('.').next().unwrap_or_default();
    let digits = last.strip_prefix("0x").unwrap_or(last);
    let radix = if digits.len() == last.len() { 10 } else { 16 };
    digits.chars().all(|digit| digit.is_digit(radix))
}

/// A prefix; an address alone stands for itself.
pub(super) fn prefix(text: &str) -> Option<IpNet> {
    text.parse().ok().or_else(|| text.parse::<IpAddr>().ok().map(IpNet::from))
}
