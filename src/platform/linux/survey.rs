//! Looking at the host.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::path::Path;

use super::{legacy, listeners, nft, resolv_conf, sysctl};
use crate::platform::routing::{Family, Link, RouteTable, SeenLink, SeenRoute};
use crate::platform::selection::EVERYBODY;
use crate::platform::survey::{NftState, Parameters, Survey, is_default_like, is_public};
use crate::platform::{HostError, Netlink};

/// What the kernel says has made a TUN.
const TUN: &str = "tun";

/// Takes stock. Reads only. `known`: the firewall as it was seen before, where nobody has changed it. Of `tables`, all
/// routes that lead anywhere are kept. Without `marks`, those in firewalls are not looked for: that takes reading all rules.
pub(in crate::platform) fn take(
    known: Option<NftState>,
    tables: &[RouteTable],
    marks: bool,
) -> Result<Survey, HostError> {
    let whole = tables;
    let mut netlink = Netlink::open()?;
    let ipv6 = Path::new("/proc/sys/net/ipv6").exists();
    let families = || Family::BOTH.into_iter().filter(|family| ipv6 || *family == Family::V4);
    let (nft, other_marks) = match known {
        Some(nft) => (nft, 0),
        None => {
            let (nft, others) = nft::survey(marks);
            (nft, if marks { others | legacy::mark_bits() } else { 0 })
        }
    };
    let seen = netlink.seen_links()?;
    let is_tun = |link: &&SeenLink| link.kind == TUN;
    let mut survey = Survey {
        tuns: seen.iter().filter(is_tun).map(|link| link.index).collect(),
        device: None,
        links: seen.into_iter().map(|link| Link { index: link.index, name: link.name }).collect(),
        addresses: netlink.addresses()?,
        rules: Vec::new(),
        aside: Vec::new(),
        routes: Vec::new(),
        tables: BTreeSet::new(),
        gateways: BTreeSet::new(),
        known_uplinks: BTreeSet::new(),
        nft,
        other_marks,
        parameters: parameters(nft::known()),
        ipv6,
        kernel_ipv6: ipv6,
        listening: listeners::listening_ports(),
        answering: listeners::answering_ports(),
        unconnected: listeners::unconnected_ports(),
        resolv_conf: resolv_conf::read(Path::new(resolv_conf::PATH)),
        resolved: resolv_conf::resolved_runs(),
        users: users(&std::fs::read_to_string("/proc/self/uid_map").unwrap_or_default()),
    };
    // A router may have a million routes: keep the few that matter, and the numbers of the tables.
    let (tables, gateways) = (RefCell::new(BTreeSet::new()), RefCell::new(BTreeSet::new()));
    let keep = |route: &SeenRoute| {
        tables.borrow_mut().insert(route.table);
        gateways.borrow_mut().extend(led_on(route));
        matters(route) || whole.contains(&route.table)
    };
    for family in families() {
        survey.rules.extend(netlink.rules(family)?);
        survey.routes.extend(netlink.routes(family, keep)?);
    }
    survey.tables = tables.into_inner();
    survey.gateways = gateways.into_inner();
    Ok(survey)
}

/// The users of the first column: see user_namespaces(7). Without a map there is one namespace, with all of them.
fn users(uid_map: &str) -> Vec<(u32, u32)> {
    let range = |line: &str| {
        let mut numbers = line.split_whitespace().map(str::parse::<u32>);
        let (first, count) = (numbers.next()?.ok()?, numbers.nth(1)?.ok()?);
        Some((first, first.checked_add(count.checked_sub(1)?)?))
    };
    let found: Vec<_> = uid_map.lines().filter_map(range).collect();
    if found.is_empty() { vec![EVERYBODY] } else { found }
}

/// The interface by which a route leads to something public behind a gateway.
fn led_on(route: &SeenRoute) -> Option<(Family, u32)> {
    let leads_on = route.table == RouteTable::MAIN && !route.on_link && is_public(&route.to);
    route.device.filter(|_| leads_on).map(|device| (Family::of(&route.to), device))
}

/// Whether the layout depends on a route that somebody else has put there.
pub(super) fn matters(route: &SeenRoute) -> bool {
    is_default_like(&route.to) || (route.table == RouteTable::MAIN && route.on_link)
}

fn ephemeral_ports() -> Option<(u16, u16)> {
    let range = sysctl::read("net/ipv4/ip_local_port_range").ok()?;
    let mut ports = range.split_ascii_whitespace().map_while(|port| port.parse().ok());
    Some((ports.next()?, ports.next()?))
}

fn parameters(knows: nft::Knows) -> Parameters {
    let number = |path: String| sysctl::read(&path).ok().and_then(|value| value.parse::<u32>().ok()).unwrap_or(0);
    let of = |family: &str, name: &str, key: &str| number(format!("net/{family}/conf/{name}/{key}"));
    let named = |family: &'static str, wanted: &dyn Fn(&str) -> bool| {
        sysctl::interfaces(family).into_iter().filter(|name| wanted(name)).collect::<BTreeSet<String>>()
    };
    let for_all = of("ipv4", "all", "rp_filter");
    Parameters {
        forward_v4: number("net/ipv4/ip_forward".to_owned()) != 0,
        forward_v6: number("net/ipv6/conf/all/forwarding".to_owned()) != 0,
        // The larger of "all" and the interface's own counts (ip-sysctl.rst).
        strict_reverse_path: named("ipv4", &|name| for_all.max(of("ipv4", name, "rp_filter")) == 1),
        ephemeral_ports: ephemeral_ports().unwrap_or_default(),
        finds_sockets: knows.sockets,
        marks_connections: knows.connection_marks,
        finds_ways_back: knows.ways_back,
        host_only_advertisements: named("ipv6", &|name| of("ipv6", name, "accept_ra") == 1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_map_of_users_is_read_as_the_ranges_inside() {
        assert_eq!(users("         0          0 4294967295\n"), [EVERYBODY]);
        assert_eq!(users("0 1000 1\n1 100000 65536\n"), [(0, 0), (1, 65536)]);
        assert_eq!(users(""), [EVERYBODY]);
        assert_eq!(users("0 0 0\nx y z\n"), [EVERYBODY]);
    }
}
