//! `include-…`, `exclude-…` and `route-…` of `tun`: whose traffic goes into the device, and where to.

use ipnet::IpNet;

use super::decode::{Decode, integer, scalar};
use super::fields::Fields;
use super::node::{Node, shortened};
use super::report::Report;

/// The interface by which rules know what this host itself sends.
pub(super) const OWN_TRAFFIC: &str = "lo";
/// The highest user there is: the number above it stands for "nobody" (user_namespaces(7)).
pub(super) const LAST_UID: u32 = u32::MAX - 1;

/// Which traffic `auto-route` takes. What is left out goes its own way, with its names; fake addresses lead into the
/// device for everybody.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Selection {
    /// `include-interface`: what arrives by these alone; `lo` stands for this host itself. Empty: everything.
    pub include_interface: Vec<String>,
    /// `exclude-interface`: but not what arrives by these. Empty where `include_interface` is not.
    pub exclude_interface: Vec<String>,
    /// `include-uid` and `include-uid-range`: of this host's own traffic only that of these users, first and last.
    pub include_uid: Vec<(u32, u32)>,
    /// `exclude-uid` and `exclude-uid-range`: but not that of these.
    pub exclude_uid: Vec<(u32, u32)>,
    /// `route-address`: only what goes there; per family everything when empty.
    pub route_address: Vec<IpNet>,
    /// `route-exclude-address`: but not what goes there.
    pub route_exclude_address: Vec<IpNet>,
}

impl Selection {
    pub(super) fn decode(fields: &mut Fields<'_>) -> Self {
        let (include_interface, mut exclude_interface) =
            (interfaces(fields, "include-interface"), interfaces(fields, "exclude-interface"));
        if !include_interface.is_empty() {
            if !exclude_interface.is_empty() {
                let message = "`exclude-interface` has no effect beside `include-interface`";
                fields.warn("exclude-interface", message).hint("as in mihomo; leave one of the two out");
                exclude_interface.clear();
            }
            if !include_interface.iter().any(|name| name == OWN_TRAFFIC) {
                let message = "what this host itself sends is left out: `lo` is not among the interfaces";
                fields.warn("include-interface", message).hint("add `lo`, unless only other hosts are to be carried");
            }
        }
        Self {
            include_interface,
            exclude_interface,
            include_uid: uids(fields, "include-uid", "include-uid-range"),
            exclude_uid: uids(fields, "exclude-uid", "exclude-uid-range"),
            route_address: prefixes(fields, ["route-address", "inet4-route-address", "inet6-route-address"]),
            route_exclude_address: prefixes(
                fields,
                ["route-exclude-address", "inet4-route-exclude-address", "inet6-route-exclude-address"],
            ),
        }
    }

    /// Whether what this host itself sends is taken, whoever sends it.
    #[must_use]
    pub fn takes_own_traffic(&self) -> bool {
        let names = |list: &[String]| list.iter().any(|name| name == OWN_TRAFFIC);
        (self.include_interface.is_empty() || names(&self.include_interface)) && !names(&self.exclude_interface)
    }
}

/// Whether the kernel could give an interface this name: IFNAMSIZ with its closing zero is 16, the name must fit a
/// directory in sysfs, and two words that stand for all interfaces there are taken. The kernel would take quotes and stars
/// as well, which mean something else to a firewall or a shell.
pub(super) fn names_an_interface(name: &str) -> bool {
    let fits = (1..=15).contains(&name.len()) && ![".", "..", "all", "default"].contains(&name);
    fits && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.@+~,=%".contains(&byte))
}

/// Interfaces need not be there yet: rules go by the name, and hold for whoever has it.
fn interfaces(fields: &mut Fields<'_>, key: &'static str) -> Vec<String> {
    let named: Vec<Interface> = fields.or(key, Vec::new());
    let mut names: Vec<String> = named.into_iter().map(|Interface(name)| name).collect();
    names.sort();
    names.dedup();
    names
}

fn uids(fields: &mut Fields<'_>, single: &'static str, range: &'static str) -> Vec<(u32, u32)> {
    let singles: Vec<Uid> = fields.or(single, Vec::new());
    let ranges: Vec<UidRange> = fields.or(range, Vec::new());
    singles.into_iter().map(|Uid(uid)| (uid, uid)).chain(ranges.into_iter().map(|UidRange(range)| range)).collect()
}

/// The key and its two older names, which mihomo reads as well and adds up.
fn prefixes(fields: &mut Fields<'_>, keys: [&'static str; 3]) -> Vec<IpNet> {
    keys.into_iter().flat_map(|key| fields.or(key, Vec::<IpNet>::new())).map(|net| net.trunc()).collect()
}

struct Interface(String);

impl Decode for Interface {
    fn decode(node: &Node, path: &str, report: &mut Report) -> Option<Self> {
        let name = String::decode(node, path, report)?;
        if names_an_interface(&name) {
            return Some(Self(name));
        }
        report
            .error(node, path, format!("`{}` cannot be the name of an interface", shortened(&name)))
            .hint("write it as `ip link` shows it, without `@`; one name each, and no patterns");
        None
    }
}

struct Uid(u32);

impl Decode for Uid {
    fn decode(node: &Node, path: &str, report: &mut Report) -> Option<Self> {
        if node.text().is_some_and(|text| UidRange::read(text).is_some()) {
            report
                .error(node, path, format!("`{}` is a range", node.text().map(shortened).unwrap_or_default()))
                .hint(format!("put it into `{}-range`", key_of(path)));
            return None;
        }
        let expected = format!("a user's number from 0 to {LAST_UID}, as `id -u NAME` prints it");
        scalar(node, path, report, &expected, uid).map(Self)
    }
}

struct UidRange((u32, u32));

impl UidRange {
    fn read(text: &str) -> Option<(u32, u32)> {
        let (first, last) = text.trim().split_once(':')?;
        Some((uid(first)?, uid(last)?))
    }
}

impl Decode for UidRange {
    fn decode(node: &Node, path: &str, report: &mut Report) -> Option<Self> {
        const EXPECTED: &str = "the first and the last of a range of users, as in 1000:1999";
        let range = scalar(node, path, report, EXPECTED, Self::read)?;
        if range.0 <= range.1 {
            return Some(Self(range));
        }
        report
            .error(node, path, format!("the range ends before it begins: {}:{}", range.0, range.1))
            .hint(format!("write {}:{}", range.1, range.0));
        None
    }
}

/// The key itself from the path of one of its items, as in `tun.include-uid[2]`.
fn key_of(path: &str) -> &str {
    let path = path.split('[').next().unwrap_or_default();
    path.rsplit('.').next().unwrap_or_default()
}

fn uid(text: &str) -> Option<u32> {
    u32::try_from(integer(text.trim())?).ok().filter(|uid| *uid <= LAST_UID)
}

#[cfg(test)]
mod tests {
    use crate::profile::{Selection, read};

    fn selection(tun: &str) -> (Selection, String) {
        let (profile, report) = read("p.yaml", format!("tun: {{{tun}}}\nmode: direct\n").as_bytes());
        (profile.unwrap().tun.selection, report.to_string())
    }

    #[test]
    fn single_users_and_ranges_add_up() {
        let (read, report) =
            selection("include-uid: [1000, 0x7], include-uid-range: ['2000:2999', '0:0'], exclude-uid: 2500");
        assert_eq!(report, "");
        assert_eq!(read.include_uid, [(1000, 1000), (7, 7), (2000, 2999), (0, 0)]);
        assert_eq!(read.exclude_uid, [(2500, 2500)]);
    }

    #[test]
    fn the_older_names_of_route_keys_add_up_with_the_new_ones() {
        let (read, report) = selection(
            "route-address: [203.0.113.7/24], inet4-route-address: [10.0.0.0/8], inet6-route-address: ['fd00::/8'], \
             route-exclude-address: ['2001:db8::1'], inet4-route-exclude-address: [10.9.0.0/16], \
             inet6-route-exclude-address: ['fd09::/16']",
        );
        assert_eq!(report, "");
        let words = |nets: &[ipnet::IpNet]| nets.iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(words(&read.route_address), ["203.0.113.0/24", "10.0.0.0/8", "fd00::/8"]);
        assert_eq!(words(&read.route_exclude_address), ["2001:db8::1/128", "10.9.0.0/16", "fd09::/16"]);
    }

    #[test]
    fn only_some_interfaces_leave_this_host_itself_out_unless_lo_is_among_them() {
        let (read, report) = selection("include-interface: [lan0]");
        assert_eq!(read.include_interface, ["lan0"]);
        assert!(report.contains("what this host itself sends is left out"), "{report}");
        assert_eq!(selection("include-interface: [lan0, lo]").1, "");
        assert_eq!(selection("exclude-interface: [lan0]").1, "");
    }

    #[test]
    fn beside_included_interfaces_excluded_ones_mean_nothing() {
        let (read, report) = selection("include-interface: [lo, lan0], exclude-interface: [eth7]");
        assert!(read.exclude_interface.is_empty());
        assert!(report.contains("tun.exclude-interface: `exclude-interface` has no effect beside"), "{report}");
    }
}
