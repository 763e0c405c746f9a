//! Links and their addresses.

use std::os::fd::{AsFd, AsRawFd};

use ipnet::IpNet;
use netlink_packet_core::{NlasIterator, Parseable};
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage};
use netlink_packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkHeader,
    LinkInfo, LinkMessage,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use nix::errno::Errno;

use super::{CREATE, Netlink, NetlinkError};
use crate::platform::routing::{Link, LinkState};

/// `IFLA_IFNAME`.
const NAME: u16 = 3;
/// `IFLA_MTU`.
const MTU: u16 = 4;
/// The length of `struct ifinfomsg` in bytes.
const LINK_HEADER: usize = 16;

nix::ioctl_read_bad!(
    /// netdevice(7): the number of an interface.
    interface_index,
    libc::SIOCGIFINDEX,
    libc::ifreq
);

impl Netlink {
    /// Every interface of the namespace.
    ///
    /// # Errors
    /// The kernel did not answer.
    pub fn links(&mut self) -> Result<Vec<Link>, NetlinkError> {
        let act = "list the interfaces";
        let request = RouteNetlinkMessage::GetLink(LinkMessage::default());
        // Read by hand: of some 60 attributes, which differ from kernel to kernel, only one matters here.
        self.dump(act, &request, |links: &mut Vec<Link>, _, payload| {
            let header = LinkHeader::parse(payload).map_err(|error| NetlinkError::garbled(act, error))?;
            let name = NlasIterator::new(payload.get(LINK_HEADER..).unwrap_or_default())
                .flatten()
                .find(|attribute| attribute.kind() == NAME)
                .map(|attribute| String::from_utf8_lossy(attribute.value()).trim_end_matches('\0').to_owned());
            links.extend(name.map(|name| Link { index: header.index, name }));
            Ok(())
        })
    }

    /// What the interface `name` is now; None: there is none of that name.
    ///
    /// # Errors
    /// The kernel did not answer.
    pub fn link_state(&mut self, name: &str) -> Result<Option<LinkState>, NetlinkError> {
        let act = "look at an interface";
        let request = RouteNetlinkMessage::GetLink(LinkMessage::default());
        let states = self.dump(act, &request, |states: &mut Vec<LinkState>, _, payload| {
            let header = LinkHeader::parse(payload).map_err(|error| NetlinkError::garbled(act, error))?;
            let (mut named, mut mtu) = (false, 0);
            for attribute in NlasIterator::new(payload.get(LINK_HEADER..).unwrap_or_default()).flatten() {
                match attribute.kind() {
                    NAME => named = attribute.value().strip_suffix(&[0]) == Some(name.as_bytes()),
                    MTU => mtu = attribute.value().first_chunk().map_or(0, |bytes| u32::from_ne_bytes(*bytes)),
                    _ => {}
                }
            }
            let up = header.flags.contains(LinkFlags::Up);
            states.extend(named.then_some(LinkState { index: header.index, up, mtu }));
            Ok(())
        })?;
        Ok(states.first().copied())
    }

    /// Every address of the namespace, with the interface that holds it.
    ///
    /// # Errors
    /// The kernel did not answer.
    pub fn addresses(&mut self) -> Result<Vec<(u32, IpNet)>, NetlinkError> {
        let act = "list the addresses";
        let request = RouteNetlinkMessage::GetAddress(AddressMessage::default());
        self.dump(act, &request, |found: &mut Vec<(u32, IpNet)>, _, payload| {
            let message = AddressMessage::parse(payload).map_err(|error| NetlinkError::garbled(act, error))?;
            let (mut local, mut address) = (None, None);
            for attribute in &message.attributes {
                match attribute {
                    AddressAttribute::Local(ip) => local = Some(*ip),
                    AddressAttribute::Address(ip) => address = Some(*ip),
                    _ => {}
                }
            }
            // On a point-to-point link IFA_ADDRESS is the peer; IFA_LOCAL, where present, is ours.
            let ours = local.or(address).and_then(|ip| IpNet::new(ip, message.header.prefix_len).ok());
            found.extend(ours.map(|net| (message.header.index, net)));
            Ok(())
        })
    }

    /// The number of the interface `name`. It takes no descriptor: if_nametoindex(3), which takes one, says that there is no
    /// such interface where none is left.
    ///
    /// # Errors
    /// There is none of that name.
    pub fn index(&self, name: &str) -> Result<u32, NetlinkError> {
        let not_found = |errno: Errno| NetlinkError::new(&format!("find the interface {name}"), errno.into());
        // SAFETY: all-zero bytes are a valid `ifreq`.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        if name.len() >= request.ifr_name.len() {
            return Err(not_found(Errno::ENODEV));
        }
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = from.cast_signed();
        }
        // SAFETY: `request` outlives the call, which reads and writes one `ifreq`.
        unsafe { interface_index(self.socket.as_raw_fd(), &raw mut request) }.map_err(not_found)?;
        // SAFETY: the call has written this member of the union, which any bytes fill anyway.
        Ok(unsafe { request.ifr_ifru.ifru_ifindex }.cast_unsigned())
    }

    /// Sets the interface up.
    ///
    /// # Errors
    /// No such interface, or no CAP_NET_ADMIN.
    pub fn link_up(&mut self, name: &str) -> Result<(), NetlinkError> {
        self.change_flag(&format!("set {name} up"), name, LinkFlags::Up)
    }

    /// Makes the interface do without ARP and neighbour discovery.
    ///
    /// # Errors
    /// No such interface, or no CAP_NET_ADMIN.
    pub fn set_noarp(&mut self, name: &str) -> Result<(), NetlinkError> {
        self.change_flag(&format!("switch ARP off on {name}"), name, LinkFlags::Noarp)
    }

    /// Sets the largest packet that the interface takes, in bytes.
    ///
    /// # Errors
    /// No such interface, no CAP_NET_ADMIN, or a size that the device cannot have.
    pub fn set_mtu(&mut self, name: &str, mtu: u32) -> Result<(), NetlinkError> {
        self.change_link(&format!("set the MTU of {name} to {mtu}"), name, LinkAttribute::Mtu(mtu))
    }

    /// Sets how many packets may wait for whoever reads the device.
    ///
    /// # Errors
    /// No such interface, or no CAP_NET_ADMIN.
    pub fn set_queue_length(&mut self, name: &str, packets: u32) -> Result<(), NetlinkError> {
        let act = format!("set the queue length of {name} to {packets}");
        self.change_link(&act, name, LinkAttribute::TxQueueLen(packets))
    }

    /// Keeps the kernel from giving the interface IPv6 link-local addresses by itself.
    ///
    /// # Errors
    /// No such interface, no CAP_NET_ADMIN, or a kernel without IPv6.
    pub fn set_no_link_local(&mut self, name: &str) -> Result<(), NetlinkError> {
        let mode = AfSpecInet6::AddrGenMode(In6AddrGenMode::None);
        let attribute = LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(vec![mode])]);
        self.change_link(&format!("set addrgenmode none on {name}"), name, attribute)
    }

    /// Takes away the link-local addresses that the kernel gave the interface, if any.
    ///
    /// # Errors
    /// No such interface, or no CAP_NET_ADMIN.
    pub fn delete_link_local(&mut self, name: &str) -> Result<(), NetlinkError> {
        let index = self.index(name)?;
        let theirs = |net: &IpNet| matches!(net, IpNet::V6(net) if net.addr().is_unicast_link_local());
        let held = self.addresses()?;
        for (_, address) in held.into_iter().filter(|(at, net)| *at == index && theirs(net)) {
            match self.delete_address(name, address) {
                Err(error) if !error.is_gone() => return Err(error),
                Ok(()) | Err(_) => {}
            }
        }
        Ok(())
    }

    /// Makes a pair of Ethernet devices of which each receives what the other sends.
    ///
    /// # Errors
    /// A name is taken, or no CAP_NET_ADMIN.
    pub fn create_veth(&mut self, one: &str, other: &str) -> Result<(), NetlinkError> {
        let mut peer = LinkMessage::default();
        peer.attributes.push(LinkAttribute::IfName(other.to_owned()));
        let mut message = LinkMessage::default();
        message.attributes = vec![
            LinkAttribute::IfName(one.to_owned()),
            LinkAttribute::LinkInfo(vec![
                LinkInfo::Kind(InfoKind::Veth),
                LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer))),
            ]),
        ];
        self.act(&format!("create the veth pair {one}, {other}"), RouteNetlinkMessage::NewLink(message), CREATE)
    }

    /// Moves the interface to the network namespace that `namespace` is open on; its addresses and routes are lost.
    ///
    /// # Errors
    /// No such interface, no CAP_NET_ADMIN in both namespaces, or its name is taken there.
    pub fn move_to_netns(&mut self, name: &str, namespace: impl AsFd) -> Result<(), NetlinkError> {
        let attribute = LinkAttribute::NetNsFd(namespace.as_fd().as_raw_fd());
        self.change_link(&format!("move {name} to another network namespace"), name, attribute)
    }

    /// Adds an address, without the kernel's own prefix route and without duplicate address detection.
    ///
    /// # Errors
    /// No such interface, no CAP_NET_ADMIN, or the interface has the address already.
    pub fn add_address(&mut self, name: &str, address: IpNet) -> Result<(), NetlinkError> {
        let message = address_message(self.index(name)?, address);
        self.act(&format!("add the address {address} to {name}"), RouteNetlinkMessage::NewAddress(message), CREATE)
    }

    /// Deletes an address.
    ///
    /// # Errors
    /// [`NetlinkError::is_gone`] when there is no such interface or address; no CAP_NET_ADMIN.
    pub fn delete_address(&mut self, name: &str, address: IpNet) -> Result<(), NetlinkError> {
        let message = address_message(self.index(name)?, address);
        self.act(&format!("delete the address {address} from {name}"), RouteNetlinkMessage::DelAddress(message), 0)
    }

    fn change_flag(&mut self, act: &str, name: &str, flag: LinkFlags) -> Result<(), NetlinkError> {
        let mut message = LinkMessage::default();
        message.header.index = self.index(name)?;
        message.header.flags = flag;
        message.header.change_mask = flag;
        self.act(act, RouteNetlinkMessage::SetLink(message), 0)
    }

    fn change_link(&mut self, act: &str, name: &str, attribute: LinkAttribute) -> Result<(), NetlinkError> {
        let mut message = LinkMessage::default();
        message.header.index = self.index(name)?;
        message.attributes.push(attribute);
        self.act(act, RouteNetlinkMessage::SetLink(message), 0)
    }
}

fn address_message(index: u32, address: IpNet) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = if address.addr().is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    message.header.prefix_len = address.prefix_len();
    message.header.index = index;
    message.attributes = vec![
        AddressAttribute::Local(address.addr()),
        AddressAttribute::Address(address.addr()),
        AddressAttribute::Flags(AddressFlags::Noprefixroute | AddressFlags::Nodad),
    ];
    message
}
