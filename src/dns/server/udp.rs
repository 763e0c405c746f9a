//! DNS over UDP: a batch is read, answered, logged with one write, and sent.

use std::io::{self, IoSlice, IoSliceMut};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsRawFd;
use std::sync::Arc;

use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, sendmsg, setsockopt, sockopt,
};
use tokio::io::Interest;
use tokio::net::UdpSocket;
use tokio::task::JoinSet;

use super::places::Places;
use crate::dns::{Answer, Dns, Transport, now};

/// Datagrams answered per write of the log.
const BATCH: usize = 64;
/// Queries of all clients together that may wait for nameservers, and of them those of one client other than this host; one
/// more is dropped, as a full socket would.
const MAX_WAITING: usize = 2048;
const MAX_OF_CLIENT: usize = 256;
/// No query is longer than this.
const DATAGRAM: usize = 4096;

/// Where an answer goes, and which of our addresses it comes from.
#[derive(Debug, Clone, Copy)]
struct Route {
    client: SockaddrStorage,
    /// Of a wildcard socket: the address that was asked.
    local: Option<Local>,
}

impl Route {
    /// The client's address.
    fn ip(&self) -> IpAddr {
        let v4 = self.client.as_sockaddr_in().map(|client| client.ip().into());
        let v6 = || self.client.as_sockaddr_in6().map(|client| client.ip().into());
        // A socket of either family hears of nobody else.
        v4.or_else(v6).unwrap_or(IpAddr::V6(std::net::Ipv6Addr::UNSPECIFIED))
    }
}

/// Queries that wait for nameservers.
struct Waiting {
    asked: JoinSet<(Vec<u8>, Route)>,
    places: Places,
}

#[derive(Debug, Clone, Copy)]
enum Local {
    V4(nix::libc::in_pktinfo),
    V6(nix::libc::in6_pktinfo),
}

/// Makes a wildcard socket report the address that each datagram was sent to.
pub(super) fn ask_for_destinations(socket: &impl std::os::fd::AsFd, listen: SocketAddr) -> io::Result<()> {
    match listen.ip() {
        IpAddr::V4(_) => setsockopt(socket, sockopt::Ipv4PacketInfo, &true)?,
        // On a socket for both families this covers IPv4 too, in mapped form.
        IpAddr::V6(_) => setsockopt(socket, sockopt::Ipv6RecvPacketInfo, &true)?,
    }
    Ok(())
}

/// Answers datagrams until dropped.
pub(super) async fn serve(dns: &Arc<Dns>, socket: &UdpSocket, wildcard: bool) -> io::Result<()> {
    let mut waiting = Waiting { asked: JoinSet::new(), places: Places::new(MAX_WAITING, MAX_OF_CLIENT) };
    let mut buffer = vec![0; DATAGRAM];
    let mut ready: Vec<(Vec<u8>, Route)> = Vec::new();
    loop {
        tokio::select! {
            readable = socket.readable() => {
                readable?;
                read_batch(dns, socket, wildcard, &mut buffer, &mut ready, &mut waiting)?;
            }
            Some(answered) = waiting.asked.join_next() => ready.extend(answered),
        }
        dns.flush();
        for (reply, route) in ready.drain(..) {
            // A client that cannot be reached loses its answer, and nobody else does.
            let _ = socket.async_io(Interest::WRITABLE, || send(socket, &reply, &route)).await;
        }
    }
}

fn read_batch(
    dns: &Arc<Dns>,
    socket: &UdpSocket,
    wildcard: bool,
    buffer: &mut [u8],
    ready: &mut Vec<(Vec<u8>, Route)>,
    waiting: &mut Waiting,
) -> io::Result<()> {
    for _ in 0..BATCH {
        let (length, route) = match socket.try_io(Interest::READABLE, || receive(socket, wildcard, buffer)) {
            Ok(Some(received)) => received,
            Ok(None) => continue,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            // Errors of earlier answers, such as an unreachable client, are reported here and are over.
            Err(error) if error.raw_os_error() != Some(nix::libc::EBADF) => return Ok(()),
            Err(error) => return Err(error),
        };
        let mut reply = Vec::new();
        match dns.answer(&buffer[..length], Transport::Udp, route.ip(), now(), &mut reply) {
            Answer::Ready => ready.push((reply, route)),
            Answer::Ask(question) => match waiting.places.enter(route.ip(), waiting.asked.len()) {
                Some(place) => {
                    let dns = Arc::clone(dns);
                    waiting.asked.spawn(async move {
                        let answer = dns.ask(question).await;
                        drop(place);
                        (answer, route)
                    });
                }
                None => dns.counters().drop_question(),
            },
            Answer::Drop => {}
        }
    }
    Ok(())
}

/// Reads one datagram; None if it was not sent to an address of ours alone.
fn receive(socket: &UdpSocket, wildcard: bool, buffer: &mut [u8]) -> io::Result<Option<(usize, Route)>> {
    let mut space = nix::cmsg_space!(nix::libc::in_pktinfo, nix::libc::in6_pktinfo);
    let mut vector = [IoSliceMut::new(buffer)];
    let control = wildcard.then_some(&mut space[..]);
    let received = recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut vector, control, MsgFlags::empty())?;
    let Some(client) = received.address else { return Ok(None) };
    let mut local = None;
    if wildcard {
        for message in received.cmsgs()? {
            match message {
                ControlMessageOwned::Ipv4PacketInfo(info) => local = Local::v4(info),
                ControlMessageOwned::Ipv6PacketInfo(info) => local = Local::v6(info),
                _ => {}
            }
        }
        if local.is_none() {
            return Ok(None);
        }
    }
    Ok(Some((received.bytes, Route { client, local })))
}

impl Local {
    fn v4(mut info: nix::libc::in_pktinfo) -> Option<Self> {
        let to = std::net::Ipv4Addr::from(info.ipi_addr.s_addr.to_ne_bytes());
        // Answering a broadcast would tell a whole network that a resolver is here.
        if to.is_multicast() || info.ipi_spec_dst.s_addr != info.ipi_addr.s_addr {
            return None;
        }
        // The routing table, not the way in, picks the way out.
        info.ipi_ifindex = 0;
        Some(Self::V4(info))
    }

    fn v6(mut info: nix::libc::in6_pktinfo) -> Option<Self> {
        let to = std::net::Ipv6Addr::from(info.ipi6_addr.s6_addr);
        if to.is_multicast() {
            return None;
        }
        if !to.is_unicast_link_local() {
            info.ipi6_ifindex = 0;
        }
        Some(Self::V6(info))
    }
}

fn send(socket: &UdpSocket, reply: &[u8], route: &Route) -> io::Result<()> {
    let vector = [IoSlice::new(reply)];
    let message = match &route.local {
        Some(Local::V4(info)) => &[ControlMessage::Ipv4PacketInfo(info)][..],
        Some(Local::V6(info)) => &[ControlMessage::Ipv6PacketInfo(info)],
        None => &[],
    };
    sendmsg(socket.as_raw_fd(), &vector, message, MsgFlags::empty(), Some(&route.client))?;
    Ok(())
}
