//! Whether a rule takes what is ours to take: as far as it matters, all of it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::platform::routing::{Family, MarkMatch, Ports, Rule};

const TCP: u8 = 6;
const UDP: u8 = 17;
/// Users of the system, and people.
const USERS: [[u32; 4]; 2] = [[0, 1, 33, 101], [1000, 1001, 2000, 30_000]];
/// Somewhere in each half of the internet.
const PLACES_V4: [[[u8; 4]; 4]; 2] = [
    [[1, 1, 1, 1], [8, 8, 8, 8], [64, 4, 4, 4], [104, 16, 1, 1]],
    [[140, 82, 1, 1], [151, 101, 1, 1], [185, 1, 1, 1], [216, 2, 2, 2]],
];
const PLACES_V6: [u16; 4] = [0x2001, 0x2400, 0x2606, 0x2a00];
/// Whom a gateway forwards for.
const CLIENTS_V4: [[u8; 4]; 3] = [[10, 1, 2, 3], [172, 20, 2, 3], [192, 168, 2, 3]];
const CLIENTS_V6: [u16; 2] = [0xfd01, 0x2003];
/// Ports of servers that are used alike.
const PORTS: [u16; 4] = [80, 443, 5222, 40_000];
/// One of those that clients get.
const CLIENT_PORT: u16 = 45_000;

/// A packet as a rule sees it, of a socket that is bound to nothing.
#[derive(Debug, Clone, Copy)]
struct Sample {
    /// None: of this host.
    client: Option<IpAddr>,
    to: IpAddr,
    mark: u32,
    protocol: u8,
    port: u16,
    user: u32,
}

/// Whether a rule selects, with and without our mark, all of TCP or of UDP, to one half of the internet at least, of all
/// people or of the system, from this host or from the LAN: what wg-quick's rule does ("not fwmark 0xca6c"), or another
/// proxy's, in however many pieces. Who passes our mark by leaves us to ourselves.
#[must_use]
pub fn takes_everything(rule: &Rule, own: MarkMatch) -> bool {
    let places = places(rule.family);
    let clients = clients(rule.family);
    let marks = [0, own.mark];
    let ways: [Vec<Option<IpAddr>>; 2] = [vec![None], clients.into_iter().map(Some).collect()];
    let all = |way: &[Option<IpAddr>], places: &[IpAddr], users: &[u32], protocol| {
        let of = |client, to, mark, port, user| Sample { client, to, mark, protocol, port, user };
        way.iter().all(|client| {
            places.iter().all(|to| {
                users.iter().all(|user| {
                    let one = |mark, port| selects(rule, &of(*client, *to, mark, port, *user));
                    marks.iter().all(|mark| PORTS.iter().all(|port| one(*mark, *port)))
                })
            })
        })
    };
    ways.iter().any(|way| {
        places.iter().any(|places| {
            let of = |protocol| USERS.iter().any(|users| all(way, places, users, protocol));
            of(TCP) || of(UDP)
        })
    })
}

fn places(family: Family) -> Vec<Vec<IpAddr>> {
    match family {
        Family::V4 => PLACES_V4.iter().map(|half| half.iter().map(|ip| IpAddr::from(*ip)).collect()).collect(),
        // All of it has the same first bits (2000::/3).
        Family::V6 => vec![PLACES_V6.iter().map(|first| v6(*first)).collect()],
    }
}

fn clients(family: Family) -> Vec<IpAddr> {
    match family {
        Family::V4 => CLIENTS_V4.iter().map(|ip| IpAddr::from(*ip)).collect(),
        Family::V6 => CLIENTS_V6.iter().map(|first| v6(*first)).collect(),
    }
}

fn v6(first: u16) -> IpAddr {
    Ipv6Addr::new(first, 1, 2, 3, 4, 5, 6, 7).into()
}

/// Whether the kernel takes `rule` for `sample`, as far as the rule is known.
fn selects(rule: &Rule, sample: &Sample) -> bool {
    let source = |net: &ipnet::IpNet| match sample.client {
        Some(client) => net.contains(&client),
        // IPv6 look-ups without a source match no prefix of one.
        None if rule.family == Family::V6 => net.prefix_len() == 0,
        None => net.contains(&IpAddr::from(Ipv4Addr::UNSPECIFIED)),
    };
    let within = |ports: Ports, port| (ports.first..=ports.last).contains(&port);
    let arrives = |name: &String| name == "lo" && sample.client.is_none();
    // What is forwarded has no owner; the kernel takes it for root's.
    let user = if sample.client.is_some() { 0 } else { sample.user };
    let known = rule.from.as_ref().is_none_or(source)
        && rule.to.is_none_or(|net| net.contains(&sample.to))
        && rule.iif.as_ref().is_none_or(arrives)
        && rule.oif.is_none()
        && rule.mark.is_none_or(|MarkMatch { mark, mask }| sample.mark & mask == mark & mask)
        && rule.protocol.is_none_or(|protocol| protocol == sample.protocol)
        && rule.source_ports.is_none_or(|ports| within(ports, CLIENT_PORT))
        && rule.destination_ports.is_none_or(|ports| within(ports, sample.port))
        && rule.uids.is_none_or(|(first, last)| (first..=last).contains(&user));
    // What else it asks for can only make it select less, and its opposite more.
    if rule.inverted { !known } else { known && !rule.foreign_selectors }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::routing::{RouteTable, RuleAction};

    const OWN: MarkMatch = MarkMatch { mark: 0x100_0000, mask: 0x100_0000 };

    fn rule() -> Rule {
        Rule { origin: 3, ..Rule::new(Family::V4, 1000, RuleAction::Lookup(RouteTable(100))) }
    }

    fn net(text: &str) -> Option<ipnet::IpNet> {
        Some(text.parse().unwrap())
    }

    fn inverted(rule: Rule) -> Rule {
        Rule { inverted: true, foreign_selectors: true, ..rule }
    }

    #[test]
    fn whoever_takes_all_of_something_that_everybody_uses_takes_everything() {
        let mark = |mark, mask| Some(MarkMatch { mark, mask });
        let lo = || Some("lo".to_owned());
        let dns = Some(Ports { first: 53, last: 53 });
        for taking in [
            rule(),
            Rule { iif: lo(), ..rule() },
            Rule { from: net("0.0.0.0/32"), iif: lo(), ..rule() },
            Rule { to: net("0.0.0.0/1"), ..rule() },
            Rule { to: net("128.0.0.0/1"), ..rule() },
            Rule { protocol: Some(TCP), ..rule() },
            Rule { protocol: Some(UDP), ..rule() },
            Rule { uids: Some((0, 65534)), ..rule() },
            Rule { uids: Some((1000, 60000)), ..rule() },
            Rule { mark: mark(0, 0x3f00), ..rule() },
            inverted(Rule { from: net("1.2.3.4/32"), ..rule() }),
            inverted(Rule { mark: mark(0xca6c, u32::MAX), ..rule() }),
            inverted(Rule { destination_ports: dns, ..rule() }),
            inverted(Rule { iif: lo(), ..rule() }),
            inverted(Rule { uids: Some((999, 999)), ..rule() }),
            Rule { family: Family::V6, ..rule() },
            Rule { family: Family::V6, to: net("2000::/3"), ..rule() },
        ] {
            assert!(takes_everything(&taking, OWN), "{taking}");
        }
    }

    #[test]
    fn whoever_takes_a_part_does_not() {
        let mark = |mark, mask| Some(MarkMatch { mark, mask });
        for part in [
            Rule { to: net("192.168.1.0/24"), ..rule() },
            Rule { to: net("0.0.0.0/4"), ..rule() },
            Rule { from: net("192.168.1.10/32"), ..rule() },
            Rule { from: net("192.168.0.0/16"), ..rule() },
            Rule { family: Family::V6, from: net("2000::/3"), iif: Some("lo".to_owned()), ..rule() },
            Rule { iif: Some("lan0".to_owned()), ..rule() },
            Rule { oif: Some("eth1".to_owned()), ..rule() },
            Rule { uids: Some((1000, 1000)), ..rule() },
            Rule { protocol: Some(1), ..rule() },
            Rule { destination_ports: Some(Ports { first: 443, last: 443 }), ..rule() },
            Rule { source_ports: Some(Ports { first: 51820, last: 51820 }), ..rule() },
            Rule { mark: mark(0x10, 0xff), ..rule() },
            Rule { mark: Some(OWN), ..rule() },
            Rule { foreign_selectors: true, ..rule() },
            inverted(Rule { mark: Some(OWN), ..rule() }),
            inverted(rule()),
        ] {
            assert!(!takes_everything(&part, OWN), "{part}");
        }
    }
}
