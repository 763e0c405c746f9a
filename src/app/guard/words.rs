//! What the guard says of many changes at once: one line that counts them.

use crate::platform::{Change, Step};

/// So many are told one by one.
pub(super) const FEW: usize = 3;

/// Counts what there is a lot of, rules and routes, and names the rest.
pub(super) fn summed<'a>(steps: impl Iterator<Item = &'a Step>) -> String {
    let (mut rules, mut routes, mut others) = (Vec::new(), Vec::new(), Vec::new());
    for step in steps {
        match step {
            Step::Rule(rule) => rules.push(rule),
            Step::Route(route) => routes.push(route),
            other => others.push(other.to_string()),
        }
    }
    let priorities = || rules.iter().map(|rule| rule.priority);
    let counted_rules = match (&rules[..], priorities().min(), priorities().max()) {
        ([rule], ..) => Some(rule.to_string()),
        (many, Some(first), Some(last)) if first == last => Some(format!("{} rules (priority {first})", many.len())),
        (many, Some(first), Some(last)) => Some(format!("{} rules (priorities {first} to {last})", many.len())),
        _ => None,
    };
    let counted_routes = match &routes[..] {
        [] => None,
        [route] => Some(format!("route {route}")),
        many => Some(format!("{} routes", many.len())),
    };
    let mut parts: Vec<String> = counted_rules.into_iter().chain(counted_routes).chain(others).collect();
    match parts.pop() {
        Some(last) if parts.is_empty() => last,
        Some(last) => format!("{} and {last}", parts.join(", ")),
        None => String::new(),
    }
}

/// The lines for what the host has come to ask for. Of many, each by itself is a matter of detail.
pub(super) fn changes(changed: &[Change]) -> Vec<String> {
    if changed.len() <= FEW {
        return changed.iter().map(ToString::to_string).collect();
    }
    let set = || changed.iter().filter_map(|change| if let Change::Set(step) = change { Some(step) } else { None });
    let dropped =
        || changed.iter().filter_map(|change| if let Change::Dropped(step) = change { Some(step) } else { None });
    let others = changed.iter().filter(|change| matches!(change, Change::Other(_))).map(ToString::to_string);
    let mut lines: Vec<String> = others.collect();
    if set().next().is_some() {
        lines.push(format!("set now: {}", summed(set())));
    }
    if dropped().next().is_some() {
        lines.push(format!("needed no more, and deleted: {}", summed(dropped())));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::{Family, Rule, RuleAction};

    fn rule(priority: u32) -> Step {
        Step::Rule(Rule::new(Family::V4, priority, RuleAction::Nop))
    }

    #[test]
    fn a_move_of_all_rules_is_a_line_for_the_new_and_one_for_the_old() {
        let new = (8800..8840).map(|priority| Change::Set(rule(priority)));
        let old = (9000..9040).map(|priority| Change::Dropped(rule(priority)));
        let moved = Change::Other("ours move from priority 9000 to 8800".to_owned());
        let changed: Vec<Change> = std::iter::once(moved).chain(new).chain(old).collect();
        let wanted = [
            "ours move from priority 9000 to 8800",
            "set now: 40 rules (priorities 8800 to 8839)",
            "needed no more, and deleted: 40 rules (priorities 9000 to 9039)",
        ];
        assert_eq!(changes(&changed), wanted);
        assert_eq!(changes(&changed[..2]), [wanted[0], "rule -4 priority 8800 nop is set"]);
    }

    #[test]
    fn what_is_of_another_kind_is_named_beside_them() {
        assert_eq!(
            summed([rule(1), Step::Firewall, rule(3)].iter()),
            "2 rules (priorities 1 to 3) and the firewall table"
        );
        assert_eq!(
            summed([rule(1), Step::Firewall, Step::Link].iter()),
            "rule -4 priority 1 nop, the firewall table and the TUN's link settings"
        );
    }
}
