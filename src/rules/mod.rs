//! The rule types. Pure: no look-ups and no I/O while matching; what is missing is named and asked for again later.

use crate::session::{FactKind, Session};

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
}
