//! The way to the internet: default routes, and whether their interfaces can carry anything.

use super::super::finding::Finding;
use super::super::record::Record;
use crate::platform::{Family, SeenLink};

pub(super) fn check(record: &Record) -> Vec<Finding> {
    let uplinks = record.uplinks();
    let usable = |link: &&&SeenLink| link.up && link.carrier;
    let mut found = Vec::new();
    if uplinks.is_empty() {
        return vec![Finding::problem(
            "there is no default route, neither for IPv4 nor for IPv6: nothing beyond the own network can be reached",
            "connect to a network, or look why its DHCP client gave no route (`ip route`, `ip -6 route`)",
        )];
    }
    let dead: Vec<&str> = uplinks.iter().filter(|link| !usable(link)).map(|link| link.name.as_str()).collect();
    if dead.len() == uplinks.len() {
        found.push(Finding::problem(
            format!("the interface of the default route has no carrier or is down: {}", dead.join(", ")),
            format!("plug it in, join its network, or switch it on: `sudo ip link set {} up`", dead[0]),
        ));
    }
    for family in Family::BOTH.into_iter().filter(|family| record.has_default(*family)) {
        let has_address = |link: &&SeenLink| {
            let of_family = |(index, net): &&(u32, ipnet::IpNet)| *index == link.index && Family::of(net) == family;
            record.survey.addresses.iter().any(|it| of_family(&it))
        };
        if !uplinks.iter().any(has_address) {
            let name = name(family);
            found.push(Finding::problem(
                format!("there is a default route for {name}, and no interface of it has an address of that family"),
                format!("look at the DHCP client or the network's settings; without an address no {name} leaves"),
            ));
        }
    }
    if found.is_empty() {
        let families: Vec<&str> =
            Family::BOTH.into_iter().filter(|family| record.has_default(*family)).map(name).collect();
        let names: Vec<&str> = uplinks.iter().map(|link| link.name.as_str()).collect();
        found.push(Finding::fine(format!("the way out is {}, for {}", names.join(", "), families.join(" and "))));
    }
    found
}

fn name(family: Family) -> &'static str {
    match family {
        Family::V4 => "IPv4",
        Family::V6 => "IPv6",
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::fixture::{only_problem, quiet, running};
    use super::*;

    #[test]
    fn a_host_with_an_uplink_is_fine_whether_we_run_or_not() {
        for record in [quiet(), running()] {
            let found = check(&record);
            assert!(found[0].what.contains("eth0, for IPv4 and IPv6"), "{found:?}");
        }
    }

    #[test]
    fn our_own_routes_are_no_way_out() {
        for mut record in [quiet(), running()] {
            record.survey.routes.retain(|route| route.device != Some(2));
            assert!(only_problem(&check(&record)).unwrap().what.contains("no default route"));
        }
    }

    #[test]
    fn an_uplink_without_carrier_or_address_is_named() {
        let mut record = quiet();
        record.links.iter_mut().for_each(|link| link.carrier = false);
        assert!(only_problem(&check(&record)).unwrap().what.contains("no carrier"));
        let mut record = quiet();
        record.survey.addresses.retain(|(index, net)| *index != 2 || net.addr().is_ipv6());
        assert!(only_problem(&check(&record)).unwrap().what.contains("default route for IPv4"));
    }
}
