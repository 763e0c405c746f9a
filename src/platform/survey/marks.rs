//! The bits of marks: which others use, which are free, and which stand for a path that somebody chose.

use std::collections::BTreeSet;

use super::{NftState, Survey};
use crate::platform::Fwmark;
use crate::platform::layout::{PAST_FOREIGN, PAST_FOREIGN_AHEAD};
use crate::platform::routing::{MarkMatch, Rule, RuleAction};

/// Bits in the order in which they are tried as marks: others crowd the low ones.
const MARK_BITS: [u32; 32] = [
    24, 25, 26, 27, 28, 29, 30, 31, 23, 22, 21, 20, 19, 18, 17, 16, 15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1,
    0,
];

impl Survey {
    /// Every bit that a rule of somebody reads or writes.
    pub(super) fn mark_bits(&self) -> u32 {
        let in_nft = match &self.nft {
            NftState::Present { mark_bits, .. } => *mark_bits,
            NftState::Missing(_) => 0,
        } | self.other_marks;
        self.all_rules().filter(|rule| !is_exemption(rule)).filter_map(|rule| rule.mark).fold(
            in_nft,
            |used, MarkMatch { mark, mask }| {
                // A full mask says only that one exact value is meant.
                used | mark | if mask == u32::MAX { 0 } else { mask }
            },
        )
    }

    /// The selectors by mark in the rules of others: whoever set such a mark has chosen a path, and we keep off it.
    #[must_use]
    pub fn foreign_marks(&self) -> BTreeSet<MarkMatch> {
        // "fwmark 0/mask" selects what nobody marked, which is nearly everything: not a path that anybody chose.
        let chosen = self.rules.iter().filter(|rule| !is_exemption(rule)).filter_map(|rule| rule.mark);
        chosen.filter(|found| found.mark & found.mask != 0).collect()
    }
}

/// Whether another run of ours lets a mark pass by this rule, because somebody has a rule for it: us, maybe. Were it a choice
/// of a path, two runs would let each other's own marks pass, and keep them when nobody has them any more.
fn is_exemption(rule: &Rule) -> bool {
    let leads = |far: u32| rule.action == RuleAction::Goto(rule.priority.saturating_add(far));
    rule.origin == Rule::KERNEL && [PAST_FOREIGN, PAST_FOREIGN_AHEAD].into_iter().any(leads)
}

/// The first that is not in use.
pub(super) fn free_bit(used: u32) -> Option<Fwmark> {
    MARK_BITS.iter().map(|bit| 1 << bit).find(|bit| used & bit == 0).map(Fwmark)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::plan::HostPlan;
    use crate::platform::plan::tests::options;
    use crate::platform::survey::tests::{marked, plain};
    use crate::platform::survey::{NoRoom, Wishes};

    #[test]
    fn marks_keep_clear_of_values_and_of_masks() {
        let mut survey = plain();
        survey.rules.push(marked(5210, 0x0100_0000, 0x0700_0000));
        survey.rules.push(marked(5211, 0x0800_ca6c, u32::MAX));
        let numbers = survey.numbers(&Wishes::default()).unwrap();
        assert_eq!((numbers.own.mark, numbers.capture.mark), (0x1000_0000, 0x2000_0000));
        survey.nft = NftState::Present {
            tables: BTreeSet::new(),
            mark_bits: 0xffff_ffff,
            dropping_forward: Vec::new(),
            gates: Vec::new(),
            kill_switches: Vec::new(),
        };
        assert_eq!(survey.numbers(&Wishes::default()), Err(NoRoom::Marks));
    }

    #[test]
    fn what_another_run_lets_pass_because_of_us_is_nobodys_choice_of_a_path() {
        let mut survey = plain();
        let plan = HostPlan::new(&options(), &survey).unwrap();
        let ours = [plan.numbers.own, plan.numbers.capture];
        survey.rules.extend(plan.rules.iter().cloned());
        let second = HostPlan::new(&options(), &survey).unwrap();
        assert!(ours.iter().all(|mark| survey.foreign_marks().contains(mark)), "it lets ours pass");
        // We, seen from where the second one's rules stand and ours do not count.
        let seen = Survey { rules: second.rules.clone(), ..plain() };
        assert_eq!(seen.foreign_marks(), [second.numbers.own, second.numbers.capture].into());
        assert_eq!(seen.numbers(&Wishes::default()).unwrap().own, plan.numbers.own, "what it let pass is free again");
    }
}
