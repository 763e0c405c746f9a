//! What the keys of a selection come to together, where that is hardly what anybody meant: nothing is taken, or a key does
//! nothing.

use ipnet::IpNet;

use super::fields::Fields;
use super::selection::{LAST_UID, OWN_TRAFFIC, Selection};

/// Warns of keys that leave everything out and of keys that contradict each other. `device` is the TUN's name.
pub(super) fn warn(selection: &Selection, device: &str, fields: &mut Fields<'_>) {
    interfaces(selection, device, fields);
    users(selection, fields);
    prefixes(selection, fields);
}

fn interfaces(selection: &Selection, device: &str, fields: &mut Fields<'_>) {
    if selection.exclude_interface.iter().any(|name| name == OWN_TRAFFIC) {
        let message = "what this host itself sends is left out: `lo` stands for it";
        fields.warn("exclude-interface", message).hint("take `lo` out, unless only other hosts are to be carried");
    }
    for (key, list) in
        [("include-interface", &selection.include_interface), ("exclude-interface", &selection.exclude_interface)]
    {
        if list.iter().any(|name| name == device) {
            let message = format!("`{device}` is our own device, by which no traffic comes: the name has no effect");
            fields
                .warn(key, message)
                .hint("these are the interfaces that other hosts are behind, and `lo` for this one");
        }
    }
}

fn users(selection: &Selection, fields: &mut Fields<'_>) {
    let (include, exclude) = (&selection.include_uid, &selection.exclude_uid);
    let written = |single: &'static str, range: &'static str| {
        move |fields: &Fields<'_>| {
            if fields.has(single) { single } else { range }
        }
    };
    let include_key = written("include-uid", "include-uid-range")(fields);
    let exclude_key = written("exclude-uid", "exclude-uid-range")(fields);
    if !selection.takes_own_traffic() {
        for (key, list) in [(include_key, include), (exclude_key, exclude)] {
            if !list.is_empty() {
                let message = format!("`{key}` has no effect: the interfaces leave out what this host itself sends");
                fields.warn(key, message).hint("only that has a user; what other hosts send has none");
            }
        }
        return;
    }
    let everybody = [(0, LAST_UID)];
    let wanted = if include.is_empty() { &everybody[..] } else { include };
    if wanted.iter().all(|range| is_covered(*range, exclude)) {
        let whom = if include.is_empty() { "every user" } else { "every user that is included" };
        let message = format!("{whom} is left out: nothing that this host itself sends is taken");
        fields.warn(exclude_key, message).hint("who is excluded stays so, included or not");
    }
}

/// Whether the ranges hold every number from the first to the last of `range`.
fn is_covered((first, last): (u32, u32), ranges: &[(u32, u32)]) -> bool {
    let mut next = u64::from(first);
    while let Some((_, end)) = ranges.iter().find(|(a, b)| (u64::from(*a)..=u64::from(*b)).contains(&next)) {
        next = u64::from(*end) + 1;
        if next > u64::from(last) {
            return true;
        }
    }
    false
}

fn prefixes(selection: &Selection, fields: &mut Fields<'_>) {
    let excluded = IpNet::aggregate(&selection.route_exclude_address);
    let is_out = |net: &IpNet| excluded.iter().any(|other| other.contains(net));
    for (family, everything, keys) in [
        ("IPv4", "0.0.0.0/0", ["inet4-route-exclude-address", "inet4-route-address"]),
        ("IPv6", "::/0", ["inet6-route-exclude-address", "inet6-route-address"]),
    ] {
        let [exclude_key, include_key] = [("route-exclude-address", keys[0]), ("route-address", keys[1])]
            .map(|(usual, older)| if fields.has(usual) { usual } else { older });
        let all: Option<IpNet> = everything.parse().ok();
        let Some(all) = all else { continue };
        let of_family = |net: &&IpNet| net.addr().is_ipv4() == all.addr().is_ipv4();
        let wanted: Vec<&IpNet> = selection.route_address.iter().filter(of_family).collect();
        if is_out(&all) || (!wanted.is_empty() && wanted.iter().all(|net| is_out(net))) {
            let message = format!(
                "nothing of {family} is taken: `route-exclude-address` leaves out all that would be. Only questions to \
                 port 53 and fake addresses go into the device"
            );
            fields
                .warn(exclude_key, message)
                .hint("an exclusion holds for all of itself, whatever `route-address` says");
        } else if let Some(net) = wanted.into_iter().find(|net| is_out(net)) {
            let message = format!("{net} has no effect: `route-exclude-address` leaves it out");
            fields.warn(include_key, message).hint("an exclusion holds for all of itself: leave one of the two out");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::is_covered;
    use crate::profile::read;

    fn told(tun: &str) -> String {
        read("p.yaml", format!("tun: {{{tun}}}\nmode: direct\n").as_bytes()).1.to_string()
    }

    #[test]
    fn interfaces_that_leave_this_host_out_or_mean_nothing_are_told() {
        let said = told("exclude-interface: [lo]");
        assert!(
            said.contains("1:7: warning: tun.exclude-interface: what this host itself sends is left out"),
            "{said}"
        );
        assert!(told("exclude-interface: [tunproxy0]").contains("`tunproxy0` is our own device"));
        assert!(told("device: t7, include-interface: [lo, t7]").contains("tun.include-interface: `t7` is our own"));
        assert_eq!(told("exclude-interface: [eth7, docker0]"), "");
    }

    #[test]
    fn users_who_are_all_left_out_are_told() {
        for all in [
            "include-uid: [0], exclude-uid: [0]",
            "include-uid-range: ['5:9'], exclude-uid: [7, 8, 9], exclude-uid-range: ['0:6']",
            "exclude-uid-range: ['0:4294967294']",
        ] {
            assert!(told(all).contains("nothing that this host itself sends is taken"), "{all}: {}", told(all));
        }
        assert_eq!(told("include-uid-range: ['5:9'], exclude-uid: [7]"), "");
        let without_effect = told("exclude-interface: [lo], include-uid: [5]");
        assert!(without_effect.contains("`include-uid` has no effect"), "{without_effect}");
    }

    #[test]
    fn ranges_cover_one_only_without_a_gap() {
        assert!(is_covered((3, 5), &[(5, 9), (0, 4)]));
        assert!(!is_covered((3, 5), &[(5, 9), (0, 3)]));
        assert!(!is_covered((0, 0), &[]));
        assert!(is_covered((0, u32::MAX - 1), &[(1, u32::MAX - 1), (0, 0)]));
    }

    #[test]
    fn prefixes_that_leave_a_family_out_or_contradict_each_other_are_told() {
        for (all, family) in [
            ("route-exclude-address: [0.0.0.0/0]", "IPv4"),
            ("route-exclude-address: [0.0.0.0/1, 128.0.0.0/1]", "IPv4"),
            ("inet6-route-exclude-address: ['::/0']", "IPv6"),
            ("route-address: [10.0.0.0/8], route-exclude-address: [10.0.0.0/8]", "IPv4"),
        ] {
            assert!(told(all).contains(&format!("nothing of {family} is taken")), "{all}: {}", told(all));
        }
        let one = told("route-address: [10.1.0.0/16, 203.0.113.0/24], route-exclude-address: [10.0.0.0/8]");
        assert!(one.contains("tun.route-address: 10.1.0.0/16 has no effect"), "{one}");
        assert_eq!(told("route-address: [10.0.0.0/8], route-exclude-address: [10.1.0.0/16, 'fd00::/8']"), "");
    }
}
