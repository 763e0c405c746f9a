//! As much of an Ethernet frame as a witness must understand. Anything else of it is kept as it is.

use std::ffi::CString;
use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use socket2::{Domain, SockAddr, Socket, Type};

use super::Netns;

/// An EtherType free for local experiments (IEEE 802, 9.2.4): no host answers or forwards it.
pub(crate) const EXPERIMENT: u16 = 0x88b5;

const IPV4: u16 = 0x0800;
const ARP: u16 = 0x0806;
const IPV6: u16 = 0x86dd;

/// IP protocol numbers a test asks for.
pub(crate) mod protocol {
    /// TCP.
    pub(crate) const TCP: u8 = 6;
    /// UDP.
    pub(crate) const UDP: u8 = 17;
    /// ICMP for IPv6: neighbour discovery too.
    pub(crate) const ICMPV6: u8 = 58;
}

/// A frame, taken apart.
#[derive(Clone, Debug)]
pub(crate) struct Packet {
    /// EtherType.
    pub(crate) ether_type: u16,
    /// What an IP packet says.
    pub(crate) ip: Option<Ip>,
    /// All bytes from the Ethernet header on.
    pub(crate) bytes: Vec<u8>,
}

/// The addresses of an IP packet. Ports are 0 where there are none, as in later fragments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ip {
    /// Protocol, after the extension headers of IPv6.
    pub(crate) protocol: u8,
    /// Where it says it comes from.
    pub(crate) source: SocketAddr,
    /// Where it goes.
    pub(crate) destination: SocketAddr,
}

impl Packet {
    /// Takes a frame apart; never fails, what makes no sense stays unexplained.
    pub(crate) fn parse(bytes: &[u8]) -> Self {
        let ether_type = bytes.get(12..14).map_or(0, |b| u16::from_be_bytes([b[0], b[1]]));
        let payload = bytes.get(14..).unwrap_or_default();
        let ip = match ether_type {
            IPV4 => ipv4(payload),
            IPV6 => ipv6(payload),
            _ => None,
        };
        Self { ether_type, ip, bytes: bytes.to_vec() }
    }

    /// Whether `needle` stands anywhere in it.
    pub(crate) fn contains(&self, needle: &[u8]) -> bool {
        self.bytes.windows(needle.len()).any(|window| window == needle)
    }

    /// What hosts of a link say among themselves: ARP, neighbour discovery, multicast listener reports, and the
    /// marker of [`Capture`](super::Capture).
    pub(crate) fn is_housekeeping(&self) -> bool {
        // ICMPv6 types 130 to 137 and 143: RFC 2710, 4861 and 9777.
        let discovery = |ip: &Ip| ip.protocol == protocol::ICMPV6 && matches!(self.icmp_type(), Some(130..=137 | 143));
        matches!(self.ether_type, ARP | EXPERIMENT) || self.ip.as_ref().is_some_and(discovery)
    }

    /// Whether it is a piece of a larger packet.
    pub(crate) fn is_fragment(&self) -> bool {
        let Some(packet) = self.bytes.get(14..) else { return false };
        match self.ether_type {
            IPV4 => packet.get(6..8).is_some_and(|word| u16::from_be_bytes([word[0], word[1]]) & 0x3fff != 0),
            // The fragment header, RFC 8200, 4.5.
            IPV6 => packet.get(6) == Some(&44),
            _ => false,
        }
    }

    /// The type of an ICMPv6 message, also behind the hop-by-hop header that listener reports carry.
    fn icmp_type(&self) -> Option<u8> {
        let (_, offset) = skip_extensions(self.bytes.get(14..)?)?;
        self.bytes.get(14 + offset).copied()
    }
}

fn ipv4(packet: &[u8]) -> Option<Ip> {
    let header = packet.first_chunk::<20>()?;
    let rest = packet.get(usize::from(header[0] & 0x0f) * 4..)?;
    let first_fragment = u16::from_be_bytes([header[6], header[7]]) & 0x1fff == 0;
    let address = |at: usize| Ipv4Addr::new(header[at], header[at + 1], header[at + 2], header[at + 3]).into();
    Some(with_ports(header[9], address(12), address(16), if first_fragment { rest } else { &[] }))
}

fn ipv6(packet: &[u8]) -> Option<Ip> {
    let address = |at: usize| packet.get(at..at + 16).and_then(|b| <[u8; 16]>::try_from(b).ok()).map(Ipv6Addr::from);
    let (protocol, offset) = skip_extensions(packet)?;
    Some(with_ports(protocol, address(8)?.into(), address(24)?.into(), packet.get(offset..)?))
}

/// Protocol and offset of what follows hop-by-hop, routing and destination options and a first fragment header.
fn skip_extensions(packet: &[u8]) -> Option<(u8, usize)> {
    let (mut next, mut offset) = (*packet.get(6)?, 40);
    loop {
        let length = match next {
            0 | 43 | 60 => usize::from(*packet.get(offset + 1)?) * 8 + 8,
            44 if packet.get(offset + 2..offset + 4)? == [0, 1] => 8,
            _ => return Some((next, offset)),
        };
        next = *packet.get(offset)?;
        offset += length;
    }
}

fn with_ports(protocol: u8, source: IpAddr, destination: IpAddr, rest: &[u8]) -> Ip {
    let port = |at: usize| rest.get(at..at + 2).map_or(0, |b| u16::from_be_bytes([b[0], b[1]]));
    let ported = matches!(protocol, protocol::TCP | protocol::UDP);
    let (from, to) = if ported { (port(0), port(2)) } else { (0, 0) };
    Ip { protocol, source: SocketAddr::new(source, from), destination: SocketAddr::new(destination, to) }
}

impl fmt::Display for Packet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.ip {
            Some(ip) => write!(f, "proto {} {} -> {}", ip.protocol, ip.source, ip.destination)?,
            None => write!(f, "ethertype {:#06x}", self.ether_type)?,
        }
        write!(f, ", {} bytes", self.bytes.len())
    }
}

/// Writes `frames` to `device` as they are. A device without link headers takes bare IP packets, right or wrong.
///
/// # Panics
/// If there is no such device.
pub(crate) fn inject(ns: &Netns, device: &str, frames: &[Vec<u8>]) {
    let name = CString::new(device).expect("a device name");
    let socket = ns.enter(move || packet_socket(&name, 0)).unwrap_or_else(|error| panic!("{device}: {error}"));
    socket.set_nonblocking(false).expect("our own socket");
    let sent = frames.iter().filter(|frame| socket.send(frame).is_ok()).count();
    // The kernel refuses a few that are shorter than any header; if it refuses all, nothing was tested.
    assert!(sent * 2 > frames.len(), "{device} took {sent} of {} frames", frames.len());
}

/// A packet socket bound to `device`; protocol 0 makes one that only sends.
pub(crate) fn packet_socket(device: &CString, protocol: libc::c_int) -> io::Result<Socket> {
    let socket = Socket::new(Domain::PACKET, Type::RAW.nonblocking(), None)?;
    socket.set_recv_buffer_size(64 << 20)?;
    let index = nix::net::if_::if_nametoindex(device.as_c_str())?;
    let fill = |storage: *mut socket2::SockAddrStorage, length: *mut libc::socklen_t| {
        // SAFETY: sockaddr_storage is large enough and aligned for every address, and came zeroed.
        let address = unsafe { &mut *storage.cast::<libc::sockaddr_ll>() };
        address.sll_family = libc::AF_PACKET as libc::sa_family_t;
        address.sll_protocol = (protocol as u16).to_be();
        address.sll_ifindex = libc::c_int::try_from(index).map_err(io::Error::other)?;
        // SAFETY: points to a length of the caller's.
        unsafe { *length = size_of::<libc::sockaddr_ll>() as libc::socklen_t };
        Ok(())
    };
    // SAFETY: `fill` writes a whole sockaddr_ll and its length.
    let ((), address) = unsafe { SockAddr::try_init(fill) }?;
    socket.bind(&address)?;
    Ok(socket)
}
