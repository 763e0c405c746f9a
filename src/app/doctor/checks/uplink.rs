//! The way to the internet: default routes, whether their interfaces can carry anything, and whether their gateways answer.

use super::super::finding::Finding;
use super::super::record::{Probed, Record};
use crate::platform::{Family, Gate, Hook, SeenLink};

pub(super) fn check(record: &Record) -> Vec<Finding> {
    let mut found: Vec<Finding> = loopback(record).into_iter().collect();
    let families: Vec<Family> = Family::BOTH.into_iter().filter(|family| record.has_default(*family)).collect();
    if families.is_empty() {
        found.push(Finding::problem(
            "there is no default route, neither for IPv4 nor for IPv6: nothing beyond the own network can be reached",
            "connect to a network, or look why its DHCP client gave no route (`ip route`, `ip -6 route`)",
        ));
        return found;
    }
    if families == [Family::V6] {
        found.push(Finding::warning(
            "there is no default route for IPv4, only for IPv6: hosts that have no IPv6 address cannot be reached",
            "look why the DHCP client gave no route (`ip route`), unless this network is meant to have IPv6 alone",
        ));
    }
    found.extend(dead(record, &families));
    found.extend(stopped(record));
    for family in families.iter().copied() {
        let nowhere = without_address(record, family).or_else(|| refused(record, family));
        found.extend(nowhere);
        found.extend(gateways(record, family));
    }
    found.extend(rivals(record));
    if found.is_empty() {
        let words: Vec<&str> = families.iter().copied().map(name).collect();
        let names: Vec<&str> = record.uplinks().iter().map(|link| link.name.as_str()).collect();
        let answer = record.probes.gateways.iter().any(|probed| probed.answers == Some(true));
        let answer = if answer { ", and its gateway answers" } else { "" };
        found.push(Finding::fine(format!("the way out is {}, for {}{answer}", names.join(", "), words.join(" and "))));
    }
    found
}

fn loopback(record: &Record) -> Option<Finding> {
    let down = record.links.iter().any(|link| link.name == "lo" && !link.up);
    down.then(|| {
        Finding::problem(
            "the loopback interface is down: programs of this host cannot talk to each other, nor to a resolver at 127.0.0.53",
            "switch it on: `sudo ip link set lo up`",
        )
    })
}

/// Families whose interfaces are all down or unplugged; one finding for those that share them.
fn dead(record: &Record, families: &[Family]) -> Vec<Finding> {
    let mut found: Vec<(Vec<&str>, Vec<&str>)> = Vec::new();
    for family in families {
        let ways = record.ways(*family);
        if ways.iter().any(|link| link.up && link.carrier) {
            continue;
        }
        let names: Vec<&str> = ways.iter().map(|link| link.name.as_str()).collect();
        match found.iter_mut().find(|(known, _)| *known == names) {
            Some((_, families)) => families.push(name(*family)),
            None => found.push((names, vec![name(*family)])),
        }
    }
    let tell = |(names, families): (Vec<&str>, Vec<&str>)| {
        Finding::problem(
            format!(
                "the interface of the default route for {} has no carrier or is down: {}",
                families.join(" and "),
                names.join(", ")
            ),
            format!("plug it in, join its network, or switch it on: `sudo ip link set {} up`", names[0]),
        )
    };
    found.into_iter().map(tell).collect()
}

/// Uplinks by which the host's own firewall lets nothing in, or nothing out.
fn stopped(record: &Record) -> Vec<Finding> {
    let tell = |(gate, link): (&Gate, &SeenLink)| {
        let (chain, name) = (&gate.chain, &link.name);
        let what = match gate.hook {
            Hook::Input => format!(
                "the host's own firewall drops what comes by {name} (chain {chain}): whatever this host asks, it hears no answer"
            ),
            Hook::Output => format!("the host's own firewall drops what it sends by {name} (chain {chain})"),
        };
        let unheard = |it: &Probed| it.gateway.device == link.index && may_stop(gate, it) && it.answers == Some(false);
        let neighbours = match record.probes.gateways.iter().any(unheard) {
            true => format!(
                ", and that by which neighbours find each other: `sudo nft insert rule {chain} meta l4proto ipv6-icmp accept`"
            ),
            false => String::new(),
        };
        Finding::problem(what, format!("let it pass: `sudo {}`{neighbours}", gate.remedy(name)))
    };
    record.gates_of_uplinks().into_iter().map(tell).collect()
}

/// Whether what a gateway is asked by, or answers with, comes to a chain: neighbour discovery is ICMPv6, and ARP is no IP.
fn may_stop(gate: &Gate, probed: &Probed) -> bool {
    probed.gateway.family == Family::V6 && gate.concerns(Family::V6)
}

fn without_address(record: &Record, family: Family) -> Option<Finding> {
    let is_global = |ip: std::net::IpAddr| !matches!(ip, std::net::IpAddr::V6(ip) if ip.is_unicast_link_local());
    let has_address = |link: &&SeenLink| {
        let of_link = record.survey.addresses.iter().filter(|(index, _)| *index == link.index);
        of_link.into_iter().any(|(_, net)| Family::of(net) == family && is_global(net.addr()))
    };
    // The kernel takes an address of any interface, where that of the route has none.
    let anywhere = record.links.iter().filter(|link| link.name != "lo").any(|link| has_address(&link));
    if record.ways(family).iter().any(has_address) || anywhere && is_point_to_point(record, family) {
        return None;
    }
    let name = name(family);
    Some(Finding::problem(
        format!("there is a default route for {name}, and no interface of it has an address of that family"),
        format!("look at the DHCP client or the network's settings; without an address no {name} leaves"),
    ))
}

/// A default route that is there and does not count: something before it refuses.
fn refused(record: &Record, family: Family) -> Option<Finding> {
    let journal = record.journal.as_ref().ok().and_then(Option::as_ref);
    // A kill switch that stands refuses, and is told of as such.
    let closed = journal.is_some_and(|journal| journal.kill_switch.is_some());
    let live = record.ways(family).iter().any(|link| link.up && link.carrier);
    if closed || !live || !record.probes.routed.contains(&(family, false)) {
        return None;
    }
    let option = if family == Family::V4 { "-4" } else { "-6" };
    Some(Finding::problem(
        format!(
            "there is a default route for {}, and the kernel does not take it: a rule, or a route that refuses, comes before it",
            name(family)
        ),
        format!(
            "look for `unreachable`, `blackhole` and `prohibit` in `ip {option} rule` and `ip {option} route show table all`, and \
             whether the rule `from all lookup main` is still there"
        ),
    ))
}

/// A tunnel may go without an address of its own.
fn is_point_to_point(record: &Record, family: Family) -> bool {
    record.ways(family).iter().all(|link| !link.kind.is_empty() && link.kind != "veth")
}

/// Gateways that do not answer: that of the route which is taken, and others.
fn gateways(record: &Record, family: Family) -> Vec<Finding> {
    let of_family = || record.probes.gateways.iter().filter(|it| it.gateway.family == family);
    let Some(best) = of_family().map(|it| it.gateway.metric).min() else { return Vec::new() };
    let taken: Vec<&Probed> = of_family().filter(|it| it.gateway.metric == best).collect();
    // IPv6 makes one route of those with the same metric; IPv4 takes the first.
    let shared = |it: &Probed| it.gateway.one_of_several || family == Family::V6;
    // A modem's route, or a tunnel's, has no gateway that could be asked, and is taken all the same.
    let of_family_direct = record.probes.direct.iter().filter(|way| way.family == family);
    let is_behind = of_family_direct.map(|way| way.metric).min().is_some_and(|direct| direct <= best);
    let is_taken = |it: &Probed| !is_behind && it.gateway.metric == best && (shared(it) || taken.first() == Some(&it));
    let all_dead = taken.iter().all(|it| it.answers == Some(false));
    // Of those that a chain may keep from being heard nobody knows.
    let gates = record.gates_of_uplinks();
    let heard = |it: &&Probed| !gates.iter().any(|(gate, link)| link.index == it.gateway.device && may_stop(gate, it));
    let dead = of_family().filter(|it| it.answers == Some(false)).filter(heard);
    let family = name(family);
    let tell = |it: &Probed| {
        let (address, device) = (it.gateway.address, device(record, it));
        let asks = if it.gateway.address.is_ipv4() { "ARP" } else { "neighbour discovery" };
        let what = format!("the gateway {address} ({device}) does not answer: nobody there answers {asks}");
        let advice = format!(
            "look whether the router runs and whether {address} is its address (`ip neigh show dev {device}`); or renew the \
             lease of {device}, which brings the right one"
        );
        match (is_taken(it), all_dead || !shared(it)) {
            (true, true) => {
                Finding::problem(format!("{what}, so that {family} gets no further than the own network"), advice)
            }
            (true, false) => Finding::problem(
                format!("{what}, so that the part of {family} that the kernel sends there gets no further"),
                advice,
            ),
            (false, _) => Finding::warning(format!("{what}; {family} has another way out besides"), advice),
        }
    };
    dead.map(tell).collect()
}

/// IPv4 takes one of several routes with the same metric, whichever was there first. (IPv6 makes one route of them.)
fn rivals(record: &Record) -> Option<Finding> {
    let alone = |it: &&Probed| it.gateway.family == Family::V4 && !it.gateway.one_of_several;
    let mut v4 = record.probes.gateways.iter().filter(alone);
    let first = v4.next()?;
    let rival = v4.find(|it| it.gateway.metric == first.gateway.metric && it.gateway.device != first.gateway.device)?;
    let (one, other, via) = (device(record, first), device(record, rival), rival.gateway.address);
    Some(Finding::warning(
        format!(
            "there are two default routes for IPv4 with the same metric ({}), by {one} and {other}: the kernel takes that which was \
             there first",
            first.gateway.metric
        ),
        format!(
            "give the one that is to be second a larger metric, as in `sudo ip route del default via {via} dev {other}; sudo ip \
             route add default via {via} dev {other} metric {}`",
            first.gateway.metric.saturating_add(100)
        ),
    ))
}

fn device<'a>(record: &'a Record, probed: &Probed) -> &'a str {
    record.survey.link_name(probed.gateway.device).unwrap_or("?")
}

fn name(family: Family) -> &'static str {
    match family {
        Family::V4 => "IPv4",
        Family::V6 => "IPv6",
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::fixture::{deafen, only_problem, quiet, running, warnings};
    use super::*;
    use crate::platform::Gateway;

    fn probed(address: &str, device: u32, metric: u32, answers: Option<bool>) -> Probed {
        let address: std::net::IpAddr = address.parse().unwrap();
        let family = if address.is_ipv4() { Family::V4 } else { Family::V6 };
        Probed { gateway: Gateway { family, address, device, metric, one_of_several: false }, answers }
    }

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
        assert!(only_problem(&check(&record)).unwrap().what.contains("for IPv4 and IPv6 has no carrier"));
        let mut record = quiet();
        record.survey.addresses.retain(|(index, net)| *index != 2 || net.addr().is_ipv6());
        assert!(only_problem(&check(&record)).unwrap().what.contains("default route for IPv4"));
        let mut record = quiet();
        record.survey.addresses.retain(|(index, net)| *index != 2 || net.addr().is_ipv4());
        record.survey.addresses.push((2, "fe80::10/64".parse().unwrap()));
        assert!(only_problem(&check(&record)).unwrap().what.contains("default route for IPv6"), "link-local is none");
    }

    #[test]
    fn a_family_whose_own_interface_is_dead_is_named_though_the_other_is_well() {
        let mut record = quiet();
        record.links.push(SeenLink { index: 3, name: "wwan0".to_owned(), ..record.links[1].clone() });
        let everything = Family::V4.everything();
        record.survey.routes.iter_mut().filter(|it| it.to == everything).for_each(|it| it.device = Some(3));
        record.survey.addresses.push((3, "10.64.0.2/30".parse().unwrap()));
        assert!(only_problem(&check(&record)).is_none(), "{:?}", check(&record));
        record.links[2].carrier = false;
        assert!(only_problem(&check(&record)).unwrap().what.contains("for IPv4 has no carrier or is down: wwan0"));
    }

    #[test]
    fn a_gateway_that_does_not_answer_is_a_problem_unless_there_is_another_or_nobody_could_tell() {
        let mut record = quiet();
        record.probes.gateways = vec![probed("192.168.1.1", 2, 0, Some(false)), probed("fe80::1", 2, 1024, Some(true))];
        let found = check(&record);
        let what = &only_problem(&found).unwrap().what;
        assert!(what.contains("192.168.1.1 (eth0)") && what.contains("ARP") && what.contains("IPv4 gets"), "{what}");
        record.probes.gateways.push(probed("192.168.1.2", 2, 100, Some(true)));
        assert!(only_problem(&check(&record)).is_some(), "the other is not taken");
        record.probes.gateways[0].gateway.metric = 200;
        assert!(only_problem(&check(&record)).is_none() && warnings(&check(&record)).len() == 1, "the dead one is not");
        for probed in &mut record.probes.gateways {
            (probed.gateway.metric, probed.gateway.one_of_several) = (0, true);
        }
        assert!(only_problem(&check(&record)).unwrap().what.contains("the part of IPv4"));
        record.probes.gateways = vec![probed("192.168.1.1", 2, 0, None)];
        assert!(only_problem(&check(&record)).is_none());
    }

    #[test]
    fn a_gateway_that_the_hosts_own_firewall_keeps_from_being_heard_is_not_blamed() {
        for mut record in [quiet(), running()] {
            record.probes.gateways =
                vec![probed("192.168.1.1", 2, 0, Some(true)), probed("fe80::1", 2, 1024, Some(false))];
            assert!(only_problem(&check(&record)).unwrap().what.contains("fe80::1"));
            deafen(&mut record);
            let found = check(&record);
            let problem = only_problem(&found).unwrap();
            assert!(problem.what.contains("drops what comes by eth0 (chain inet adm input)"), "{problem:?}");
            let wanted = "nft insert rule inet adm input iifname \"eth0\" ct state established,related accept";
            assert!(problem.advice.contains(wanted) && problem.advice.contains("ipv6-icmp"), "{problem:?}");
            // ARP is nothing that such a chain sees.
            record.probes.gateways[0].answers = Some(false);
            let found = check(&record);
            assert!(found.iter().any(|it| it.what.contains("192.168.1.1 (eth0) does not answer")), "{found:?}");
        }
    }

    #[test]
    fn a_dead_gateway_behind_a_modem_whose_route_has_none_is_no_problem() {
        let mut record = quiet();
        record.probes.gateways = vec![probed("192.168.1.1", 2, 100, Some(false))];
        let direct = |family, metric| crate::platform::DirectWay { family, device: 3, metric };
        for (way, problem) in [
            (direct(Family::V4, 50), false),
            (direct(Family::V4, 100), false),
            (direct(Family::V4, 200), true),
            (direct(Family::V6, 50), true),
        ] {
            record.probes.direct = vec![way];
            let found = check(&record);
            assert_eq!(only_problem(&found).is_some(), problem, "{way:?}: {found:?}");
            assert_eq!(warnings(&found).is_empty(), problem, "{way:?}: {found:?}");
        }
    }

    #[test]
    fn a_default_route_that_something_refuses_before_is_named() {
        let mut record = quiet();
        record.probes.routed = vec![(Family::V4, true), (Family::V6, true)];
        assert!(only_problem(&check(&record)).is_none());
        record.probes.routed[0].1 = false;
        let found = check(&record);
        assert!(
            only_problem(&found).unwrap().what.contains("default route for IPv4, and the kernel does not"),
            "{found:?}"
        );
        let kill_switch = Some("tunproxy".to_owned());
        record.journal = Ok(Some(super::super::super::record::Journal { kill_switch, ..Default::default() }));
        assert!(only_problem(&check(&record)).is_none(), "that is told of elsewhere");
    }

    #[test]
    fn two_default_routes_of_one_metric_and_ipv6_alone_are_warnings() {
        let mut record = quiet();
        record.survey.links.push(crate::platform::Link { index: 3, name: "eth1".to_owned() });
        record.probes.gateways = vec![probed("192.168.1.1", 2, 0, None), probed("192.168.2.1", 3, 0, None)];
        assert!(warnings(&check(&record))[0].contains("by eth0 and eth1"), "{:?}", check(&record));
        record.probes.gateways[1].gateway.metric = 100;
        assert!(warnings(&check(&record)).is_empty());
        record.survey.routes.retain(|route| route.to != Family::V4.everything());
        assert!(warnings(&check(&record))[0].contains("no default route for IPv4"));
    }

    #[test]
    fn a_loopback_that_is_down_is_named() {
        let mut record = quiet();
        record.links[0].up = false;
        assert!(only_problem(&check(&record)).unwrap().advice.contains("ip link set lo up"));
    }
}
