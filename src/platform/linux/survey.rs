//! Looking at the host.

use std::collections::BTreeSet;
use std::path::Path;

use super::{listeners, nft, resolv_conf, sysctl};
use crate::platform::routing::{Family, RouteTable, SeenRoute};
use crate::platform::survey::{Parameters, Survey, is_default_like};
use crate::platform::{HostError, Netlink};

/// Takes stock. Reads only.
pub(in crate::platform) fn take() -> Result<Survey, HostError> {
    let mut netlink = Netlink::open()?;
    let ipv6 = Path::new("/proc/sys/net/ipv6").exists();
    let families = || Family::BOTH.into_iter().filter(|family| ipv6 || *family == Family::V4);
    let mut survey = Survey {
        links: netlink.links()?,
        addresses: netlink.addresses()?,
        rules: Vec::new(),
        aside: Vec::new(),
        routes: Vec::new(),
        tables: BTreeSet::new(),
        nft: nft::survey(),
        parameters: parameters(),
        ipv6,
        kernel_ipv6: ipv6,
        listening: listeners::listening_ports(),
        unconnected: listeners::unconnected_ports(),
        resolv_conf: resolv_conf::read(Path::new(resolv_conf::PATH)),
        resolved: resolv_conf::resolved_runs(),
    };
    // A router may have a million routes: keep the few that matter, and the numbers of the tables.
    let tables = std::cell::RefCell::new(BTreeSet::new());
    let keep = |route: &SeenRoute| {
        tables.borrow_mut().insert(route.table);
        is_default_like(&route.to) || (route.table == RouteTable::MAIN && route.on_link)
    };
    for family in families() {
        survey.rules.extend(netlink.rules(family)?);
        survey.routes.extend(netlink.routes(family, keep)?);
    }
    survey.tables = tables.into_inner();
    Ok(survey)
}

fn ephemeral_ports() -> Option<(u16, u16)> {
    let range = sysctl::read("net/ipv4/ip_local_port_range").ok()?;
    let mut ports = range.split_ascii_whitespace().map_while(|port| port.parse().ok());
    Some((ports.next()?, ports.next()?))
}

fn parameters() -> Parameters {
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
        host_only_advertisements: named("ipv6", &|name| of("ipv6", name, "accept_ra") == 1),
    }
}
