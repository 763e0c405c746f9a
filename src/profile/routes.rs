//! `proxies:`, `proxy-groups:` and `rules:`: the names, and whether each that is used exists.

use std::collections::HashMap;

use super::fields::Fields;
use super::groups;
use super::nearest::nearest;
use super::node::{Node, Place, shortened};
use super::report::Report;
use super::rule_lines::{self, PlacedRule};

/// Targets that every profile has.
pub const BUILT_IN: &[&str] = &["DIRECT", "REJECT", "REJECT-DROP", "PASS", "GLOBAL", "COMPATIBLE"];

/// An entry of `proxies`. What else it says is for the kind of outbound to decode from `node`.
#[derive(Debug, Clone)]
pub struct Proxy {
    /// `name`.
    pub name: String,
    /// `type`, as written.
    pub kind: String,
    /// The whole entry.
    pub node: Node,
    /// Its key path, as in `proxies[2]`.
    pub path: String,
}

/// An entry of `proxy-groups`.
#[derive(Debug, Clone)]
pub struct Group {
    /// `name`.
    pub name: String,
    /// `type`, as written.
    pub kind: String,
    /// `proxies`: the names of its members, each of which exists. No group contains itself, on whichever way, and groups
    /// nest at most 64 deep: members that would break that are left out.
    pub proxies: Vec<String>,
    /// What brings members beside `proxies`.
    pub brought: Brought,
    /// Whether the report has an error about its members; then nothing more needs to be said about them.
    pub wrong: bool,
    /// The whole entry.
    pub node: Node,
    /// Its key path, as in `proxy-groups[0]`.
    pub path: String,
}

/// The keys of a group that bring members without naming them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Brought {
    /// `include-all` or `include-all-proxies`: every proxy of the profile.
    pub proxies: bool,
    /// The key that asks for the proxies of providers, of `use`, `include-all-providers` and `include-all`.
    pub providers: Option<&'static str>,
}

/// How many misspelt names get a hint. More of them are no slips of the finger, and each costs a look at every name.
const MOST_HINTS: usize = 32;

/// The names that rules and groups may use, with the place of each.
#[derive(Debug, Default)]
pub(super) struct Names {
    places: HashMap<String, Place>,
    /// Names that nobody defines, and what to do about each.
    hints: HashMap<String, String>,
}

impl Names {
    pub(super) fn has(&self, name: &str) -> bool {
        BUILT_IN.contains(&name) || self.places.contains_key(name)
    }

    /// Whether the profile itself defines `name`.
    pub(super) fn defines(&self, name: &str) -> bool {
        self.places.contains_key(name)
    }

    /// Adds an error for `name`, which nobody defines, and the nearest name that somebody does.
    pub(super) fn undefined(&mut self, name: &str, place: Place, path: &str, report: &mut Report) {
        let diagnostic = report.error(place, path, format!("there is no proxy or group named `{}`", shortened(name)));
        if !self.hints.contains_key(name) {
            if self.hints.len() >= MOST_HINTS {
                return;
            }
            let mut names: Vec<&str> = self.places.keys().map(String::as_str).chain(BUILT_IN.iter().copied()).collect();
            names.sort_unstable();
            let hint = match nearest(name, names) {
                Some(near) => format!("did you mean `{near}`?"),
                None => "define it under `proxies` or `proxy-groups`, or use DIRECT or REJECT".to_owned(),
            };
            self.hints.insert(name.to_owned(), hint);
        }
        if let Some(hint) = self.hints.get(name) {
            diagnostic.hint(hint.as_str());
        }
    }

    /// Takes a name into the list, unless it is there already or built in.
    fn define(&mut self, name: &str, place: Place, path: &str, built_in_allowed: bool, report: &mut Report) {
        if BUILT_IN.contains(&name) && !built_in_allowed {
            report.error(place, path, format!("`{name}` is a built-in target and cannot be defined"));
            return;
        }
        if let Some(first) = self.places.get(name) {
            let line = first.at.line;
            let message = format!("the name `{}` is used twice; the first one stands at line {line}", shortened(name));
            report.error(place, path, message).hint("proxies and groups share one set of names");
            return;
        }
        self.places.insert(name.to_owned(), place);
    }
}

/// The three lists.
pub(super) struct Routes {
    pub(super) proxies: Vec<Proxy>,
    pub(super) groups: Vec<Group>,
    pub(super) rules: Vec<PlacedRule>,
}

/// Reads the three lists. Every name that is used and not defined is an error at the place that uses it.
pub(super) fn routes(fields: &mut Fields<'_>) -> Routes {
    let mut names = Names::default();
    let mut proxies = Vec::new();
    for (index, node) in list(fields, "proxies").iter().enumerate() {
        let path = format!("proxies[{index}]");
        if let Some((name, kind)) = head(node, &path, fields.report()) {
            let place = node.child("name").map_or(node.place, Place::from);
            names.define(&name, place, &format!("{path}.name"), false, fields.report());
            proxies.push(Proxy { name, kind, node: node.clone(), path });
        }
    }
    let mut groups = Vec::new();
    for (index, node) in list(fields, "proxy-groups").iter().enumerate() {
        let path = format!("proxy-groups[{index}]");
        if let Some((name, kind)) = head(node, &path, fields.report()) {
            let place = node.child("name").map_or(node.place, Place::from);
            names.define(&name, place, &format!("{path}.name"), name == "GLOBAL", fields.report());
            let (proxies, brought) = (Vec::new(), Brought::default());
            groups.push(Group { name, kind, proxies, brought, wrong: false, node: node.clone(), path });
        }
    }
    for group in &mut groups {
        groups::read_members(group, &mut names, fields.report());
    }
    groups::refuse_cycles(&mut groups, fields.report());
    let rules = rule_lines::read(list(fields, "rules"), &mut names, fields.report());
    Routes { proxies, groups, rules }
}

/// The items under `key`; what is no list is an error.
fn list<'a>(fields: &mut Fields<'a>, key: &'static str) -> &'a [Node] {
    let Some(node) = fields.node(key) else { return &[] };
    if node.entries().is_some() || node.text().is_some() {
        let message = format!("expected a list (lines that begin with `- `), found {}", node.found());
        fields.error(key, message);
        return &[];
    }
    node.items()
}

/// `name` and `type` of an entry; the other keys are for others to read.
fn head(node: &Node, path: &str, report: &mut Report) -> Option<(String, String)> {
    let mut fields = Fields::relaxed(node, path, report)?;
    let (name, kind) = (fields.required::<String>("name"), fields.required::<String>("type"));
    let name = name.filter(|name| {
        let blank = name.trim().is_empty();
        if blank {
            fields.error("name", "the name is empty");
        }
        !blank
    });
    Some((name?, kind?.trim().to_owned()))
}
