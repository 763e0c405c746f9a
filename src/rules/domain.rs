//! Conditions on the destination's name.
//!
//! A session's [`Name`] is lower-case, so payloads are made lower-case; what is not ASCII becomes punycode, because
//! that is what programs ask the DNS for.

use std::sync::Arc;

use super::{BadPayload, Built, Lookup, Match, Matcher, Params};
use crate::net::Name;
use crate::session::Session;

struct Exact(Name);
struct Suffix(Name);
struct Keyword(Box<str>);

pub(super) fn exact(payload: &str, _: Params) -> Built {
    Ok(Arc::new(Exact(name(payload)?)))
}

pub(super) fn suffix(payload: &str, _: Params) -> Built {
    Ok(Arc::new(Suffix(name(payload)?)))
}

pub(super) fn keyword(payload: &str, _: Params) -> Built {
    if payload.is_empty() {
        return Err(BadPayload { expected: "a part of a domain name", hint: None, harmless: false });
    }
    Ok(Arc::new(Keyword(ascii(payload).into())))
}

impl Matcher for Exact {
    fn matches(&self, session: &Session) -> Match {
        session.name().is_some_and(|name| *name == self.0).into()
    }

    fn lookup(&self) -> Option<Lookup<'_>> {
        Some(Lookup::Name(self.0.as_str()))
    }
}

impl Matcher for Suffix {
    fn matches(&self, session: &Session) -> Match {
        session.name().is_some_and(|name| is_below(name.as_str(), self.0.as_str())).into()
    }

    fn lookup(&self) -> Option<Lookup<'_>> {
        Some(Lookup::Suffix(self.0.as_str()))
    }
}

impl Matcher for Keyword {
    fn matches(&self, session: &Session) -> Match {
        session.name().is_some_and(|name| name.as_str().contains(&*self.0)).into()
    }
}

/// Whether `name` is `apex` or ends in `.apex`.
fn is_below(name: &str, apex: &str) -> bool {
    name.strip_suffix(apex).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

fn name(payload: &str) -> Result<Name, BadPayload> {
    const EXPECTED: &str = "a domain name";
    if payload.is_empty() {
        return Err(BadPayload { expected: EXPECTED, hint: None, harmless: false });
    }
    let harmless = |hint| BadPayload { expected: EXPECTED, hint, harmless: true };
    if payload.starts_with(['.', '+']) || payload.contains('*') {
        return Err(harmless(Some(
            "wildcards do not work here; DOMAIN-SUFFIX,example.com takes all names below it too",
        )));
    }
    Name::new(&ascii(payload)).map_err(|_| harmless(None))
}

/// The form in which names are compared: lower-case, in punycode where it is not ASCII. Text that has no such form stays
/// as it is and matches nothing.
#[must_use]
pub fn ascii(text: &str) -> String {
    let lower = text.to_lowercase();
    if lower.is_ascii() {
        return lower;
    }
    match hickory_proto::rr::Name::from_utf8(&lower) {
        Ok(name) => name.to_ascii(),
        Err(_) => lower,
    }
}
