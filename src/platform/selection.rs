//! Whose traffic is taken: what a profile leaves out by interface and by user.

use super::plan::HostOptions;
use super::survey::Survey;

/// The interface by which rules know what this host itself sends.
pub(super) const OWN_TRAFFIC: &str = "lo";
/// Users of every namespace that has them all: the number above the last stands for nobody.
pub(super) const EVERYBODY: (u32, u32) = (0, u32::MAX - 1);

/// What to say of an interface that `key` of `tun` names and that is not there. Rules go by the name: the kernel heeds them
/// when an interface comes to have it.
#[must_use]
pub fn interface_not_there(key: &str, name: &str) -> String {
    format!("tun.{key}: there is no interface {name} now; it takes effect as soon as there is one")
}

impl HostOptions {
    /// Whether what arrives by the interface `name` is taken.
    pub(super) fn takes_interface(&self, name: &str) -> bool {
        let named = |list: &[String]| list.iter().any(|it| it == name);
        (self.include_interface.is_empty() || named(&self.include_interface)) && !named(&self.exclude_interface)
    }

    /// The interfaces that are taken or left out and that are not there, a warning each.
    pub(super) fn not_there(&self, survey: &Survey) -> Vec<String> {
        let missing = |name: &&String| *name != OWN_TRAFFIC && survey.links.iter().all(|link| link.name != **name);
        let [included, excluded] =
            [&self.include_interface, &self.exclude_interface].map(|list| list.iter().filter(missing));
        let told = |key: &'static str| move |name: &String| interface_not_there(key, name);
        included.map(told("include-interface")).chain(excluded.map(told("exclude-interface"))).collect()
    }

    /// Whether what this host itself sends is taken.
    pub(super) fn takes_own_traffic(&self) -> bool {
        self.takes_interface(OWN_TRAFFIC)
    }

    /// The users of `known` whose traffic is not taken, as ascending ranges that do not touch. A rule that names a user
    /// whom the namespace does not know is refused by the kernel.
    pub(super) fn users_left_out(&self, known: &[(u32, u32)]) -> Vec<(u32, u32)> {
        let mut left_out = self.exclude_uid.clone();
        if !self.include_uid.is_empty() {
            left_out.extend(complement(&self.include_uid));
        }
        let left_out = merged(left_out);
        let overlaps = known.iter().flat_map(|known| left_out.iter().filter_map(|range| overlap(*known, *range)));
        let mut overlaps: Vec<(u32, u32)> = overlaps.collect();
        overlaps.sort_unstable();
        overlaps
    }
}

fn overlap(a: (u32, u32), b: (u32, u32)) -> Option<(u32, u32)> {
    let both = (a.0.max(b.0), a.1.min(b.1));
    (both.0 <= both.1).then_some(both)
}

/// Everybody else.
fn complement(ranges: &[(u32, u32)]) -> Vec<(u32, u32)> {
    let (mut next, end) = EVERYBODY;
    let mut others = Vec::new();
    for (first, last) in merged(ranges.to_vec()) {
        if first > next {
            others.push((next, first - 1));
        }
        next = last.saturating_add(1);
    }
    if next <= end {
        others.push((next, end));
    }
    others
}

/// The same users in as few ranges as can be, ascending.
fn merged(mut ranges: Vec<(u32, u32)>) -> Vec<(u32, u32)> {
    ranges.sort_unstable();
    let mut merged: Vec<(u32, u32)> = Vec::with_capacity(ranges.len());
    for (first, last) in ranges {
        match merged.last_mut() {
            Some(before) if first <= before.1.saturating_add(1) => before.1 = before.1.max(last),
            _ => merged.push((first, last)),
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::plan::tests::options;

    fn left_out(include: &[(u32, u32)], exclude: &[(u32, u32)]) -> Vec<(u32, u32)> {
        let options = HostOptions { include_uid: include.to_vec(), exclude_uid: exclude.to_vec(), ..options() };
        options.users_left_out(&[EVERYBODY])
    }

    #[test]
    fn included_users_leave_all_others_out() {
        assert_eq!(left_out(&[], &[]), []);
        assert_eq!(left_out(&[(1000, 1000)], &[]), [(0, 999), (1001, EVERYBODY.1)]);
        assert_eq!(left_out(&[EVERYBODY], &[]), []);
        assert_eq!(left_out(&[(0, 5), (3, 9), (10, 10)], &[]), [(11, EVERYBODY.1)]);
    }

    #[test]
    fn whoever_is_included_and_excluded_is_excluded() {
        assert_eq!(left_out(&[(1000, 1999)], &[(1500, 1500)]), [(0, 999), (1500, 1500), (2000, EVERYBODY.1)]);
        assert_eq!(left_out(&[(1000, 1000)], &[(1000, 1000)]), [EVERYBODY]);
        assert_eq!(left_out(&[], &[(7, 7), (8, 9), (7, 7)]), [(7, 9)]);
    }

    #[test]
    fn only_users_that_the_namespace_knows_are_named() {
        let options = HostOptions { include_uid: vec![(1000, 1000)], ..options() };
        assert_eq!(options.users_left_out(&[(0, 65535)]), [(0, 999), (1001, 65535)]);
        assert_eq!(options.users_left_out(&[(100_000, 165_535), (0, 0)]), [(0, 0), (100_000, 165_535)]);
    }

    #[test]
    fn interfaces_are_taken_unless_others_are_named_or_they_are_excluded() {
        let named = |include: &[&str], exclude: &[&str]| {
            let list = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
            HostOptions { include_interface: list(include), exclude_interface: list(exclude), ..options() }
        };
        assert!(named(&[], &[]).takes_own_traffic());
        assert!(!named(&["lan0"], &[]).takes_own_traffic() && named(&["lan0"], &[]).takes_interface("lan0"));
        assert!(!named(&[], &["lan0"]).takes_interface("lan0") && named(&[], &["lan0"]).takes_own_traffic());
        assert!(!named(&[], &["lo"]).takes_own_traffic());
    }
}
