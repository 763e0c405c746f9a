//! A place ahead of the rules of others that come before ours.

use super::{NftState, Survey};
use crate::platform::layout::{LENGTH_AHEAD, PAST_TUN_AHEAD, UNTIL_DNS, UNTIL_TUN};
use crate::platform::routing::{Family, RouteTable, Rule, RuleAction};

/// The table of the host's own addresses.
const LOCAL: RouteTable = RouteTable(255);
/// So many runs find a place of their own ahead of a rule.
const RUNS: u32 = 16;

/// Where questions can be taken ahead of the rules of others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::platform) enum Ahead {
    /// Nobody's stand before ours.
    NotNeeded,
    /// From this priority on.
    At(u32),
    /// The first rule of another leaves none; its priority.
    NoRoom(u32),
}

impl Ahead {
    /// The first priority, if there is to be one.
    pub(in crate::platform) fn first(self) -> Option<u32> {
        if let Self::At(first) = self { Some(first) } else { None }
    }
}

impl Survey {
    /// Where our rules stand ahead of others' when our block begins at `block`. The runs that were here first come first
    /// there too, and each finds its place by itself: by how many are before it.
    pub(in crate::platform) fn ahead(&self, block: u32) -> Ahead {
        // What is the host's own stays here, where somebody has that looked up late as well.
        let late = self.looks_up_local();
        let is_other = |rule: &&Rule| rule.origin != Rule::KERNEL || self.is_refusal_left_ahead(rule);
        let others = || self.rules.iter().filter(is_other).map(|rule| rule.priority);
        let before_us = |it: &u32| *it > 0 && *it <= block + UNTIL_DNS;
        let Some(first) = others().filter(|it| before_us(it) && *it > late).min() else {
            // All of them come before what is local.
            return others().filter(before_us).min().map_or(Ahead::NotNeeded, Ahead::NoRoom);
        };
        // A run that was here before us and has none there takes questions by its block.
        let runs = self.places_of_runs();
        let of_run = |place: &u32| place.saturating_sub(UNTIL_TUN) + UNTIL_DNS;
        let (without, with): (Vec<u32>, Vec<u32>) =
            runs.range(..block).map(of_run).partition(|questions| *questions < first);
        let floor = without.into_iter().max().unwrap_or_default().max(late);
        let end = first.min(block);
        let Some(last) = end.checked_sub(LENGTH_AHEAD).filter(|last| *last > floor) else {
            return Ahead::NoRoom(first);
        };
        let begin = end.saturating_sub(RUNS * LENGTH_AHEAD).max(floor + 1);
        let is_free = |at: &u32| {
            let place = *at..at.saturating_add(LENGTH_AHEAD);
            !self.all_rules().any(|rule| place.contains(&rule.priority))
        };
        let mut places = (begin..=last).step_by(LENGTH_AHEAD as usize).skip(with.len());
        places.find(is_free).map_or(Ahead::NoRoom(first), Ahead::At)
    }

    /// The priority at which the host's own addresses are looked up.
    pub(in crate::platform) fn looks_up_local(&self) -> u32 {
        let is_local = |rule: &&Rule| **rule == Rule { origin: rule.origin, ..local(rule.family, rule.priority) };
        self.all_rules().filter(is_local).map(|rule| rule.priority).max().unwrap_or_default()
    }

    /// Whether a rule refuses, here, what was to go through the TUN of a run that has crashed. It may have had the very
    /// addresses that we have.
    fn is_refusal_left_ahead(&self, rule: &Rule) -> bool {
        let places = rule.priority.saturating_sub(LENGTH_AHEAD)..rule.priority;
        let is_gone = |tun: &String| !self.links.iter().any(|link| link.name == *tun);
        let of_gone = |it: &Rule| {
            it.origin == Rule::KERNEL
                && it.family == rule.family
                && places.contains(&it.priority)
                && it.action == RuleAction::Goto(it.priority.saturating_add(PAST_TUN_AHEAD))
                && it.iif.as_ref().is_some_and(is_gone)
        };
        rule.origin == Rule::KERNEL && rule.action == RuleAction::UNREACHABLE && self.rules.iter().any(of_gone)
    }

    /// Whether there is nftables.
    pub(in crate::platform) fn has_nft(&self) -> bool {
        matches!(self.nft, NftState::Present { .. })
    }
}

/// The look-up of the host's own addresses.
fn local(family: Family, priority: u32) -> Rule {
    Rule::new(family, priority, RuleAction::Lookup(LOCAL))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::Link;
    use crate::platform::plan::HostPlan;
    use crate::platform::plan::tests::options;
    use crate::platform::survey::tests::plain;

    fn with(priority: u32) -> Survey {
        let mut survey = plain();
        let rule = Rule::new(Family::V6, priority, RuleAction::Lookup(RouteTable(52)));
        survey.rules.push(Rule { origin: 3, ..rule });
        survey
    }

    #[test]
    fn a_rule_behind_ours_or_of_the_kernel_is_nobody_before_us() {
        for survey in [plain(), with(9026), with(20_000)] {
            assert_eq!(survey.ahead(9000), Ahead::NotNeeded);
        }
        let mut survey = with(5270);
        survey.rules.iter_mut().for_each(|rule| rule.origin = Rule::KERNEL);
        assert_eq!(survey.ahead(9000), Ahead::NotNeeded, "a rule for VRFs, or another run's");
    }

    #[test]
    fn the_place_is_before_the_first_of_them_and_behind_the_look_up_of_what_is_local() {
        assert_eq!(with(5270).ahead(9000), Ahead::At(5062));
        assert_eq!(with(9003).ahead(9000), Ahead::At(8792), "before our block");
        assert_eq!(with(100).ahead(9000), Ahead::At(1));
        assert_eq!((with(14).ahead(9000), with(13).ahead(9000)), (Ahead::At(1), Ahead::NoRoom(13)));
        let mut late = with(2000);
        late.rules[0].priority = 1900;
        late.rules[0].origin = 3;
        assert_eq!(late.ahead(9000), Ahead::At(1901));
        for priority in [1988, 2000, 3000] {
            late.rules[0].priority = priority;
            assert_eq!(late.ahead(9000), Ahead::NoRoom(2000), "what is local comes first");
        }
        late.rules[0].to = Some("192.0.2.0/24".parse().unwrap());
        late.rules[0].priority = 3000;
        assert_eq!(late.ahead(9000), Ahead::At(1792), "a part of it does not");
    }

    #[test]
    fn a_later_run_does_not_come_before_the_block_of_one_that_needs_no_place_ahead() {
        let mut survey = plain();
        let wishes = crate::platform::survey::Wishes { first_priority: Some(5100), ..Default::default() };
        let first =
            HostPlan::new(&crate::platform::HostOptions { tun: "tun1".to_owned(), wishes, ..options() }, &survey);
        survey.rules.extend(first.unwrap().rules);
        survey.links.push(Link { index: 70, name: "tun1".to_owned() });
        let rule = Rule::new(Family::V6, 5210, RuleAction::Lookup(RouteTable(52)));
        survey.rules.push(Rule { origin: 3, ..rule });
        assert_eq!(survey.ahead(5100 - 100), Ahead::NotNeeded);
        let Ahead::At(place) = survey.ahead(9000) else { panic!("no place") };
        assert!(place > 5125, "{place} is behind where the first takes questions");
        survey.rules.last_mut().unwrap().priority = 5135;
        assert_eq!(survey.ahead(9000), Ahead::NoRoom(5135));
    }

    #[test]
    fn runs_stand_there_by_age_as_well_and_move_up_when_one_ends() {
        let mut survey = with(1000);
        for (number, place) in [(1, 792), (2, 805), (3, 818)] {
            let tun = format!("tun{number}");
            let plan = HostPlan::new(&crate::platform::HostOptions { tun: tun.clone(), ..options() }, &survey).unwrap();
            assert!(plan.rules.iter().any(|rule| rule.priority == place), "{number}");
            survey.rules.extend(plan.rules);
            survey.links.push(Link { index: 70 + number, name: tun });
        }
        let mut left = with(1000);
        left.rules.extend(survey.rules.iter().filter(|rule| (805..818).contains(&rule.priority)).cloned());
        left.links.push(Link { index: 72, name: "tun2".to_owned() });
        assert_eq!(left.ahead(9100), Ahead::At(792));
    }

    #[test]
    fn what_a_crashed_run_refuses_there_is_come_before_and_what_a_living_one_does_is_not() {
        let mut survey = with(1000);
        let plan =
            HostPlan::new(&crate::platform::HostOptions { tun: "tun1".to_owned(), ..options() }, &survey).unwrap();
        survey.rules.extend(plan.rules);
        let refusal = 797;
        assert!(survey.rules.iter().any(|it| it.priority == refusal && it.action == RuleAction::UNREACHABLE));
        let Ahead::At(place) = survey.ahead(8900) else { panic!("no place") };
        assert!(place + LENGTH_AHEAD <= refusal, "{place}");
        // Though nobody else is there any more.
        survey.rules.retain(|rule| rule.origin == Rule::KERNEL);
        assert_eq!(survey.ahead(8900), Ahead::At(place));
        survey.links.push(Link { index: 70, name: "tun1".to_owned() });
        assert_eq!(survey.ahead(9100), Ahead::NotNeeded);
        survey.rules.extend(with(1000).rules);
        assert_eq!(survey.ahead(9100), Ahead::At(805));
    }
}
