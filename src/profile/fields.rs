//! Decoding a mapping: each field is asked for by name, and what nobody asked for is reported.

use std::ops::RangeInclusive;

use super::decode::{Decode, integer, mismatch, scalar};
use super::known;
use super::nearest::nearest;
use super::node::{Entry, Node, Place, Value};
use super::report::{Diagnostic, Report};

/// How many unknown keys of one mapping are compared with the known ones.
const MOST_HINTS: usize = 256;

/// A mapping that is being decoded. Ask for every field, then [`finish`](Self::finish).
///
/// Methods that meet a wrong value say so in the report and go on, so that one run shows every mistake; whoever
/// decodes asks for all fields first and only then looks at the `None`s.
#[derive(Debug)]
pub struct Fields<'a> {
    entries: &'a [Entry],
    place: Place,
    path: String,
    report: &'a mut Report,
    known: Vec<&'static str>,
    /// Keys that keep something from leaving, or from being taken: a slip in one is an error.
    grave: &'static [&'static str],
    /// Keys match without regard to case and with `_` for `-`, as mihomo reads proxies and groups.
    relaxed: bool,
}

impl<'a> Fields<'a> {
    /// Begins with the mapping `node`, which stands at `path`; null counts as an empty mapping. Keys match exactly.
    /// `None`: it is no mapping, and the report says so.
    pub fn new(node: &'a Node, path: impl Into<String>, report: &'a mut Report) -> Option<Self> {
        let path = path.into();
        let entries = match node.entries() {
            Some(entries) => entries,
            None if node.is_null() => &[],
            None => {
                mismatch(node, &path, report, "a mapping (lines of `key: value`)");
                return None;
            }
        };
        Some(Self { entries, place: node.place, path, report, known: Vec::new(), grave: &[], relaxed: false })
    }

    /// Like [`new`](Self::new), for entries of `proxies` and `proxy-groups`: `Skip_Cert_Verify` is `skip-cert-verify`.
    pub fn relaxed(node: &'a Node, path: impl Into<String>, report: &'a mut Report) -> Option<Self> {
        Self::new(node, path, report).map(|fields| Self { relaxed: true, ..fields })
    }

    /// An unknown key that is nearly one of `keys` is an error: whoever wrote it relies on it.
    pub fn grave(&mut self, keys: &'static [&'static str]) {
        self.grave = keys;
    }

    /// The value of `key`, if it is there and not null; marks the key as known.
    pub fn node(&mut self, key: &'static str) -> Option<&'a Node> {
        self.known.push(key);
        self.entry(key).map(|entry| &entry.value).filter(|value| !value.is_null())
    }

    /// The value of a field that must be there.
    pub fn required<T: Decode>(&mut self, key: &'static str) -> Option<T> {
        let Some(node) = self.node(key) else {
            let place = self.place(key);
            let path = self.path_of(key);
            self.report.error(place, path, format!("the key `{key}` is required and missing"));
            return None;
        };
        T::decode(node, &self.path_of(key), self.report)
    }

    /// The value of a field that may be absent or blank.
    pub fn optional<T: Decode>(&mut self, key: &'static str) -> Option<T> {
        let node = self.node(key)?;
        T::decode(node, &self.path_of(key), self.report)
    }

    /// The value of a field, or `default` when it is absent, blank or wrong (and then reported).
    pub fn or<T: Decode>(&mut self, key: &'static str, default: T) -> T {
        self.optional(key).unwrap_or(default)
    }

    /// A whole number within `range`, which messages call `what`; `default` when it is absent, blank or wrong (and then
    /// reported).
    pub fn within(&mut self, key: &'static str, what: &str, range: RangeInclusive<u32>, default: u32) -> u32 {
        let Some(node) = self.node(key) else { return default };
        let expected = format!("{what} from {} to {}", range.start(), range.end());
        let read = |text: &str| u32::try_from(integer(text)?).ok().filter(|number| range.contains(number));
        scalar(node, &self.path_of(key), self.report, &expected, read).unwrap_or(default)
    }

    /// Adds an error where a key is written that no longer exists; it is then not reported as unknown as well.
    pub fn renamed(&mut self, old: &'static str, new: &str) {
        if self.has(old) {
            self.known.push(old);
            let message = format!("`{old}` is a key of old Clash and is not read");
            self.error(old, message).hint(format!("call it `{new}`"));
        }
    }

    /// One of the named choices, without regard to case; `None` when absent, blank or wrong (and then reported).
    pub fn choice<T: Copy>(&mut self, key: &'static str, choices: &[(&str, T)]) -> Option<T> {
        let node = self.node(key)?;
        let written = node.text().unwrap_or_default();
        if let Some((_, value)) = choices.iter().find(|(name, _)| name.eq_ignore_ascii_case(written.trim())) {
            return Some(*value);
        }
        let names: Vec<&str> = choices.iter().map(|(name, _)| *name).collect();
        let message = format!("expected one of {}, found {}", names.join(", "), node.found());
        let diagnostic = self.report.error(node, join(&self.path, key), message);
        if let Some(name) = nearest(written, names.iter().copied()) {
            diagnostic.hint(format!("did you mean `{name}`?"));
        }
        None
    }

    /// The mapping under `key`, to be decoded in turn; `None` when absent or no mapping (and then reported).
    pub fn nested(&mut self, key: &'static str) -> Option<Fields<'_>> {
        let node = self.node(key)?;
        let path = self.path_of(key);
        Fields::new(node, path, self.report).map(|fields| Fields { relaxed: self.relaxed, ..fields })
    }

    /// Keys that mihomo has and we do not heed yet: one warning each when present.
    pub fn without_effect(&mut self, keys: &[&'static str]) {
        for &key in keys {
            self.known.push(key);
            if let Some(entry) = self.entry(key) {
                self.report.warn_once(&entry.key, join(&self.path, key), format!("`{key}` has no effect yet"));
            }
        }
    }

    /// Keys that mihomo has and that can mean nothing here: one warning each when present, which says why.
    pub fn without_effect_because(&mut self, keys: &[&'static str], why: &str) {
        for &key in keys {
            self.known.push(key);
            if let Some(entry) = self.entry(key) {
                let message = format!("`{key}` has no effect");
                self.report.warn_once(&entry.key, join(&self.path, key), message).hint(why);
            }
        }
    }

    /// Keys that are known and need no word.
    pub fn silent(&mut self, keys: &[&'static str]) {
        self.known.extend_from_slice(keys);
    }

    /// Whether `key` is written, even blank. Does not mark it as known.
    #[must_use]
    pub fn has(&self, key: &str) -> bool {
        self.entry(key).is_some()
    }

    /// Where a message about `key` points: its value when that is a scalar, else the key; the mapping when it is absent.
    #[must_use]
    pub fn place(&self, key: &str) -> Place {
        self.entry(key).map_or(self.place, |entry| match entry.value.value {
            Value::Scalar(_) => entry.value.place,
            _ => entry.key.place,
        })
    }

    /// The key path of the mapping itself.
    #[must_use]
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The key path of `key`.
    #[must_use]
    pub fn path_of(&self, key: &str) -> String {
        join(&self.path, key)
    }

    /// Adds an error at `key`.
    pub fn error(&mut self, key: &str, message: impl Into<String>) -> &mut Diagnostic {
        let (place, path) = (self.place(key), self.path_of(key));
        self.report.error(place, path, message)
    }

    /// Adds a warning at `key`.
    pub fn warn(&mut self, key: &str, message: impl Into<String>) -> &mut Diagnostic {
        let (place, path) = (self.place(key), self.path_of(key));
        self.report.warn(place, path, message)
    }

    /// The report, for messages about something else.
    pub fn report(&mut self) -> &mut Report {
        self.report
    }

    /// Warns about every key that nobody asked for, with the nearest known one. Keys that begin with `x-` and
    /// templates (values with an anchor) are left in peace.
    pub fn finish(self) {
        #[cfg(test)]
        self.report.asked.extend(self.known.iter().map(|key| join(&self.path, key)));
        let mut unknown = 0;
        for Entry { key, value } in self.entries {
            let known = self.known.iter().any(|name| self.same(&key.text, name));
            if known || key.text.starts_with("x-") || value.anchored {
                continue;
            }
            let path = join(&self.path, &key.text);
            if unknown < MOST_HINTS
                && let Some(name) = nearest_key(&key.text, &self.known).filter(|name| self.grave.contains(name))
            {
                unknown += 1;
                let message = format!("`{}` is not a known key", super::node::shortened(&key.text));
                let hint = format!("did you mean `{name}`? Without it more would leave, or less, than you wrote");
                self.report.error(key, path, message).hint(hint);
                continue;
            }
            let message = format!("`{}` is not a known key and is ignored", super::node::shortened(&key.text));
            let diagnostic = self.report.warn_once(key, path, message);
            unknown += 1;
            if unknown > MOST_HINTS {
                continue;
            }
            if let Some(hint) = meant(&self.path, &self.known, &key.text) {
                diagnostic.hint(hint);
            }
        }
    }

    fn entry(&self, key: &str) -> Option<&'a Entry> {
        let exact = self.entries.iter().find(|entry| &*entry.key.text == key);
        exact.or_else(|| self.entries.iter().find(|entry| self.same(&entry.key.text, key)))
    }

    fn same(&self, written: &str, known: &str) -> bool {
        written == known
            || (self.relaxed
                && written.len() == known.len()
                && written.bytes().zip(known.bytes()).all(|(a, b)| {
                    let a = if a == b'_' { b'-' } else { a };
                    a.eq_ignore_ascii_case(&b)
                }))
    }
}

/// The known key that `key` nearly is: written with other signs between its words, or with a slip of the finger.
fn nearest_key(key: &str, known: &[&'static str]) -> Option<&'static str> {
    let plain = |text: &str| text.chars().filter(|c| c.is_alphanumeric()).collect::<String>().to_lowercase();
    let written = plain(key);
    let same = known.iter().copied().find(|name| plain(name) == written);
    same.or_else(|| nearest(key, known.iter().copied()))
}

/// What `key` was probably meant to be, which the mapping at `path` does not know: a key of another section, or a slip of the
/// finger.
fn meant(path: &str, known: &[&'static str], key: &str) -> Option<String> {
    let there = known::sections_of(key);
    // Entries of lists have keys of their own, by which many a word of the sections means something else.
    if !there.is_empty() && !path.contains('[') {
        return Some(format!("`{key}` belongs {}", places(&there)));
    }
    if let Some(name) = nearest(key, known.iter().copied()) {
        return Some(format!("did you mean `{name}`?"));
    }
    let name = known::nearest_heeded(key).filter(|_| !path.contains('['))?;
    Some(format!("did you mean `{name}`? That belongs {}", places(&known::sections_of(name))))
}

/// Where a key of these sections is to be written.
fn places(sections: &[&str]) -> String {
    let place = |section: &&str| match *section {
        "" => "at the top level, at the left edge of the file".to_owned(),
        section => format!("under `{section}:`"),
    };
    sections.iter().map(place).collect::<Vec<_>>().join(", or ")
}

fn join(path: &str, key: &str) -> String {
    if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::profile::parse;

    fn decode<T>(text: &str, read: impl FnOnce(&mut Fields<'_>) -> T) -> (T, String) {
        let mut report = Report::new("p.yaml", text);
        let root = parse(&mut report).unwrap_or_else(|| panic!("{report}"));
        let mut fields = Fields::new(&root, "", &mut report).unwrap();
        let value = read(&mut fields);
        fields.finish();
        (value, report.to_string())
    }

    #[test]
    fn numbers_may_be_quoted_and_one_value_may_stand_for_a_list() {
        let (values, report) = decode("port: '443'\nudp: 'true'\nalpn: h2\nnone:\n", |fields| {
            (
                fields.required::<u16>("port"),
                fields.or("udp", false),
                fields.optional::<Vec<String>>("alpn"),
                fields.optional::<String>("none"),
            )
        });
        assert_eq!(values, (Some(443), true, Some(vec!["h2".to_owned()]), None));
        assert_eq!(report, "");
    }

    #[test]
    fn every_mistake_is_reported_with_its_path_and_underlined() {
        let ((), report) = decode("port: 70000\nlist: [1, x, y]\n", |fields| {
            assert_eq!(fields.required::<u16>("port"), None);
            assert_eq!(fields.optional::<Vec<u8>>("list"), None);
            assert_eq!(fields.required::<String>("name"), None);
        });
        assert!(report.contains("p.yaml:1:7: error: port: expected a whole number from 0 to 65535, found `70000`"));
        assert!(report.contains("  1 | port: 70000\n    |       ^^^^^\n"), "{report}");
        assert!(report.contains("list[1]: expected") && report.contains("list[2]: expected"));
        assert!(report.contains("the key `name` is required and missing"));
    }

    #[test]
    fn unknown_keys_are_warned_about_with_the_nearest_known_one() {
        let text = "prot: 1\nx-mine: 2\ntemplate: &t {a: 1}\nudp: true\ntfo: true\n";
        let ((), report) = decode(text, |fields| {
            fields.silent(&["port", "udp"]);
            fields.without_effect(&["tfo"]);
        });
        assert!(report.contains("p.yaml:1:1: warning: prot: `prot` is not a known key and is ignored"), "{report}");
        assert!(report.contains("did you mean `port`?"));
        assert!(report.contains("p.yaml:5:1: warning: tfo: `tfo` has no effect yet"));
        assert_eq!(report.matches("warning").count(), 2);
    }

    #[test]
    fn the_same_warning_on_every_proxy_is_one_block() {
        let text = "- {tfo: true}\n- {tfo: true}\n- {tfo: false}\n";
        let mut report = Report::new("p.yaml", text);
        let root = parse(&mut report).unwrap();
        for (index, node) in root.items().iter().enumerate() {
            let mut fields = Fields::relaxed(node, format!("proxies[{index}]"), &mut report).unwrap();
            fields.without_effect(&["tfo"]);
            fields.finish();
        }
        assert_eq!(report.warnings().count(), 1);
        assert!(report.to_string().contains("also at line 2, 3"), "{report}");
    }

    #[test]
    fn relaxed_keys_match_in_any_case_and_with_underscores() {
        let mut report = Report::new("p.yaml", "Skip_Cert_Verify: yes\n");
        let root = parse(&mut report).unwrap();
        let mut fields = Fields::relaxed(&root, "proxies[0]", &mut report).unwrap();
        assert!(fields.or("skip-cert-verify", false));
        fields.finish();
        assert!(report.is_empty(), "{report}");
    }

    #[test]
    fn a_wrong_choice_names_them_all() {
        let (mode, report) = decode("mode: Rul\n", |fields| fields.choice("mode", &[("rule", 1), ("global", 2)]));
        assert_eq!(mode, None);
        assert!(report.contains("expected one of rule, global, found `Rul`"), "{report}");
        assert!(report.contains("did you mean `rule`?"));
        let (mode, report) = decode("mode: Rule\n", |fields| fields.choice("mode", &[("rule", 1)]));
        assert_eq!((mode, report.as_str()), (Some(1), ""));
    }

    #[test]
    fn a_list_where_a_mapping_belongs_is_said_so() {
        let ((), report) = decode("tun: [a]\nblank:\n", |fields| {
            assert!(fields.nested("tun").is_none());
            assert!(fields.nested("blank").is_none());
        });
        assert!(report.contains("tun: expected a mapping"), "{report}");
    }
}
