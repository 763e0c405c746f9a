//! `proxy-groups:` in an order in which every group follows its members.

use std::collections::VecDeque;
use std::sync::Arc;

use super::{Entry, Index, Outbounds};
use crate::outbound::{Member, Outbound, Select, Unsupported};
use crate::profile::{Fields, Group, Place, Report};

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
    "interface-name",
    "routing-mark",
    "empty-fallback",
];

/// Keys that choose among members. Until they work, who the members would be cannot be told.
const CHOICES: [&str; 3] = ["filter", "exclude-filter", "exclude-type"];

/// A group as it was written.
struct Written<'a> {
    group: &'a Group,
    kind: Kind,
    members: Vec<Index>,
    default: Option<String>,
    disable_udp: bool,
    /// Of its name.
    place: Place,
    /// Of its type.
    kind_place: Place,
    /// Why it can have no member now; the report says so already.
    refuses: Option<String>,
}

/// Adds the groups to `table`, and GLOBAL if the profile does not have its own.
pub(super) fn add(table: &mut Outbounds, groups: &[Group], report: &mut Report) {
    let proxies = table.entries.len();
    let mut own = Vec::with_capacity(groups.len());
    for group in groups {
        // A name that is taken is an error in the report.
        if !table.names.contains_key(&group.name) {
            table.names.insert(group.name.clone(), Index(proxies + own.len()));
            own.push(group);
        }
    }
    let written: Vec<Written<'_>> = own.iter().map(|group| read(table, proxies, group, report)).collect();
    let mut built: Vec<Option<Entry>> = written.iter().map(|_| None).collect();
    for at in order(&written, proxies) {
        let entry = build(table, &built, proxies, &written[at], report);
        built[at] = Some(entry);
    }
    for (group, entry) in own.iter().zip(built) {
        table.entries.push(entry.unwrap_or_else(|| refusing(&group.name, "contains itself")));
    }
    add_global(table);
}

/// Reads one group. A wrong one stays in its place, without members, as its index is taken.
fn read<'a>(table: &Outbounds, proxies: usize, group: &'a Group, report: &mut Report) -> Written<'a> {
    let (kind, members) = (Kind::Select, Vec::new());
    let place = group.node.place;
    let mut written =
        Written { group, kind, members, default: None, disable_udp: false, place, kind_place: place, refuses: None };
    let Some(mut fields) = Fields::relaxed(&group.node, &*group.path, report) else { return written };
    fields.silent(&["name", "hidden", "icon", "proxies", "use"]);
    fields.silent(&["include-all", "include-all-proxies", "include-all-providers"]);
    (written.place, written.kind_place) = (fields.place("name"), fields.place("type"));
    written.kind = fields.choice("type", KINDS).unwrap_or(Kind::Select);
    written.disable_udp = fields.or("disable-udp", false);
    written.default = fields.optional::<String>("default-selected").filter(|name| !name.is_empty());
    written.members = group.proxies.iter().filter_map(|name| table.index(name)).collect();
    if group.brought.proxies {
        written.members.extend(all_proxies(table, proxies, &written.members));
    }
    written.refuses = choices(group, &mut fields);
    if written.refuses.is_none() {
        written.refuses = provided(group, &written.members, &mut fields);
    }
    fields.without_effect(WITHOUT_EFFECT);
    fields.finish();
    written
}

/// `filter` and its like: a group that has one refuses, because it would otherwise have members that its author took
/// out. `filter` leaves members alone that are named.
fn choices(group: &Group, fields: &mut Fields<'_>) -> Option<String> {
    let mut refuses = None;
    for key in CHOICES {
        let written = fields.optional::<String>(key).is_some_and(|text| !text.is_empty());
        let brought = group.brought.proxies || group.brought.providers.is_some();
        if !written || refuses.is_some() {
            continue;
        }
        if key == "filter" && !brought {
            fields.warn(
                key,
                "`filter` has no effect: it chooses among what `include-all` and `use` bring, not among `proxies`",
            );
        } else {
            let why = format!("has `{key}`, which is not built yet");
            fields.warn(key, format!("the group `{}` {why}: it refuses every flow that reaches it", group.name));
            refuses = Some(why);
        }
    }
    refuses
}

/// What is to be said of proxies that only a provider would bring; whether the group then refuses.
fn provided(group: &Group, members: &[Index], fields: &mut Fields<'_>) -> Option<String> {
    let key = group.brought.providers?;
    if members.is_empty() && !group.wrong {
        let message = format!(
            "proxy providers are not built yet: `{}` is empty and refuses every flow that reaches it",
            group.name
        );
        fields.warn(key, message);
        return Some("is filled by proxy providers, which are not built yet".to_owned());
    }
    if key != "include-all" {
        let (place, path) = (fields.place(key), fields.path_of(key));
        fields.report().warn_once(place, path, "proxy providers are not built yet: their proxies are missing here");
    }
    None
}

/// mihomo sorts what `include-all` brings by name; a proxy that is a member already is not brought again.
fn all_proxies(table: &Outbounds, proxies: usize, named: &[Index]) -> Vec<Index> {
    let mut all: Vec<Index> =
        (Outbounds::BUILT_IN..proxies).map(Index).filter(|index| !named.contains(index)).collect();
    all.sort_by_key(|index| table.outbound(*index).name());
    all
}

/// The groups, each after its members (Kahn). None contains itself, which was seen to when the profile was read.
fn order(groups: &[Written<'_>], proxies: usize) -> Vec<usize> {
    let inner = |group: &Written<'_>| -> Vec<usize> {
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
    order
}

fn build(
    table: &Outbounds,
    built: &[Option<Entry>],
    proxies: usize,
    written: &Written<'_>,
    report: &mut Report,
) -> Entry {
    let Group { name, path, .. } = written.group;
    // The order of building makes every member an entry by now.
    let entry = |index: Index| match index.0.checked_sub(proxies) {
        Some(at) => built.get(at).and_then(Option::as_ref),
        None => table.entries.get(index.0),
    };
    let known: Vec<(Index, &Entry)> =
        written.members.iter().filter_map(|&at| entry(at).map(|found| (at, found))).collect();
    if written.kind == Kind::Relay {
        let message = format!("`{name}`: `type: relay` is not built yet; flows to it are refused");
        report.warn(written.place, path, message);
        return refusing(name, "is of type relay, which is not built yet");
    }
    if let Some(why) = &written.refuses {
        return refusing(name, why);
    }
    let Some(usable) = known.iter().position(|(_, entry)| entry.usable) else {
        // Where the profile has errors, a wrong entry may be why.
        if !report.has_errors() {
            let message = format!("no member of `{name}` can be used yet; flows to it are refused");
            report.warn(written.place, path, message);
        }
        return refusing(name, "has no member that is built yet");
    };
    let now = match written.kind {
        Kind::Measures(kind) => {
            let (member, direct) = (known[usable].1.outbound.name(), known[usable].1.direct);
            let way = if direct { ": its flows go DIRECT" } else { "" };
            let message =
                format!("`type: {kind}` acts as `select` for now, on the first member that is built, `{member}`{way}");
            report.warn(written.kind_place, format!("{path}.type"), message);
            usable
        }
        _ => default(written, &known, report),
    };
    let (usable, direct) = (known[now].1.usable, known[now].1.direct);
    let members =
        known.iter().map(|(index, entry)| Member { index: *index, outbound: Arc::clone(&entry.outbound) }).collect();
    match Select::new(name, members, now, written.disable_udp).map(Arc::new) {
        Some(select) => {
            Entry { outbound: Arc::clone(&select) as Arc<dyn Outbound>, group: Some(select), usable, direct }
        }
        None => refusing(name, "has no members"),
    }
}

/// The member that a `select` group begins with.
fn default(written: &Written<'_>, known: &[(Index, &Entry)], report: &mut Report) -> usize {
    let Some(wanted) = &written.default else { return 0 };
    known.iter().position(|(_, entry)| entry.outbound.name() == wanted).unwrap_or_else(|| {
        let path = format!("{}.default-selected", written.group.path);
        report.warn(written.place, path, format!("`{wanted}` is not a member; the first one is selected"));
        0
    })
}

fn refusing(name: &str, why: &str) -> Entry {
    let outbound = Arc::new(Unsupported::new(name, format!("the group `{name}` {why}")));
    Entry { outbound, group: None, usable: false, direct: false }
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
        table.names.insert("GLOBAL".to_owned(), Index(table.entries.len()));
        let outbound = Arc::clone(&global) as Arc<dyn Outbound>;
        table.entries.push(Entry { outbound, group: Some(global), usable: true, direct: true });
    }
}
