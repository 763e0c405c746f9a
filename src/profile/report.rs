//! Everything that is wrong with a profile, collected: one readable block for each mistake.

use std::collections::HashMap;
use std::fmt;

use super::node::{Place, Position};

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Severity {
    /// The profile loads; something in it does not do what its author may think.
    Warning,
    /// The profile is refused.
    Error,
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Warning => "warning",
            Self::Error => "error",
        })
    }
}

/// One mistake.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Diagnostic {
    /// Error or warning.
    pub severity: Severity,
    /// Where it stands.
    pub place: Place,
    /// The key path, as in `proxies[2].port`; empty for the file as a whole.
    pub path: String,
    /// What is wrong and what was expected.
    pub message: String,
    /// What to do about it.
    pub hint: Option<String>,
    /// Further places that have the same mistake under the same key of other list items.
    pub repeats: Vec<Position>,
}

impl Diagnostic {
    /// Adds what to do about it.
    pub fn hint(&mut self, hint: impl Into<String>) -> &mut Self {
        self.hint = Some(hint.into());
        self
    }
}

/// The mistakes of one file, with its text, so that each can be shown where it stands.
#[derive(Debug, Clone, Default)]
pub struct Report {
    file: String,
    source: String,
    /// The byte at which each line begins.
    lines: Vec<usize>,
    diagnostics: Vec<Diagnostic>,
    folded: HashMap<(String, String), usize>,
    /// Every key path that a decoder asked for, for the test that holds docs/profile.md to the code.
    #[cfg(test)]
    pub(super) asked: std::collections::BTreeSet<String>,
}

impl Report {
    /// A report without mistakes on `file` (the name that messages show) and its text.
    pub fn new(file: impl Into<String>, source: impl Into<String>) -> Self {
        let source = source.into();
        let lines = std::iter::once(0).chain(source.match_indices('\n').map(|(index, _)| index + 1)).collect();
        Self { file: file.into(), source, lines, ..Self::default() }
    }

    /// The name that messages show.
    #[must_use]
    pub fn file(&self) -> &str {
        &self.file
    }

    /// The file's text.
    #[must_use]
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Adds an error: the profile will be refused.
    pub fn error(
        &mut self,
        place: impl Into<Place>,
        path: impl Into<String>,
        message: impl Into<String>,
    ) -> &mut Diagnostic {
        self.add(Severity::Error, place.into(), path.into(), message.into())
    }

    /// Adds a warning.
    pub fn warn(
        &mut self,
        place: impl Into<Place>,
        path: impl Into<String>,
        message: impl Into<String>,
    ) -> &mut Diagnostic {
        self.add(Severity::Warning, place.into(), path.into(), message.into())
    }

    /// Adds a warning, or, where another item of the same list already has it, one more place to that.
    pub fn warn_once(
        &mut self,
        place: impl Into<Place>,
        path: impl Into<String>,
        message: impl Into<String>,
    ) -> &mut Diagnostic {
        let (place, path, message) = (place.into(), path.into(), message.into());
        let key = (without_indices(&path), message);
        let index = match self.folded.get(&key) {
            Some(&index) => {
                self.diagnostics[index].repeats.push(place.at);
                index
            }
            None => {
                let index = self.diagnostics.len();
                self.add(Severity::Warning, place, path, key.1.clone());
                self.folded.insert(key, index);
                index
            }
        };
        &mut self.diagnostics[index]
    }

    /// Every mistake, in the order of the file.
    #[must_use]
    pub fn diagnostics(&self) -> Vec<&Diagnostic> {
        let mut all: Vec<&Diagnostic> = self.diagnostics.iter().collect();
        all.sort_by_key(|diagnostic| (diagnostic.place.at.line, diagnostic.place.at.column));
        all
    }

    /// The errors, in the order of the file.
    pub fn errors(&self) -> impl Iterator<Item = &Diagnostic> {
        self.diagnostics().into_iter().filter(|diagnostic| diagnostic.severity == Severity::Error)
    }

    /// The warnings, in the order of the file.
    pub fn warnings(&self) -> impl Iterator<Item = &Diagnostic> {
        self.diagnostics().into_iter().filter(|diagnostic| diagnostic.severity == Severity::Warning)
    }

    /// Whether the profile must be refused.
    #[must_use]
    pub fn has_errors(&self) -> bool {
        self.diagnostics.iter().any(|diagnostic| diagnostic.severity == Severity::Error)
    }

    /// Whether there is nothing to say.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.diagnostics.is_empty()
    }

    /// One mistake as text: the place, the key path, what was expected, the line with the spot underlined, a hint.
    #[must_use]
    pub fn block<'a>(&'a self, diagnostic: &'a Diagnostic) -> Block<'a> {
        Block { report: self, diagnostic }
    }

    fn add(&mut self, severity: Severity, place: Place, path: String, message: String) -> &mut Diagnostic {
        let index = self.diagnostics.len();
        self.diagnostics.push(Diagnostic { severity, place, path, message, hint: None, repeats: Vec::new() });
        &mut self.diagnostics[index]
    }

    fn line(&self, number: u32) -> Option<&str> {
        let index = usize::try_from(number.checked_sub(1)?).ok()?;
        self.source.get(*self.lines.get(index)?..)?.lines().next()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, diagnostic) in self.diagnostics().into_iter().enumerate() {
            if index > 0 {
                f.write_str("\n")?;
            }
            self.block(diagnostic).fmt(f)?;
        }
        Ok(())
    }
}

/// Displays one mistake of a report.
#[derive(Debug, Clone, Copy)]
pub struct Block<'a> {
    report: &'a Report,
    diagnostic: &'a Diagnostic,
}

/// How much of a long line is shown on each side of the spot, in characters.
const CONTEXT: usize = 60;

impl fmt::Display for Block<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { report, diagnostic } = self;
        let at = diagnostic.place.at;
        f.write_str(&report.file)?;
        if at.line > 0 {
            write!(f, ":{at}")?;
        }
        write!(f, ": {}: ", diagnostic.severity)?;
        if !diagnostic.path.is_empty() {
            write!(f, "{}: ", diagnostic.path)?;
        }
        writeln!(f, "{}", diagnostic.message)?;
        if let Some(line) = report.line(at.line) {
            underline(f, line, at)?;
        }
        if let Some(origin) = diagnostic.place.origin {
            writeln!(f, "  = the value was written at {}:{origin}", report.file)?;
        }
        if !diagnostic.repeats.is_empty() {
            write!(f, "  = also at line")?;
            for (index, position) in diagnostic.repeats.iter().take(8).enumerate() {
                write!(f, "{}{}", if index == 0 { " " } else { ", " }, position.line)?;
            }
            match diagnostic.repeats.len() {
                ..=8 => writeln!(f)?,
                more => writeln!(f, " and {} more", more - 8)?,
            }
        }
        match &diagnostic.hint {
            Some(hint) => writeln!(f, "  = hint: {hint}"),
            None => Ok(()),
        }
    }
}

/// The line, with tabs made narrow and long lines cut, and carets under the spot.
fn underline(f: &mut fmt::Formatter<'_>, line: &str, at: Position) -> fmt::Result {
    let column = usize::try_from(at.column.saturating_sub(1)).unwrap_or(0);
    let length = usize::try_from(at.length).unwrap_or(0);
    let skipped = column.saturating_sub(CONTEXT);
    let shown: String =
        line.chars().skip(skipped).take(CONTEXT * 2).map(|c| if c.is_control() { ' ' } else { c }).collect();
    let offset = column - skipped;
    let carets = length.min(shown.chars().count().saturating_sub(offset)).max(1);
    let gutter = at.line.to_string().len().max(3);
    writeln!(f, "{:>gutter$} | {shown}", at.line)?;
    writeln!(f, "{:>gutter$} | {:offset$}{}", "", "", "^".repeat(carets))
}

/// `proxies[2].tfo` becomes `proxies[].tfo`.
fn without_indices(path: &str) -> String {
    let mut inside = false;
    path.chars()
        .filter(|&c| {
            inside = inside && c != ']';
            let keep = !inside;
            inside = inside || c == '[';
            keep
        })
        .collect()
}
