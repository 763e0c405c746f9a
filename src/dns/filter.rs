//! `fake-ip-filter`: the domain wildcards of Clash, and which names they keep real.

use std::collections::HashMap;

use foldhash::fast::RandomState;

/// What a name that matches the filter gets (`fake-ip-filter-mode`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum FilterMode {
    /// Names that match are real, all others are fake.
    #[default]
    Blacklist,
    /// Names that match are fake, all others are real.
    Whitelist,
}

/// Why a text is not a domain wildcard.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvalidPattern {
    /// Nothing stands there.
    #[error("the pattern is empty")]
    Empty,
    /// White space in or around the pattern.
    #[error("the pattern has white space")]
    Space,
    /// Two dots in a row, or one at the end.
    #[error("the pattern has an empty label")]
    EmptyLabel,
    /// `geosite:` and `rule-set:` name a list, not a wildcard.
    #[error("the pattern names a list, and lists of names are not supported here yet")]
    List,
}

/// A set of domain wildcards, kept as a tree of labels from the right:
/// `a.b` itself, `*.a.b` one label more, `.a.b` anything below, `+.a.b` both apex and below, `x.*.b` any one label.
#[derive(Debug, Default)]
pub struct Wildcards {
    root: Node,
}

#[derive(Debug, Default)]
struct Node {
    labels: HashMap<Box<str>, Node, RandomState>,
    /// `*`: one label, whatever it says.
    star: Option<Box<Node>>,
    /// A pattern ends here.
    apex: bool,
    /// Everything below matches, at any depth.
    below: bool,
}

impl Wildcards {
    /// Adds one pattern; letter case does not matter.
    ///
    /// # Errors
    /// [`InvalidPattern`]; the set is then as before.
    pub fn insert(&mut self, pattern: &str) -> Result<(), InvalidPattern> {
        let list = pattern.split_once(':').map(|(kind, _)| kind.to_ascii_lowercase());
        if matches!(list.as_deref(), Some("geosite" | "rule-set")) {
            return Err(InvalidPattern::List);
        }
        if pattern.is_empty() {
            return Err(InvalidPattern::Empty);
        }
        if pattern.contains(char::is_whitespace) {
            return Err(InvalidPattern::Space);
        }
        let pattern = pattern.to_lowercase();
        let (suffix, apex, below) = match (pattern.strip_prefix("+."), pattern.strip_prefix('.')) {
            _ if pattern == "+" => ("", false, true),
            (Some(suffix), _) => (suffix, true, true),
            (None, Some(suffix)) => (suffix, false, true),
            (None, None) => (&*pattern, true, false),
        };
        if pattern != "+" && suffix.split('.').any(str::is_empty) {
            return Err(InvalidPattern::EmptyLabel);
        }
        let mut node = &mut self.root;
        for label in suffix.rsplit('.').filter(|label| !label.is_empty()) {
            node = match label {
                "*" => node.star.get_or_insert_default(),
                label => node.labels.entry(label.into()).or_default(),
            };
        }
        node.apex |= apex;
        node.below |= below;
        Ok(())
    }

    /// Whether a pattern covers `name` (lower-case, no trailing dot).
    #[must_use]
    pub fn matches(&self, name: &str) -> bool {
        self.root.matches(name)
    }
}

impl Node {
    /// `rest` holds the labels that are left of this node; empty means that the name ends here.
    fn matches(&self, rest: &str) -> bool {
        if rest.is_empty() {
            return self.apex;
        }
        if self.below {
            return true;
        }
        let (rest, label) = rest.rsplit_once('.').unwrap_or(("", rest));
        self.labels.get(label).is_some_and(|node| node.matches(rest))
            || self.star.as_ref().is_some_and(|node| node.matches(rest))
    }
}

/// Decides which names get a fake address.
#[derive(Debug, Default)]
pub struct Filter {
    wildcards: Wildcards,
    mode: FilterMode,
}

impl Filter {
    /// A filter of these patterns.
    #[must_use]
    pub fn new(wildcards: Wildcards, mode: FilterMode) -> Self {
        Self { wildcards, mode }
    }

    /// Whether `name` (lower-case, no trailing dot) gets a fake address.
    ///
    /// Names that only the local network can know are real unless a whitelist says otherwise: single labels, `.local`
    /// (RFC 6762) and everything under `.arpa`. No proxy could resolve them, and a fake answer would make names
    /// exist that search lists and discovery protocols (`wpad`, `ipv4only.arpa`) must see fail.
    #[must_use]
    pub fn fakes(&self, name: &str) -> bool {
        match self.mode {
            FilterMode::Whitelist => self.wildcards.matches(name),
            FilterMode::Blacklist => !local_only(name) && !self.wildcards.matches(name),
        }
    }
}

fn local_only(name: &str) -> bool {
    name.rsplit_once('.').is_none_or(|(_, top)| top == "local" || top == "arpa")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(patterns: &[&str]) -> Wildcards {
        let mut set = Wildcards::default();
        patterns.iter().for_each(|pattern| set.insert(pattern).unwrap());
        set
    }

    #[test]
    fn each_wildcard_covers_what_clash_says_and_nothing_else() {
        for (pattern, hits, misses) in [
            ("a.com", &["a.com"][..], &["x.a.com", "com", "ba.com"][..]),
            ("*.a.com", &["x.a.com"], &["a.com", "y.x.a.com"]),
            (".a.com", &["x.a.com", "y.x.a.com"], &["a.com", "xa.com"]),
            ("+.a.com", &["a.com", "x.a.com", "y.x.a.com"], &["xa.com", "com"]),
            ("x.*.com", &["x.a.com", "x.b.com"], &["x.com", "x.a.b.com", "y.a.com"]),
            ("*", &["printer"], &["a.com"]),
            ("+", &["printer", "a.com"], &[]),
            ("*.*.com", &["x.a.com"], &["a.com", "y.x.a.com"]),
            ("A.Com", &["a.com"], &[]),
        ] {
            let set = set(&[pattern]);
            hits.iter().for_each(|name| assert!(set.matches(name), "{pattern} covers {name}"));
            misses.iter().for_each(|name| assert!(!set.matches(name), "{pattern} does not cover {name}"));
        }
    }

    #[test]
    fn a_closer_label_does_not_hide_a_wildcard_beside_it() {
        let set = set(&["y.x.com", "z.*.com", "+.w.com", "q.w.com"]);
        assert!(set.matches("y.x.com") && set.matches("z.x.com") && set.matches("a.w.com") && set.matches("b.q.w.com"));
        assert!(!set.matches("a.x.com"));
    }

    #[test]
    fn a_malformed_pattern_says_why() {
        let mut set = Wildcards::default();
        for (pattern, why) in [
            ("", InvalidPattern::Empty),
            (" a.com", InvalidPattern::Space),
            ("a.com.", InvalidPattern::EmptyLabel),
            ("a..com", InvalidPattern::EmptyLabel),
            (".", InvalidPattern::EmptyLabel),
            ("+.", InvalidPattern::EmptyLabel),
            ("geosite:cn", InvalidPattern::List),
            ("GEOSITE:cn", InvalidPattern::List),
        ] {
            assert_eq!(set.insert(pattern), Err(why), "{pattern:?}");
        }
    }

    #[test]
    fn names_of_the_local_network_are_faked_only_on_request() {
        let blacklist = Filter::new(set(&["+.real.example"]), FilterMode::Blacklist);
        for name in ["nas", "printer.local", "1.0.168.192.in-addr.arpa", "www.real.example"] {
            assert!(!blacklist.fakes(name), "{name}");
        }
        assert!(blacklist.fakes("www.example.com"));
        let whitelist = Filter::new(set(&["*", "+.fake.example"]), FilterMode::Whitelist);
        assert!(whitelist.fakes("nas") && whitelist.fakes("fake.example") && !whitelist.fakes("www.example.com"));
    }
}
