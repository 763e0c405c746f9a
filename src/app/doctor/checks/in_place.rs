//! Whether what a run has changed is still as it made it.

use super::super::finding::Finding;
use super::super::record::Record;
use crate::platform::{HostPlan, Route, RouteKind, Rule, parameter_name, rule_command};

/// The run stands guard over all of this by itself.
const LOOK_AGAIN: &str = "somebody has undone it: a network service, a VPN, or `ip rule flush`. tunproxy puts it back within a \
                          second: look again. If it is still away, or goes again and again, its log says more; find out \
                          who does it";

pub(super) fn check(record: &Record) -> Vec<Finding> {
    let Some(plan) = record.plan() else { return Vec::new() };
    let mut found: Vec<Finding> =
        [rules(record, plan), routes(record, plan), addresses(record, plan)].into_iter().flatten().collect();
    found.extend(parameters(record, plan));
    if found.is_empty() {
        let (rules, routes) = (plan.rules.len(), plan.routes.len());
        let what = format!("all that was changed is in place: {rules} rules, {routes} routes, addresses, parameters");
        found.push(Finding::fine(what));
    }
    found
}

fn rules(record: &Record, plan: &HostPlan) -> Option<Finding> {
    let gone: Vec<&Rule> = plan.rules.iter().filter(|rule| !record.survey.rules.contains(rule)).collect();
    let first = gone.first()?;
    let again = rule_command("add", first);
    Some(Finding::problem(
        format!("{} of {} rules of ours are gone: `{again}`{}", gone.len(), plan.rules.len(), and_so_on(&gone)),
        LOOK_AGAIN,
    ))
}

fn routes(record: &Record, plan: &HostPlan) -> Option<Finding> {
    let is_there = |route: &&Route| {
        record.our_routes.iter().any(|seen| {
            let device = matches!(route.kind, RouteKind::Device(_));
            (seen.table, seen.to, seen.on_link) == (route.table, route.to, device)
        })
    };
    let gone: Vec<&Route> = plan.routes.iter().filter(|route| !is_there(route)).collect();
    let first = gone.first()?;
    Some(Finding::problem(
        format!("{} of {} routes of ours are gone: {first}{}", gone.len(), plan.routes.len(), and_so_on(&gone)),
        LOOK_AGAIN,
    ))
}

fn addresses(record: &Record, plan: &HostPlan) -> Option<Finding> {
    let tun = record.links.iter().find(|link| link.name == plan.tun)?.index;
    let gone = plan.addresses.iter().find(|wanted| !record.survey.addresses.contains(&(tun, **wanted)))?;
    Some(Finding::problem(format!("the TUN has lost its address {gone}"), LOOK_AGAIN))
}

fn parameters(record: &Record, plan: &HostPlan) -> Vec<Finding> {
    let changed = plan.sysctls.iter().filter_map(|wanted| {
        let now = record.parameter(&wanted.path).filter(|now| *now != wanted.value)?;
        let (name, value) = (parameter_name(&wanted.path), &wanted.value);
        Some(Finding::problem(
            format!("the parameter {name} is {now}, and has to be {value} while tunproxy runs"),
            match name.ends_with("forward") || name.ends_with("forwarding") {
                true => format!(
                    "tunproxy sets it back within a second: look again. If it is still so, `sudo sysctl -w {name}={value}`, \
                     and find out who changes it"
                ),
                // Of the others the kernel tells nobody.
                false => format!(
                    "set it back: `sudo sysctl -w {name}={value}` (tunproxy does, with the next change of this host's \
                     network); and find out who changed it"
                ),
            },
        ))
    });
    changed.collect()
}

fn and_so_on<T>(list: &[T]) -> &'static str {
    if list.len() > 1 { ", and others" } else { "" }
}

#[cfg(test)]
mod tests {
    use super::super::super::fixture::{only_problem, quiet, running};
    use super::*;

    #[test]
    fn what_is_all_there_is_fine_and_without_a_run_there_is_nothing_to_look_at() {
        assert!(only_problem(&check(&running())).is_none());
        assert!(check(&quiet()).is_empty());
    }

    #[test]
    fn a_rule_that_was_deleted_is_named_as_it_would_be_typed() {
        let mut record = running();
        record.survey.rules.retain(|rule| rule.priority != 9043 || rule.family == crate::platform::Family::V6);
        let found = check(&record);
        assert!(only_problem(&found).unwrap().what.contains("ip -4 rule add priority 9043 lookup 2022"), "{found:?}");
    }

    #[test]
    fn a_route_an_address_and_a_parameter_are_missed_too() {
        let mut record = running();
        record.our_routes.remove(0);
        assert!(only_problem(&check(&record)).unwrap().what.contains("routes of ours are gone"));
        let mut record = running();
        record.survey.addresses.retain(|(_, net)| net.to_string() != "198.18.0.1/30");
        assert!(only_problem(&check(&record)).unwrap().what.contains("198.18.0.1/30"));
        let mut record = running();
        record.parameters.insert("net/ipv4/conf/tunproxy0/src_valid_mark".to_owned(), "0".to_owned());
        let found = check(&record);
        assert!(only_problem(&found).unwrap().advice.contains("sysctl -w net.ipv4.conf.tunproxy0.src_valid_mark=1"));
    }
}
