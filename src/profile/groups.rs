//! The members of groups: that they exist, and that no group contains itself.

use std::collections::HashMap;

use super::decode::Decode;
use super::fields::Fields;
use super::report::Report;
use super::routes::{Group, Names};

/// The names under `proxies` that exist. A group without any is an error, unless providers would fill it.
pub(super) fn members(group: &Group, names: &Names, report: &mut Report) -> Vec<String> {
    let Some(mut fields) = Fields::relaxed(&group.node, &*group.path, report) else { return Vec::new() };
    let path = fields.path_of("proxies");
    let items = fields.node("proxies").map_or(&[][..], |node| node.items());
    let mut members = Vec::with_capacity(items.len());
    for (index, item) in items.iter().enumerate() {
        let path = format!("{path}[{index}]");
        let Some(name) = String::decode(item, &path, fields.report()) else { continue };
        if name == "GLOBAL" && !names.defines(&name) {
            fields.report().error(item, path, "GLOBAL has every group as a member and cannot be one itself");
        } else if names.has(&name) {
            members.push(name);
        } else {
            names.undefined(&name, item.place, &path, fields.report());
        }
    }
    if items.is_empty() {
        empty(&mut fields, &group.name);
    }
    members
}

fn empty(fields: &mut Fields<'_>, name: &str) {
    const PROVIDED: [&str; 4] = ["use", "include-all", "include-all-proxies", "include-all-providers"];
    let key = PROVIDED.into_iter().find(|key| fields.has(key));
    match key {
        Some(key) => fields.warn(
            key,
            format!("`{key}` has no effect yet, so the group `{name}` is empty: it refuses every flow that reaches it"),
        ),
        None => {
            fields.error("proxies", format!("the group `{name}` is empty")).hint("list its members under `proxies`")
        }
    };
}

/// Adds one error for each way in which groups contain each other; it names the way round.
pub(super) fn refuse_cycles(groups: &[Group], report: &mut Report) {
    let numbers: HashMap<&str, usize> = groups.iter().enumerate().map(|(n, group)| (group.name.as_str(), n)).collect();
    let mut done = vec![false; groups.len()];
    let mut on_way = vec![false; groups.len()];
    for first in 0..groups.len() {
        // The way from `first` to the group looked at, each with the number of its members already followed.
        // A stack of our own: a profile may chain more groups than a thread's stack has room for.
        let mut way = if done[first] { Vec::new() } else { vec![(first, 0)] };
        while let Some((group, followed)) = way.last_mut() {
            let group = *group;
            on_way[group] = true;
            let member = groups[group].proxies.get(*followed);
            *followed += 1;
            match member.map(|name| numbers.get(name.as_str())) {
                None => {
                    done[group] = true;
                    on_way[group] = false;
                    way.pop();
                }
                Some(Some(&next)) if on_way[next] => {
                    let names =
                        way.iter().map(|&(number, _)| number).skip_while(|&number| number != next).chain([next]);
                    let names: Vec<&str> = names.map(|number| groups[number].name.as_str()).collect();
                    report_cycle(&groups[next], &names, report);
                }
                Some(Some(&next)) if !done[next] => way.push((next, 0)),
                Some(_) => {}
            }
        }
    }
}

/// `way` begins and ends with the name of `group`.
fn report_cycle(group: &Group, way: &[&str], report: &mut Report) {
    let members = group.node.child("proxies").map_or(&[][..], |node| node.items());
    let member = members.iter().position(|item| item.text() == way.get(1).copied());
    let place = member.map_or(group.node.place, |index| members[index].place);
    let path = format!("{}.proxies[{}]", group.path, member.unwrap_or_default());
    let message = format!("groups contain each other: {}", way.join(" -> "));
    report.error(place, path, message).hint("take one of these members out");
}
