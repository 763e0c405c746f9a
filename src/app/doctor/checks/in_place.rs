//! Whether what a run has changed is still as it made it.

use super::super::finding::Finding;
use super::super::record::Record;
use crate::platform::{HostPlan, Route, RouteKind, Rule, Sysctl, not_set, parameter_name, rule_command};

/// The run stands guard over all of this by itself.
const LOOK_AGAIN: &str = "somebody has undone it: a network service, a VPN, or `ip rule flush`. tunproxy puts it back within a \
                          second: look again. If it is still away, or goes again and again, its log says more; find out \
                          who does it";

/// Parameters of the TUN alone, by their names.
pub(in crate::app::doctor) const OF_TUN: [&str; 2] = ["src_valid_mark", "accept_local"];

pub(super) fn check(record: &Record) -> Vec<Finding> {
    let Some(plan) = record.plan() else { return before(record).into_iter().collect() };
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
    let wrong = plan.sysctls.iter().filter_map(|wanted| {
        let now = record.parameter(&wanted.path).filter(|now| *now != wanted.value)?;
        Some((wanted, now))
    });
    if record.read_only {
        return closed(&wrong.map(|(wanted, _)| wanted).collect::<Vec<_>>(), record, "could not set")
            .into_iter()
            .collect();
    }
    let changed = wrong.map(|(wanted, now)| {
        let (name, value) = (parameter_name(&wanted.path), &wanted.value);
        Finding::problem(
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
        )
    });
    changed.collect()
}

/// What a start could not set. A TUN that is to be made gets what stands under "default".
fn before(record: &Record) -> Option<Finding> {
    let plan = record.start.as_ref()?.plan.as_deref().filter(|_| record.read_only)?;
    let wrong = |wanted: &&Sysctl| match OF_TUN.into_iter().find(|key| wanted.of_tun && wanted.path.ends_with(key)) {
        Some(key) => record.parameter(&format!("net/ipv4/conf/default/{key}")).is_some_and(|now| now != wanted.value),
        // The rest of the TUN is IPv6, of which another check tells; of the host only what is not so is in a plan.
        None => !wanted.of_tun,
    };
    closed(&plan.sysctls.iter().filter(wrong).collect::<Vec<_>>(), record, "cannot set")
}

/// What a read-only /proc/sys keeps from being `wanted`, what that costs, and who can do something about it.
fn closed(wanted: &[&Sysctl], record: &Record, could_not: &str) -> Option<Finding> {
    let first = wanted.first()?;
    let what = format!("/proc/sys is read-only here, as in most containers: tunproxy {could_not} {}", not_set(wanted));
    // What is set for new interfaces, the TUN gets when it is made.
    let from_outside = |it: &&Sysctl| match it.path.rsplit('/').next().filter(|_| it.of_tun) {
        Some(key) => format!("--sysctl net.ipv4.conf.default.{key}={}", it.value),
        None => format!("--sysctl {}={}", parameter_name(&it.path), it.value),
    };
    let options: Vec<String> = wanted.iter().map(from_outside).collect();
    let advice = format!(
        "have it set from outside (for Docker: {}), or let /proc/sys be writable (`mount -o remount,rw /proc/sys` by root of the \
         host), and restart tunproxy",
        options.join(" ")
    );
    let severe = wanted.iter().any(|it| !it.of_tun)
        || (first.path.ends_with(OF_TUN[0]) && record.survey.parameters.strict_reverse_path.contains(tun_of(record)));
    Some(if severe { Finding::problem(what, advice) } else { Finding::warning(what, advice) })
}

/// The TUN's name, or where what it will get stands.
fn tun_of(record: &Record) -> &str {
    record.plan().map_or("default", |plan| plan.tun.as_str())
}

fn and_so_on<T>(list: &[T]) -> &'static str {
    if list.len() > 1 { ", and others" } else { "" }
}

#[cfg(test)]
mod tests {
    use super::super::super::fixture::{only_problem, quiet, running, warnings};
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

    #[test]
    fn parameters_that_nobody_can_set_here_are_nobodys_fault() {
        let mut record = running();
        record.read_only = true;
        record.parameters.insert("net/ipv4/conf/tunproxy0/src_valid_mark".to_owned(), "0".to_owned());
        let found = check(&record);
        assert!(only_problem(&found).is_none() && warnings(&found)[0].contains("/proc/sys is read-only"), "{found:?}");
        assert!(found[0].advice.contains("--sysctl net.ipv4.conf.default.src_valid_mark=1"), "{found:?}");
        record.survey.parameters.strict_reverse_path.insert("tunproxy0".to_owned());
        assert!(only_problem(&check(&record)).unwrap().what.contains("could not set"), "with a strict filter it hurts");
    }

    #[test]
    fn before_a_start_a_read_only_host_says_what_could_not_be_set() {
        let mut record = quiet();
        for key in OF_TUN {
            record.parameters.insert(format!("net/ipv4/conf/default/{key}"), "0".to_owned());
        }
        assert!(check(&record).is_empty());
        record.read_only = true;
        let told = warnings(&check(&record));
        assert!(told[0].contains("cannot set") && told[0].contains("tunproxy0.accept_local=1"), "{told:?}");
        for key in OF_TUN {
            record.parameters.insert(format!("net/ipv4/conf/default/{key}"), "1".to_owned());
        }
        assert!(check(&record).is_empty(), "the TUN gets them when it is made");
    }
}
