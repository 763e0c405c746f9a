//! The members of groups: that they exist, that no group contains itself, and that groups do not nest without end.

use std::collections::HashMap;

use super::decode::Decode;
use super::fields::Fields;
use super::report::Report;
use super::routes::{Brought, Group, Names};

/// How deep groups may contain each other: a flow passes all of them, each time. Real profiles stay below five.
const MAX_NESTING: usize = 64;
/// Of so many ways round each is told; each costs a look at all of it.
const MOST_ROUNDS: usize = 64;

/// Reads the names under `proxies` that exist, and what else brings members. A group that nothing fills is an error.
pub(super) fn read_members(group: &mut Group, names: &mut Names, report: &mut Report) {
    let node = group.node.clone();
    let Some(mut fields) = Fields::relaxed(&node, &*group.path, report) else { return };
    let path = fields.path_of("proxies");
    let items = fields.node("proxies").map_or(&[][..], |node| node.items());
    for (index, item) in items.iter().enumerate() {
        let path = format!("{path}[{index}]");
        let Some(name) = String::decode(item, &path, fields.report()) else {
            group.wrong = true;
            continue;
        };
        if name == "GLOBAL" && !names.defines(&name) {
            fields.report().error(item, path, "GLOBAL has every group as a member and cannot be one itself");
            group.wrong = true;
        } else if names.has(&name) {
            group.proxies.push(name);
        } else {
            names.undefined(&name, item.place, &path, fields.report());
            group.wrong = true;
        }
    }
    group.brought = brought(&mut fields);
    let nothing = items.is_empty() && group.brought == Brought::default();
    if nothing {
        let message = format!("the group `{}` is empty", super::node::shortened(&group.name));
        fields.error("proxies", message).hint("list its members under `proxies`");
        group.wrong = true;
    }
}

/// As in mihomo `include-all` is both of the two keys below it.
fn brought(fields: &mut Fields<'_>) -> Brought {
    let all = fields.or("include-all", false);
    let proxies = fields.or("include-all-proxies", false);
    let providers = fields.or("include-all-providers", false);
    let used = fields.node("use").is_some_and(|providers| !providers.items().is_empty());
    let providers = match (used, providers, all) {
        (true, ..) => Some("use"),
        (_, true, _) => Some("include-all-providers"),
        (.., true) => Some("include-all"),
        _ => None,
    };
    Brought { proxies: all || proxies, providers }
}

/// A walk over groups that contain each other, with a stack of its own: a profile may chain more of them than a
/// thread's stack has room for.
struct Walk {
    /// Where each group stands in the list.
    numbers: HashMap<String, usize>,
    /// How deep a group nests; 0 until that is known.
    height: Vec<usize>,
    on_way: Vec<bool>,
    /// Whether a group was found too deep: a chain of thousands is one mistake.
    too_deep: bool,
    /// Ways round that were found.
    rounds: usize,
}

/// Adds one error for each way in which groups contain each other, naming the way round, and one if they nest too deep.
/// The member that makes it so is taken out, so that whoever follows members comes to an end.
pub(super) fn refuse_cycles(groups: &mut [Group], report: &mut Report) {
    let numbers = groups.iter().enumerate().map(|(number, group)| (group.name.clone(), number)).collect();
    let mut walk =
        Walk { numbers, height: vec![0; groups.len()], on_way: vec![false; groups.len()], too_deep: false, rounds: 0 };
    for first in 0..groups.len() {
        if walk.height[first] == 0 {
            walk.from(first, groups, report);
        }
    }
}

impl Walk {
    fn from(&mut self, first: usize, groups: &mut [Group], report: &mut Report) {
        // The way from `first` to the group looked at, each with the number of its members already followed.
        let mut way = vec![(first, 0)];
        while let Some((group, followed)) = way.last_mut() {
            let (number, at) = (*group, *followed);
            self.on_way[number] = true;
            *followed += 1;
            let Some(member) = groups[number].proxies.get(at) else {
                self.height[number] = 1 + self.highest_member(&groups[number]);
                self.on_way[number] = false;
                way.pop();
                continue;
            };
            let Some(&next) = self.numbers.get(member) else { continue };
            let wrong = self.on_way[next] || self.height[next] >= MAX_NESTING;
            if !wrong && self.height[next] > 0 {
                continue;
            }
            // What stands at `at` is looked at again: another member, or this one once its height is known. Before it there
            // is none of the same name, or that would be gone.
            *followed -= 1;
            if wrong {
                if let Some(message) = self.message(next, &way, groups) {
                    complain(&groups[number], at, message, report);
                }
                // It may stand there a million times.
                let proxies = &mut groups[number].proxies;
                let member = proxies[at].clone();
                proxies.retain(|name| *name != member);
                groups[number].wrong = true;
            } else {
                way.push((next, 0));
            }
        }
    }

    /// What is wrong with the last group of `way` having `next` as a member, unless that was said often enough.
    fn message(&mut self, next: usize, way: &[(usize, usize)], groups: &[Group]) -> Option<String> {
        if !self.on_way[next] {
            let said = std::mem::replace(&mut self.too_deep, true);
            return (!said).then(|| format!("groups contain each other more than {MAX_NESTING} levels deep"));
        }
        self.rounds += 1;
        if self.rounds > MOST_ROUNDS {
            return None;
        }
        let round = way.iter().map(|&(number, _)| number).skip_while(|&number| number != next).chain([next]);
        let names: Vec<&str> = round.map(|number| groups[number].name.as_str()).collect();
        Some(format!("groups contain each other: {}", in_short(&names)))
    }

    fn highest_member(&self, group: &Group) -> usize {
        let heights = group.proxies.iter().filter_map(|name| self.numbers.get(name)).map(|&number| self.height[number]);
        heights.max().unwrap_or(0)
    }
}

/// The names of a long way are cut in the middle.
fn in_short(names: &[&str]) -> String {
    const ENDS: usize = 4;
    if names.len() <= 2 * ENDS {
        return names.join(" -> ");
    }
    let (head, tail) = (names[..ENDS].join(" -> "), names[names.len() - ENDS..].join(" -> "));
    format!("{head} -> … -> {tail}")
}

/// An error at the member at `at` of those that are left.
fn complain(group: &Group, at: usize, message: String, report: &mut Report) {
    let items = group.node.child("proxies").map_or(&[][..], |node| node.items());
    let member = items.iter().position(|item| item.text() == group.proxies.get(at).map(String::as_str));
    let place = member.map_or(group.node.place, |index| items[index].place);
    let path = format!("{}.proxies[{}]", group.path, member.unwrap_or_default());
    report.error(place, path, message).hint("take one of these members out");
}
