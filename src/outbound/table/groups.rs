//! `proxy-groups:` in an order in which every group follows its members.

use std::collections::VecDeque;
use std::sync::Arc;

use super::{Entry, Index, Outbounds};
use crate::outbound::{Member, Outbound, Select, Unsupported};
use crate::profile::{Fields, Node, Place, Report};

/// How a group finds its present member.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// It is told.
    Select,
    /// It will measure; until then it takes the first member that can be used.
    Measures(&'static str),
    /// Not built: `relay`.
    Relay,
}

const KINDS: &[(&str, Kind)] = &[
    ("select", Kind::Select),
    ("url-test", Kind::Measures("url-test")),
    ("fallback", Kind::Measures("fallback")),
    ("load-balance", Kind::Measures("load-balance")),
    ("relay", Kind::Relay),
];

/// Keys of mihomo's groups that do nothing here yet.
const WITHOUT_EFFECT: &[&str] = &[
    "url",
    "interval",
    "lazy",
    "timeout",
    "max-failed-times",
    "tolerance",
    "strategy",
    "expected-status",
    "filter",
    "exclude-filter",
    "exclude-type",
    "include-all-providers",
    "interface-name",
    "routing-mark",
    "empty-fallback",
];

/// A group as it was written.
struct Written {
    name: String,
    kind: Kind,
    members: Vec<Index>,
    default: Option<String>,
    disable_udp: bool,
    place: Place,
    path: String,
}

/// Adds the groups to `table`, and GLOBAL if the profile does not have its own.
pub(super) fn add(table: &mut Outbounds, nodes: &[Node], report: &mut Report) {
    let proxies = table.entries.len();
    let heads = reserve(table, nodes, report);
    let groups: Vec<Written> = heads.into_iter().filter_map(|head| read(table, proxies, head, report)).collect();

    let mut built: Vec<Option<Entry>> = groups.iter().map(|_| None).collect();
    for at in order(&groups, proxies, report) {
        let entry = build(table, &built, proxies, &groups[at], report);
        built[at] = Some(entry);
    }
    for (group, entry) in groups.iter().zip(built) {
        // Only a group in a cycle was not built, and that is an error in the report.
        table.entries.push(entry.unwrap_or_else(|| refusing(&group.name, "is part of a cycle")));
    }
    add_global(table);
}

/// An entry with a name of its own, whose index is thereby known.
struct Head<'a> {
    node: &'a Node,
    path: String,
    name: String,
}

/// Gives every group that has a free name its index, so that groups can name later ones.
fn reserve<'a>(table: &mut Outbounds, nodes: &'a [Node], report: &mut Report) -> Vec<Head<'a>> {
    let mut heads = Vec::new();
    for (at, node) in nodes.iter().enumerate() {
        let path = format!("proxy-groups[{at}]");
        let Some(mut fields) = Fields::relaxed(node, path.clone(), report) else { continue };
        let Some(name) = fields.required::<String>("name") else { continue };
        if table.is_free(&name, &mut fields) {
            table.names.insert(name.clone(), Index(table.entries.len() + heads.len()));
            heads.push(Head { node, path, name });
        }
    }
    heads
}

/// Reads one group. A wrong one stays in its place, without members, as its index is taken.
fn read(table: &Outbounds, proxies: usize, head: Head<'_>, report: &mut Report) -> Option<Written> {
    let Head { node, path, name } = head;
    let mut fields = Fields::relaxed(node, path.clone(), report)?;
    fields.silent(&["name", "hidden", "icon"]);
    let kind = match (fields.choice("type", KINDS), fields.has("type")) {
        (Some(kind), _) => kind,
        (None, true) => Kind::Select,
        (None, false) => {
            fields.error("type", "the key `type` is required and missing");
            Kind::Select
        }
    };
    let disable_udp = fields.or("disable-udp", false);
    let default = fields.optional::<String>("default-selected");
    let mut members = members(table, &mut fields);
    if fields.or("include-all", false) | fields.or("include-all-proxies", false) {
        members.extend(all_proxies(table, proxies));
    }
    let provided = fields.node("use").is_some_and(|providers| !providers.items().is_empty());
    if provided {
        let (place, at) = (fields.place("use"), fields.path_of("use"));
        fields.report().warn_once(place, at, "proxy providers are not built yet: their proxies are missing here");
    }
    let listed = fields.node("proxies").is_some_and(|proxies| !proxies.items().is_empty());
    if members.is_empty() && !provided && !listed {
        fields.error("proxies", format!("the group `{name}` has no members: expected `proxies`"));
    }
    fields.without_effect(WITHOUT_EFFECT);
    let place = fields.place("name");
    fields.finish();
    Some(Written { name, kind, members, default, disable_udp, place, path })
}

fn members(table: &Outbounds, fields: &mut Fields<'_>) -> Vec<Index> {
    let Some(node) = fields.node("proxies") else { return Vec::new() };
    let list = fields.path_of("proxies");
    let mut members = Vec::new();
    for (at, item) in node.items().iter().enumerate() {
        let path = format!("{list}[{at}]");
        match item.text().map(|text| (text, table.index(text))) {
            Some((_, Some(index))) => members.push(index),
            Some((text, None)) => {
                fields.report().error(item, path, format!("no proxy or group is called `{text}`"));
            }
            None => {
                fields.report().error(item, path, format!("expected the name of a proxy, found {}", item.found()));
            }
        }
    }
    members
}

/// mihomo sorts what `include-all` brings by name.
fn all_proxies(table: &Outbounds, proxies: usize) -> Vec<Index> {
    let built_in = Outbounds::BUILT_IN;
    let mut all: Vec<Index> = (built_in..proxies).map(Index).collect();
    all.sort_by_key(|index| table.outbound(*index).name());
    all
}

/// The groups, each after its members (Kahn); those in a cycle, and those that lead to one, are left out.
fn order(groups: &[Written], proxies: usize, report: &mut Report) -> Vec<usize> {
    let inner = |group: &Written| -> Vec<usize> {
        group.members.iter().filter_map(|index| index.0.checked_sub(proxies)).filter(|at| *at < groups.len()).collect()
    };
    let mut waits: Vec<usize> = groups.iter().map(|group| inner(group).len()).collect();
    let mut parents: Vec<Vec<usize>> = vec![Vec::new(); groups.len()];
    for (at, group) in groups.iter().enumerate() {
        for member in inner(group) {
            parents[member].push(at);
        }
    }
    let mut ready: VecDeque<usize> = (0..groups.len()).filter(|at| waits[*at] == 0).collect();
    let mut order = Vec::with_capacity(groups.len());
    while let Some(at) = ready.pop_front() {
        order.push(at);
        for &parent in &parents[at] {
            waits[parent] -= 1;
            if waits[parent] == 0 {
                ready.push_back(parent);
            }
        }
    }
    if let Some(start) = (0..groups.len()).find(|at| waits[*at] > 0) {
        // Every group that still waits has a member that does, so this walk meets a group twice.
        let mut path = vec![start];
        let mut at = start;
        while let Some(next) = inner(&groups[at]).into_iter().find(|member| waits[*member] > 0) {
            let met = path.iter().position(|seen| *seen == next);
            path.push(next);
            if let Some(met) = met {
                path.drain(..met);
                break;
            }
            at = next;
        }
        let first = &groups[path[0]];
        let names: Vec<&str> = path.iter().map(|at| groups[*at].name.as_str()).collect();
        let message = format!("these groups lead in a circle: {}", names.join(" -> "));
        report.error(first.place, format!("{}.proxies", first.path), message);
    }
    order
}

fn build(table: &Outbounds, built: &[Option<Entry>], proxies: usize, group: &Written, report: &mut Report) -> Entry {
    // The order of building makes every member an entry by now.
    let entry = |index: Index| match index.0.checked_sub(proxies) {
        Some(at) => built.get(at).and_then(Option::as_ref),
        None => table.entries.get(index.0),
    };
    let known: Vec<(Index, &Entry)> =
        group.members.iter().filter_map(|&at| entry(at).map(|found| (at, found))).collect();
    let place = (group.place, group.path.clone());
    if group.kind == Kind::Relay {
        let message = format!("`{}`: `type: relay` is not built yet; flows to it are refused", group.name);
        report.warn(place.0, place.1, message);
        return refusing(&group.name, "is of type relay, which is not built yet");
    }
    let Some(usable) = known.iter().position(|(_, entry)| entry.usable) else {
        let message = format!("no member of `{}` can be used yet; flows to it are refused", group.name);
        report.warn(place.0, place.1, message);
        return refusing(&group.name, "has no member that is built yet");
    };
    let now = match group.kind {
        Kind::Measures(kind) => {
            let message = format!("`type: {kind}` acts as `select` for now, on its first usable member");
            report.warn_once(place.0, format!("{}.type", place.1), message);
            usable
        }
        _ => default(group, &known, report),
    };
    let usable = known[now].1.usable;
    let members =
        known.iter().map(|(index, entry)| Member { index: *index, outbound: Arc::clone(&entry.outbound) }).collect();
    match Select::new(&group.name, members, now, group.disable_udp).map(Arc::new) {
        Some(select) => Entry { outbound: Arc::clone(&select) as Arc<dyn Outbound>, group: Some(select), usable },
        None => refusing(&group.name, "has no members"),
    }
}

/// The member that a `select` group begins with.
fn default(group: &Written, known: &[(Index, &Entry)], report: &mut Report) -> usize {
    let Some(wanted) = &group.default else { return 0 };
    known.iter().position(|(_, entry)| entry.outbound.name() == wanted).unwrap_or_else(|| {
        let path = format!("{}.default-selected", group.path);
        report.warn(group.place, path, format!("`{wanted}` is not a member; the first one is selected"));
        0
    })
}

fn refusing(name: &str, why: &str) -> Entry {
    let outbound = Arc::new(Unsupported::new(name, format!("the group `{name}` {why}")));
    Entry { outbound, group: None, usable: false }
}

/// GLOBAL, which `mode: global` uses: DIRECT, REJECT, the proxies and the groups in the order of the profile.
fn add_global(table: &mut Outbounds) {
    if table.index("GLOBAL").is_some() {
        return;
    }
    let own = (Outbounds::BUILT_IN..table.entries.len()).map(Index);
    let members = [Outbounds::DIRECT, Outbounds::REJECT]
        .into_iter()
        .chain(own)
        .map(|index| Member { index, outbound: Arc::clone(table.outbound(index)) })
        .collect();
    if let Some(global) = Select::new("GLOBAL", members, 0, false).map(Arc::new) {
        table.push(Arc::clone(&global) as Arc<dyn Outbound>, Some(global), true);
    }
}
