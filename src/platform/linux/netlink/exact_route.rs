//! Routes with all by which the kernel tells one from another.

use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use netlink_packet_core::NlasIterator;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::route::{RouteHeader, RouteMessage, RouteType};

use super::route::{HEADER, address_family, attribute, number};
use super::{Netlink, NetlinkError};
use crate::platform::routing::{Family, Route, RouteKind, RouteTable};

/// A route as it stands, to be compared with one of ours.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::platform) struct ExactRoute {
    table: RouteTable,
    to: IpNet,
    kind: u8,
    metric: u32,
    /// It names no gateway and no next hops: as every one of ours.
    plain: bool,
}

impl ExactRoute {
    /// Whether it is `route`, by whatever device: a name may have become another's.
    pub(in crate::platform) fn is(&self, route: &Route) -> bool {
        *self == Self::of(route)
    }

    /// How `route` stands in its table.
    pub(in crate::platform) fn of(route: &Route) -> Self {
        let kind = match route.kind {
            RouteKind::Device(_) => RouteType::Unicast,
            RouteKind::Throw => RouteType::Throw,
            RouteKind::Unreachable => RouteType::Unreachable,
        };
        Self { table: route.table, to: route.to.trunc(), kind: kind.into(), metric: route.metric, plain: true }
    }
}

impl Netlink {
    /// The routes of a family in the tables that `wanted` names.
    ///
    /// # Errors
    /// The kernel did not answer.
    pub(in crate::platform) fn exact_routes(
        &mut self,
        family: Family,
        wanted: impl Fn(RouteTable) -> bool,
    ) -> Result<Vec<ExactRoute>, NetlinkError> {
        let act = "list the routes";
        let mut request = RouteMessage::default();
        request.header.address_family = address_family(family);
        self.dump(act, &RouteNetlinkMessage::GetRoute(request), |found: &mut Vec<ExactRoute>, _, payload| {
            let header = RouteHeader::parse(payload).map_err(|error| NetlinkError::garbled(act, error))?;
            let route = exact_route(family, &header, payload.get(HEADER..).unwrap_or_default());
            found.extend(route.filter(|route| wanted(route.table)));
            Ok(())
        })
    }
}

fn exact_route(family: Family, header: &RouteHeader, attributes: &[u8]) -> Option<ExactRoute> {
    let (mut table, mut metric, mut plain) = (u32::from(header.table), 0, true);
    let length = header.destination_prefix_length;
    let mut to = family.everything();
    for found in NlasIterator::new(attributes).flatten() {
        let value = found.value();
        match found.kind() {
            attribute::TABLE => table = number(value).unwrap_or(table),
            attribute::METRIC => metric = number(value).unwrap_or(metric),
            attribute::DESTINATION => to = prefix(family, value, length)?,
            attribute::GATEWAY | attribute::VIA | attribute::MULTIPATH | attribute::NEXT_HOP => plain = false,
            _ => {}
        }
    }
    Some(ExactRoute { table: RouteTable(table), to, kind: header.kind.into(), metric, plain })
}

fn prefix(family: Family, octets: &[u8], length: u8) -> Option<IpNet> {
    Some(match family {
        Family::V4 => Ipv4Net::new(Ipv4Addr::from(<[u8; 4]>::try_from(octets).ok()?), length).ok()?.into(),
        Family::V6 => Ipv6Net::new(Ipv6Addr::from(<[u8; 16]>::try_from(octets).ok()?), length).ok()?.into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_route_is_told_from_others_to_the_same_place_in_the_same_table() {
        let route = |kind, metric| Route { table: RouteTable(2022), to: "192.0.2.0/24".parse().unwrap(), kind, metric };
        let ours = route(RouteKind::Unreachable, 4096);
        let seen = ExactRoute::of(&ours);
        assert!(seen.is(&ours));
        assert!(!seen.is(&route(RouteKind::Unreachable, 0)) && !seen.is(&route(RouteKind::Throw, 4096)));
        assert!(!ExactRoute { plain: false, ..seen }.is(&ours));
    }
}
