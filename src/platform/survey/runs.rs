//! Other runs of ours beside us, each with a TUN that takes traffic.

use std::collections::BTreeSet;

use ipnet::IpNet;

use super::Survey;
use crate::platform::layout::PAST_TUN;
use crate::platform::routing::{Rule, RuleAction};

impl Survey {
    /// The names of other runs' TUNs, by the rule that lets pass what comes out of each: the first that a run makes and the
    /// last that it takes away. An address would not do, which anybody's DHCP server can give to an uplink.
    #[must_use]
    pub(in crate::platform) fn runs(&self) -> BTreeSet<&str> {
        let tuns = self.rules.iter().filter(|rule| lets_tun_pass(rule)).filter_map(|rule| rule.iif.as_deref());
        tuns.filter(|name| self.links.iter().any(|link| link.name == *name)).collect()
    }

    /// The same, and each TUN that has the IPv4 address among `addresses` on the very same network, the first four of a fake
    /// range: that of a run that has no rules yet, or wants none. A LAN with just these addresses is a network in the way.
    pub(in crate::platform) fn runs_and_twins(&self, addresses: &[IpNet]) -> BTreeSet<&str> {
        let same = self.addresses.iter().filter(|(_, net)| net.addr().is_ipv4() && addresses.contains(net));
        let same = same.filter(|(index, _)| self.tuns.contains(index));
        let twins = same.filter_map(|(index, _)| self.link_name(*index));
        self.runs().into_iter().chain(twins).collect()
    }

    /// Whether rules from `first` on come after those of all other runs.
    pub(in crate::platform) fn is_behind_runs(&self, first: u32) -> bool {
        self.places_of_runs().into_iter().all(|run| run < first)
    }

    /// A priority of each other run, one of the first in its block.
    pub(super) fn places_of_runs(&self) -> BTreeSet<u32> {
        let runs = self.runs();
        let of_run = |rule: &&Rule| lets_tun_pass(rule) && rule.iif.as_deref().is_some_and(|iif| runs.contains(iif));
        self.rules.iter().filter(of_run).map(|rule| rule.priority).collect()
    }
}

/// Whether a rule is the one by which a run is known.
pub(in crate::platform) fn lets_tun_pass(rule: &Rule) -> bool {
    let end = rule.priority.saturating_add(PAST_TUN);
    rule.origin == Rule::KERNEL && rule.iif.is_some() && rule.action == RuleAction::Goto(end)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::plan::HostPlan;
    use crate::platform::plan::tests::options;
    use crate::platform::survey::Wishes;
    use crate::platform::survey::tests::plain;
    use crate::platform::{HostOptions, Link, RouteTable, SeenRoute};

    /// A host on which `options` are in force.
    fn with_run(options: &HostOptions) -> Survey {
        let mut survey = plain();
        let plan = HostPlan::new(options, &survey).unwrap();
        survey.rules.extend(plan.rules);
        survey.links.push(Link { index: 77, name: options.tun.clone() });
        survey.addresses.extend(options.addresses.iter().map(|net| (77, *net)));
        let to = "0.0.0.0/0".parse().unwrap();
        survey.routes.push(SeenRoute { table: RouteTable(2022), to, device: Some(77), on_link: true });
        survey
    }

    #[test]
    fn a_run_is_known_by_its_rules_as_long_as_its_tun_is_there() {
        let mut survey = with_run(&options());
        assert_eq!(survey.runs(), ["tun7"].into());
        survey.links.pop();
        assert!(survey.runs().is_empty(), "it crashed");
    }

    #[test]
    fn who_is_left_out_by_interface_is_no_run() {
        let left_out = HostOptions { exclude_interface: vec!["lan0".to_owned()], ..options() };
        assert_eq!(with_run(&left_out).runs(), ["tun7"].into());
        let alone = HostOptions { include_interface: vec!["lan0".to_owned(), "lo".to_owned()], ..options() };
        assert_eq!(with_run(&alone).runs(), ["tun7"].into());
    }

    #[test]
    fn the_tun_of_another_run_is_no_uplink() {
        assert_eq!(with_run(&options()).uplinks(), plain().uplinks());
    }

    #[test]
    fn one_with_an_address_of_ours_is_a_run_before_its_rules_stand() {
        let mut survey = with_run(&options());
        survey.rules = plain().rules;
        survey.tuns.insert(77);
        assert_eq!(survey.runs_and_twins(&options().addresses), ["tun7"].into());
        assert!(survey.runs().is_empty());
        survey.tuns.clear();
        assert!(survey.runs_and_twins(&options().addresses).is_empty(), "no TUN, but a LAN");
    }

    /// Runs that stand, the oldest first: the plan of each, with its TUN.
    struct Standing(Vec<HostPlan>);

    impl Standing {
        /// The host as `but` would see it without itself.
        fn seen(&self, but: &str) -> Survey {
            let mut survey = plain();
            for (index, plan) in (100..).zip(self.0.iter().filter(|plan| plan.tun != but)) {
                survey.rules.extend(plan.rules.iter().cloned());
                survey.links.push(Link { index, name: plan.tun.clone() });
            }
            survey
        }

        /// One more starts.
        fn start(&mut self, tun: String, wishes: Wishes) {
            let survey = self.seen(&tun);
            let plan = HostPlan::new(&HostOptions { tun, wishes, ..options() }, &survey).unwrap();
            self.0.push(plan);
        }

        /// Each looks at what has become of the host.
        fn settle(&mut self, wishes: Wishes) {
            for at in 0..self.0.len() {
                let tun = self.0[at].tun.clone();
                let survey = self.seen(&tun);
                let (numbers, _) = survey.place_of(self.0[at].numbers, wishes.first_priority);
                if numbers != self.0[at].numbers {
                    let options = HostOptions { tun, wishes, ..options() };
                    self.0[at] = HostPlan::with_numbers(&options, &survey, numbers).unwrap();
                }
            }
        }

        fn assert_by_age(&self) {
            let places: Vec<u32> = self.0.iter().map(|plan| plan.numbers.first_priority).collect();
            assert!(places.windows(2).all(|pair| pair[0] + 100 <= pair[1]), "{places:?}");
        }
    }

    #[test]
    fn however_often_one_takes_over_from_another_the_later_one_stands_behind() {
        for (alive, wish) in [(1, None), (3, None), (1, Some(32_000)), (2, Some(20_050))] {
            let wishes = Wishes { first_priority: wish, ..Wishes::default() };
            let mut standing = Standing(Vec::new());
            let mut moves = 0;
            for number in 0..500 {
                standing.start(format!("tun{number}"), wishes);
                standing.assert_by_age();
                if standing.0.len() > alive {
                    standing.0.remove(0);
                }
                let places = |standing: &Standing| -> Vec<u32> {
                    standing.0.iter().map(|plan| plan.numbers.first_priority).collect()
                };
                let before = places(&standing);
                standing.settle(wishes);
                standing.assert_by_age();
                moves += u32::from(places(&standing) != before);
                if number % 10 == 0 {
                    let settled = places(&standing);
                    standing.settle(wishes);
                    assert_eq!(places(&standing), settled, "once is enough");
                }
            }
            assert!((1..=100).contains(&moves) || wish == Some(32_000), "{alive} {wish:?}: {moves} moves");
        }
    }

    #[test]
    fn whoever_comes_later_stands_behind_though_there_is_a_place_before() {
        let wish = |first| Wishes { first_priority: Some(first), ..Wishes::default() };
        let mut survey = plain();
        let late = HostPlan::new(&HostOptions { wishes: wish(9200), ..options() }, &survey).unwrap();
        survey.rules.extend(late.rules);
        survey.links.push(Link { index: 77, name: options().tun });
        let first = |wishes: &Wishes| survey.numbers(wishes).unwrap().first_priority;
        assert_eq!((first(&Wishes::default()), first(&wish(9000)), first(&wish(9400))), (9300, 9300, 9400));
        let plan = HostPlan::new(&HostOptions { wishes: wish(9000), ..options() }, &survey).unwrap();
        let told = plan.passed_over.iter().any(|it| it.contains("from 9000 on would come before those of another run"));
        assert!(told, "{:?}", plan.passed_over);
    }
}
