//! YAML text -> [`Node`]: one pass over the parser's events.
//!
//! The events carry the raw text of every scalar, which serde's data model would already have interpreted: a
//! password `0123` must stay `0123`, and a duplicate key must be reported with both of its places.

use std::collections::HashMap;
use std::sync::Arc;

use serde_saphyr::granit_parser::{Event, Parser, ScalarStyle, ScanError, Span, Tag, options};

use super::node::{Entry, Key, Node, Place, Position, Scalar, Value};
use super::report::Report;

/// How deep lists and mappings may nest, aliases followed; real profiles stay below ten.
const MAX_DEPTH: usize = 64;
/// How many keys and values a profile may have, those that merge keys copy included.
const MAX_NODES: usize = 4_000_000;

/// Parses the report's own source. `None`: it is no YAML, and the report says where. A duplicate key is an error in
/// the report, yet the tree comes back, so that the other mistakes are found in the same run.
#[must_use]
pub fn parse(report: &mut Report) -> Option<Node> {
    let source = report.source().to_owned();
    let options = options! { emit_comments: false };
    let mut builder = Builder::new(report);
    for event in Parser::new_from_str_with_options(&source, options) {
        let step = match event {
            Ok((event, span)) => builder.event(event, span),
            Err(error) => Err(builder.syntax(&error, &source)),
        };
        match step {
            Ok(true) => {}
            Ok(false) => break,
            Err(Stop) => return None,
        }
    }
    if builder.root.is_none() {
        builder.report.error(Position { line: 1, column: 1, length: 0 }, "", "the profile is empty");
    }
    builder.root
}

/// Parsing cannot go on; the report says why.
struct Stop;

/// A node with the height of its tree.
#[derive(Clone)]
struct Built {
    node: Node,
    height: usize,
}

enum Open {
    Sequence { items: Vec<Node> },
    Mapping(Mapping),
}

#[derive(Default)]
struct Mapping {
    entries: Vec<Entry>,
    places: HashMap<Arc<str>, Position>,
    key: Option<Key>,
    merges: Vec<(Node, Place)>,
}

struct Frame {
    open: Open,
    at: Position,
    anchor: usize,
    height: usize,
    anchored: bool,
}

struct Builder<'a> {
    report: &'a mut Report,
    stack: Vec<Frame>,
    anchors: HashMap<usize, Built>,
    root: Option<Node>,
    nodes: usize,
    ended: bool,
}

impl<'a> Builder<'a> {
    fn new(report: &'a mut Report) -> Self {
        Self { report, stack: Vec::new(), anchors: HashMap::new(), root: None, nodes: 0, ended: false }
    }

    /// Takes one event; false when the first document is complete and another begins.
    fn event(&mut self, event: Event<'_>, span: Span) -> Result<bool, Stop> {
        let at = position(&span);
        match event {
            Event::DocumentStart(..) if self.ended => {
                self.report.warn(at, "", "everything from the second YAML document on is ignored");
                return Ok(false);
            }
            Event::DocumentEnd => self.ended = true,
            Event::Scalar(text, style, anchor, tag) => {
                let value = scalar(&text, style, tag.as_deref());
                self.finish(value, at, anchor, 0, false)?;
            }
            Event::Alias(id) => self.alias(id, at)?,
            Event::SequenceStart(_, anchor, _) => self.open(Open::Sequence { items: Vec::new() }, at, anchor)?,
            Event::MappingStart(_, anchor, _) => self.open(Open::Mapping(Mapping::default()), at, anchor)?,
            Event::SequenceEnd | Event::MappingEnd => self.close()?,
            _ => {}
        }
        Ok(true)
    }

    fn open(&mut self, open: Open, at: Position, anchor: usize) -> Result<(), Stop> {
        if self.stack.len() >= MAX_DEPTH {
            return Err(self.too_deep(at));
        }
        if let Some(Frame { open: Open::Mapping(Mapping { key: None, .. }), .. }) = self.stack.last() {
            let path = self.path();
            self.report.error(at, path, "expected a plain key, found a list or a mapping");
            return Err(Stop);
        }
        self.stack.push(Frame { open, at, anchor, height: 0, anchored: false });
        Ok(())
    }

    fn close(&mut self) -> Result<(), Stop> {
        let Some(frame) = self.stack.pop() else { return Ok(()) };
        let value = match frame.open {
            Open::Sequence { items } => Value::Sequence(items.into()),
            Open::Mapping(mapping) => Value::Mapping(self.merge(mapping)?.into()),
        };
        self.finish(value, frame.at, frame.anchor, frame.height + 1, frame.anchored)
    }

    fn finish(&mut self, value: Value, at: Position, anchor: usize, height: usize, inside: bool) -> Result<(), Stop> {
        let node = Node { value, place: at.into(), anchored: inside || anchor > 0 };
        let built = Built { node, height };
        if anchor > 0 {
            self.anchors.insert(anchor, built.clone());
        }
        self.place(built)
    }

    fn alias(&mut self, id: usize, at: Position) -> Result<(), Stop> {
        let Some(mut built) = self.anchors.get(&id).cloned() else {
            let path = self.path();
            self.report.error(at, path, "this alias stands inside the very anchor that it names");
            return Err(Stop);
        };
        built.node.place = Place { at, origin: Some(built.node.place.at) };
        built.node.anchored = false;
        self.place(built)
    }

    /// Puts a finished node where it belongs: the list, the key or the value that waits for it, or the root.
    fn place(&mut self, Built { mut node, height }: Built) -> Result<(), Stop> {
        self.count(node.place.at, 1)?;
        if self.stack.len() + height > MAX_DEPTH {
            return Err(self.too_deep(node.place.at));
        }
        let Some(frame) = self.stack.last_mut() else {
            self.root = Some(node);
            return Ok(());
        };
        frame.height = frame.height.max(height);
        frame.anchored |= node.anchored;
        match &mut frame.open {
            Open::Sequence { items } => items.push(node),
            Open::Mapping(mapping) => match mapping.key.take() {
                None => match key(&node) {
                    Some(key) => mapping.key = Some(key),
                    None => return Err(self.no_key(&node)),
                },
                Some(key) => {
                    if node.is_null() && node.place.at.length == 0 {
                        node.place = key.place;
                    }
                    if let Err((key, first)) = mapping.insert(key, node) {
                        self.written_twice(&key, first);
                    }
                }
            },
        }
        Ok(())
    }

    fn written_twice(&mut self, key: &Key, first: Position) {
        let path = match self.path().as_str() {
            "" => key.text.to_string(),
            parent => format!("{parent}.{}", key.text),
        };
        let message = format!("the key is written twice; the first one stands at line {}", first.line);
        self.report.error(key, path, message).hint("remove one of them, or join the two");
    }

    /// The key path of the innermost open list or mapping.
    fn path(&self) -> String {
        let mut path = String::new();
        for frame in &self.stack {
            match &frame.open {
                Open::Sequence { items } => path.push_str(&format!("[{}]", items.len())),
                Open::Mapping(Mapping { key: Some(key), .. }) if path.is_empty() => path.push_str(&key.text),
                Open::Mapping(Mapping { key: Some(key), .. }) => path.push_str(&format!(".{}", key.text)),
                Open::Mapping(_) => {}
            }
        }
        path
    }

    /// The mapping's entries with those of its merge keys: what is written wins, then earlier merges.
    fn merge(&mut self, mapping: Mapping) -> Result<Vec<Entry>, Stop> {
        let Mapping { mut entries, mut places, merges, .. } = mapping;
        for (merged, use_site) in merges {
            for source in merged.items() {
                let Some(more) = source.entries() else {
                    let found = source.found();
                    self.report
                        .error(source.place, "<<", format!("expected a mapping to merge, found {found}"))
                        .hint("write `<<: *name`, where `&name` stands on a mapping");
                    continue;
                };
                self.count(use_site.at, more.len())?;
                for entry in more {
                    if places.contains_key(&entry.key.text) {
                        continue;
                    }
                    places.insert(entry.key.text.clone(), use_site.at);
                    entries.push(entry.brought_to(use_site.at));
                }
            }
        }
        Ok(entries)
    }

    fn count(&mut self, at: Position, more: usize) -> Result<(), Stop> {
        self.nodes = self.nodes.saturating_add(more);
        if self.nodes <= MAX_NODES {
            return Ok(());
        }
        let path = self.path();
        self.report.error(at, path, format!("the profile has more than {MAX_NODES} keys and values"));
        Err(Stop)
    }

    fn no_key(&mut self, node: &Node) -> Stop {
        let path = self.path();
        self.report.error(node, path, format!("expected a plain key, found {}", node.found()));
        Stop
    }

    fn too_deep(&mut self, at: Position) -> Stop {
        let path = self.path();
        self.report.error(at, path, format!("lists and mappings nest deeper than {MAX_DEPTH} levels"));
        Stop
    }

    fn syntax(&mut self, error: &ScanError, source: &str) -> Stop {
        let marker = error.marker();
        let at = Position { line: narrow(marker.line()), column: narrow(marker.col()).saturating_add(1), length: 1 };
        let line = source.lines().nth(marker.line().saturating_sub(1)).unwrap_or_default();
        let indentation = &line[..line.len() - line.trim_start_matches([' ', '\t']).len()];
        let path = self.path();
        let diagnostic = self.report.error(at, path, format!("this is not valid YAML: {}", error.info()));
        diagnostic.hint(if indentation.contains('\t') {
            "YAML does not allow tabs in the indentation; use spaces"
        } else {
            "look at this line and the one before it: indentation, a missing `:`, an open quote or bracket, \
             or a value that begins with `*`, `&`, `!`, `%`, `@` and needs quotes"
        });
        Stop
    }
}

impl Mapping {
    /// Adds an entry; a key that is there already comes back with the place of the first.
    fn insert(&mut self, key: Key, value: Node) -> Result<(), (Key, Position)> {
        if let Some(first) = self.places.get(&key.text) {
            return Err((key, *first));
        }
        self.places.insert(key.text.clone(), key.place.at);
        if &*key.text == "<<" {
            let place = value.place;
            self.merges.push((value, place));
        } else {
            self.entries.push(Entry { key, value });
        }
        Ok(())
    }
}

impl Entry {
    /// The same entry as a merge key at `at` brings it into another mapping.
    fn brought_to(&self, at: Position) -> Self {
        let mut entry = self.clone();
        for place in [&mut entry.key.place, &mut entry.value.place] {
            *place = Place { at, origin: Some(place.origin.unwrap_or(place.at)) };
        }
        entry.value.anchored = false;
        entry
    }
}

fn key(node: &Node) -> Option<Key> {
    match &node.value {
        Value::Scalar(scalar) => Some(Key { text: scalar.text.clone(), place: node.place }),
        Value::Null => Some(Key { text: "".into(), place: node.place }),
        Value::Sequence(_) | Value::Mapping(_) => None,
    }
}

fn scalar(text: &str, style: ScalarStyle, tag: Option<&Tag>) -> Value {
    let core = tag.and_then(Tag::core_suffix);
    // Clash profiles write `!<str>` where YAML writes `!!str`; both keep digits a text.
    let string = core == Some("str") || tag.is_some_and(|tag| tag.suffix() == "str");
    let quoted = style != ScalarStyle::Plain || string;
    let null = core == Some("null") || (!quoted && matches!(text, "" | "~" | "null" | "Null" | "NULL"));
    if null { Value::Null } else { Value::Scalar(Scalar { text: text.into(), quoted }) }
}

fn position(span: &Span) -> Position {
    let length = if span.start.line() == span.end.line() {
        span.end.col().saturating_sub(span.start.col())
    } else {
        // The underline ends with the line.
        usize::MAX
    };
    Position {
        line: narrow(span.start.line()),
        column: narrow(span.start.col()).saturating_add(1),
        length: narrow(length),
    }
}

fn narrow(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn tree(text: &str) -> Node {
        let mut report = Report::new("p.yaml", text);
        parse(&mut report).unwrap_or_else(|| panic!("{report}"))
    }

    fn failure(text: &str) -> String {
        let mut report = Report::new("p.yaml", text);
        let _ = parse(&mut report);
        assert!(report.has_errors(), "parsed: {text}");
        report.to_string()
    }

    #[test]
    fn keys_and_values_know_line_and_column() {
        let root = tree("a: 1\nlist:\n  - x\n  - {k: \"v w\"}\n");
        let entries = root.entries().unwrap();
        assert_eq!(entries[0].value.place.at, Position { line: 1, column: 4, length: 1 });
        assert_eq!(entries[1].key.place.at, Position { line: 2, column: 1, length: 4 });
        let inner = &entries[1].value.items()[1].entries().unwrap()[0];
        assert_eq!(inner.value.place.at, Position { line: 4, column: 9, length: 5 });
        assert_eq!(inner.value.text(), Some("v w"));
    }

    #[test]
    fn columns_count_characters_and_not_bytes() {
        let root = tree("{ä: ö, k: v}");
        assert_eq!(root.child("k").unwrap().place.at, Position { line: 1, column: 11, length: 1 });
    }

    #[test]
    fn scalars_keep_the_text_that_was_written() {
        let root = tree("a: 0123\nb: 1e3\nc: yes\nd: !!str 12\ne: !<str> 7\nf: \"\"\ng: '~'");
        for (key, text) in [("a", "0123"), ("b", "1e3"), ("c", "yes"), ("d", "12"), ("e", "7"), ("f", ""), ("g", "~")] {
            assert_eq!(root.child(key).unwrap().text(), Some(text), "{key}");
        }
    }

    #[test]
    fn blank_values_are_null_and_point_at_their_key() {
        let root = tree("rules:\nb: ~\nc: null\n");
        assert!(root.entries().unwrap().iter().all(|entry| entry.value.is_null()));
        assert_eq!(root.entries().unwrap()[0].value.place.at, Position { line: 1, column: 1, length: 5 });
    }

    #[test]
    fn an_alias_is_used_in_one_place_and_defined_in_another() {
        let root = tree("x: &x {k: v}\ny: *x\n");
        let alias = root.child("y").unwrap();
        assert_eq!(alias.place.at, Position { line: 2, column: 4, length: 2 });
        assert_eq!(alias.place.origin.unwrap().line, 1);
        assert_eq!(alias.child("k").unwrap().text(), Some("v"));
        assert!(root.child("x").unwrap().anchored && !alias.anchored);
    }

    #[test]
    fn merge_keys_give_way_to_what_is_written_and_to_earlier_merges() {
        let root = tree("a: &a {p: 1, q: 1}\nb: &b {q: 2, r: 2}\nc:\n  <<: [*a, *b]\n  p: 3\n");
        let merged = root.child("c").unwrap();
        let texts: Vec<_> = ["p", "q", "r"].map(|key| merged.child(key).unwrap().text().unwrap()).into();
        assert_eq!(texts, ["3", "1", "2"]);
        assert_eq!(merged.child("q").unwrap().place.at.line, 4);
        assert_eq!(merged.child("q").unwrap().place.origin.unwrap().line, 1);
    }

    #[test]
    fn duplicate_keys_are_errors_that_name_both_lines() {
        let text = failure("a:\n  port: 1\n  port: 2\n");
        assert!(
            text.contains("p.yaml:3:3: error: a.port: the key is written twice; the first one stands at line 2"),
            "{text}"
        );
    }

    #[test]
    fn syntax_errors_have_line_and_column() {
        let text = failure("a: 1\nb: [1, 2\nc: 3\n");
        assert!(text.starts_with("p.yaml:"), "{text}");
        assert!(text.contains("not valid YAML"), "{text}");
        assert!(failure("a:\n\tb: 1\n").contains("tabs"), "{}", failure("a:\n\tb: 1\n"));
        assert!(failure("a: *nowhere\n").contains("p.yaml:1:4"), "{}", failure("a: *nowhere\n"));
    }

    #[test]
    fn syntax_errors_name_the_key_that_they_are_in() {
        for (text, path) in [
            ("mixed-port: @7890\n", "mixed-port"),
            ("a: 1\nrules:\n  - x\n  - \"MATCH,DIRECT\n", "rules[1]"),
            ("tun:\n  device: [a, b\nc: 1\n", "tun.device[1]"),
            ("a:\n  b: *nowhere\n", "a.b"),
            ("a: {? [x] : y}\n", "a"),
        ] {
            let text = failure(text);
            assert!(text.contains(&format!(": error: {path}: ")), "{path}: {text}");
        }
    }

    #[test]
    fn what_no_profile_has_is_refused() {
        assert!(failure("").contains("empty"));
        assert!(failure("# only a comment\n").contains("empty"));
        assert!(failure("? [a, b]\n: c\n").contains("plain key"));
        assert!(failure("a: &a [*a]\n").contains("inside the very anchor"));
        assert!(failure("a: 1\nb:\n  <<: 7\n").contains("expected a mapping to merge"));
    }

    #[test]
    fn depth_is_bounded_even_through_aliases() {
        assert!(failure(&format!("{}{}", "[".repeat(100), "]".repeat(100))).contains("deeper"));
        let chain: String = (1..500).map(|n| format!("- &a{n} [*a{}]\n", n - 1)).collect();
        assert!(failure(&format!("- &a0 x\n{chain}")).contains("deeper"));
    }

    #[test]
    fn only_the_first_document_counts() {
        let mut report = Report::new("p.yaml", "a: 1\n---\nb: 2\n");
        let root = parse(&mut report).unwrap();
        assert!(root.child("a").is_some() && root.child("b").is_none());
        assert_eq!(report.warnings().count(), 1);
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic(text in "[ \\[\\]{}:,&*a-c<!|>'\"\n\t%#?~-]{0,80}|.{0,200}") {
            let mut report = Report::new("p.yaml", text);
            let node = parse(&mut report);
            prop_assert!(node.is_some() || report.has_errors());
            let _ = report.to_string();
        }
    }
}
