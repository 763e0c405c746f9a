//! Gateways of default routes, and what is known of them as neighbours.

use std::net::IpAddr;

use netlink_packet_core::{NLM_F_REPLACE, NlasIterator};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourHeader, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{RouteHeader, RouteMessage, RouteType};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::route::{address_family, attribute, number};
use super::{Netlink, NetlinkError};
use crate::platform::routing::{DirectWay, Family, Gateway, Neighbour, RouteTable};

/// The lengths of `struct rtmsg`, `struct rtnexthop` and `struct ndmsg` in bytes.
const ROUTE: usize = 12;
const HOP: usize = 8;
const NEIGHBOUR: usize = 12;
/// Of `struct ndmsg` (linux/neighbour.h).
const NDA_DST: u16 = 1;
/// The kernel's states of a neighbour (`NUD_*`).
const INCOMPLETE: u16 = 0x01;
const REACHABLE: u16 = 0x02;
const STALE: u16 = 0x04;
const DELAY: u16 = 0x08;
const PROBE: u16 = 0x10;
const FAILED: u16 = 0x20;

impl Netlink {
    /// The gateways of the main table's default routes of a family, of which one with several next hops has several; and the
    /// ways of them that have none.
    ///
    /// # Errors
    /// The kernel did not answer.
    pub fn default_ways(&mut self, family: Family) -> Result<(Vec<Gateway>, Vec<DirectWay>), NetlinkError> {
        let act = "list the default routes";
        let mut request = RouteMessage::default();
        request.header.address_family = address_family(family);
        self.dump(act, &RouteNetlinkMessage::GetRoute(request), |found: &mut (Vec<_>, Vec<_>), _, payload| {
            let header = RouteHeader::parse(payload).map_err(|error| NetlinkError::garbled(act, error))?;
            if header.kind == RouteType::Unicast && header.destination_prefix_length == 0 {
                let table = u32::from(header.table);
                let (gateways, direct) = of_route(family, table, payload.get(ROUTE..).unwrap_or_default());
                found.0.extend(gateways);
                found.1.extend(direct);
            }
            Ok(())
        })
    }

    /// What the kernel knows of a gateway as a neighbour; nothing where it has never asked.
    ///
    /// # Errors
    /// The kernel did not answer.
    pub fn neighbour(&mut self, gateway: &Gateway) -> Result<Option<Neighbour>, NetlinkError> {
        Ok(self.known_neighbour(gateway)?.map(|header| state(u16::from(header.state))))
    }

    fn known_neighbour(&mut self, gateway: &Gateway) -> Result<Option<NeighbourHeader>, NetlinkError> {
        let act = "look at a neighbour";
        let mut request = NeighbourMessage::default();
        request.header.family = family_of(gateway.address);
        let found = self.dump(act, &RouteNetlinkMessage::GetNeighbour(request), |found: &mut Vec<_>, _, payload| {
            let header = NeighbourHeader::parse(payload).map_err(|error| NetlinkError::garbled(act, error))?;
            let mut attributes = NlasIterator::new(payload.get(NEIGHBOUR..).unwrap_or_default()).flatten();
            let address = attributes.find(|it| it.kind() == NDA_DST).and_then(|it| ip(it.value()));
            if header.ifindex == gateway.device && address == Some(gateway.address) {
                found.push(header);
            }
            Ok(())
        })?;
        Ok(found.into_iter().next())
    }

    /// Has the kernel ask a neighbour that it knows whether it is still there, as it does by itself before it goes on to use
    /// an address for long: three times within three seconds. The neighbour then counts as present, or as absent.
    ///
    /// # Errors
    /// The kernel does not know it; no CAP_NET_ADMIN.
    pub fn verify_neighbour(&mut self, gateway: &Gateway) -> Result<(), NetlinkError> {
        let mut message = NeighbourMessage::default();
        message.header.family = family_of(gateway.address);
        message.header.ifindex = gateway.device;
        message.header.state = NeighbourState::Probe;
        // What is not said of it again it would lose: that it is a router, or was entered by a program.
        message.header.flags = self.known_neighbour(gateway)?.map(|known| known.flags).unwrap_or_default();
        let address = match gateway.address {
            IpAddr::V4(ip) => NeighbourAddress::Inet(ip),
            IpAddr::V6(ip) => NeighbourAddress::Inet6(ip),
        };
        message.attributes.push(NeighbourAttribute::Destination(address));
        self.act("verify a neighbour", RouteNetlinkMessage::NewNeighbour(message), NLM_F_REPLACE)
    }
}

fn family_of(address: IpAddr) -> AddressFamily {
    if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}

fn state(bits: u16) -> Neighbour {
    match bits {
        REACHABLE => Neighbour::Present,
        STALE | DELAY | PROBE => Neighbour::Remembered,
        0 | INCOMPLETE => Neighbour::Asked,
        FAILED => Neighbour::Absent,
        // Links without neighbours, and what somebody has written by hand.
        _ => Neighbour::Fixed,
    }
}

/// The gateways of a default route, if it stands in the main table, and the ways of it without.
fn of_route(family: Family, mut table: u32, attributes: &[u8]) -> (Vec<Gateway>, Vec<DirectWay>) {
    let (mut address, mut device, mut metric, mut hops) = (None, None, 0, Vec::new());
    for found in NlasIterator::new(attributes).flatten() {
        let value = found.value();
        match found.kind() {
            attribute::TABLE => table = number(value).unwrap_or(table),
            attribute::DEVICE => device = number(value),
            attribute::METRIC => metric = number(value).unwrap_or_default(),
            attribute::GATEWAY | attribute::VIA => address = gateway(found.kind(), value),
            attribute::MULTIPATH => hops = in_hops(value),
            _ => {}
        }
    }
    if RouteTable(table) != RouteTable::MAIN {
        return (Vec::new(), Vec::new());
    }
    let single = device.map(|device| (address, device, false));
    let ways: Vec<_> = single.into_iter().chain(hops.into_iter().map(|(to, device)| (to, device, true))).collect();
    let gateway = |&(address, device, one_of_several): &(Option<IpAddr>, u32, bool)| {
        address.map(|address| Gateway { family, address, device, metric, one_of_several })
    };
    let direct = ways.iter().filter(|(address, ..)| address.is_none());
    let direct = direct.map(|(_, device, _)| DirectWay { family, device: *device, metric }).collect();
    (ways.iter().filter_map(gateway).collect(), direct)
}

/// An address by itself, or behind its family in two bytes (`struct rtvia`).
fn gateway(kind: u16, value: &[u8]) -> Option<IpAddr> {
    ip(if kind == attribute::VIA { value.get(2..)? } else { value })
}

fn ip(bytes: &[u8]) -> Option<IpAddr> {
    let v4 = || <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from);
    v4().or_else(|| <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from))
}

/// The devices in a list of `struct rtnexthop`, each with its gateway, if it has one.
fn in_hops(mut list: &[u8]) -> Vec<(Option<IpAddr>, u32)> {
    let mut found = Vec::new();
    while let (Some(length), Some(device)) = (list.first_chunk(), list.get(4..8).and_then(number)) {
        let length = usize::from(u16::from_ne_bytes(*length)).max(HOP);
        let inside = list.get(HOP..length.min(list.len())).unwrap_or_default();
        let mut attributes = NlasIterator::new(inside).flatten();
        let way = attributes.find(|it| matches!(it.kind(), attribute::GATEWAY | attribute::VIA));
        found.push((way.and_then(|it| gateway(it.kind(), it.value())), device));
        list = list.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let length = u16::try_from(4 + value.len()).unwrap();
        let mut bytes = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn hop(device: u32, gateway: [u8; 4]) -> Vec<u8> {
        let inside = attribute(attribute::GATEWAY, &gateway);
        let length = u16::try_from(HOP + inside.len()).unwrap();
        [&length.to_ne_bytes()[..], &[0, 0], &device.to_ne_bytes(), &inside].concat()
    }

    #[test]
    fn a_gateway_is_read_with_its_device_and_metric_or_one_for_each_hop() {
        let one = [
            attribute(attribute::TABLE, &254_u32.to_ne_bytes()),
            attribute(attribute::GATEWAY, &[192, 168, 1, 1]),
            attribute(attribute::DEVICE, &2_u32.to_ne_bytes()),
            attribute(attribute::METRIC, &100_u32.to_ne_bytes()),
        ]
        .concat();
        let found = of_route(Family::V4, 254, &one);
        let wanted = |last, device, metric, one_of_several| {
            let address = IpAddr::from([192, 168, last, 1]);
            Gateway { family: Family::V4, address, device, metric, one_of_several }
        };
        assert_eq!(found, (vec![wanted(1, 2, 100, false)], vec![]));
        let bare = [&8_u16.to_ne_bytes()[..], &[0, 0], &4_u32.to_ne_bytes()].concat();
        let hops = [hop(2, [192, 168, 1, 1]), hop(3, [192, 168, 2, 1]), bare].concat();
        let found = of_route(Family::V4, 254, &attribute(attribute::MULTIPATH, &hops));
        let direct = |device, metric| DirectWay { family: Family::V4, device, metric };
        assert_eq!(found, (vec![wanted(1, 2, 0, true), wanted(2, 3, 0, true)], vec![direct(4, 0)]));
        // Of another table, and without a gateway.
        assert_eq!(of_route(Family::V4, 77, &one[8..]).0, []);
        assert_eq!(of_route(Family::V4, 77, &attribute(attribute::DEVICE, &2_u32.to_ne_bytes())), (vec![], vec![]));
        assert_eq!(of_route(Family::V4, 254, &attribute(attribute::GATEWAY, &[192, 168, 1, 1])), (vec![], vec![]));
        let bare = [(attribute::DEVICE, 2_u32), (attribute::METRIC, 50)];
        let bare: Vec<u8> = bare.iter().flat_map(|(kind, value)| attribute(*kind, &value.to_ne_bytes())).collect();
        assert_eq!(of_route(Family::V4, 254, &bare), (vec![], vec![direct(2, 50)]));
    }

    #[test]
    fn a_gateway_of_the_other_family_stands_behind_it() {
        let via = [&10_u16.to_ne_bytes()[..], &[0xfe, 0x80], &[0; 13], &[1]].concat();
        assert_eq!(gateway(attribute::VIA, &via), Some("fe80::1".parse().unwrap()));
    }

    #[test]
    fn lists_that_lie_about_their_lengths_end() {
        for bytes in [vec![0; 64], vec![0xff; 64], vec![1; 7]] {
            assert!(in_hops(&bytes).len() <= 8);
        }
    }
}
