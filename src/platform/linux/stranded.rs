//! Connections of ours from an address that this host has no more: nothing comes back to them, and the kernel would try
//! for a quarter of an hour before it gave them up. Ended at once, they let their clients begin anew.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::mem;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use nix::sys::socket::{AddressFamily, SockType, SockaddrLike, SockaddrStorage, getsockname, getsockopt, sockopt};

use crate::platform::routing::{Family, RouteTable};
use crate::platform::survey::is_default_like;
use crate::platform::{Fwmark, Netlink, NetlinkError};

/// An address may come back, as after a sleep or when its interface is set up anew, and connections live on then. So long
/// it is waited for where there is no other way out.
const COMES_BACK: Duration = Duration::from_secs(10);

/// Knows which addresses the host had.
#[derive(Debug, Default)]
pub struct Stranded {
    /// With the index of the interface of each.
    had: BTreeMap<IpAddr, u32>,
    /// Those that may come back: where they were, and since when they are away.
    away: BTreeMap<IpAddr, (u32, Instant)>,
}

/// What a look at the host's addresses came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reset {
    /// How many connections were reset.
    pub connections: usize,
    /// After so long it is to be looked again, whatever happens.
    pub again: Option<Duration>,
}

impl Stranded {
    /// Looks at the host's addresses. Where one has gone that does not come back, or that another way out takes the place
    /// of, the TCP connections from it that carry `mark` are reset, and whoever uses them hears of that.
    ///
    /// # Errors
    /// The kernel does not tell which addresses and routes there are.
    pub fn reset(&mut self, mark: Fwmark, now: Instant) -> Result<Reset, NetlinkError> {
        let mut netlink = Netlink::open()?;
        let addresses = netlink.addresses()?;
        let has: BTreeMap<IpAddr, u32> = addresses.iter().map(|(index, net)| (net.addr(), *index)).collect();
        let gone = self.had.iter().filter(|(ip, _)| !has.contains_key(ip));
        self.away.extend(gone.map(|(ip, index)| (*ip, (*index, now))));
        self.away.retain(|ip, _| !has.contains_key(ip));
        self.had = has;
        let mut gone = BTreeSet::new();
        for family in [Family::V4, Family::V6] {
            let of_family = |ip: &IpAddr| ip.is_ipv4() == (family == Family::V4);
            if !self.away.keys().any(of_family) {
                continue;
            }
            let out = netlink.routes(family, |route| route.table == RouteTable::MAIN && is_default_like(&route.to))?;
            let leads_out = |index: u32| out.iter().any(|route| route.device == Some(index));
            let others = || self.had.iter().filter(|(ip, _)| of_family(ip) && !is_link_local(ip));
            let another = others().any(|(_, index)| leads_out(*index));
            let replaced = |at: u32| others().any(|(_, index)| *index == at);
            let late = |since: Instant| now.saturating_duration_since(since) >= COMES_BACK;
            let lost = self
                .away
                .iter()
                .filter(|(ip, (at, since))| of_family(ip) && (another || replaced(*at) || late(*since)));
            gone.extend(lost.map(|(ip, _)| *ip));
        }
        self.away.retain(|ip, _| !gone.contains(ip));
        let again = self
            .away
            .values()
            .map(|(_, since)| since)
            .min()
            .map(|since| (*since + COMES_BACK).saturating_duration_since(now));
        let connections = if gone.is_empty() { 0 } else { reset_from(&gone, mark) };
        Ok(Reset { connections, again })
    }
}

fn is_link_local(ip: &IpAddr) -> bool {
    matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local())
}

/// Resets the connections of this process that come from these addresses.
fn reset_from(gone: &BTreeSet<IpAddr>, mark: Fwmark) -> usize {
    let numbers = match descriptors() {
        Ok(numbers) => numbers,
        Err(error) => {
            tracing::warn!("connections from addresses that are gone are left to the kernel's patience: {error}");
            return 0;
        }
    };
    // A descriptor of our own: whatever becomes of the number meanwhile, it is this socket that is looked at and reset.
    let sockets = numbers.into_iter().filter_map(|number| duplicate(number).ok());
    sockets.filter(|socket| is_from(socket, gone, mark) && disconnect(socket).is_ok()).count()
}

/// The numbers of all descriptors of this process.
fn descriptors() -> io::Result<Vec<RawFd>> {
    let entries = std::fs::read_dir("/proc/self/fd")?;
    Ok(entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect())
}

fn duplicate(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: no memory is involved; a number that nobody has any more is refused.
    let copy = unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, 0) };
    if copy < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: fcntl has just made it for us.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}

/// Whether it is a TCP connection, or about to be one, with this mark, from one of these addresses.
fn is_from(socket: &OwnedFd, gone: &BTreeSet<IpAddr>, mark: Fwmark) -> bool {
    let stream = getsockopt(socket, sockopt::SockType).is_ok_and(|kind| kind == SockType::Stream);
    let listens = || getsockopt(socket, sockopt::AcceptConn).unwrap_or(true);
    let marked = || getsockopt(socket, sockopt::Mark).is_ok_and(|marked| marked == mark.0);
    stream && marked() && !listens() && local(socket).is_some_and(|ip| gone.contains(&ip))
}

fn local(socket: &OwnedFd) -> Option<IpAddr> {
    let name: SockaddrStorage = getsockname(socket.as_raw_fd()).ok()?;
    match name.family()? {
        AddressFamily::Inet => Some(name.as_sockaddr_in()?.ip().into()),
        AddressFamily::Inet6 => Some(IpAddr::V6(name.as_sockaddr_in6()?.ip()).to_canonical()),
        _ => None,
    }
}

/// Dissolves the connection (connect(2)): it is reset, and reading from it is an error.
fn disconnect(socket: impl AsFd) -> io::Result<()> {
    // SAFETY: all zeroes are a valid `sockaddr`.
    let mut nowhere: libc::sockaddr = unsafe { mem::zeroed() };
    nowhere.sa_family = libc::AF_UNSPEC as libc::sa_family_t;
    let length = size_of::<libc::sockaddr>() as libc::socklen_t;
    // SAFETY: the address lasts as long as the call, and is as long as it says.
    let done = unsafe { libc::connect(socket.as_fd().as_raw_fd(), &raw const nowhere, length) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{Ipv4Addr, TcpListener, TcpStream};

    use super::*;

    #[test]
    fn a_connection_from_an_address_that_is_gone_ends_by_an_error_and_others_go_on() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let from = |last: u8| {
            let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
            let source = std::net::SocketAddr::from((Ipv4Addr::new(127, 0, 77, last), 0));
            socket.bind(&source.into()).unwrap();
            socket.connect(&listener.local_addr().unwrap().into()).unwrap();
            TcpStream::from(socket)
        };
        let (mut stays, mut goes) = (from(1), from(2));
        let (mut peer, _) = listener.accept().unwrap();
        // Without privileges no socket has a mark; what has another one is not ours.
        let gone = BTreeSet::from([IpAddr::from([127, 0, 77, 2])]);
        assert_eq!(reset_from(&gone, Fwmark(9)), 0);
        assert_eq!(reset_from(&gone, Fwmark(0)), 1);
        let error = goes.read(&mut [0]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        peer.write_all(b"x").unwrap();
        let mut heard = [0];
        stays.read_exact(&mut heard).unwrap();
        assert_eq!(&heard, b"x");
        drop(goes);
        // The listener has another address, and would not be touched if it had this one.
        let listens = TcpListener::bind("127.0.77.2:0").unwrap();
        assert_eq!(reset_from(&gone, Fwmark(0)), 0);
        TcpStream::connect(listens.local_addr().unwrap()).unwrap();
    }
}
