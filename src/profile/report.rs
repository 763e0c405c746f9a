//! Everything that is wrong with a profile, collected: one readable block for each mistake.

use std::collections::HashMap;
use std::fmt::{self, Write};

use super::node::{Place, Position};

/// How many errors, and how many warnings, are kept; the rest is only counted. A file with more is no profile.
const MOST: usize = 256;

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
    errors: usize,
    warnings: usize,
    /// Where those beyond [`MOST`] go.
    beyond: Option<Diagnostic>,
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
        if let Some(&index) = self.folded.get(&key) {
            let first = &mut self.diagnostics[index];
            first.repeats.push(place.at);
            return first;
        }
        let message = key.1.clone();
        if self.warnings < MOST {
            self.folded.insert(key, self.diagnostics.len());
        }
        self.add(Severity::Warning, place, path, message)
    }

    /// Leaves out the warnings on these keys: whoever reads the report makes no use of them.
    pub fn pass_over(&mut self, keys: &[&str]) {
        let (left, all) = (
            |it: &Diagnostic| it.severity == Severity::Warning && keys.contains(&it.path.as_str()),
            self.diagnostics.len(),
        );
        self.diagnostics.retain(|it| !left(it));
        self.warnings = self.warnings.saturating_sub(all - self.diagnostics.len());
        self.folded.clear();
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
        self.errors > 0
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

    /// One mistake for programs: file, line and column (from 1; 0 for the file as a whole), key path, level, message,
    /// hint (null where there is none), and the lines that have the same mistake.
    #[must_use]
    pub fn json(&self, diagnostic: &Diagnostic) -> serde_json::Value {
        let Diagnostic { severity, place, path, message, hint, repeats } = diagnostic;
        let repeats: Vec<u32> = repeats.iter().map(|position| position.line).collect();
        serde_json::json!({
            "file": self.file,
            "line": place.at.line,
            "column": place.at.column,
            "path": path,
            "level": severity.to_string(),
            "message": message,
            "hint": hint,
            "also": repeats,
        })
    }

    /// Every kept mistake by [`Report::json`], and in one line more how many were left out, if any.
    #[must_use]
    pub fn json_lines(&self) -> Vec<serde_json::Value> {
        let mut lines: Vec<_> = self.diagnostics().into_iter().map(|diagnostic| self.json(diagnostic)).collect();
        if self.left_out() > 0 {
            let level = if self.has_errors() { Severity::Error } else { Severity::Warning };
            let message = format!("and {} more", self.left_out());
            lines.push(serde_json::json!({ "file": self.file, "level": level.to_string(), "message": message }));
        }
        lines
    }

    /// How many mistakes there are beyond those that are kept.
    #[must_use]
    pub fn left_out(&self) -> usize {
        self.errors + self.warnings - self.diagnostics.len()
    }

    fn add(&mut self, severity: Severity, place: Place, path: String, message: String) -> &mut Diagnostic {
        let count = match severity {
            Severity::Error => &mut self.errors,
            Severity::Warning => &mut self.warnings,
        };
        *count += 1;
        let diagnostic = Diagnostic { severity, place, path, message, hint: None, repeats: Vec::new() };
        if *count > MOST {
            return self.beyond.insert(diagnostic);
        }
        let index = self.diagnostics.len();
        self.diagnostics.push(diagnostic);
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
        match self.left_out() {
            0 => Ok(()),
            more => writeln!(f, "\n{}: and {more} more", Clean(&self.file)),
        }
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
        write!(f, "{}", Clean(&report.file))?;
        if at.line > 0 {
            write!(f, ":{at}")?;
        }
        write!(f, ": {}: ", diagnostic.severity)?;
        if !diagnostic.path.is_empty() {
            write!(f, "{}: ", Clean(&diagnostic.path))?;
        }
        writeln!(f, "{}", Clean(&diagnostic.message))?;
        if let Some(line) = report.line(at.line) {
            underline(f, line, at)?;
        }
        if let Some(origin) = diagnostic.place.origin {
            writeln!(f, "  = the value was written at {}:{origin}", Clean(&report.file))?;
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
            Some(hint) => writeln!(f, "  = hint: {}", Clean(hint)),
            None => Ok(()),
        }
    }
}

/// Whether a terminal does something at `c` instead of showing it: control characters, and those that turn the direction
/// of the text round.
fn acts(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{61c}' | '\u{200e}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// Text of the profile for a terminal: what would act there is escaped.
struct Clean<'a>(&'a str);

impl fmt::Display for Clean<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.chars().try_for_each(|c| if acts(c) { write!(f, "{}", c.escape_default()) } else { f.write_char(c) })
    }
}

/// The line, with tabs made narrow and long lines cut, and carets under the spot.
fn underline(f: &mut fmt::Formatter<'_>, line: &str, at: Position) -> fmt::Result {
    let column = usize::try_from(at.column.saturating_sub(1)).unwrap_or(0);
    let length = usize::try_from(at.length).unwrap_or(0);
    let skipped = column.saturating_sub(CONTEXT);
    let shown: String = line.chars().skip(skipped).take(CONTEXT * 2).map(|c| if acts(c) { ' ' } else { c }).collect();
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_of_warnings_hides_no_error_and_is_counted() {
        let mut report = Report::new("p.yaml", "a");
        for line in 1..=1000 {
            report.warn(Position { line, column: 1, length: 1 }, "a", "odd").hint("stop");
        }
        for index in 0..1000 {
            report.warn_once(Position::default(), format!("list[{index}]"), "odd too");
        }
        assert!(!report.has_errors());
        report.error(Position::default(), "", "wrong");
        assert!(report.has_errors() && report.errors().count() == 1);
        assert_eq!(report.warnings().count(), MOST);
        assert!(report.to_string().ends_with("p.yaml: and 1744 more\n"), "{report}");
    }

    #[test]
    fn long_lines_are_cut_around_the_spot() {
        let line = format!("{}HERE{}", "x".repeat(500), "y".repeat(500));
        let mut report = Report::new("p.yaml", line);
        report.error(Position { line: 1, column: 501, length: 4 }, "", "wrong");
        let text = report.to_string();
        let (shown, carets) = (text.lines().nth(1).unwrap(), text.lines().nth(2).unwrap());
        assert!(shown.len() < 140);
        assert_eq!(shown.find("HERE"), carets.find("^^^^"));
    }

    #[test]
    fn what_a_terminal_would_obey_is_escaped_wherever_it_stands() {
        let evil = "a\u{1b}[31m\n\u{202e}b";
        let mut report = Report::new(evil, evil);
        report.error(Position { line: 1, column: 1, length: 3 }, evil, evil).hint(evil);
        let text = report.to_string();
        assert!(!text.chars().any(|c| c != '\n' && acts(c)), "{text:?}");
        assert_eq!(text.matches("a\\u{1b}[31m\\n\\u{202e}b").count(), 4, "file, path, message and hint: {text}");
        assert_eq!(text.lines().count(), 4);
    }

    #[test]
    fn programs_get_each_mistake_as_an_object() {
        let mut report = Report::new("p.yaml", "a: 1");
        report.warn_once(Position { line: 1, column: 4, length: 1 }, "a[0]", "odd").hint("stop");
        report.warn_once(Position { line: 7, column: 4, length: 1 }, "a[1]", "odd");
        let json = report.json(report.diagnostics()[0]);
        assert_eq!(
            json,
            serde_json::json!({"file": "p.yaml", "line": 1, "column": 4, "path": "a[0]", "level": "warning",
                               "message": "odd", "hint": "stop", "also": [7]})
        );
    }

    #[test]
    fn a_place_outside_the_text_is_named_and_not_shown() {
        let mut report = Report::new("p.yaml", "");
        report.error(Position { line: 9, column: u32::MAX, length: u32::MAX }, "a.b", "wrong");
        assert_eq!(report.to_string(), format!("p.yaml:9:{}: error: a.b: wrong\n", u32::MAX));
    }
}
