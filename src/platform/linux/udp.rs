//! A datagram socket for many peers that hears of ICMP errors and can set DF (udp(7), ip(7), ipv6(7)).

use std::io::{self, IoSlice, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::num::NonZeroU16;
use std::os::fd::AsRawFd;
use std::sync::LazyLock;
use std::task::{Context, Poll, ready};

use nix::libc::{self, c_int};
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, sendmsg, setsockopt, sockopt,
};
use nix::{cmsg_space, setsockopt_impl, sockopt_impl};
use tokio::io::unix::AsyncFd;
use tokio::io::{Interest, ReadBuf};

use crate::net::Reach;

/// `SO_SELECT_ERR_QUEUE` of asm-generic/socket.h: a filled error queue raises POLLPRI, which epoll reports as readable.
const SO_SELECT_ERR_QUEUE: c_int = 45;

/// Datagrams of one train: `UDP_MAX_SEGMENTS` of linux/udp.h, which newer kernels have raised.
const MOST_SEGMENTS: usize = 64;
/// Bytes of one train: what an IP packet holds, with room for headers of any length.
const LONGEST_TRAIN: usize = 64_000;

/// Whether this kernel sends trains as they should be.
static SENDS_TRAINS: LazyLock<bool> = LazyLock::new(|| {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    !has_segmentation_bug(&release)
});

sockopt_impl!(
    /// Wakes readers for the error queue too.
    SelectErrQueue,
    SetOnly,
    libc::SOL_SOCKET,
    SO_SELECT_ERR_QUEUE,
    bool
);
sockopt_impl!(
    /// Path MTU discovery, IPv4.
    Ipv4MtuDiscover,
    SetOnly,
    libc::IPPROTO_IP,
    libc::IP_MTU_DISCOVER,
    c_int
);
sockopt_impl!(
    /// Path MTU discovery, IPv6.
    Ipv6MtuDiscover,
    SetOnly,
    libc::IPPROTO_IPV6,
    libc::IPV6_MTU_DISCOVER,
    c_int
);

/// What a [`DatagramSocket`] received.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arrival {
    /// A payload from this peer, now in the caller's buffer.
    Payload(SocketAddr),
    /// Several payloads of one peer, now one behind the other in the caller's buffer.
    Train {
        /// The peer.
        from: SocketAddr,
        /// The bytes of each; the last may be shorter.
        size: NonZeroU16,
    },
    /// An earlier datagram to `to` met an ICMP error, or did not fit the path.
    Failed {
        /// Where the datagram was sent.
        to: SocketAddr,
        /// What came of it.
        why: Reach,
    },
}

/// An unconnected, unblocking socket of one family. It lives in the runtime that it was made in.
#[derive(Debug)]
pub struct DatagramSocket {
    io: AsyncFd<UdpSocket>,
    ipv6: bool,
    /// Whether DF is set at present; changed only when a datagram wants it otherwise.
    dont_fragment: bool,
    /// The error queue may hold something. ICMP errors announce themselves as the socket's error, which the next
    /// call returns; only local ones (EMSGSIZE) lie there unannounced, and those begin with a failed send.
    errors: bool,
    /// The last destination whose path was too small: the kernel tells its port only for connected sockets.
    too_big: Option<SocketAddr>,
    /// Datagrams beyond this size are not sent in trains: the kernel has refused one. 0: none are.
    train_limit: usize,
    /// Where the size of a received train and its destination are told; None when neither is asked for.
    control: Option<Vec<u8>>,
    /// Where the last datagram came to.
    reached_at: Option<IpAddr>,
}

impl DatagramSocket {
    /// The port that it is bound to.
    #[must_use]
    pub fn port(&self) -> Option<u16> {
        Some(self.io.get_ref().local_addr().ok()?.port())
    }

    /// Takes over a bound socket that does not block.
    ///
    /// # Errors
    /// What the kernel says to the options or the reactor to the descriptor.
    pub fn new(socket: UdpSocket) -> io::Result<Self> {
        let ipv6 = socket.local_addr()?.is_ipv6();
        if ipv6 {
            setsockopt(&socket, sockopt::Ipv6RecvErr, &true)?;
        } else {
            setsockopt(&socket, sockopt::Ipv4RecvErr, &true)?;
        }
        setsockopt(&socket, SelectErrQueue, &true)?;
        set_dont_fragment(&socket, ipv6, false)?;
        let interest = Interest::READABLE | Interest::WRITABLE | Interest::PRIORITY;
        // SAFETY: the descriptor belongs to `socket`, which moves into the AsyncFd and never leaves it, so it stays
        // open and the same for as long as it is registered.
        let io = unsafe { AsyncFd::register_with_interest(socket, interest) }?;
        let train_limit = if *SENDS_TRAINS { LONGEST_TRAIN } else { 0 };
        Ok(Self {
            io,
            ipv6,
            dont_fragment: false,
            errors: false,
            too_big: None,
            train_limit,
            control: None,
            reached_at: None,
        })
    }

    /// From now on datagrams of one peer and one size may arrive as one [`Arrival::Train`] (`UDP_GRO`, udp(7)), for which
    /// the receiving buffer has to have 64 KiB: what does not fit is lost. False: the kernel knows no trains, and every
    /// datagram comes by itself.
    pub fn receive_trains(&mut self) -> bool {
        let accepted = setsockopt(self.io.get_ref(), sockopt::UdpGroSegment, &true).is_ok();
        if accepted {
            self.control.get_or_insert_with(space);
        }
        accepted
    }

    /// From now on [`reached_at`](Self::reached_at) knows. False: the kernel does not tell.
    pub fn receive_destinations(&mut self) -> bool {
        let socket = self.io.get_ref();
        let accepted = if self.ipv6 {
            setsockopt(socket, sockopt::Ipv6RecvPacketInfo, &true).is_ok()
        } else {
            setsockopt(socket, sockopt::Ipv4PacketInfo, &true).is_ok()
        };
        if accepted {
            self.control.get_or_insert_with(space);
        }
        accepted
    }

    /// The address of this host that the last datagram or train was sent to, if that was asked for.
    #[must_use]
    pub fn reached_at(&self) -> Option<IpAddr> {
        self.reached_at
    }

    /// The socket's own address.
    ///
    /// # Errors
    /// Those of getsockname(2).
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.io.get_ref().local_addr()
    }

    /// Sends one datagram; with `dont_fragment`, what exceeds the path's MTU fails with `EMSGSIZE`, and
    /// [`poll_recv_from`](Self::poll_recv_from) tells the MTU. Without, the kernel fragments.
    ///
    /// # Errors
    /// Those of sendto(2) for this very datagram; errors of earlier ones come out of the other direction.
    pub fn poll_send_to(
        &mut self,
        cx: &mut Context<'_>,
        payload: &[u8],
        to: SocketAddr,
        dont_fragment: bool,
    ) -> Poll<io::Result<()>> {
        self.set_dont_fragment(dont_fragment)?;
        match ready!(self.poll_whole(cx, |socket| send(socket, payload, to))) {
            Ok(pending) => self.errors |= pending,
            Err(error) => {
                self.errors = true;
                if error.raw_os_error() == Some(libc::EMSGSIZE) {
                    self.too_big = Some(to);
                }
                return Poll::Ready(Err(error));
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Sends the first datagrams of `train` in one call (`UDP_SEGMENT`, udp(7)), each as
    /// [`poll_send_to`](Self::poll_send_to) would. All but the last have `size` bytes. Returns the bytes that are done
    /// with, those of one datagram at least.
    ///
    /// # Errors
    /// Those of `poll_send_to` for the first datagram; what follows it is still to be sent.
    pub fn poll_send_train(
        &mut self,
        cx: &mut Context<'_>,
        train: &[u8],
        size: NonZeroU16,
        to: SocketAddr,
        dont_fragment: bool,
    ) -> Poll<io::Result<usize>> {
        let each = usize::from(size.get());
        let segments = (LONGEST_TRAIN / each).min(MOST_SEGMENTS);
        let cut = &train[..train.len().min(segments * each)];
        if cut.len() > each && each <= self.train_limit {
            self.set_dont_fragment(dont_fragment)?;
            match ready!(self.poll_whole(cx, |socket| send_train(socket, cut, size, to))) {
                Ok(()) => return Poll::Ready(Ok(cut.len())),
                // Nothing was sent. The error may be an earlier datagram's, or that of any of these: sent by themselves
                // they tell.
                Err(error) => {
                    self.errors = true;
                    self.train_limit = limit_after(&error, each, self.train_limit);
                }
            }
        }
        let first = &train[..train.len().min(each)];
        self.poll_send_to(cx, first, to, dont_fragment).map_ok(|()| first.len())
    }

    /// Does `send` until the kernel has room for it.
    fn poll_whole<T>(&self, cx: &mut Context<'_>, send: impl Fn(&UdpSocket) -> io::Result<T>) -> Poll<io::Result<T>> {
        // The socket of a new association has room, though the reactor has not said so yet: it is asked only when the
        // kernel has none, so that whoever sends without waiting loses no first datagram.
        let mut sent = send(self.io.get_ref());
        while sent.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock) {
            let mut guard = ready!(self.io.poll_write_ready(cx))?;
            if let Ok(again) = guard.try_io(|io| send(io.get_ref())) {
                sent = again;
            }
        }
        Poll::Ready(sent)
    }

    fn set_dont_fragment(&mut self, on: bool) -> io::Result<()> {
        if self.dont_fragment != on {
            set_dont_fragment(self.io.get_ref(), self.ipv6, on)?;
            self.dont_fragment = on;
        }
        Ok(())
    }

    /// Receives one datagram or one train of them, or the error that one of ours met.
    ///
    /// # Errors
    /// The reactor is gone; errors of single peers are an [`Arrival`].
    pub fn poll_recv_from(&mut self, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<Arrival>> {
        loop {
            if self.errors {
                match next_error(self.io.get_ref()) {
                    Ok(Some((mut to, why))) => {
                        if to.port() == 0 {
                            to = self.too_big.filter(|big| big.ip() == to.ip()).unwrap_or(to);
                        }
                        return Poll::Ready(Ok(Arrival::Failed { to, why }));
                    }
                    Ok(None) => continue,
                    Err(_) => self.errors = false,
                }
            }
            let mut guard = ready!(self.io.poll_read_ready(cx))?;
            // The kernel fills the buffer: handing it over initialised costs once, as ReadBuf remembers.
            let space = buffer.initialize_unfilled();
            let control = self.control.as_mut();
            match guard.try_io(|io| receive(io.get_ref(), space, control)) {
                Ok(Ok((length, arrival, reached_at))) => {
                    buffer.advance(length);
                    self.reached_at = reached_at;
                    return Poll::Ready(Ok(arrival));
                }
                // A socket error is the echo of an entry in the error queue. Asking the queue ends this: every look
                // takes an entry out, and the socket error is cleared by being reported.
                Ok(Err(_)) => self.errors = true,
                Err(_would_block) => {}
            }
        }
    }
}

/// Sends, and says whether an error of an earlier datagram was met on the way. The kernel reports that one first,
/// whoever asks (sk_err); the second try then speaks of this datagram.
fn send(socket: &UdpSocket, payload: &[u8], to: SocketAddr) -> io::Result<bool> {
    match socket.send_to(payload, to) {
        Ok(_) => Ok(false),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock || error.raw_os_error() == Some(libc::EMSGSIZE) => {
            Err(error)
        }
        Err(_) => socket.send_to(payload, to).map(|_| true),
    }
}

/// Sends all of `train` or nothing.
fn send_train(socket: &UdpSocket, train: &[u8], size: NonZeroU16, to: SocketAddr) -> io::Result<()> {
    let (parts, size) = ([IoSlice::new(train)], size.get());
    let control = [ControlMessage::UdpGsoSegments(&size)];
    sendmsg(socket.as_raw_fd(), &parts, &control, MsgFlags::empty(), Some(&SockaddrStorage::from(to)))?;
    Ok(())
}

/// Room for what is told of a received train.
fn space() -> Vec<u8> {
    cmsg_space!(c_int, libc::in6_pktinfo)
}

/// How many bytes there were, from whom, and the address of this host that they were sent to.
type Came = (usize, Arrival, Option<IpAddr>);

/// Receives into `space`. With `control`, a train too.
fn receive(socket: &UdpSocket, space: &mut [u8], control: Option<&mut Vec<u8>>) -> io::Result<Came> {
    let Some(control) = control else {
        return socket.recv_from(space).map(|(length, from)| (length, Arrival::Payload(from), None));
    };
    let mut parts = [IoSliceMut::new(space)];
    let message = recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut parts, Some(control), MsgFlags::empty())?;
    let from = message.address.as_ref().and_then(socket_addr).ok_or(io::ErrorKind::InvalidData)?;
    let (mut size, mut reached_at) = (None, None);
    for control in message.cmsgs()? {
        match control {
            ControlMessageOwned::UdpGroSegments(each) => size = u16::try_from(each).ok().and_then(NonZeroU16::new),
            // Of a broadcast, the host's own address on that link.
            ControlMessageOwned::Ipv4PacketInfo(info) => {
                reached_at = Some(Ipv4Addr::from(u32::from_be(info.ipi_spec_dst.s_addr)).into());
            }
            ControlMessageOwned::Ipv6PacketInfo(info) => {
                reached_at = Some(Ipv6Addr::from(info.ipi6_addr.s6_addr).into());
            }
            _ => {}
        }
    }
    // A train of one datagram is none.
    let size = size.filter(|size| message.bytes > usize::from(size.get()));
    Ok((message.bytes, size.map_or(Arrival::Payload(from), |size| Arrival::Train { from, size }), reached_at))
}

/// The new limit of [`DatagramSocket::train_limit`] after a train of datagrams of `size` bytes met `error`.
fn limit_after(error: &io::Error, size: usize, limit: usize) -> usize {
    match error.raw_os_error() {
        // Larger than the path or the device takes: the kernel does not fragment the parts of a train.
        Some(libc::EINVAL | libc::EMSGSIZE) => size - 1,
        // No trains at all, or not through this device.
        Some(libc::EIO | libc::EOPNOTSUPP | libc::ENOPROTOOPT) => 0,
        _ => limit,
    }
}

/// Linux 7.0 to 7.1.4 spoil what UDP_SEGMENT sends.
fn has_segmentation_bug(release: &str) -> bool {
    let mut numbers = release.trim().split(|letter: char| !letter.is_ascii_digit()).map(str::parse::<u32>);
    let mut next = || numbers.next().and_then(Result::ok);
    match (next(), next(), next()) {
        (Some(7), Some(0), _) => true,
        (Some(7), Some(1), patch) => patch.is_none_or(|patch| patch <= 4),
        _ => false,
    }
}

/// Takes one entry out of the error queue: None if it says nothing to a peer.
fn next_error(socket: &UdpSocket) -> io::Result<Option<(SocketAddr, Reach)>> {
    // The queue returns the start of the datagram that failed; nobody needs it.
    let mut payload = [0; 1];
    let mut parts = [IoSliceMut::new(&mut payload)];
    // Where the socket is told of destinations, that stands before the error.
    let mut control = cmsg_space!(libc::in6_pktinfo, libc::sock_extended_err, libc::sockaddr_in6);
    let flags = MsgFlags::MSG_ERRQUEUE | MsgFlags::MSG_DONTWAIT;
    let message = recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut parts, Some(&mut control), flags)?;
    let Some(to) = message.address.as_ref().and_then(socket_addr) else { return Ok(None) };
    let why = message.cmsgs()?.find_map(|control| match control {
        ControlMessageOwned::Ipv4RecvErr(error, _) | ControlMessageOwned::Ipv6RecvErr(error, _) => reach(&error),
        _ => None,
    });
    Ok(why.map(|why| (to, why)))
}

fn socket_addr(address: &SockaddrStorage) -> Option<SocketAddr> {
    if let Some(v4) = address.as_sockaddr_in() {
        return Some(SocketAddr::new(IpAddr::V4(v4.ip()), v4.port()));
    }
    address.as_sockaddr_in6().map(|v6| SocketAddr::new(IpAddr::V6(v6.ip()), v6.port()))
}

/// What an error tells: the ICMP message behind it, or the kernel's errno (icmp_err_convert, icmpv6_err_convert), which is the
/// same for codes of which programs hear and others of which they do not.
fn reach(error: &libc::sock_extended_err) -> Option<Reach> {
    match (error.ee_origin, error.ee_type, error.ee_code) {
        (libc::SO_EE_ORIGIN_ICMP, 3, 0) => return Some(Reach::Network),
        (libc::SO_EE_ORIGIN_ICMP, 3, 1) => return Some(Reach::Host),
        (libc::SO_EE_ORIGIN_ICMP, 3, 2) | (libc::SO_EE_ORIGIN_ICMP6, 4, 1) => return Some(Reach::Protocol),
        (libc::SO_EE_ORIGIN_ICMP, 3, 13) => return Some(Reach::Prohibited),
        (libc::SO_EE_ORIGIN_ICMP, 3, code @ (5..=12 | 14..=15)) => return Some(Reach::Coded(code)),
        (libc::SO_EE_ORIGIN_LOCAL | libc::SO_EE_ORIGIN_ICMP | libc::SO_EE_ORIGIN_ICMP6, ..) => {}
        _ => return None,
    }
    match c_int::try_from(error.ee_errno).ok()? {
        libc::ECONNREFUSED => Some(Reach::Port),
        libc::EMSGSIZE => Some(Reach::TooBig(error.ee_info)),
        libc::ENETUNREACH => Some(Reach::Network),
        libc::EHOSTUNREACH => Some(Reach::Host),
        libc::EACCES | libc::EPERM => Some(Reach::Prohibited),
        _ => None,
    }
}

fn set_dont_fragment(socket: &UdpSocket, ipv6: bool, on: bool) -> io::Result<()> {
    if ipv6 {
        let mode = if on { libc::IPV6_PMTUDISC_DO } else { libc::IPV6_PMTUDISC_DONT };
        setsockopt(socket, Ipv6MtuDiscover, &mode)?;
    } else {
        let mode = if on { libc::IP_PMTUDISC_DO } else { libc::IP_PMTUDISC_DONT };
        setsockopt(socket, Ipv4MtuDiscover, &mode)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
