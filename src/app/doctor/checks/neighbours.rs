//! Other programs that route: VPNs, proxies, and rules that are asked before ours.

use super::super::finding::Finding;
use super::super::record::{Record, RunState, is_default_name};
use super::before_us::partial;
use crate::platform::{Family, HostPlan, MarkMatch, Rule, RuleAction, SeenLink, takes_everything};

/// Kinds of interfaces that lead into a tunnel of somebody else.
const TUNNELS: [&str; 3] = ["tun", "wireguard", "ppp"];

pub(super) fn check(record: &Record) -> Vec<Finding> {
    let mut found = match record.plan() {
        Some(plan) => {
            let mut found = before_ours(record, plan);
            found.extend(marks_without_bypass(record, plan));
            found
        }
        None => other_captures(record),
    };
    found.extend(
        record.plan_or_start().filter(|plan| !plan.rules.is_empty()).into_iter().flat_map(|plan| partial(record, plan)),
    );
    if found.is_empty() {
        let names: Vec<&str> = tunnels(record).map(|link| link.name.as_str()).collect();
        found.push(Finding::fine(match names.as_slice() {
            [] => "no other tunnel or proxy is in the way".to_owned(),
            names => format!("other tunnels are there and not in the way: {}", names.join(", ")),
        }));
    }
    found
}

fn tunnels(record: &Record) -> impl Iterator<Item = &SeenLink> {
    let ours = record.plan().map(|plan| plan.tun.as_str());
    record.links.iter().filter(move |link| TUNNELS.contains(&link.kind.as_str()) && Some(link.name.as_str()) != ours)
}

/// Rules of others that send everything elsewhere before ours are asked.
fn before_ours(record: &Record, plan: &HostPlan) -> Vec<Finding> {
    let first = plan.numbers.first_priority;
    if plan.rules.is_empty() {
        return Vec::new();
    }
    // Before the last of ours; the kernel's own rule stands first of all.
    let until = first.saturating_add(HostPlan::PRIORITIES);
    let before = record.foreign_rules().filter(|rule| (1..until).contains(&rule.priority));
    let takes = |rule: &&Rule| rule.suppress_prefix_length.is_none() && takes_everything(rule, plan.numbers.own);
    let rules = before.filter(takes);
    let takes = rules.filter(|rule| match rule.action {
        RuleAction::Lookup(_) => record.leads_out(rule).is_some(),
        RuleAction::Goto(target) => target > first,
        RuleAction::Nop => false,
        // Blackhole, unreachable, prohibit.
        RuleAction::Other(_) => true,
    });
    takes
        .map(|rule| {
            Finding::problem(
                format!("another program's rule is asked before ours and takes the traffic: {rule}"),
                format!(
                    "tunproxy moves its rules before such a one by itself, if there is room (they begin at {first}): look \
                     again. If it stays, stop that program, or have it choose a priority above ours"
                ),
            )
        })
        .collect()
}

/// Who marks packets has chosen their path. A mark that came after our start is not let pass: a VPN's own packets would
/// enter the TUN.
fn marks_without_bypass(record: &Record, plan: &HostPlan) -> Vec<Finding> {
    if plan.rules.is_empty() {
        return Vec::new();
    }
    let passes = |family: Family, mark: MarkMatch| {
        let to_the_end = |rule: &&Rule| matches!(rule.action, RuleAction::Goto(_)) && rule.mark == Some(mark);
        record.survey.rules.iter().filter(to_the_end).any(|rule| rule.family == family)
    };
    let marked = record.foreign_rules().filter(|rule| rule.mark.is_some_and(|it| it.mark & it.mask != 0));
    let without = marked.filter(|rule| rule.mark.is_some_and(|mark| !passes(rule.family, mark)));
    let mut found: Vec<Finding> = without
        .map(|rule| {
            let MarkMatch { mark, mask } = rule.mark.unwrap_or(MarkMatch { mark: 0, mask: 0 });
            Finding::problem(
                format!(
                    "another program (a VPN?) has begun to route by the mark {mark:#x}/{mask:#x} after tunproxy was \
                     started ({rule}): its own packets enter our TUN"
                ),
                "tunproxy lets a new mark pass within a second: look again. If it is still so, its log says why",
            )
        })
        .collect();
    found.dedup();
    found
}

/// Without a run of ours: programs that take everything already, and that a start would meet.
fn other_captures(record: &Record) -> Vec<Finding> {
    let tunnel = |index: Option<u32>| tunnels(record).find(|link| Some(link.index) == index);
    let captures = record.foreign_rules().filter(|rule| rule.priority > 0).filter_map(|rule| {
        let link = tunnel(record.leads_out(rule)?.device)?;
        Some((rule, link))
    });
    let mut seen = Vec::new();
    let mut found = Vec::new();
    for (rule, link) in captures {
        if seen.contains(&link.index) {
            continue;
        }
        seen.push(link.index);
        if is_default_name(&link.name) {
            // It is that run's, which cannot be asked what it has changed.
            if matches!(record.run, RunState::Lost(_)) {
                continue;
            }
            found.push(Finding::warning(
                format!(
                    "a tunproxy with another state directory takes this host's traffic into {} ({rule})",
                    link.name
                ),
                "ask again with its --state-dir, or as its user (sudo)",
            ));
            continue;
        }
        found.push(Finding::warning(
            format!("another proxy or VPN takes this host's traffic into {} ({rule})", link.name),
            format!(
                "if it is another transparent proxy (mihomo, sing-box), stop it before tunproxy is started: two send \
                 each other's traffic round. A VPN may stay; tunproxy's own connections then go by {}",
                link.name
            ),
        ));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::super::super::fixture::{only_problem, quiet, running};
    use super::*;
    use crate::platform::{RouteTable, SeenRoute};

    /// A tunnel of somebody else, with a table of its own that leads into it.
    fn with_tunnel(mut record: Record, kind: &str) -> Record {
        record.links.push(SeenLink { index: 70, name: "wg0".to_owned(), kind: kind.to_owned(), ..SeenLink::default() });
        let (table, to) = (RouteTable(51820), "0.0.0.0/0".parse().unwrap());
        record.survey.routes.push(SeenRoute { table, to, device: Some(70), on_link: true });
        record
    }

    fn into_it(priority: u32) -> Rule {
        Rule { origin: 3, ..Rule::new(Family::V4, priority, RuleAction::Lookup(RouteTable(51820))) }
    }

    #[test]
    fn a_host_of_our_own_is_fine() {
        assert!(only_problem(&check(&running())).is_none());
        assert!(only_problem(&check(&quiet())).is_none());
    }

    #[test]
    fn a_rule_for_everything_before_ours_is_a_problem_and_one_behind_is_none() {
        let mut record = with_tunnel(running(), "wireguard");
        record.survey.rules.push(into_it(32000));
        assert!(only_problem(&check(&record)).is_none());
        record.survey.rules.push(into_it(8999));
        assert!(only_problem(&check(&record)).unwrap().what.contains("priority 8999"));
    }

    #[test]
    fn what_stands_among_our_rules_and_takes_everything_is_a_problem() {
        let mut record = with_tunnel(running(), "wireguard");
        let from = Some("0.0.0.0/32".parse().unwrap());
        record.survey.rules.push(Rule { from, iif: Some("lo".to_owned()), ..into_it(9015) });
        assert!(only_problem(&check(&record)).unwrap().what.contains("takes the traffic"));
    }

    #[test]
    fn a_narrow_rule_before_ours_is_no_problem() {
        let mut record = with_tunnel(running(), "wireguard");
        record.survey.rules.push(Rule { to: Some("10.0.0.0/8".parse().unwrap()), ..into_it(8999) });
        record.survey.rules.push(Rule { suppress_prefix_length: Some(0), ..into_it(8998) });
        record.survey.rules.push(Rule { foreign_selectors: true, ..into_it(8997) });
        assert!(only_problem(&check(&record)).is_none());
    }

    #[test]
    fn a_mark_that_came_later_has_to_be_let_pass() {
        let mut record = with_tunnel(running(), "wireguard");
        let mark = Some(MarkMatch { mark: 0xca6c, mask: u32::MAX });
        record.survey.rules.push(Rule { mark, foreign_selectors: true, ..into_it(32764) });
        assert!(only_problem(&check(&record)).unwrap().what.contains("0xca6c"));
        let end = RuleAction::Goto(9090);
        record.survey.rules.push(Rule { mark, ..Rule::new(Family::V4, 9001, end) });
        assert!(only_problem(&check(&record)).is_none(), "{:?}", check(&record));
    }

    #[test]
    fn another_proxy_is_named_before_a_start() {
        let mut record = with_tunnel(quiet(), "tun");
        record.survey.rules.push(into_it(9002));
        let found = check(&record);
        assert!(found[0].what.contains("wg0") && found[0].advice.contains("mihomo"), "{found:?}");
    }
}
