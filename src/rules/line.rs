//! The grammar of a rule line: `TYPE,payload,target[,params…]`, or `MATCH,target`.

use std::fmt;
use std::sync::Arc;

use super::{BadPayload, Matcher, NOT_YET, Params, TYPES};

/// A rule that works.
#[derive(Clone)]
pub struct Rule {
    /// The type, one of the names in [`TYPES`].
    pub kind: &'static str,
    /// What the type looks for, as written; empty for `MATCH`.
    pub payload: Arc<str>,
    /// The name of the proxy, the group or the built-in target that it sends to.
    pub target: Arc<str>,
    /// The whole line as written.
    pub text: Arc<str>,
    /// The line in the profile, from 1; 0 when it comes from elsewhere.
    pub line: u32,
    /// The condition.
    pub matcher: Arc<dyn Matcher>,
    /// Parameters that this type does not know, or that do nothing for it.
    pub ignored: Vec<String>,
}

impl fmt::Debug for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (line {})", self.text, self.line)
    }
}

/// What a rule line is.
#[derive(Debug, Clone)]
pub enum Line {
    /// A rule.
    Rule(Rule),
    /// A rule of a type that is known and not built.
    NotYet(NotYet),
}

/// A rule of a type that is known and not built.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NotYet {
    /// The type, one of the names in [`NOT_YET`].
    pub kind: &'static str,
    /// Where it would send.
    pub target: String,
}

/// Why a line is no rule.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RuleError {
    /// There are too few fields, or the target is empty.
    #[error("expected `TYPE,payload,target` or `MATCH,target`")]
    Shape,
    /// Nobody knows this type.
    #[error("`{0}` is not a rule type")]
    UnknownType(String),
    /// The type does not take this payload.
    #[error("{kind} expects {}, found `{payload}`", why.expected)]
    Payload {
        /// The type.
        kind: &'static str,
        /// What was written.
        payload: String,
        /// What was expected.
        why: BadPayload,
        /// Where the rule would have sent.
        target: String,
    },
}

/// Reads one line of `rules:`. The rule's line number is 0 until the caller sets it.
///
/// # Errors
/// [`RuleError`] says what is wrong with the line; it does not check that the target exists.
pub fn parse(text: &str) -> Result<Line, RuleError> {
    let fields: Vec<&str> = text.split(',').map(str::trim).collect();
    let kind = fields[0].to_ascii_uppercase();
    if kind.is_empty() {
        return Err(RuleError::Shape);
    }
    if let Some(kind) = NOT_YET.iter().find(|name| **name == kind) {
        let target = if keeps_commas(kind) { fields.last() } else { fields.get(2) };
        let target = target.filter(|target| fields.len() > 2 && !target.is_empty()).ok_or(RuleError::Shape)?;
        return Ok(Line::NotYet(NotYet { kind, target: (*target).to_owned() }));
    }
    let kind = TYPES.iter().find(|kind_of| kind_of.name == kind);
    let kind = kind.ok_or_else(|| RuleError::UnknownType(fields[0].to_owned()))?;
    let (payload, target, params) = match (kind.name, fields.as_slice()) {
        ("MATCH", [_, target, params @ ..]) => ("", *target, params),
        (_, [_, payload, target, params @ ..]) => (*payload, *target, params),
        _ => return Err(RuleError::Shape),
    };
    if target.is_empty() {
        return Err(RuleError::Shape);
    }
    let (params, ignored) = read_params(kind.name, params);
    let matcher = (kind.build)(payload, params).map_err(|why| RuleError::Payload {
        kind: kind.name,
        payload: payload.to_owned(),
        why,
        target: target.to_owned(),
    })?;
    Ok(Line::Rule(Rule {
        kind: kind.name,
        payload: payload.into(),
        target: target.into(),
        text: text.trim().into(),
        line: 0,
        matcher,
        ignored,
    }))
}

/// In these types the target is the last field and everything before it is payload.
fn keeps_commas(kind: &str) -> bool {
    matches!(kind, "AND" | "OR" | "NOT" | "SUB-RULE") || kind.ends_with("-REGEX")
}

/// The parameters, which are case-sensitive as in mihomo, and those that do nothing here. `no-resolve` on a rule that
/// never looks anything up is common and harmless, so it is not among them.
fn read_params(kind: &str, fields: &[&str]) -> (Params, Vec<String>) {
    let mut params = Params::default();
    let mut ignored = Vec::new();
    for field in fields.iter().filter(|field| !field.is_empty()) {
        match *field {
            "no-resolve" => params.no_resolve = true,
            "src" if kind.starts_with("IP-CIDR") => params.source = true,
            _ => ignored.push((*field).to_owned()),
        }
    }
    (params, ignored)
}
