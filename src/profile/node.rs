//! A YAML document as a tree in which every key and value knows where it was written.

use std::fmt;
use std::sync::Arc;

/// A place in the profile: line and column count from 1, in characters. Line 0 means the file as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Position {
    /// The line, from 1.
    pub line: u32,
    /// The column, from 1, in characters.
    pub column: u32,
    /// How many characters the text covers on that line, at least 0.
    pub length: u32,
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.line, self.column)
    }
}

/// Where a value is used and, when an alias or a merge key brought it there, where it was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Place {
    /// The use site: what a message points at.
    pub at: Position,
    /// The definition behind an alias or a merge key.
    pub origin: Option<Position>,
}

impl From<Position> for Place {
    fn from(at: Position) -> Self {
        Self { at, origin: None }
    }
}

impl From<&Node> for Place {
    fn from(node: &Node) -> Self {
        node.place
    }
}

impl From<&Key> for Place {
    fn from(key: &Key) -> Self {
        key.place
    }
}

/// A value with its place. Cloning is cheap: aliases share what they name.
#[derive(Debug, Clone)]
pub struct Node {
    /// What was written.
    pub value: Value,
    /// Where.
    pub place: Place,
    /// Whether an anchor stands on this node or inside it, which makes it a template for others.
    pub anchored: bool,
}

/// The three shapes of YAML, and nothing.
#[derive(Debug, Clone)]
pub enum Value {
    /// Nothing, `~` or `null`.
    Null,
    /// Text that is not interpreted yet.
    Scalar(Scalar),
    /// A list.
    Sequence(Arc<[Node]>),
    /// Keys and values in the order written, merged ones last; keys are unique.
    Mapping(Arc<[Entry]>),
}

/// A scalar as it was written, escapes resolved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scalar {
    /// The text.
    pub text: Arc<str>,
    /// Whether it was quoted, a block, or tagged `!!str`: such text is never null.
    pub quoted: bool,
}

/// A mapping's key.
#[derive(Debug, Clone)]
pub struct Key {
    /// The text.
    pub text: Arc<str>,
    /// Where.
    pub place: Place,
}

/// One line of a mapping.
#[derive(Debug, Clone)]
pub struct Entry {
    /// The key.
    pub key: Key,
    /// Its value.
    pub value: Node,
}

impl Node {
    /// The scalar's text, if it is a scalar.
    #[must_use]
    pub fn text(&self) -> Option<&str> {
        match &self.value {
            Value::Scalar(scalar) => Some(&scalar.text),
            _ => None,
        }
    }

    /// Whether nothing was written.
    #[must_use]
    pub fn is_null(&self) -> bool {
        matches!(self.value, Value::Null)
    }

    /// The items of a list, nothing for null, and the value itself when it stands where a list is expected.
    #[must_use]
    pub fn items(&self) -> &[Node] {
        match &self.value {
            Value::Null => &[],
            Value::Sequence(items) => items,
            _ => std::slice::from_ref(self),
        }
    }

    /// The entries, if it is a mapping.
    #[must_use]
    pub fn entries(&self) -> Option<&[Entry]> {
        match &self.value {
            Value::Mapping(entries) => Some(entries),
            _ => None,
        }
    }

    /// The value under `key`, if this is a mapping that has it and it is not null.
    #[must_use]
    pub fn child(&self, key: &str) -> Option<&Node> {
        let entry = self.entries()?.iter().find(|entry| &*entry.key.text == key)?;
        (!entry.value.is_null()).then_some(&entry.value)
    }

    /// What was found, in words, for messages.
    #[must_use]
    pub fn found(&self) -> String {
        match &self.value {
            Value::Null => "nothing".to_owned(),
            Value::Scalar(scalar) => format!("`{}`", shortened(&scalar.text)),
            Value::Sequence(_) => "a list".to_owned(),
            Value::Mapping(_) => "a mapping".to_owned(),
        }
    }
}

/// `text` on one line and at most 60 characters long.
pub(super) fn shortened(text: &str) -> String {
    let mut out: String = text.chars().take(60).map(|c| if c.is_control() { ' ' } else { c }).collect();
    if text.chars().nth(60).is_some() {
        out.push('…');
    }
    out
}
