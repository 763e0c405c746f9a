//! Conditions on ports.

use std::ops::RangeInclusive;
use std::sync::Arc;

use super::{BadPayload, Built, Match, Matcher, Params};
use crate::session::{Network, Session};

/// mihomo's limit on the ranges of one rule.
const MAX_RANGES: usize = 28;

struct Destination(Box<[RangeInclusive<u16>]>);
struct Source(Box<[RangeInclusive<u16>]>);

pub(super) fn destination(payload: &str, _: Params) -> Built {
    Ok(Arc::new(Destination(ranges(payload)?)))
}

pub(super) fn source(payload: &str, _: Params) -> Built {
    Ok(Arc::new(Source(ranges(payload)?)))
}

impl Matcher for Destination {
    fn matches(&self, session: &Session) -> Match {
        holds(&self.0, session, session.destination.port)
    }
}

impl Matcher for Source {
    fn matches(&self, session: &Session) -> Match {
        holds(&self.0, session, session.source.port())
    }
}

/// Echo requests have no ports: what stands in their place matches no rule.
fn holds(ranges: &[RangeInclusive<u16>], session: &Session, port: u16) -> Match {
    (session.network != Network::Icmp && ranges.iter().any(|range| range.contains(&port))).into()
}

/// `80/443/1000-2000`; a range written backwards is turned round.
fn ranges(payload: &str) -> Result<Box<[RangeInclusive<u16>]>, BadPayload> {
    let bad = |expected| BadPayload { expected, hint: None, harmless: false };
    let ranges: Option<Vec<_>> = payload.split('/').map(range).collect();
    let ranges = ranges.ok_or(bad("ports and ranges such as 80/443/1000-2000"))?;
    if ranges.len() > MAX_RANGES { Err(bad("at most 28 ports and ranges")) } else { Ok(ranges.into()) }
}

fn range(text: &str) -> Option<RangeInclusive<u16>> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let (first, last) = (number(first)?, number(last)?);
    Some(first.min(last)..=first.max(last))
}

fn number(text: &str) -> Option<u16> {
    let text = text.trim();
    if text.bytes().all(|byte| byte.is_ascii_digit()) { text.parse().ok() } else { None }
}
