//! The rule types. Pure: no look-ups and no I/O while matching; what is missing is named and asked for again later.
//!
//! A rule type is one [`Matcher`] in a file here and one entry in [`TYPES`].

mod address;
mod domain;
mod line;
mod network;
mod port;

use std::sync::Arc;

use crate::session::{FactKind, Session};

pub use domain::ascii;
pub use line::{Line, NotYet, Rule, RuleError, parse};

/// What a rule says of a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Match {
    /// The rule applies.
    Match,
    /// The rule does not apply.
    Miss,
    /// The rule can only tell once this fact is known or has failed.
    Needs(FactKind),
}

impl From<bool> for Match {
    fn from(applies: bool) -> Self {
        if applies { Self::Match } else { Self::Miss }
    }
}

/// One condition on a session.
pub trait Matcher: Send + Sync {
    /// Whether the condition holds for `session`, or which fact it lacks.
    fn matches(&self, session: &Session) -> Match;

    /// Where an index finds this condition. `None`: it must be asked.
    fn lookup(&self) -> Option<Lookup<'_>> {
        None
    }
}

/// A condition that a hash table answers as well as [`Matcher::matches`] does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lookup<'a> {
    /// The destination's name is this one.
    Name(&'a str),
    /// The destination's name is this one or lies below it.
    Suffix(&'a str),
}

/// A rule type: the word that begins the line, and how the rest becomes a condition.
pub struct Type {
    /// The word, in upper case.
    pub name: &'static str,
    /// What it matches, in one line.
    pub description: &'static str,
    build: Build,
}

/// Payload and parameters -> condition.
type Build = fn(&str, Params) -> Built;
type Built = Result<Arc<dyn Matcher>, BadPayload>;

impl std::fmt::Debug for Type {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Type").field("name", &self.name).finish_non_exhaustive()
    }
}

/// The parameters that may follow the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Params {
    /// `no-resolve`: the rule asks for no look-up; an address that is known anyway still matches.
    pub no_resolve: bool,
    /// `src`: the rule looks at the source instead of the destination.
    pub source: bool,
}

/// Why a payload does not fit its type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BadPayload {
    /// What was expected.
    pub expected: &'static str,
    /// What to write instead.
    pub hint: Option<&'static str>,
    /// Whether the rule is well-formed and merely matches nothing, which is no reason to refuse a profile.
    pub harmless: bool,
}

/// The rule types that work.
pub const TYPES: &[Type] = &[
    Type { name: "DOMAIN", description: "the destination's name is the payload", build: domain::exact },
    Type {
        name: "DOMAIN-SUFFIX",
        description: "the destination's name is the payload or lies below it",
        build: domain::suffix,
    },
    Type { name: "DOMAIN-KEYWORD", description: "the destination's name contains the payload", build: domain::keyword },
    Type { name: "IP-CIDR", description: "the destination's address lies in the prefix", build: address::destination },
    Type { name: "IP-CIDR6", description: "another word for IP-CIDR", build: address::destination },
    Type { name: "SRC-IP-CIDR", description: "the source address lies in the prefix", build: address::source },
    Type { name: "SRC-PORT", description: "the source port is one of the ports or ranges", build: port::source },
    Type {
        name: "DST-PORT",
        description: "the destination port is one of the ports or ranges",
        build: port::destination,
    },
    Type { name: "NETWORK", description: "the network is tcp, udp or icmp", build: network::build },
    Type { name: "MATCH", description: "always", build: |_, _| Ok(Arc::new(Always)) },
];

/// Rule types of mihomo that load with a warning and match nothing yet.
pub const NOT_YET: &[&str] = &[
    "DOMAIN-WILDCARD",
    "DOMAIN-REGEX",
    "GEOSITE",
    "GEOIP",
    "SRC-GEOIP",
    "IP-SUFFIX",
    "SRC-IP-SUFFIX",
    "IP-ASN",
    "SRC-IP-ASN",
    "IN-PORT",
    "IN-TYPE",
    "IN-USER",
    "IN-NAME",
    "DSCP",
    "UID",
    "PROCESS-NAME",
    "PROCESS-NAME-REGEX",
    "PROCESS-NAME-WILDCARD",
    "PROCESS-PATH",
    "PROCESS-PATH-REGEX",
    "PROCESS-PATH-WILDCARD",
    "RULE-SET",
    "SUB-RULE",
    "AND",
    "OR",
    "NOT",
    "REMATCH-NAME",
];

/// `MATCH`.
struct Always;

impl Matcher for Always {
    fn matches(&self, _: &Session) -> Match {
        Match::Match
    }
}

#[cfg(test)]
pub(crate) mod tests;
