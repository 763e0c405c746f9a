//! docs/host-changes.md is the specification of all that is changed on a host. Its tables are held against plans: what a
//! plan has is in the document, and what the document has is in some plan.
//!
//! Whoever adds a change adds it to the document, and to [`hosts`] a host on which it is made.

use std::collections::{BTreeMap, BTreeSet};

use super::layout::CAPTURE_STAGE;
use super::plan::tests::options;
use super::survey::tests::plain;
use super::{
    Before, DnsPlan, Family, HostOptions, HostPlan, Link, MarkMatch, NftState, RouteTable, Rule, RuleAction, SeenRoute,
    Survey,
};
use super::{layout, words};

const DOCUMENT: &str = include_str!("../../docs/host-changes.md");

/// Hosts and profiles that between them need every change.
fn hosts() -> Vec<(&'static str, HostOptions, Survey)> {
    let nets = |list: &[&str]| list.iter().map(|net| net.parse().unwrap()).collect();
    let with = |change: &dyn Fn(&mut Survey)| {
        let mut survey = plain();
        change(&mut survey);
        survey
    };
    let resolv_conf = |text: &str| Survey { resolv_conf: Some(text.to_owned()), ..plain() };
    let gateway = HostOptions { auto_forward: true, ..options() };
    let own_routes = HostOptions {
        route_address: nets(&["203.0.113.0/24", "2001:db8::/32"]),
        route_exclude: nets(&["203.0.113.16/28", "2001:db8:9::/64"]),
        ..options()
    };
    vec![
        ("a desktop", options(), plain()),
        ("a gateway", gateway.clone(), with(&|it| it.parameters.host_only_advertisements = ["eth0".to_owned()].into())),
        ("a strict gateway", gateway, with(&|it| it.parameters.strict_reverse_path = ["eth0".to_owned()].into())),
        (
            "a strict router",
            options(),
            with(&|it| {
                it.parameters.strict_reverse_path = ["eth0".to_owned()].into();
                it.parameters.forward_v4 = true;
            }),
        ),
        (
            "beside another VPN",
            options(),
            with(&|it| {
                let rule = Rule::new(Family::V4, 5210, RuleAction::Lookup(RouteTable::MAIN));
                let mark = Some(MarkMatch { mark: 0x80000, mask: 0xff0000 });
                it.rules.push(Rule { mark, origin: 3, ..rule });
            }),
        ),
        (
            "a LAN and a user left out beside another VPN",
            HostOptions { exclude_interface: vec!["lan0".to_owned()], exclude_uid: vec![(1000, 1000)], ..options() },
            with(&|it| {
                let table = Rule::new(Family::V4, 5270, RuleAction::Lookup(RouteTable(52)));
                it.rules.push(Rule { origin: 3, ..table });
            }),
        ),
        (
            "two interfaces alone beside another VPN, and another run",
            HostOptions { include_interface: vec!["lan0".to_owned(), "lo".to_owned()], ..options() },
            with(&|it| {
                let first = HostPlan::new(&HostOptions { tun: "other".to_owned(), ..options() }, it).unwrap();
                it.rules.extend(first.rules);
                it.links.push(Link { index: 77, name: "other".to_owned() });
                let table = Rule::new(Family::V4, 5270, RuleAction::Lookup(RouteTable(52)));
                it.rules.push(Rule { origin: 3, ..table });
            }),
        ),
        (
            "beside another run",
            options(),
            with(&|it| {
                let first = HostPlan::new(&HostOptions { tun: "other".to_owned(), ..options() }, it).unwrap();
                it.rules.extend(first.rules);
                it.links.push(Link { index: 77, name: "other".to_owned() });
            }),
        ),
        (
            "a LAN with public addresses",
            options(),
            with(&|it| {
                let (table, to) = (RouteTable::MAIN, "203.0.113.0/24".parse().unwrap());
                it.routes.push(SeenRoute { table, to, device: Some(3), on_link: true });
            }),
        ),
        ("without IPv6", options(), Survey { ipv6: false, ..plain() }),
        ("without nftables", options(), with(&|it| it.nft = NftState::Missing("not there".to_owned()))),
        ("routes of its own", own_routes, plain()),
        ("users left out", HostOptions { exclude_uid: vec![(1000, 1000)], ..options() }, plain()),
        ("an interface left out", HostOptions { exclude_interface: vec!["lan0".to_owned()], ..options() }, plain()),
        (
            "two interfaces alone",
            HostOptions { include_interface: vec!["lan0".to_owned(), "lo".to_owned()], ..options() },
            plain(),
        ),
        ("a kill switch", HostOptions { kill_switch: true, ..options() }, plain()),
        ("strict without IPv6", HostOptions { strict_route: true, ..options() }, Survey { ipv6: false, ..plain() }),
        ("without dns-hijack", HostOptions { dns_hijack: false, ..options() }, plain()),
        ("without auto-route", HostOptions { auto_route: false, ..options() }, plain()),
        ("no resolv.conf", options(), Survey { resolv_conf: None, ..plain() }),
        ("no nameserver", options(), resolv_conf("search lan\n")),
        ("no nameserver that can be asked", options(), resolv_conf("nameserver router.lan\n")),
        ("a nameserver on the link", options(), resolv_conf("nameserver fe80::1%eth0\n")),
        ("systemd-resolved", options(), Survey { resolved: true, ..resolv_conf("nameserver 127.0.0.53\n") }),
    ]
}

fn plans() -> Vec<HostPlan> {
    hosts().iter().map(|(_, options, survey)| HostPlan::new(options, survey).unwrap()).collect()
}

/// The cells of each row of the tables below a heading.
fn rows(heading: &str) -> Vec<Vec<&'static str>> {
    let section = DOCUMENT.split("\n## ").find(|section| section.starts_with(heading));
    let lines = section.unwrap_or_else(|| panic!("docs/host-changes.md has no section {heading:?}")).lines();
    let cells = |line: &'static str| line.trim_matches('|').split('|').map(str::trim).collect::<Vec<_>>();
    let is_row = |cells: &Vec<&str>| cells.iter().any(|cell| cell.chars().any(char::is_alphanumeric));
    let mut rows: Vec<Vec<&str>> = lines.filter(|line| line.starts_with('|')).map(cells).filter(is_row).collect();
    // Further tables of the section have the same heads.
    let head = rows.first().cloned();
    rows.retain(|row| Some(row) != head.as_ref());
    assert!(!rows.is_empty(), "no table below {heading:?}");
    rows
}

/// Fails unless the document names exactly what the plans have.
fn assert_named<T: Ord + std::fmt::Debug>(what: &str, documented: &BTreeSet<T>, planned: &BTreeSet<T>) {
    let missing: Vec<&T> = planned.difference(documented).collect();
    assert!(missing.is_empty(), "{what} that docs/host-changes.md does not name; add them there: {missing:#?}");
    let stale: Vec<&T> = documented.difference(planned).collect();
    assert!(
        stale.is_empty(),
        "{what} in docs/host-changes.md that no plan has; take them out, or add a host to `hosts` in \
         src/platform/specification.rs that needs them: {stale:#?}"
    );
}

/// The kinds of changes in the order of the document: its words in bold type.
fn documented_order() -> Vec<&'static str> {
    rows("In the order done").into_iter().map(|row| row[1].split("**").nth(1).expect("a title in bold type")).collect()
}

#[test]
fn the_document_names_every_kind_of_change_in_the_order_in_which_they_are_made() {
    let order = documented_order();
    let planned: Vec<Vec<&str>> =
        plans().iter().map(|plan| plan.outline(&Before::default()).iter().map(|group| group.title).collect()).collect();
    let documented = order.iter().copied().collect();
    assert_named("kinds of changes", &documented, &planned.concat().into_iter().collect());
    for titles in planned {
        let places: Vec<_> = titles.iter().map(|title| order.iter().position(|it| it == title)).collect();
        assert!(places.is_sorted(), "the table \"In the order done\" has another order than {titles:?}");
    }
}

#[test]
fn the_document_says_which_rules_are_made_when() {
    let mut planned: BTreeMap<bool, BTreeSet<Place>> = BTreeMap::new();
    for plan in plans() {
        for rule in &plan.rules {
            let captures = layout::stage(rule, &plan.numbers) >= CAPTURE_STAGE;
            planned.entry(captures).or_default().insert(place_of(rule.priority, &plan));
        }
    }
    for (captures, title) in [(false, "rules that are jump targets or let traffic pass"), (true, "rules that capture")]
    {
        let row = rows("In the order done").into_iter().find(|row| row[1].contains(&format!("**{title}**")));
        assert_named(
            &format!("priorities (B+n, A+n) of {title}"),
            &priorities(row.expect("a row")[1]),
            &planned[&captures],
        );
    }
}

/// A priority as the document has it: `B` or `A`, and how far behind it.
type Place = (char, u32);

/// Ours stand in the block of B, and ahead of others from A on.
fn place_of(priority: u32, plan: &HostPlan) -> Place {
    let first = plan.rules.iter().map(|rule| rule.priority).min().unwrap_or_default();
    let block = plan.numbers.first_priority;
    if priority < block { ('A', priority - first) } else { ('B', priority - block) }
}

/// The places that a text names: `B`, `B+3`, and `B+30 to B+33` for all of these.
fn priorities(text: &str) -> BTreeSet<Place> {
    let place = |word: &str| {
        let word = word.trim_matches(|c: char| !c.is_alphanumeric());
        let (base, rest) = (word.chars().next().filter(|base| "AB".contains(*base))?, word.get(1..)?);
        let far = if rest.is_empty() { 0 } else { rest.strip_prefix('+')?.parse().ok()? };
        Some((base, far))
    };
    let words: Vec<&str> = text.split_whitespace().collect();
    let mut found: BTreeSet<Place> = words.iter().filter_map(|word| place(word)).collect();
    for window in words.windows(3) {
        if let (Some((base, first)), "to", Some((_, last))) = (place(window[0]), window[1], place(window[2])) {
            found.extend((first..=last).map(|far| (base, far)));
        }
    }
    found
}

#[test]
fn the_document_names_every_rule_with_its_selectors_and_its_action() {
    let mut planned = BTreeSet::new();
    let mut families: BTreeMap<Place, BTreeSet<Family>> = BTreeMap::new();
    for plan in plans() {
        for rule in &plan.rules {
            let at = place_of(rule.priority, &plan);
            families.entry(at).or_default().insert(rule.family);
            planned.extend(facts_of(rule, &plan).into_iter().map(|fact| (at, fact)));
        }
    }
    for (at, families) in families {
        let only = match (families.contains(&Family::V4), families.contains(&Family::V6)) {
            (true, true) => "both families",
            (true, false) => "(IPv4)",
            _ => "(IPv6)",
        };
        planned.insert((at, only.to_owned()));
    }
    let mut documented = BTreeSet::new();
    for row in rows("The rules") {
        let at = priorities(row[0]).into_iter().next().unwrap_or_else(|| panic!("no priority in {row:?}"));
        let only = ["(IPv4)", "(IPv6)"].into_iter().find(|only| row[0].contains(only)).unwrap_or("both families");
        documented.insert((at, only.to_owned()));
        let code = row[1].split('`').skip(1).step_by(2);
        documented.extend(code.flat_map(facts).map(|fact| (at, fact)));
    }
    assert_named("facts of rules (their offset in our block, and a selector or action)", &documented, &planned);
}

/// A rule's facts, with the names that the document has for our numbers.
fn facts_of(rule: &Rule, plan: &HostPlan) -> BTreeSet<String> {
    let line = words::rule("add", rule).replace(" protocol kernel", "");
    let mut facts = facts(line.split_once(" priority ").map_or("", |(_, rest)| rest));
    let numbers = &plan.numbers;
    if let RuleAction::Goto(target) = rule.action {
        facts.remove(&format!("goto {target}"));
        let (base, far) = place_of(target, plan);
        facts.insert(format!("goto {base}+{far}"));
    }
    for (table, name) in [(numbers.captured, "T"), (numbers.always, "D")] {
        if facts.remove(&format!("lookup {table}")) {
            facts.insert(format!("lookup {name}"));
        }
    }
    facts
}

/// The selectors of a rule as it is written, by their names; its action with what it leads to.
fn facts(text: &str) -> BTreeSet<String> {
    const SELECTORS: [&str; 10] =
        ["from", "to", "fwmark", "iif", "oif", "uidrange", "ipproto", "sport", "dport", "suppress_prefixlength"];
    let words: Vec<&str> = text.split_whitespace().collect();
    let mut facts = BTreeSet::new();
    for (at, word) in words.iter().enumerate() {
        match *word {
            "goto" | "lookup" => {
                facts.insert(format!("{word} {}", words.get(at + 1).copied().unwrap_or_default()));
            }
            "nop" => {
                facts.insert((*word).to_owned());
            }
            word if SELECTORS.contains(&word) => {
                facts.insert(word.to_owned());
            }
            _ => {}
        }
    }
    facts
}

#[test]
fn the_document_names_every_chain_of_the_firewall_table() {
    let planned: BTreeSet<String> = plans()
        .iter()
        .filter_map(|plan| plan.nft.as_ref())
        .flat_map(|nft| nft.text.lines())
        .filter_map(|line| line.trim().strip_prefix("chain ")?.split(' ').next().map(str::to_owned))
        .collect();
    let names = rows("The firewall table").into_iter().flat_map(|row| row[0].split('`').skip(1).step_by(2));
    // A name with a blank is a table's.
    let documented = names.filter(|name| !name.contains(' ')).map(str::to_owned).collect();
    assert_named("chains", &documented, &planned);
}

#[test]
fn the_document_names_every_parameter_with_its_value() {
    let mut planned = BTreeSet::new();
    for plan in plans() {
        for sysctl in &plan.sysctls {
            let parts = sysctl.path.split('/').map(|part| match part {
                part if part == plan.tun => "TUN",
                "eth0" => "UPLINK",
                part => part,
            });
            planned.insert((parts.collect::<Vec<_>>().join("."), sysctl.value.clone()));
        }
    }
    let documented =
        rows("The parameters").into_iter().map(|row| (row[0].replace('`', ""), row[1].to_owned())).collect();
    assert_named("parameters and values", &documented, &planned);
}

#[test]
fn the_document_names_every_reason_to_touch_the_resolver() {
    let section = DOCUMENT.split("\n## ").find(|section| section.starts_with("The resolver")).expect("a section");
    let listed = section.lines().filter_map(|line| line.strip_prefix("- "));
    let documented: BTreeSet<String> =
        listed.map(|line| line.trim_end_matches(" or").trim_end_matches([',', '.', ';']).replace('`', "")).collect();
    let (mut planned, mut told) = (BTreeSet::new(), false);
    for plan in plans() {
        match plan.dns {
            DnsPlan::Rewrite { reason, .. } => drop(planned.insert(reason.into_owned())),
            DnsPlan::Resolved { .. } => told = true,
            DnsPlan::Untouched => {}
        }
    }
    assert_named("reasons to rewrite resolv.conf", &documented, &planned);
    assert!(told && section.contains("systemd-resolved"));
}

#[test]
fn each_host_is_there_for_something() {
    let mut seen = BTreeSet::new();
    for ((name, ..), plan) in hosts().iter().zip(plans()) {
        assert!(seen.insert(plan.to_string()), "the plan for {name:?} is that of a host before it");
    }
}
