//! Rules of others that take everything together, each its piece of the internet.

use std::collections::HashMap;
use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::Survey;
use super::before::takes_ours;
use crate::platform::routing::{Family, MarkMatch, Rule, RuleAction};

/// Of a half so much may be missing, as a power of two: a VPN's own server, networks that somebody keeps out of it.
const MISSING: u32 = 8;

impl Survey {
    /// The rules that take everything only with others: alike but for their destinations, priorities and tables, each of which
    /// has a route for everything; and the destinations are as good as all of one half of the internet.
    pub(in crate::platform) fn take_all_together(&self, own: MarkMatch) -> Vec<&Rule> {
        let is_piece = |rule: &&Rule| {
            let anywhere = || Rule { to: None, ..(*rule).clone() };
            rule.to.is_some() && !rule.inverted && takes_ours(&anywhere(), own) && self.leads_out(rule)
        };
        let mut kinds: HashMap<Rule, Vec<&Rule>> = HashMap::new();
        for rule in self.rules.iter().filter(is_piece) {
            let kind = Rule { to: None, priority: 0, action: RuleAction::Nop, origin: 0, ..rule.clone() };
            kinds.entry(kind).or_default().push(rule);
        }
        kinds.retain(|_, rules| rules.len() > 1 && is_a_half(rules));
        let mut found: Vec<&Rule> = kinds.into_values().flatten().collect();
        found.sort_by_key(|rule| (rule.priority, rule.to));
        found
    }
}

/// Whether the destinations of `rules`, all of one family, cover a half of the internet, but for what is in no internet.
fn is_a_half(rules: &[&Rule]) -> bool {
    let Some(family) = rules.first().map(|rule| rule.family) else { return false };
    let pieces: Vec<IpNet> = rules.iter().filter_map(|rule| rule.to).collect();
    // Else what is in none would do for a good part of a half.
    let covered = |nets: &Vec<IpNet>, half: &IpNet| -> u128 {
        IpNet::aggregate(nets).iter().map(|net| if net.contains(half) { size(half) } else { within(net, half) }).sum()
    };
    let with_others: Vec<IpNet> = pieces.iter().copied().chain(in_no_internet(family)).collect();
    let is_covered = |half: &IpNet| {
        let missing = size(half) - covered(&with_others, half);
        covered(&pieces, half) > 0 && missing <= size(half) >> MISSING
    };
    halves(family).iter().any(is_covered)
}

fn within(net: &IpNet, half: &IpNet) -> u128 {
    if half.contains(net) { size(net) } else { 0 }
}

/// How many addresses are in `net`, which is a half or less.
fn size(net: &IpNet) -> u128 {
    1 << (net.max_prefix_len() - net.prefix_len()).min(127)
}

fn halves(family: Family) -> Vec<IpNet> {
    match family {
        Family::V4 => [0, 128].map(|first| v4(first, 0, 1)).into(),
        // All of it has the same first bits.
        Family::V6 => vec![IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::new(0x2000, 0, 0, 0, 0, 0, 0, 0), 3))],
    }
}

/// RFC 6890: this network, private, shared, this host, link-local, multicast and reserved.
fn in_no_internet(family: Family) -> Vec<IpNet> {
    match family {
        Family::V4 => vec![
            v4(0, 0, 8),
            v4(10, 0, 8),
            v4(100, 64, 10),
            v4(127, 0, 8),
            v4(169, 254, 16),
            v4(172, 16, 12),
            v4(192, 168, 16),
            v4(224, 0, 3),
        ],
        Family::V6 => Vec::new(),
    }
}

fn v4(first: u8, second: u8, prefix: u8) -> IpNet {
    IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::new(first, second, 0, 0), prefix))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::routing::{RouteTable, SeenRoute};
    use crate::platform::survey::Wishes;
    use crate::platform::survey::tests::plain;
    use crate::platform::{HostPlan, NftState};

    const OWN: MarkMatch = MarkMatch { mark: 0x100_0000, mask: 0x100_0000 };
    const VPN: RouteTable = RouteTable(77);

    /// A host with a rule of somebody's for each of these destinations, from priority 1000 on.
    fn with(pieces: &[String]) -> Survey {
        let mut survey = plain();
        for (at, piece) in (1000..).zip(pieces) {
            let to: IpNet = piece.parse().unwrap();
            let rule = Rule::new(Family::of(&to), at, RuleAction::Lookup(VPN));
            survey.rules.push(Rule { to: Some(to), origin: 3, ..rule });
        }
        for to in ["0.0.0.0/0", "::/0"] {
            let to = to.parse().unwrap();
            survey.routes.push(SeenRoute { table: VPN, to, device: Some(9), on_link: true });
        }
        survey
    }

    fn list(pieces: &[&str]) -> Vec<String> {
        pieces.iter().map(|piece| (*piece).to_owned()).collect()
    }

    fn fourteen() -> Vec<String> {
        (0..14).map(|at| format!("{}.0.0.0/4", at * 16)).collect()
    }

    /// All of 0.0.0.0/0 but `hole`, in as few pieces as can be.
    fn all_but(hole: &str) -> Vec<String> {
        let hole: Ipv4Net = hole.parse().unwrap();
        let beside = |length| {
            let up = Ipv4Net::new(hole.addr(), length).unwrap().trunc();
            let bit = 1 << (32 - u32::from(length));
            Ipv4Net::new(Ipv4Addr::from_bits(up.addr().to_bits() ^ bit), length).unwrap().to_string()
        };
        (1..=hole.prefix_len()).map(beside).collect()
    }

    fn together(pieces: &[String]) -> usize {
        with(pieces).take_all_together(OWN).len()
    }

    #[test]
    fn pieces_that_make_up_a_half_of_the_internet_take_everything() {
        assert_eq!(together(&fourteen()), 14);
        assert_eq!(together(&fourteen()[..8]), 8, "0.0.0.0/1");
        assert_eq!(together(&fourteen()[8..]), 6, "the other, without multicast");
        assert_eq!(together(&all_but("10.0.0.0/8")), 8, "the LAN is kept out");
        assert_eq!(together(&all_but("203.0.113.7/32")), 32, "the VPN's server is");
        let doubled = list(&["0.0.0.0/2", "64.0.0.0/2", "64.0.0.0/3", "0.0.0.0/2"]);
        assert_eq!(together(&doubled), 4, "no matter how often");
        let v6: Vec<String> = (0..32).map(|at| format!("{:x}::/8", 0x2000 + at * 0x100)).collect();
        assert_eq!(together(&v6), 32);
    }

    #[test]
    fn pieces_that_leave_something_out_do_not() {
        let mut holed = fourteen();
        holed.retain(|piece| piece != "64.0.0.0/4" && piece != "144.0.0.0/4");
        assert_eq!(together(&holed), 0);
        assert_eq!(together(&all_but("128.0.0.0/1")), 0, "one alone is seen as such");
        assert_eq!(together(&list(&["1.1.1.1/32", "8.8.8.8/32", "64.4.4.4/32", "104.16.1.1/32"])), 0);
        assert_eq!(together(&list(&["10.0.0.0/8", "192.168.0.0/16", "224.0.0.0/3"])), 0, "no internet at all");
        let mut pieces = with(&fourteen());
        pieces.routes.retain(|route| route.table != VPN);
        assert!(pieces.take_all_together(OWN).is_empty(), "without a route none is taken");
    }

    #[test]
    fn only_rules_that_are_alike_count_together_and_another_run_is_no_rival() {
        let changed = |change: fn(&mut Rule)| {
            let mut survey = with(&fourteen());
            survey.rules.iter_mut().filter(|rule| rule.to.is_some()).for_each(change);
            survey.take_all_together(OWN).len()
        };
        assert_eq!(changed(|rule| rule.priority = 1000), 14);
        assert_eq!(changed(|rule| rule.iif = Some("lo".to_owned())), 14);
        assert_eq!(changed(|rule| rule.uids = (rule.priority % 2 == 0).then_some((0, u32::MAX - 1))), 0);
        assert_eq!(changed(|rule| rule.from = Some("192.168.7.7/32".parse().unwrap())), 0);
        assert_eq!(changed(|rule| rule.mark = Some(OWN)), 0);
        assert_eq!(changed(|rule| rule.suppress_prefix_length = Some(0)), 0);
        assert_eq!(changed(|rule| rule.inverted = true), 0);
        assert_eq!(changed(|rule| rule.origin = Rule::KERNEL), 0);
    }

    #[test]
    fn a_start_stands_before_them_and_one_that_cannot_says_so() {
        let survey = with(&fourteen());
        let first = survey.numbers(&Wishes::default()).unwrap().first_priority;
        assert!(first + super::super::BLOCK <= 1000, "{first}");
        let mut early = with(&fourteen());
        early.rules.iter_mut().filter(|rule| rule.to.is_some()).for_each(|rule| rule.priority -= 980);
        early.nft = NftState::empty();
        let plan = HostPlan::new(&crate::platform::plan::tests::options(), &early).unwrap();
        let said: Vec<&String> = plan.warnings.iter().filter(|it| it.contains("takes all traffic")).collect();
        assert!(said.len() == 1 && said[0].contains("with 13 others"), "{:?}", plan.warnings);
    }
}
