//! Reading the host once more after changes were undone: what is said to be as it was has to be seen to be.

use std::collections::BTreeSet;

use ipnet::IpNet;

use super::Netlink;
use super::applied::HostError;
use super::imp::netlink::exact_route::ExactRoute;
use super::imp::netlink::nftables::SeenTable;
use super::imp::{nft, resolv_conf, sysctl};
use super::routing::{Family, RouteTable, Rule};
use super::undo::Undo;

/// What is there of the kinds that were undone.
#[derive(Debug, Default)]
struct Found {
    rules: Vec<Rule>,
    /// In the tables of the routes that were undone.
    routes: Vec<ExactRoute>,
    addresses: Vec<(u32, IpNet)>,
    /// The firewall's tables.
    tables: Vec<SeenTable>,
}

/// Those of `undos`, each of which was carried out, whose change is in place all the same. Changes nothing.
///
/// # Errors
/// The host cannot be read, so that nobody knows.
pub(super) fn still_in_place<'a>(netlink: &mut Netlink, undos: &[&'a Undo]) -> Result<Vec<&'a Undo>, HostError> {
    let found = Found::read(netlink, undos)?;
    Ok(undos.iter().copied().filter(|undo| found.has(undo, netlink)).collect())
}

/// The tables of nftables.
///
/// # Errors
/// The kernel does not tell.
pub(super) fn firewall() -> Result<Vec<SeenTable>, HostError> {
    nft::tables().map_err(|source| HostError::io("read the firewall again", source))
}

impl Found {
    fn read(netlink: &mut Netlink, undos: &[&Undo]) -> Result<Self, HostError> {
        let mut found = Self::default();
        let families = |of: fn(&Undo) -> Option<Family>| {
            Family::BOTH.into_iter().filter(move |family| undos.iter().any(|undo| of(undo) == Some(*family)))
        };
        for family in families(|undo| if let Undo::Rule(rule) = undo { Some(rule.family) } else { None }) {
            found.rules.extend(netlink.rules(family)?);
        }
        let of_route = |undo: &&Undo| if let Undo::Route(route) = undo { Some(route.table) } else { None };
        let tables: BTreeSet<RouteTable> = undos.iter().filter_map(of_route).collect();
        for family in families(|undo| if let Undo::Route(route) = undo { Some(Family::of(&route.to)) } else { None }) {
            found.routes.extend(netlink.exact_routes(family, |table| tables.contains(&table))?);
        }
        if undos.iter().any(|undo| matches!(undo, Undo::Address { .. })) {
            found.addresses = netlink.addresses()?;
        }
        if undos.iter().any(|undo| matches!(undo, Undo::Table(_))) {
            found.tables = firewall()?;
        }
        Ok(found)
    }

    fn has(&self, undo: &Undo, netlink: &Netlink) -> bool {
        match undo {
            Undo::Rule(rule) => self.rules.contains(rule),
            Undo::Route(route) => self.routes.iter().any(|seen| seen.is(route)),
            Undo::Address { device, address } => {
                netlink.index(device).is_ok_and(|index| self.addresses.contains(&(index, *address)))
            }
            // Whoever has written something else since meant it.
            Undo::Sysctl { path, ours, old } => {
                sysctl::read(path).is_ok_and(|now| now != *old && ours.as_ref().is_none_or(|ours| now == *ours))
            }
            // Another run's may have come to have the name.
            Undo::Table(table) => {
                self.tables.iter().any(|it| it.name == table.name && it.comment.as_ref() == Some(&table.comment))
            }
            Undo::ResolvConf { path, ours, old } => {
                resolv_conf::read(path).is_some_and(|now| now == *ours) && !old.reads_as(ours)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::routing::{Route, RouteKind, RuleAction};

    #[test]
    fn what_is_still_there_is_told_from_what_is_gone() {
        let rule = |priority| Rule::new(Family::V4, priority, RuleAction::Nop);
        let to: IpNet = "192.0.2.0/24".parse().unwrap();
        let route = |kind, metric| Route { table: RouteTable(2022), to, kind, metric };
        let found = Found {
            rules: vec![rule(9000)],
            routes: vec![ExactRoute::of(&route(RouteKind::Throw, 1))],
            addresses: Vec::new(),
            tables: Vec::new(),
        };
        let netlink = Netlink::open().unwrap();
        let has = |undo: Undo| found.has(&undo, &netlink);
        assert!(has(Undo::Rule(rule(9000))) && !has(Undo::Rule(rule(9001))));
        assert!(has(Undo::Route(route(RouteKind::Throw, 1))));
        for other in [route(RouteKind::Device("tun7".to_owned()), 1), route(RouteKind::Throw, 0)] {
            assert!(!has(Undo::Route(other.clone())), "{other}");
        }
        assert!(!has(Undo::Address { device: "no-such-device".to_owned(), address: to }));
        let parameter = |ours: Option<&str>, old: &str| Undo::Sysctl {
            path: "kernel/pid_max".to_owned(),
            ours: ours.map(str::to_owned),
            old: old.to_owned(),
        };
        let now = sysctl::read("kernel/pid_max").unwrap();
        assert!(has(parameter(Some(&now), "1")) && has(parameter(None, "1")));
        assert!(!has(parameter(Some(&now), &now)), "it was the same before");
        assert!(!has(parameter(Some("1"), "2")), "somebody has written something else");
    }
}
