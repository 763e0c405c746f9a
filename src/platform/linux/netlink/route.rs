//! Routes.

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use netlink_packet_core::NlasIterator;
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteMetric, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::{CREATE, Netlink, NetlinkError};
use crate::platform::routing::{Family, Route, RouteKind, RouteTable, SeenRoute};

/// Attributes of `struct rtmsg` (linux/rtnetlink.h).
pub(super) mod attribute {
    pub(in super::super) const DESTINATION: u16 = 1;
    pub(in super::super) const DEVICE: u16 = 4;
    pub(in super::super) const GATEWAY: u16 = 5;
    pub(in super::super) const METRIC: u16 = 6;
    pub(in super::super) const MULTIPATH: u16 = 9;
    pub(in super::super) const TABLE: u16 = 15;
    pub(in super::super) const VIA: u16 = 18;
    pub(in super::super) const NEXT_HOP: u16 = 30;
}

/// The congestion control of TCP connections of this host over a route of ours (`congctl` of ip-route(8)). Behind our
/// device is no network that could be congested, only our own window; the one that paces by a timer (BBR) would spend
/// half of a connection's CPU time on that. Built into every kernel. Our own connections to the servers go by other
/// routes and keep the host's.
const CONGESTION_CONTROL: &str = "reno";
/// The length of `struct rtmsg` in bytes.
pub(super) const HEADER: usize = 12;
/// `RTM_F_CLONED`: a cached copy of a route (IPv6), not a route that anybody put there.
const CLONED: u32 = 0x200;

impl Netlink {
    /// Adds a route to its table. One to a device is one to our own: TCP does not pace there.
    ///
    /// # Errors
    /// An equal route exists, its device is missing or down, or no CAP_NET_ADMIN.
    pub fn add_route(&mut self, route: &Route) -> Result<(), NetlinkError> {
        let message = self.route_message(route, false)?;
        self.act(&format!("add the route {route}"), RouteNetlinkMessage::NewRoute(message), CREATE)
    }

    /// Deletes exactly this route.
    ///
    /// # Errors
    /// [`NetlinkError::is_gone`] when there is no such route or device; no CAP_NET_ADMIN.
    pub fn delete_route(&mut self, route: &Route) -> Result<(), NetlinkError> {
        let message = self.route_message(route, true)?;
        self.act(&format!("delete the route {route}"), RouteNetlinkMessage::DelRoute(message), 0)
    }

    /// Sends everything of one family that the main table knows no better way for to `device`.
    ///
    /// # Errors
    /// As [`Netlink::add_route`].
    pub fn add_default_route(&mut self, device: &str, family: Family) -> Result<(), NetlinkError> {
        self.add_route(&Route {
            table: RouteTable::MAIN,
            to: family.everything(),
            kind: RouteKind::Device(device.to_owned()),
            metric: 1,
        })
    }

    /// The unicast and throw-like routes of all tables that `keep` wants; one with several next hops once for each.
    ///
    /// A router may hold a million of them: `keep` sees each before anything is allocated for it.
    ///
    /// # Errors
    /// The kernel did not answer.
    pub fn routes(
        &mut self,
        family: Family,
        keep: impl Fn(&SeenRoute) -> bool,
    ) -> Result<Vec<SeenRoute>, NetlinkError> {
        let act = "list the routes";
        let objects = self.next_hops()?;
        let mut request = RouteMessage::default();
        request.header.address_family = address_family(family);
        self.dump(act, &RouteNetlinkMessage::GetRoute(request), |found: &mut Vec<SeenRoute>, _, payload| {
            let header = RouteHeader::parse(payload).map_err(|error| NetlinkError::garbled(act, error))?;
            let attributes = payload.get(HEADER..).unwrap_or_default();
            let Some((route, mut hops)) = seen_route(family, &header, attributes) else {
                return Ok(());
            };
            if route.device.is_none() && hops.is_empty() && header.kind == RouteType::Unicast {
                hops = next_hop(attributes).map(|object| objects.devices(object)).unwrap_or_default();
            }
            if hops.is_empty() {
                found.extend(Some(route).filter(|route| keep(route)));
            } else {
                let by_hop = hops.into_iter().map(|device| SeenRoute { device: Some(device), ..route.clone() });
                found.extend(by_hop.filter(|route| keep(route)));
            }
            Ok(())
        })
    }

    fn route_message(&self, route: &Route, delete: bool) -> Result<RouteMessage, NetlinkError> {
        let family = Family::of(&route.to);
        let mut message = RouteMessage::default();
        message.header.address_family = address_family(family);
        message.header.destination_prefix_length = route.to.prefix_len();
        message.header.protocol = RouteProtocol::Kernel;
        message.header.table = u8::try_from(route.table.0).unwrap_or_default();
        let attributes = &mut message.attributes;
        attributes.push(RouteAttribute::Table(route.table.0));
        attributes.push(RouteAttribute::Priority(route.metric));
        if route.to.prefix_len() > 0 {
            attributes.push(RouteAttribute::Destination(RouteAddress::from(route.to.network())));
        }
        match &route.kind {
            RouteKind::Device(device) => {
                message.header.kind = RouteType::Unicast;
                // Not `Link`, lest a gateway that somebody names without a device be looked for behind it.
                message.header.scope = RouteScope::Universe;
                attributes.push(RouteAttribute::Oif(self.index(device)?));
                if !delete {
                    let metrics = vec![RouteMetric::CcAlgo(CONGESTION_CONTROL.to_owned())];
                    attributes.push(RouteAttribute::Metrics(metrics));
                }
            }
            RouteKind::Throw => message.header.kind = RouteType::Throw,
            RouteKind::Unreachable => message.header.kind = RouteType::Unreachable,
        }
        // IPv6 knows no scopes; in a deletion "nowhere" stands for any (fib_table_delete).
        message.header.scope = match (family, delete) {
            (Family::V4, true) => RouteScope::NoWhere,
            (Family::V4, false) => message.header.scope,
            (Family::V6, _) => RouteScope::Universe,
        };
        Ok(message)
    }
}

/// The route that a notification of the kernel's is about, if it is one that anybody put there.
pub(in crate::platform::linux) fn announced(payload: &[u8]) -> Option<SeenRoute> {
    let header = RouteHeader::parse(payload).ok()?;
    let family = if header.address_family == AddressFamily::Inet { Family::V4 } else { Family::V6 };
    let (route, hops) = seen_route(family, &header, payload.get(HEADER..).unwrap_or_default())?;
    Some(SeenRoute { device: route.device.or(hops.first().copied()), ..route })
}

/// The object that a route goes by, where it says nothing else (`net.ipv4.nexthop_compat_mode` 0).
fn next_hop(attributes: &[u8]) -> Option<u32> {
    let mut objects = NlasIterator::new(attributes).flatten().filter(|it| it.kind() == attribute::NEXT_HOP);
    number(objects.next()?.value())
}

pub(super) fn address_family(family: Family) -> AddressFamily {
    match family {
        Family::V4 => AddressFamily::Inet,
        Family::V6 => AddressFamily::Inet6,
    }
}

/// A route, and the devices of its next hops where it has several.
///
/// Reads by hand, because next-hop encapsulations that the layout does not depend on need not be understood.
fn seen_route(family: Family, header: &RouteHeader, attributes: &[u8]) -> Option<(SeenRoute, Vec<u32>)> {
    let not_a_way = matches!(
        header.kind,
        RouteType::Local | RouteType::Broadcast | RouteType::Anycast | RouteType::Multicast | RouteType::Unspec
    );
    if not_a_way || header.flags.bits() & CLONED != 0 {
        return None;
    }
    let (mut table, mut address, mut device) = (u32::from(header.table), None, None);
    let mut on_link = header.kind == RouteType::Unicast;
    let mut hops = Vec::new();
    for found in NlasIterator::new(attributes).flatten() {
        let value = found.value();
        match found.kind() {
            attribute::TABLE => table = number(value).unwrap_or(table),
            attribute::DEVICE => device = number(value),
            attribute::DESTINATION => address = Some(value.to_vec()),
            attribute::MULTIPATH => {
                hops = devices(value);
                on_link = false;
            }
            // A next-hop object may or may not hold a gateway: the careful answer.
            attribute::GATEWAY | attribute::VIA | attribute::NEXT_HOP => on_link = false,
            _ => {}
        }
    }
    if header.kind != RouteType::Unicast {
        // IPv6 shows the loopback as the device of routes that lead nowhere.
        device = None;
    }
    let length = header.destination_prefix_length;
    let to = match family {
        Family::V4 => {
            let octets: [u8; 4] = address.unwrap_or_else(|| vec![0; 4]).try_into().ok()?;
            IpNet::V4(Ipv4Net::new(octets.into(), length).ok()?)
        }
        Family::V6 => {
            let octets: [u8; 16] = address.unwrap_or_else(|| vec![0; 16]).try_into().ok()?;
            IpNet::V6(Ipv6Net::new(octets.into(), length).ok()?)
        }
    };
    Some((SeenRoute { table: RouteTable(table), to, device, on_link }, hops))
}

/// The devices of a list of `struct rtnexthop`: u16 length with attributes, u8 flags, u8 weight, i32 device
/// (rtnetlink(7)).
fn devices(mut list: &[u8]) -> Vec<u32> {
    let mut devices = Vec::new();
    while let (Some(length), Some(device)) = (list.first_chunk(), list.get(4..8).and_then(number)) {
        devices.push(device);
        let length = usize::from(u16::from_ne_bytes(*length)).max(8).next_multiple_of(4);
        list = list.get(length..).unwrap_or_default();
    }
    devices
}

pub(super) fn number(value: &[u8]) -> Option<u32> {
    value.first_chunk().map(|bytes| u32::from_ne_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_next_hop_names_its_device() {
        let hop = |length: u16, device: u32| {
            let mut hop = length.to_ne_bytes().to_vec();
            hop.extend([0, 0]);
            hop.extend(device.to_ne_bytes());
            hop.resize(usize::from(length), 0);
            hop
        };
        assert_eq!(devices(&[hop(16, 2), hop(8, 3)].concat()), [2, 3]);
        assert_eq!(devices(&[]), [0_u32; 0]);
    }

    #[test]
    fn a_list_of_next_hops_that_lies_about_its_lengths_ends() {
        for bytes in [vec![0; 64], vec![0xff; 64], vec![0; 7]] {
            assert!(devices(&bytes).len() <= 8);
        }
    }
}
