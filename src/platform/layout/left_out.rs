//! The rules for what a profile leaves out. It goes its own way with its names: a name that had a fake address would
//! lead back in. They stand behind the rule for fake addresses and before those for DNS.

use super::Layout;
use super::places::Places;
use crate::platform::routing::{Rule, RuleAction};
use crate::platform::selection::OWN_TRAFFIC;

/// Whether `rules`, those of a run whose block begins at `first`, take what this host itself sends: the first that concerns
/// it of those by interface decides.
pub(in crate::platform) fn take_own_traffic(rules: &[Rule], first: u32) -> bool {
    let at = Places::in_block(first);
    let concerns = |rule: &&Rule| rule.iif.as_ref().is_none_or(|name| name == OWN_TRAFFIC);
    let by_interface = |place: u32| rules.iter().filter(move |rule| rule.priority == place).find(concerns);
    let first = by_interface(at.interface).or_else(|| by_interface(at.other_interfaces));
    first.is_none_or(|rule| rule.action != RuleAction::Goto(at.end))
}

impl Layout<'_> {
    pub(super) fn left_out(&self, at: &Places) -> Vec<Rule> {
        let users = self.options.users_left_out(&self.survey.users);
        let rule = |priority, action| Rule::new(self.family, priority, action);
        let by_interface = |name: &String, action| Rule { iif: Some(name.clone()), ..rule(at.interface, action) };
        let past = RuleAction::Goto(at.end);
        let mut rules = Vec::new();
        let included = &self.options.include_interface;
        if !included.is_empty() {
            let on = RuleAction::Goto(at.users);
            rules.extend(included.iter().map(|name| by_interface(name, on)));
            rules.push(rule(at.other_interfaces, past));
            if users.is_empty() {
                rules.push(rule(at.users, RuleAction::Nop));
            }
        }
        rules.extend(self.options.exclude_interface.iter().map(|name| by_interface(name, past)));
        // What is forwarded has no user, and the kernel takes that for user 0: only what the host itself sends is meant.
        rules.extend(users.into_iter().map(|range| Rule { uids: Some(range), ..self.local(rule(at.users, past)) }));
        rules
    }
}

#[cfg(test)]
mod tests {
    use crate::platform::layout::tests::listed;
    use crate::platform::plan::HostOptions;
    use crate::platform::plan::tests::options;
    use crate::platform::survey::tests::plain;
    use crate::platform::{Family, Survey};

    /// The rules between those for fake addresses and those for DNS.
    fn between(options: &HostOptions, survey: &Survey, family: Family) -> Vec<String> {
        let rules = listed(options, survey, family).into_iter();
        rules.filter(|rule| ("9010".."9020").contains(&&rule[..4])).collect()
    }

    fn names(list: &[&str]) -> Vec<String> {
        list.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn excluded_interfaces_and_users_go_to_the_end_past_the_rules_for_dns() {
        let options = HostOptions {
            exclude_interface: names(&["lan0", "not-there-yet"]),
            exclude_uid: vec![(1000, 1000), (2000, 2999)],
            ..options()
        };
        for family in Family::BOTH {
            let wanted = [
                "9010 iif lan0 goto 9090",
                "9010 iif not-there-yet goto 9090",
                "9012 iif lo uidrange 1000-1000 goto 9090",
                "9012 iif lo uidrange 2000-2999 goto 9090",
            ];
            assert_eq!(between(&options, &plain(), family), wanted);
        }
    }

    #[test]
    fn included_interfaces_go_on_and_all_others_to_the_end() {
        let options = HostOptions { include_interface: names(&["lan0", "lo"]), ..options() };
        let on = ["9010 iif lan0 goto 9012", "9010 iif lo goto 9012", "9011 goto 9090"];
        for family in Family::BOTH {
            assert_eq!(between(&options, &plain(), family), [&on[..], &["9012 nop"]].concat());
            let options = HostOptions { include_uid: vec![(1000, u32::MAX - 1)], ..options.clone() };
            let users = ["9012 iif lo uidrange 0-999 goto 9090"];
            assert_eq!(between(&options, &plain(), family), [&on[..], &users].concat());
        }
    }

    #[test]
    fn the_rules_say_whether_the_hosts_own_traffic_is_taken() {
        let taken = |include: &[&str], exclude: &[&str]| {
            let options =
                HostOptions { include_interface: names(include), exclude_interface: names(exclude), ..options() };
            let plan = crate::platform::HostPlan::new(&options, &plain()).unwrap();
            assert_eq!(plan.takes_own_traffic(), options.takes_own_traffic());
            plan.takes_own_traffic()
        };
        assert!(taken(&[], &[]) && taken(&[], &["lan0"]) && taken(&["lan0", "lo"], &[]));
        assert!(!taken(&["lan0"], &[]) && !taken(&[], &["lan0", "lo"]));
    }

    #[test]
    fn a_namespace_with_few_users_gets_rules_for_those_alone() {
        let survey = Survey { users: vec![(0, 0)], ..plain() };
        let options = HostOptions { include_uid: vec![(1000, 1000)], ..options() };
        assert_eq!(between(&options, &survey, Family::V4), ["9012 iif lo uidrange 0-0 goto 9090"]);
    }
}
