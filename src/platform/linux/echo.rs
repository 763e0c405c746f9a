//! Sockets for echo requests: raw ones, which see every ICMP message that comes to this host (raw(7)); where they are
//! not allowed, those that the kernel has for `ping` (icmp(7)), with one id each.

use std::io::{self, IoSlice, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsRawFd;
use std::task::{Context, Poll, ready};

use nix::libc::{self, c_int};
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, sendmsg, setsockopt, sockopt,
};
use nix::{cmsg_space, setsockopt_impl, sockopt_impl};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use self::message::{Told, read, read_v4};
use super::socket::deepen;
use super::udp::{Ipv4MtuDiscover, Ipv6MtuDiscover, SelectErrQueue};
use crate::net::{Echo, EchoArrival, EchoError, EchoFailure};
use crate::stack::checksum;

mod message;

/// Types that pass: the others of all ICMP that comes to this host are not for us.
const V4_TYPES: [u8; 4] = [0, 3, 11, 12];
const V6_TYPES: [u8; 5] = [1, 2, 3, 4, 129];

/// `ICMP_FILTER` of linux/icmp.h.
const ICMP_FILTER: c_int = 1;
/// `ICMPV6_FILTER` of linux/icmpv6.h.
const ICMPV6_FILTER: c_int = 1;

sockopt_impl!(
    /// Types of ICMP messages to leave out, a bit each (raw(7)).
    IcmpFilter,
    SetOnly,
    libc::SOL_RAW,
    ICMP_FILTER,
    u32
);
sockopt_impl!(
    /// The same for ICMPv6 (RFC 3542 section 3.2; Linux leaves out the types whose bit is set).
    Icmp6Filter,
    SetOnly,
    libc::IPPROTO_ICMPV6,
    ICMPV6_FILTER,
    [u32; 8]
);

/// An unblocking socket for echo requests of one family. It lives in the runtime that it was made in.
#[derive(Debug)]
pub struct EchoSocket {
    io: AsyncFd<Socket>,
    ipv6: bool,
    /// The id that the kernel has given a ping socket.
    own_id: Option<u16>,
    /// Whether DF is set at present; changed only when a request wants it otherwise.
    dont_fragment: bool,
    control: Vec<u8>,
    /// A ping socket's error queue may hold something.
    errors: bool,
}

impl EchoSocket {
    /// Opens a raw socket (CAP_NET_RAW), or else a ping socket (`net.ipv4.ping_group_range`). `prepare` sets what all our
    /// sockets have.
    ///
    /// # Errors
    /// What the kernel says; `PermissionDenied` if it allows neither.
    pub(in crate::platform) fn open(ipv6: bool, prepare: impl Fn(&Socket) -> io::Result<()>) -> io::Result<Self> {
        let (domain, protocol) = if ipv6 { (Domain::IPV6, Protocol::ICMPV6) } else { (Domain::IPV4, Protocol::ICMPV4) };
        match Socket::new(domain, Type::RAW.nonblocking(), Some(protocol)) {
            Ok(socket) => {
                prepare(&socket)?;
                filter(&socket, ipv6)?;
                deepen(&socket);
                Self::register(socket, ipv6, None)
            }
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                let socket = Socket::new(domain, Type::DGRAM.nonblocking(), Some(protocol))?;
                prepare(&socket)?;
                let id = bind(&socket, ipv6)?;
                hear_errors(&socket, ipv6)?;
                Self::register(socket, ipv6, Some(id))
            }
            Err(error) => Err(error),
        }
    }

    fn register(socket: Socket, ipv6: bool, own_id: Option<u16>) -> io::Result<Self> {
        if ipv6 {
            setsockopt(&socket, sockopt::Ipv6RecvHopLimit, &true)?;
            setsockopt(&socket, sockopt::Ipv6RecvTClass, &true)?;
            setsockopt(&socket, sockopt::Ipv6RecvPacketInfo, &true)?;
        } else {
            setsockopt(&socket, sockopt::Ipv4RecvTtl, &true)?;
            setsockopt(&socket, sockopt::IpRecvTos, &true)?;
        }
        set_dont_fragment(&socket, ipv6, false)?;
        let interest = Interest::READABLE | Interest::PRIORITY;
        // SAFETY: the descriptor belongs to `socket`, which moves into the AsyncFd and never leaves it, so it stays
        // open and the same for as long as it is registered.
        let io = unsafe { AsyncFd::register_with_interest(socket, interest) }?;
        let control = cmsg_space!(c_int, c_int, libc::in6_pktinfo, libc::sock_extended_err, libc::sockaddr_in6);
        Ok(Self { io, ipv6, own_id, dont_fragment: false, control, errors: false })
    }

    /// The one id that a ping socket sends with and hears of; None: it is a raw one.
    #[must_use]
    pub fn own_id(&self) -> Option<u16> {
        self.own_id
    }

    /// Sends one request now, with its own time to live and type of service. With `dont_fragment`, what the device of the
    /// way out does not take fails with `EMSGSIZE`; routers on the way say so by themselves.
    ///
    /// # Errors
    /// Those of sendmsg(2). `WouldBlock`: there is no room for it.
    pub fn send(&mut self, to: IpAddr, echo: &Echo<'_>) -> io::Result<()> {
        if self.dont_fragment != echo.dont_fragment {
            set_dont_fragment(self.io.get_ref(), self.ipv6, echo.dont_fragment)?;
            self.dont_fragment = echo.dont_fragment;
        }
        let head = self.head(echo);
        let parts = [IoSlice::new(&head), IoSlice::new(echo.payload)];
        let (ttl, class, tos) = (c_int::from(echo.ttl), i32::from(echo.tos), echo.tos);
        let control = if self.ipv6 {
            [ControlMessage::Ipv6HopLimit(&ttl), ControlMessage::Ipv6TClass(&class)]
        } else {
            [ControlMessage::Ipv4Ttl(&ttl), ControlMessage::Ipv4Tos(&tos)]
        };
        let to = SockaddrStorage::from(SocketAddr::new(to, 0));
        let socket = self.io.get_ref().as_raw_fd();
        let send = || sendmsg(socket, &parts, &control, MsgFlags::MSG_DONTWAIT, Some(&to)).map_err(io::Error::from);
        let sent = match send() {
            // A ping socket reports what came of an earlier request first, whoever asks; the second try is this one's. The
            // reader, woken by the same news, finds it in the queue.
            Err(_) if self.own_id.is_some() => {
                self.errors = true;
                send()
            }
            sent => sent,
        };
        match sent {
            Ok(_) => Ok(()),
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => Err(io::ErrorKind::WouldBlock.into()),
            Err(error) => Err(error),
        }
    }

    /// The header of an echo request. The kernel completes it where it knows more: for ping sockets and for ICMPv6.
    fn head(&self, echo: &Echo<'_>) -> [u8; 8] {
        let (id, sequence) = (echo.id.to_be_bytes(), echo.sequence.to_be_bytes());
        let kind = if self.ipv6 { 128 } else { 8 };
        let mut head = [kind, 0, 0, 0, id[0], id[1], sequence[0], sequence[1]];
        if !self.ipv6 {
            let sum = checksum(&head, echo.payload);
            head[2..4].copy_from_slice(&sum.to_be_bytes());
        }
        head
    }

    /// Whether the device that it was bound to is gone. One that is plugged in again is another one, though its name be the
    /// same: a socket is bound to the number.
    #[must_use]
    pub fn is_stranded(&self) -> bool {
        // The kernel looks the name up by that number.
        self.io.get_ref().device().is_err_and(|error| error.raw_os_error() == Some(libc::ENODEV))
    }

    /// Receives one reply or error. `buffer` has to hold the largest packet there is.
    ///
    /// # Errors
    /// The reactor is gone.
    pub fn poll_recv(&mut self, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<EchoArrival>> {
        loop {
            if self.errors {
                match self.next_error(buffer) {
                    Ok(Some(error)) => return Poll::Ready(Ok(EchoArrival::Error(error))),
                    Ok(None) => continue,
                    Err(_) => self.errors = false,
                }
            }
            let mut guard = ready!(self.io.poll_read_ready(cx))?;
            let (ipv6, raw) = (self.ipv6, self.own_id.is_none());
            match guard.try_io(|io| receive(io.get_ref(), buffer, &mut self.control, ipv6, raw)) {
                Ok(Ok(Some(arrival))) => return Poll::Ready(Ok(arrival)),
                // Not for us, or damaged.
                Ok(Ok(None)) => {}
                // The echo of an entry in the error queue, or of a device that is gone; reporting it clears it.
                Ok(Err(_)) => self.errors = self.own_id.is_some(),
                Err(_would_block) => {}
            }
        }
    }

    /// Takes one entry out of a ping socket's error queue: None if it is no router's word about a request.
    fn next_error(&mut self, buffer: &mut [u8]) -> io::Result<Option<EchoError>> {
        let mut parts = [IoSliceMut::new(buffer)];
        let flags = MsgFlags::MSG_ERRQUEUE | MsgFlags::MSG_DONTWAIT;
        let socket = self.io.get_ref().as_raw_fd();
        let message = recvmsg::<SockaddrStorage>(socket, &mut parts, Some(&mut self.control), flags)?;
        let (to, length) = (message.address.as_ref().and_then(ip_of), message.bytes);
        let told = message.cmsgs()?.find_map(|control| match control {
            ControlMessageOwned::Ipv4RecvErr(error, from) => {
                Some((error, from.map(|from| IpAddr::V4(Ipv4Addr::from(u32::from_be(from.sin_addr.s_addr))))))
            }
            ControlMessageOwned::Ipv6RecvErr(error, from) => {
                Some((error, from.map(|from| IpAddr::V6(Ipv6Addr::from(from.sin6_addr.s6_addr)))))
            }
            _ => None,
        });
        let (Some(to), Some((error, router)), Some(id)) = (to, told, self.own_id) else { return Ok(None) };
        let from_network = matches!(error.ee_origin, libc::SO_EE_ORIGIN_ICMP | libc::SO_EE_ORIGIN_ICMP6);
        // What the kernel has kept of the request begins with its own header.
        let Some(head) = buffer.get(..length.min(8)).filter(|head| from_network && head.len() == 8) else {
            return Ok(None);
        };
        let sequence = u16::from_be_bytes([head[6], head[7]]);
        let message = EchoFailure { kind: error.ee_type, code: error.ee_code, word: error.ee_info };
        Ok(Some(EchoError { router, to, id, sequence, ttl: None, message, payload: 8..length }))
    }
}

/// Receives one message: None if it is not for us. A raw IPv4 socket hands over the IP header as well.
fn receive(
    socket: &Socket,
    buffer: &mut [u8],
    control: &mut [u8],
    ipv6: bool,
    raw: bool,
) -> io::Result<Option<EchoArrival>> {
    let mut parts = [IoSliceMut::new(buffer)];
    let message = recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut parts, Some(control), MsgFlags::MSG_DONTWAIT)?;
    let Some(from) = message.address.as_ref().and_then(ip_of) else { return Ok(None) };
    let mut told = Told { from, to: None, ttl: 0, tos: 0 };
    for control in message.cmsgs()? {
        match control {
            ControlMessageOwned::Ipv4Ttl(ttl) | ControlMessageOwned::Ipv6HopLimit(ttl) => {
                told.ttl = u8::try_from(ttl).unwrap_or(0);
            }
            ControlMessageOwned::Ipv4Tos(tos) => told.tos = tos,
            ControlMessageOwned::Ipv6TClass(class) => told.tos = u8::try_from(class).unwrap_or(0),
            ControlMessageOwned::Ipv6PacketInfo(info) => told.to = Some(Ipv6Addr::from(info.ipi6_addr.s6_addr).into()),
            _ => {}
        }
    }
    let length = message.bytes;
    let bytes = &buffer[..length];
    Ok(if raw && !ipv6 { read_v4(bytes, told.from) } else { read(bytes, 0, ipv6, &told) })
}

/// Leaves all that is not for us to others.
fn filter(socket: &Socket, ipv6: bool) -> io::Result<()> {
    if ipv6 {
        let mut left_out = [u32::MAX; 8];
        V6_TYPES.into_iter().for_each(|kind| left_out[usize::from(kind / 32)] &= !(1 << (kind % 32)));
        setsockopt(socket, Icmp6Filter, &left_out)?;
    } else {
        setsockopt(socket, IcmpFilter, &V4_TYPES.into_iter().fold(u32::MAX, |mask, kind| mask & !(1 << kind)))?;
    }
    Ok(())
}

/// Has the kernel choose an id.
fn bind(socket: &Socket, ipv6: bool) -> io::Result<u16> {
    let any: IpAddr = if ipv6 { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() };
    socket.bind(&SocketAddr::new(any, 0).into())?;
    let bound = socket.local_addr()?.as_socket().ok_or(io::ErrorKind::InvalidData)?;
    Ok(bound.port())
}

/// Ping sockets hear of errors by their queue alone.
fn hear_errors(socket: &Socket, ipv6: bool) -> io::Result<()> {
    if ipv6 {
        setsockopt(socket, sockopt::Ipv6RecvErr, &true)?;
    } else {
        setsockopt(socket, sockopt::Ipv4RecvErr, &true)?;
    }
    setsockopt(socket, SelectErrQueue, &true)?;
    Ok(())
}

/// With `on`, DF whatever is known of the path: what does not fit is for the routers on it to say, as to any sender.
fn set_dont_fragment(socket: &Socket, ipv6: bool, on: bool) -> io::Result<()> {
    if ipv6 {
        let mode = if on { libc::IPV6_PMTUDISC_PROBE } else { libc::IPV6_PMTUDISC_DONT };
        setsockopt(socket, Ipv6MtuDiscover, &mode)?;
    } else {
        let mode = if on { libc::IP_PMTUDISC_PROBE } else { libc::IP_PMTUDISC_DONT };
        setsockopt(socket, Ipv4MtuDiscover, &mode)?;
    }
    Ok(())
}

fn ip_of(address: &SockaddrStorage) -> Option<IpAddr> {
    let v4 = address.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
    v4.or_else(|| address.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip())))
}
