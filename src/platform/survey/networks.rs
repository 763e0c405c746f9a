//! Which interfaces lead to the internet, and which networks are our own.

use std::collections::BTreeSet;

use ipnet::IpNet;

use super::Survey;
use crate::platform::layout::{MULTICAST, PRIVATE};
use crate::platform::routing::{Family, RouteTable, SeenRoute};

impl Survey {
    /// Interfaces by which a whole internet can be reached, in whatever table the route to it stands. Another run's TUN only
    /// leads to those.
    #[must_use]
    pub fn uplinks(&self) -> BTreeSet<u32> {
        let runs = self.runs();
        let leads_out = |device: &u32| self.link_name(*device).is_none_or(|name| !runs.contains(name));
        let wide = self.routes.iter().filter(|route| is_default_like(&route.to));
        wide.filter_map(|route| route.device).filter(leads_out).collect()
    }

    /// On-link prefixes of interfaces that are no uplinks: our own networks, even where their addresses are global.
    ///
    /// An uplink's do not count: whoever runs its DHCP server could name any prefix (TunnelCrack), and no router along with
    /// it. So public prefixes are our own only beside an uplink, and where nothing public lies behind a gateway; or, in IPv6,
    /// where this host is a router, since its LAN may have routers with prefixes of their own.
    #[must_use]
    pub fn own_networks(&self) -> BTreeSet<IpNet> {
        let uplinks = self.ways_out();
        let routed = |family| family == Family::V6 && self.parameters.forward_v6;
        let leads_on =
            |family, device| !routed(family) && self.gateways.contains(&(family, device)) || uplinks.is_empty();
        self.on_link(|device, to| !uplinks.contains(&device) && (!is_public(to) || !leads_on(Family::of(to), device)))
    }

    /// The uplinks, and what was one at some time of this run: a default route may be away for a moment, or for as long as
    /// somebody outside likes.
    #[must_use]
    pub(in crate::platform) fn ways_out(&self) -> BTreeSet<u32> {
        self.uplinks().union(&self.known_uplinks).copied().collect()
    }

    /// On-link prefixes of uplinks: their neighbours there.
    #[must_use]
    pub(in crate::platform) fn uplink_networks(&self) -> BTreeSet<IpNet> {
        let uplinks = self.uplinks();
        // A point-to-point link has all of the internet on it.
        self.on_link(|device, to| uplinks.contains(&device) && !is_default_like(to))
    }

    fn on_link(&self, wanted: impl Fn(u32, &IpNet) -> bool) -> BTreeSet<IpNet> {
        let wanted = |route: &SeenRoute| route.device.is_some_and(|device| wanted(device, &route.to));
        let on_link = |route: &&SeenRoute| route.table == RouteTable::MAIN && route.on_link && wanted(route);
        self.routes.iter().filter(on_link).map(|route| route.to.trunc()).collect()
    }
}

/// Whether a route is "everything", or one of the few pieces that programs cut everything into.
pub(in crate::platform) fn is_default_like(to: &IpNet) -> bool {
    match to {
        IpNet::V4(net) => net.prefix_len() <= 1,
        // 2000::/3 is all of the global unicast space (RFC 4291 section 2.4).
        IpNet::V6(net) => net.prefix_len() <= 3,
    }
}

/// Whether hosts with public addresses may lie behind a route.
pub(in crate::platform) fn is_public(to: &IpNet) -> bool {
    let inside = |block: &str| block.parse().is_ok_and(|block: IpNet| block.contains(to));
    !PRIVATE.into_iter().chain(MULTICAST).any(inside)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::survey::tests::plain;

    #[test]
    fn a_network_is_our_own_unless_its_interface_leads_to_the_internet() {
        let own: Vec<String> = plain().own_networks().iter().map(ToString::to_string).collect();
        assert_eq!(own, ["192.168.7.0/24", "2001:db8:7::/64"]);
        let mut survey = plain();
        let table = RouteTable(200);
        survey.routes.push(SeenRoute { table, to: "8000::/1".parse().unwrap(), device: Some(3), on_link: false });
        let own: Vec<String> = survey.own_networks().iter().map(ToString::to_string).collect();
        assert!(own.is_empty(), "{own:?}");
    }

    fn own(survey: &Survey) -> Vec<String> {
        survey.own_networks().iter().map(ToString::to_string).collect()
    }

    #[test]
    fn without_an_uplink_nothing_public_is_our_own() {
        let mut survey = plain();
        survey.routes.retain(|route| !is_default_like(&route.to));
        assert_eq!(own(&survey), ["192.168.7.0/24"]);
        survey.known_uplinks = [2].into();
        assert_eq!(own(&survey), own(&plain()), "an uplink's default route is away for a moment");
    }

    #[test]
    fn an_interface_with_a_gateway_to_something_public_is_no_lan_of_public_addresses() {
        let mut survey = plain();
        survey.gateways = [(Family::V4, 3)].into();
        assert_eq!(own(&survey), own(&plain()), "its IPv6 has none");
        survey.gateways = [(Family::V6, 3)].into();
        assert_eq!(own(&survey), ["192.168.7.0/24"]);
        survey.parameters.forward_v6 = true;
        assert_eq!(own(&survey), own(&plain()), "a router's LAN has routers");
    }
}
