//! Objects that stand for the next hops of routes (ip-nexthop(8)), as routing daemons make them.

use std::collections::BTreeMap;

use netlink_packet_core::{NetlinkSerializable, NlasIterator};

use super::route::number;
use super::{Netlink, NetlinkError};
use crate::platform::linux::sysctl;

/// `RTM_NEWNEXTHOP` and `RTM_DELNEXTHOP` (linux/rtnetlink.h).
pub(in crate::platform::linux) const OBJECTS: [u16; 2] = [104, 105];
/// `RTM_GETNEXTHOP`.
const GET: u16 = 106;
/// The length of `struct nhmsg` in bytes (linux/nexthop.h), and of `struct nexthop_grp`, which begins with a number.
const HEADER: usize = 8;
const MEMBER: usize = 8;
/// `NHA_ID`, `NHA_GROUP` and `NHA_OIF`.
const ID: u16 = 1;
const GROUP: u16 = 2;
const DEVICE: u16 = 5;

/// Whether routes name only the object that they go by, and not its device. So routing daemons have it, for speed.
pub(in crate::platform::linux) fn are_all_that_routes_say() -> bool {
    sysctl::read("net/ipv4/nexthop_compat_mode").is_ok_and(|value| value == "0")
}

/// What objects there are, by their numbers.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct NextHops(BTreeMap<u32, NextHop>);

#[derive(Debug, PartialEq, Eq)]
enum NextHop {
    Device(u32),
    Group(Vec<u32>),
}

impl NextHops {
    /// The devices by which what goes by `object` leaves. A group has no groups in it.
    pub(super) fn devices(&self, object: u32) -> Vec<u32> {
        let device = |object: &u32| match self.0.get(object) {
            Some(NextHop::Device(device)) => Some(*device),
            Some(NextHop::Group(_)) | None => None,
        };
        match self.0.get(&object) {
            Some(NextHop::Group(members)) => members.iter().filter_map(device).collect(),
            Some(NextHop::Device(_)) | None => device(&object).into_iter().collect(),
        }
    }

    fn add(&mut self, attributes: &[u8]) {
        let (mut id, mut hop) = (None, None);
        for found in NlasIterator::new(attributes).flatten() {
            let value = found.value();
            match found.kind() {
                ID => id = number(value),
                DEVICE => hop = number(value).map(NextHop::Device),
                GROUP => hop = Some(NextHop::Group(value.chunks(MEMBER).filter_map(number).collect())),
                _ => {}
            }
        }
        self.0.extend(id.zip(hop));
    }
}

impl Netlink {
    /// The objects that routes go by; none where routes say by themselves where they go.
    ///
    /// # Errors
    /// The kernel did not answer.
    pub(super) fn next_hops(&mut self) -> Result<NextHops, NetlinkError> {
        if !are_all_that_routes_say() {
            return Ok(NextHops::default());
        }
        self.dump("list the next hops", &Request, |found: &mut NextHops, _, payload| {
            found.add(payload.get(HEADER..).unwrap_or_default());
            Ok(())
        })
    }
}

/// Asks for all of them, of any family.
#[derive(Clone)]
struct Request;

impl NetlinkSerializable for Request {
    fn message_type(&self) -> u16 {
        GET
    }

    fn buffer_len(&self) -> usize {
        HEADER
    }

    fn serialize(&self, buffer: &mut [u8]) {
        buffer.fill(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let length = u16::try_from(4 + value.len()).unwrap();
        [&length.to_ne_bytes()[..], &kind.to_ne_bytes(), value].concat()
    }

    fn member(object: u32) -> Vec<u8> {
        [&object.to_ne_bytes()[..], &[0; 4]].concat()
    }

    #[test]
    fn an_object_leads_to_its_device_and_a_group_to_those_of_its_members() {
        let mut found = NextHops::default();
        for (object, device) in [(1_u32, 7_u32), (2, 8)] {
            found.add(&[attribute(ID, &object.to_ne_bytes()), attribute(DEVICE, &device.to_ne_bytes())].concat());
        }
        found.add(&[attribute(ID, &3_u32.to_ne_bytes()), attribute(GROUP, &[member(1), member(2)].concat())].concat());
        assert_eq!((found.devices(1), found.devices(3), found.devices(4)), (vec![7], vec![7, 8], vec![]));
    }

    #[test]
    fn what_lies_about_itself_ends() {
        let mut found = NextHops::default();
        found.add(&[attribute(ID, &3_u32.to_ne_bytes()), attribute(GROUP, &member(3))].concat());
        found.add(&attribute(ID, &[1]));
        found.add(&[0xff; 9]);
        assert_eq!(found.devices(3), Vec::<u32>::new());
    }
}
