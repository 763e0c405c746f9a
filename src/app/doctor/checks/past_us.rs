//! IPv6 that a TUN without it cannot take, where the host has it all the same.

use super::super::finding::Finding;
use super::super::record::Record;
use crate::platform::Family;

/// The firewall chain that makes it unreachable.
const SHUT: &str = "shut";

pub(super) fn check(record: &Record) -> Vec<Finding> {
    let Some(plan) = record.plan_or_start().filter(|plan| !plan.rules.is_empty()) else { return Vec::new() };
    let taken = plan.rules.iter().any(|rule| rule.family == Family::V6);
    if taken || !record.survey.kernel_ipv6 || !record.has_default(Family::V6) {
        return Vec::new();
    }
    let why = match record.read_only {
        true => "it is off for new interfaces, and cannot be switched on while /proc/sys is read-only",
        false => "it cannot be switched on for it",
    };
    let shut = plan.nft.as_ref().is_some_and(|nft| nft.chains().any(|chain| chain == SHUT));
    let would = if record.plan().is_some() { "" } else { "once tunproxy runs, " };
    let on = "have it on for new interfaces (`net.ipv6.conf.default.disable_ipv6=0`, for Docker with --sysctl) and restart \
              tunproxy";
    vec![match shut {
        true => Finding::warning(
            format!("{would}IPv6 is unreachable for programs of this host: the TUN has none, because {why}"),
            format!("if IPv6 is wanted, {on}"),
        ),
        false => Finding::problem(
            format!(
                "{would}IPv6 goes past tunproxy, questions for names included: the TUN has none, because {why}, while this host \
                 has a default route for it"
            ),
            format!("{on}; or write `tun: {{ strict-route: true }}`, which makes IPv6 unreachable instead"),
        ),
    }]
}

#[cfg(test)]
mod tests {
    use super::super::super::fixture::{only_problem, quiet, running, warnings};
    use super::super::super::record::RunState;
    use super::*;
    use crate::platform::HostPlan;

    fn without_ipv6(change: impl Fn(&mut HostPlan)) -> Record {
        let mut record = running();
        if let RunState::Answers { plan: Some(plan), .. } = &mut record.run {
            plan.rules.retain(|rule| rule.family == Family::V4);
            change(plan);
        }
        record.read_only = true;
        record
    }

    #[test]
    fn a_tun_that_takes_ipv6_and_a_host_that_has_none_are_fine() {
        assert!(check(&running()).is_empty() && check(&quiet()).is_empty());
        let mut record = without_ipv6(|_| {});
        record.survey.routes.retain(|route| Family::of(&route.to) == Family::V4);
        assert!(check(&record).is_empty());
        let mut record = without_ipv6(|_| {});
        record.survey.kernel_ipv6 = false;
        assert!(check(&record).is_empty());
    }

    #[test]
    fn ipv6_that_goes_past_is_a_problem_and_one_that_is_shut_a_warning() {
        let found = check(&without_ipv6(|_| {}));
        let problem = only_problem(&found).unwrap();
        assert!(
            problem.what.starts_with("IPv6 goes past tunproxy") && problem.what.contains("read-only"),
            "{problem:?}"
        );
        assert!(problem.advice.contains("strict-route"), "{problem:?}");
        let shut = |plan: &mut HostPlan| {
            plan.nft.iter_mut().for_each(|nft| nft.text.insert_str(0, "chain shut {\n}\n"));
        };
        let found = check(&without_ipv6(shut));
        assert!(warnings(&found)[0].contains("IPv6 is unreachable"), "{found:?}");
    }

    #[test]
    fn before_a_start_it_is_told_of_what_would_be() {
        let mut record = quiet();
        let plan = record.start.as_mut().unwrap().plan.as_mut().unwrap();
        plan.rules.retain(|rule| rule.family == Family::V4);
        assert!(only_problem(&check(&record)).unwrap().what.starts_with("once tunproxy runs, IPv6 goes past"));
    }
}
