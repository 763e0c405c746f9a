//! What rules do that their author may not expect, told once it is known where each of them leads.

use std::collections::HashMap;

use crate::outbound::Outbounds;
use crate::profile::{PlacedRule, Profile, Report};
use crate::rules::Rule;
use crate::session::Network;

/// Where a rule leads as things stand.
#[derive(Debug, Clone, Copy)]
struct Way {
    /// It carries UDP.
    udp: bool,
    /// It is PASS, or a group whose present member is: the rule is skipped.
    passes: bool,
    /// It leaves the host without a proxy.
    direct: bool,
}

/// Warns of flows that go DIRECT although nobody wrote so, and of rules that no flow reaches. For `mode: rule`, and for
/// a profile without errors.
pub(super) fn on_rules(profile: &Profile, outbounds: &Outbounds, report: &mut Report) {
    let ways: Vec<Way> = profile.rules.iter().map(|placed| way(&placed.rule, outbounds)).collect();
    warn_of_an_open_end(profile, &ways, report);
    warn_of_udp_without_way(&profile.rules, &ways, report);
    warn_of_unreachable_rules(&profile.rules, &ways, report);
}

fn way(rule: &Rule, outbounds: &Outbounds) -> Way {
    // A name that nobody defines is an error, and then nothing is asked here.
    outbounds.index(&rule.target).map_or(Way { udp: true, passes: false, direct: false }, |at| Way {
        udp: outbounds.networks(at).carries(Network::Udp),
        passes: outbounds.passes(at),
        direct: outbounds.goes_direct(at),
    })
}

/// Whether the condition holds for every flow of `network`.
fn takes_all(rule: &Rule, network: Network) -> bool {
    let word = match network {
        Network::Tcp => "tcp",
        Network::Udp => "udp",
        Network::Icmp => "icmp",
    };
    rule.kind == "MATCH" || (rule.kind == "NETWORK" && rule.payload.eq_ignore_ascii_case(word))
}

fn warn_of_an_open_end(profile: &Profile, ways: &[Way], report: &mut Report) {
    let taken =
        |network| profile.rules.iter().zip(ways).any(|(placed, way)| takes_all(&placed.rule, network) && !way.passes);
    if !taken(Network::Tcp) || !taken(Network::Udp) {
        let words = match profile.rules.is_empty() {
            true => "there are no `rules`: everything goes DIRECT",
            false => "no rule takes everything: what none of them takes goes DIRECT",
        };
        report
            .warn(profile.rules_place, "rules", words)
            .hint("end the rules with `MATCH,DIRECT`, or with `MATCH,` and the name of a proxy or group");
    } else if !taken(Network::Icmp) {
        report
            .warn(profile.rules_place, "rules", "echo requests (ping) that no rule takes go DIRECT")
            .hint("add the rule `NETWORK,icmp,DIRECT` if that is meant, else `NETWORK,icmp,REJECT`");
    }
}

/// The condition as written: all of the line but its target.
fn condition(rule: &Rule) -> (&'static str, &str, bool) {
    (rule.kind, &rule.payload, rule.text.split(',').any(|field| field.trim() == "src"))
}

/// As in mihomo, UDP passes over a rule whose outbound carries none. Where it then surely ends on DIRECT, nobody wrote
/// that.
fn warn_of_udp_without_way(rules: &[PlacedRule], ways: &[Way], report: &mut Report) {
    // Backwards, so that what surely takes such a flow further below is known: a rule that takes all UDP, or one with the
    // same condition. Both by their index.
    let mut all: Option<usize> = None;
    let mut same: HashMap<_, usize> = HashMap::new();
    let mut found = Vec::new();
    for (index, (PlacedRule { rule, .. }, way)) in rules.iter().zip(ways).enumerate().rev() {
        let only_tcp = rule.kind == "NETWORK" && takes_all(rule, Network::Tcp);
        if way.passes || only_tcp {
            continue;
        }
        if way.udp {
            same.insert(condition(rule), index);
            all = if takes_all(rule, Network::Udp) { Some(index) } else { all };
        } else {
            let end = same.get(&condition(rule)).copied().into_iter().chain(all).min();
            found.push((index, end));
        }
    }
    let goes_direct = |end: Option<usize>| end.is_none_or(|at| ways[at].direct);
    // Behind a rule that takes all UDP none arrives.
    let takes = |(placed, way): (&PlacedRule, &Way)| takes_all(&placed.rule, Network::Udp) && way.udp && !way.passes;
    let last = rules.iter().zip(ways).position(takes).unwrap_or(rules.len());
    for (index, end) in found.into_iter().rev().filter(|(index, end)| *index < last && goes_direct(*end)) {
        warn_of_udp(&rules[index], end.map(|at| &rules[at].rule), report);
    }
}

fn warn_of_udp(placed: &PlacedRule, end: Option<&Rule>, report: &mut Report) {
    let by = end.map_or("because no rule below takes them".to_owned(), |rule| format!("by line {}", rule.line));
    let target = &placed.rule.target;
    let (flows, instead) = match placed.rule.kind {
        "MATCH" => ("UDP flows that come to this rule", "add the rule `NETWORK,udp,REJECT` behind it"),
        _ => ("UDP flows of this rule", "repeat the rule behind it with the target REJECT"),
    };
    report
        .warn_once(placed.place, &*placed.path, format!("`{target}` carries no UDP, so {flows} end on DIRECT, {by}"))
        .hint(format!(
            "to keep them from it, {instead}; `udp: true` makes a socks5 proxy carry UDP, if its server does"
        ));
}

fn warn_of_unreachable_rules(rules: &[PlacedRule], ways: &[Way], report: &mut Report) {
    let takes_everything =
        |index: &usize| rules[*index].rule.kind == "MATCH" && !ways[*index].passes && ways[*index].udp;
    let Some(last) = (0..rules.len()).find(takes_everything) else { return };
    if let Some(next) = rules.get(last + 1) {
        let line = rules[last].rule.line;
        let message = format!("no flow reaches this rule or those below: line {line} takes everything");
        report.warn(next.place, &*next.path, message).hint("move MATCH to the end");
    }
}
