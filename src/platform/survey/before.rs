//! Rules of others that take what is ours to take, and places before them.

use super::takes::takes_everything;
use super::{BLOCK, FIRST_PRIORITY, MAIN_PRIORITY, Numbers, Survey, is_default_like};
use crate::platform::routing::{MarkMatch, RouteTable, Rule, RuleAction};

/// Priorities that are to be free behind the last run: of several that come at once each takes [`BLOCK`] of them.
const ROOM: u32 = 16 * BLOCK;

impl Survey {
    /// Whether a rule takes everything, as far as it matters, with a route for it: what wg-quick puts there ("not fwmark
    /// 0xca6c lookup 51820"), or another proxy.
    pub(in crate::platform) fn takes_all(&self, rule: &Rule, own: MarkMatch) -> bool {
        takes_ours(rule, own) && self.leads_out(rule)
    }

    /// Whether the table of a rule has a route for everything, which counts.
    pub(super) fn leads_out(&self, rule: &Rule) -> bool {
        let RuleAction::Lookup(table) = rule.action else { return false };
        let has_default = || self.routes.iter().any(|it| it.table == table && is_default_like(&it.to));
        rule.suppress_prefix_length.is_none() && has_default()
    }

    /// What a rule that must not stand before our block at `block` does there, in words that follow "another rule"; none for
    /// one that may.
    pub(in crate::platform) fn rivals(&self, rule: &Rule, own: MarkMatch, block: u32) -> Option<&'static str> {
        let main_first = || {
            let main = rule.action == RuleAction::Lookup(RouteTable::MAIN) && rule.suppress_prefix_length.is_some();
            main && takes_ours(rule, own)
        };
        if self.takes_all(rule, own) {
            Some("takes all traffic before ours can")
        } else if main_first() {
            Some("asks the main table before ours, so that whatever that has a route to goes past us")
        } else if self.leads_past_us(rule, own, block) {
            Some("leads all traffic past ours")
        } else if self.is_abandoned_refusal(rule) {
            Some("of a run that has crashed refuses what ours are to take")
        } else {
            None
        }
    }

    /// Before this priority ours must stand, so that traffic comes to us first: before all rules of others that take
    /// everything, and before those that ask the main table first, for whatever it has a route to.
    fn limit(&self, own: MarkMatch, block: u32) -> u32 {
        let rivals = self.rules.iter().filter(|rule| self.rivals(rule, own, block).is_some());
        let first = rivals.chain(self.take_all_together(own));
        // The kernel's own rule stands there, and is no other program's.
        first.map(|rule| rule.priority).min().unwrap_or(MAIN_PRIORITY).min(MAIN_PRIORITY)
    }

    /// Whether a rule has everything go on behind our place, or at another program's rule that takes it.
    fn leads_past_us(&self, rule: &Rule, own: MarkMatch, block: u32) -> bool {
        let RuleAction::Goto(target) = rule.action else { return false };
        let there = |it: &Rule| it.priority >= target && it.priority < MAIN_PRIORITY && self.takes_all(it, own);
        takes_ours(rule, own) && (target > block || self.rules.iter().any(there))
    }

    /// Whether a rule refuses what was to go through the TUN of a run that has crashed: it may have had the very addresses that
    /// we have. While that run is alive it takes them itself, and is no rival.
    fn is_abandoned_refusal(&self, rule: &Rule) -> bool {
        let is_ours = |rule: &Rule| rule.origin == Rule::KERNEL && rule.priority > 0;
        let is_gone = |tun: &String| !self.links.iter().any(|link| link.name == *tun);
        let block = rule.priority.saturating_sub(BLOCK)..rule.priority;
        let of_gone = |it: &Rule| {
            is_ours(it)
                && it.family == rule.family
                && block.contains(&it.priority)
                && it.oif.as_ref().is_some_and(is_gone)
        };
        rule.action == RuleAction::UNREACHABLE && is_ours(rule) && self.rules.iter().any(of_gone)
    }

    /// Whether a rule stands where a run would take its priorities from `first` on.
    pub(in crate::platform) fn has_rules_from(&self, first: u32) -> bool {
        let block = first..first.saturating_add(BLOCK);
        self.all_rules().any(|rule| block.contains(&rule.priority))
    }

    /// The first of [`BLOCK`] free priorities: the wish, or one near where we usually are; before the rules of others that
    /// would take everything, and behind those of other runs, if there is room.
    pub(super) fn free_priorities(&self, wish: Option<u32>, own: MarkMatch) -> Option<u32> {
        let before = || self.free_blocks(wish, self.limit(own, wish.unwrap_or(FIRST_PRIORITY)));
        // Another run's flows would come to us, were we before it: what has an address that is the TUN's of both.
        let behind = before().find(|first| self.is_behind_runs(*first));
        behind.or_else(|| before().next()).or_else(|| self.free_blocks(wish, MAIN_PRIORITY).next())
    }

    /// The first of each [`BLOCK`] free priorities before `limit`, the wish before all others. What is the host's own is looked
    /// up before us, wherever somebody has that done.
    fn free_blocks(&self, wish: Option<u32>, limit: u32) -> impl Iterator<Item = u32> {
        let used: std::collections::BTreeSet<u32> = self.all_rules().map(|rule| rule.priority).collect();
        let near = (FIRST_PRIORITY..MAIN_PRIORITY).chain((1..FIRST_PRIORITY).rev());
        let local = self.looks_up_local();
        wish.into_iter().chain(near.filter(|first| first % BLOCK == 0)).chain([local + 1]).filter(move |first| {
            let end = first.saturating_add(BLOCK);
            *first > local && end <= limit && used.range(*first..end).next().is_none()
        })
    }

    /// Where our rules are to stand from now on, with the reason in words where that is not where they do. `self` knows nothing
    /// of our rules.
    pub(in crate::platform) fn place_of(&self, numbers: Numbers, wish: Option<u32>) -> (Numbers, &'static str) {
        let before = self.before_others(numbers);
        if before != numbers {
            return (before, "another program's rules came to stand before ours");
        }
        (self.with_room_behind(numbers, wish), "there would soon be no room left for another run behind ours")
    }

    /// Our numbers, with a place that another run has left lower down, where little room is left for one that is to take
    /// over from us. It would find a place before ours alone, and take our flows. Between the same runs as before.
    fn with_room_behind(&self, numbers: Numbers, wish: Option<u32>) -> Numbers {
        let limit = self.limit(numbers.own, numbers.first_priority);
        let runs = self.places_of_runs();
        let last = runs.iter().copied().chain([numbers.first_priority]).max().unwrap_or_default();
        if limit.saturating_sub(last) >= ROOM {
            return numbers;
        }
        let same_order = |first: &u32| runs.iter().all(|run| (run < first) == (*run < numbers.first_priority));
        // What a start would take, and never any other: else we would look for yet a lower one each time.
        let place = self.free_blocks(wish, limit).find(same_order).filter(|first| *first < numbers.first_priority);
        Numbers { first_priority: place.unwrap_or(numbers.first_priority), ..numbers }
    }

    /// Our numbers, with a place before rules of others that have come to stand before ours and take everything. The same
    /// where there are none, and where no place is left. `self` knows nothing of our rules.
    pub(in crate::platform) fn before_others(&self, numbers: Numbers) -> Numbers {
        let limit = self.limit(numbers.own, numbers.first_priority);
        let behind_local = numbers.first_priority > self.looks_up_local();
        if behind_local && numbers.first_priority.saturating_add(BLOCK) <= limit {
            return numbers;
        }
        // Whoever stands behind us has to move as well, and is to find a place behind ours.
        let runs = self.places_of_runs();
        let behind_us = runs.range(numbers.first_priority..).count() as u32;
        let same_order = |first: &u32| runs.iter().all(|run| (run < first) == (*run < numbers.first_priority));
        let place = self.free_blocks(None, limit.saturating_sub(BLOCK * behind_us)).find(same_order);
        let free = || self.free_priorities(None, numbers.own).filter(|first| first.saturating_add(BLOCK) <= limit);
        Numbers { first_priority: place.or_else(free).unwrap_or(numbers.first_priority), ..numbers }
    }
}

/// Whether a rule selects, of what this host sends, what carries our mark as well as what carries none. Another run of
/// ours is no rival: the two would overtake each other without end.
pub(super) fn takes_ours(rule: &Rule, own: MarkMatch) -> bool {
    if rule.origin == Rule::KERNEL && rule.priority > 0 && rule.priority < MAIN_PRIORITY {
        return false;
    }
    takes_everything(rule, own)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::routing::{Family, Link, SeenRoute};
    use crate::platform::survey::Wishes;
    use crate::platform::survey::tests::plain;

    const WG: RouteTable = RouteTable(51820);
    /// What ip(8) writes (`RTPROT_BOOT`).
    const BOOT: u8 = 3;

    /// What `wg-quick up` leaves behind: its rules directly before whatever comes first.
    fn with_wg_quick(first: u32) -> Survey {
        let mut survey = plain();
        let lookup = Rule::new(Family::V4, first, RuleAction::Lookup(WG));
        let mark = Some(MarkMatch { mark: 0xca6c, mask: u32::MAX });
        survey.rules.push(Rule { mark, inverted: true, foreign_selectors: true, origin: BOOT, ..lookup });
        let main = Rule::new(Family::V4, first - 1, RuleAction::Lookup(RouteTable::MAIN));
        survey.rules.push(Rule { suppress_prefix_length: Some(0), origin: BOOT, ..main });
        let to = "0.0.0.0/0".parse().unwrap();
        survey.routes.push(SeenRoute { table: WG, to, device: Some(9), on_link: true });
        survey
    }

    fn numbers() -> Numbers {
        plain().numbers(&Wishes::default()).unwrap()
    }

    #[test]
    fn a_vpn_for_everything_that_comes_after_us_is_overtaken() {
        let moved = with_wg_quick(8999).before_others(numbers());
        assert_eq!(moved, Numbers { first_priority: 8800, ..numbers() });
        assert_eq!(with_wg_quick(8999).before_others(moved), moved, "once is enough");
    }

    #[test]
    fn the_refusals_of_a_run_that_has_crashed_are_overtaken_and_those_of_one_that_lives_are_not() {
        let mut survey = plain();
        let bound = Rule::new(Family::V4, 8903, RuleAction::Lookup(RouteTable(2024)));
        survey.rules.push(Rule { oif: Some("tun9".to_owned()), ..bound });
        let to = Some("198.18.0.0/15".parse().unwrap());
        survey.rules.push(Rule { to, ..Rule::new(Family::V4, 8906, RuleAction::UNREACHABLE) });
        assert_eq!(survey.before_others(numbers()).first_priority, 8800);
        survey.links.push(Link { index: 99, name: "tun9".to_owned() });
        assert_eq!(survey.before_others(numbers()), numbers());
    }

    #[test]
    fn one_that_was_there_first_is_not_stood_behind() {
        assert_eq!(with_wg_quick(5270).numbers(&Wishes::default()).unwrap().first_priority, 5100);
        assert_eq!(with_wg_quick(32764).numbers(&Wishes::default()).unwrap().first_priority, 9000);
    }

    #[test]
    fn rules_that_take_less_leave_us_where_we_are() {
        let mut survey = with_wg_quick(8999);
        survey.routes.retain(|route| route.table != WG);
        survey.rules.retain(|rule| rule.suppress_prefix_length.is_none());
        assert_eq!(survey.before_others(numbers()), numbers(), "a table without a default route takes little");
        let mut survey = with_wg_quick(8999);
        survey.rules.iter_mut().filter(|rule| rule.priority > 8000 && rule.priority < 9000).for_each(|rule| {
            (rule.mark, rule.inverted, rule.foreign_selectors) = (None, false, false);
            rule.from = Some("192.0.2.0/24".parse().unwrap());
        });
        assert_eq!(survey.before_others(numbers()), numbers(), "a part of the sources");
    }

    #[test]
    fn whatever_takes_everything_is_overtaken_in_how_many_pieces_it_may_come() {
        let net = |text: &str| Some(text.parse().unwrap());
        let rule = |priority| Rule { origin: BOOT, ..Rule::new(Family::V4, priority, RuleAction::Lookup(WG)) };
        let lo = || Some("lo".to_owned());
        for taking in [
            vec![Rule { iif: lo(), ..rule(1000) }],
            vec![Rule { to: net("128.0.0.0/1"), ..rule(1000) }],
            vec![Rule { suppresses_group: true, ..rule(1000) }],
            vec![Rule { action: RuleAction::Goto(9500), ..rule(1000) }],
            vec![Rule { action: RuleAction::Goto(2500), ..rule(1000) }, rule(2500)],
        ] {
            let mut survey = with_wg_quick(32764);
            survey.rules.extend(taking);
            assert_eq!(survey.before_others(numbers()).first_priority, 900, "{:?}", survey.rules.last());
        }
        // Among ours, as another proxy would do it that takes no look at who is there.
        let mut survey = with_wg_quick(32764);
        survey.rules.push(Rule { from: net("0.0.0.0/32"), iif: lo(), ..rule(9003) });
        assert_eq!(survey.before_others(numbers()).first_priority, 8900);
    }

    #[test]
    fn two_runs_that_a_vpn_overtakes_keep_their_order_whichever_moves_first() {
        let of_run = |first: u32| {
            let past = RuleAction::Goto(first + 2 + crate::platform::layout::PAST_TUN);
            Rule { iif: Some("tun9".to_owned()), ..Rule::new(Family::V4, first + 2, past) }
        };
        let moved = |ours: u32, other: u32| {
            let mut survey = with_wg_quick(8999);
            survey.rules.push(of_run(other));
            survey.links.push(Link { index: 99, name: "tun9".to_owned() });
            survey.before_others(Numbers { first_priority: ours, ..numbers() }).first_priority
        };
        assert_eq!(moved(9000, 9100), 8700, "the first leaves room behind it");
        assert_eq!(moved(9100, 8700), 8800);
        assert_eq!((moved(9100, 9000), moved(9000, 8800)), (8800, 8700), "the other way round");
    }

    #[test]
    fn between_a_rival_and_what_is_local_the_last_room_is_taken() {
        let place = |survey: &Survey| survey.numbers(&Wishes::default()).unwrap().first_priority;
        assert_eq!(place(&with_wg_quick(102)), 1, "rules at 101 and 102");
        assert_eq!(place(&with_wg_quick(101)), 9000, "no room is left");
        let mut late = plain();
        late.rules.push(Rule::new(Family::V4, 10_000, RuleAction::Lookup(RouteTable(255))));
        assert_eq!(place(&late), 10_100, "what comes in for this host would go into the TUN");
        assert_eq!(late.before_others(numbers()).first_priority, 10_100);
    }

    #[test]
    fn a_leap_over_the_place_that_the_profile_wishes_is_one_past_us() {
        let mut survey = plain();
        let leap = Rule::new(Family::V4, 1000, RuleAction::Goto(6000));
        survey.rules.push(Rule { origin: BOOT, ..leap });
        let wishes = Wishes { first_priority: Some(5000), ..Wishes::default() };
        assert_eq!(survey.numbers(&wishes).unwrap().first_priority, 900);
    }

    #[test]
    fn a_leap_that_leads_nowhere_past_us_is_let_be() {
        let mut survey = plain();
        let leap = Rule::new(Family::V4, 1000, RuleAction::Goto(2500));
        survey.rules.push(Rule { origin: BOOT, ..leap });
        assert_eq!(survey.before_others(numbers()), numbers());
    }

    #[test]
    fn another_run_of_ours_is_not_overtaken() {
        let mut survey = with_wg_quick(8999);
        survey.rules.iter_mut().for_each(|rule| rule.origin = Rule::KERNEL);
        assert_eq!(survey.before_others(numbers()), numbers());
    }

    #[test]
    fn the_last_place_that_a_profile_may_wish_is_one() {
        let last = crate::profile::LAST_RULE_INDEX;
        let own = numbers().own;
        assert_eq!(plain().free_priorities(Some(last), own), Some(last));
        assert_eq!(plain().free_priorities(Some(last + 1), own), Some(FIRST_PRIORITY));
    }

    #[test]
    fn without_a_place_before_it_we_stay() {
        assert_eq!(with_wg_quick(60).before_others(numbers()), numbers());
    }

    #[test]
    fn whoever_passes_our_own_mark_takes_only_what_he_should_not() {
        let mut survey = with_wg_quick(8999);
        let own = numbers().own;
        let rule = survey.rules.iter_mut().find(|rule| rule.inverted).unwrap();
        rule.mark = Some(own);
        let rule = rule.clone();
        assert!(!survey.takes_all(&rule, own));
    }
}
