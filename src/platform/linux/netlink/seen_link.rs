//! How interfaces are: up, with carrier, of what kind and MTU.

use netlink_packet_core::NlasIterator;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkFlags, LinkHeader, LinkMessage};

use super::{Netlink, NetlinkError};
use crate::platform::routing::SeenLink;

/// Attributes of `struct ifinfomsg` (linux/if_link.h).
mod attribute {
    pub(super) const NAME: u16 = 3;
    pub(super) const MTU: u16 = 4;
    pub(super) const INFO: u16 = 18;
    /// Within `INFO`.
    pub(super) const KIND: u16 = 1;
}

/// The length of `struct ifinfomsg` in bytes.
const HEADER: usize = 16;

impl Netlink {
    /// Every interface of the namespace with its state.
    ///
    /// # Errors
    /// The kernel did not answer.
    pub fn seen_links(&mut self) -> Result<Vec<SeenLink>, NetlinkError> {
        let act = "list the interfaces";
        let request = RouteNetlinkMessage::GetLink(LinkMessage::default());
        self.dump(act, &request, |links: &mut Vec<SeenLink>, _, payload| {
            let header = LinkHeader::parse(payload).map_err(|error| NetlinkError::garbled(act, error))?;
            let mut link = SeenLink {
                index: header.index,
                up: header.flags.contains(LinkFlags::Up),
                carrier: header.flags.contains(LinkFlags::LowerUp),
                ..SeenLink::default()
            };
            for attribute in NlasIterator::new(payload.get(HEADER..).unwrap_or_default()).flatten() {
                match attribute.kind() {
                    attribute::NAME => link.name = text(attribute.value()),
                    attribute::MTU => {
                        link.mtu = attribute.value().first_chunk().map_or(0, |it| u32::from_ne_bytes(*it));
                    }
                    attribute::INFO => {
                        let kind =
                            NlasIterator::new(attribute.value()).flatten().find(|it| it.kind() == attribute::KIND);
                        link.kind = kind.map(|kind| text(kind.value())).unwrap_or_default();
                    }
                    _ => {}
                }
            }
            links.push(link);
            Ok(())
        })
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).trim_end_matches('\0').to_owned()
}
