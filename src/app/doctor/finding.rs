//! What was found: how bad, what, and what to do.

use serde::Serialize;

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Something does not work.
    Problem,
    /// Something may not work, or works less well.
    Warning,
    /// As it should be.
    Fine,
}

/// One thing that a check found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// The check.
    pub check: &'static str,
    /// How bad it is.
    pub severity: Severity,
    /// What it is, in one sentence.
    pub what: String,
    /// What to do about it, in one sentence; empty where all is well.
    #[serde(rename = "do")]
    pub advice: String,
}

impl Finding {
    /// Something that does not work.
    pub(super) fn problem(what: impl Into<String>, advice: impl Into<String>) -> Self {
        Self::new(Severity::Problem, what.into(), advice.into())
    }

    /// Something that may not work.
    pub(super) fn warning(what: impl Into<String>, advice: impl Into<String>) -> Self {
        Self::new(Severity::Warning, what.into(), advice.into())
    }

    /// Something that is as it should be.
    pub(super) fn fine(what: impl Into<String>) -> Self {
        Self::new(Severity::Fine, what.into(), String::new())
    }

    fn new(severity: Severity, what: String, advice: String) -> Self {
        Self { check: "", severity, what, advice }
    }
}
