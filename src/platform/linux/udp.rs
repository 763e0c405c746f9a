//! A datagram socket for many peers that hears of ICMP errors and can set DF (udp(7), ip(7), ipv6(7)).

use std::io::{self, IoSliceMut};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::task::{Context, Poll, ready};

use nix::libc::{self, c_int};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, setsockopt, sockopt};
use nix::{cmsg_space, setsockopt_impl, sockopt_impl};
use tokio::io::unix::AsyncFd;
use tokio::io::{Interest, ReadBuf};

use crate::net::Reach;

/// `SO_SELECT_ERR_QUEUE` of asm-generic/socket.h: a filled error queue raises POLLPRI, which epoll reports as readable.
const SO_SELECT_ERR_QUEUE: c_int = 45;

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
}

impl DatagramSocket {
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
        Ok(Self { io, ipv6, dont_fragment: false, errors: false, too_big: None })
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
        if self.dont_fragment != dont_fragment {
            set_dont_fragment(self.io.get_ref(), self.ipv6, dont_fragment)?;
            self.dont_fragment = dont_fragment;
        }
        // The socket of a new association has room, though the reactor has not said so yet: it is asked only when the
        // kernel has none, so that whoever sends without waiting loses no first datagram.
        let mut sent = send(self.io.get_ref(), payload, to);
        while sent.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock) {
            let mut guard = ready!(self.io.poll_write_ready(cx))?;
            if let Ok(again) = guard.try_io(|io| send(io.get_ref(), payload, to)) {
                sent = again;
            }
        }
        match sent {
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

    /// Receives one datagram, or the error that one of ours met.
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
            match guard.try_io(|io| io.get_ref().recv_from(space)) {
                Ok(Ok((length, from))) => {
                    buffer.advance(length);
                    return Poll::Ready(Ok(Arrival::Payload(from)));
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

/// Takes one entry out of the error queue: None if it says nothing to a peer.
fn next_error(socket: &UdpSocket) -> io::Result<Option<(SocketAddr, Reach)>> {
    // The queue returns the start of the datagram that failed; nobody needs it.
    let mut payload = [0; 1];
    let mut parts = [IoSliceMut::new(&mut payload)];
    let mut control = cmsg_space!(libc::sock_extended_err, libc::sockaddr_in6);
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

/// What the kernel's errno (icmp_err_convert, icmpv6_err_convert) tells of the ICMP message behind it.
fn reach(error: &libc::sock_extended_err) -> Option<Reach> {
    if !matches!(error.ee_origin, libc::SO_EE_ORIGIN_LOCAL | libc::SO_EE_ORIGIN_ICMP | libc::SO_EE_ORIGIN_ICMP6) {
        return None;
    }
    match c_int::try_from(error.ee_errno).ok()? {
        libc::ECONNREFUSED => Some(Reach::Port),
        libc::EMSGSIZE => Some(Reach::TooBig(error.ee_info)),
        libc::ENETUNREACH => Some(Reach::Network),
        libc::EHOSTUNREACH | libc::EHOSTDOWN | libc::ENOPROTOOPT => Some(Reach::Host),
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
mod tests {
    use std::future::poll_fn;

    use super::*;

    async fn send_to(socket: &mut DatagramSocket, payload: &[u8], to: SocketAddr, df: bool) -> io::Result<()> {
        poll_fn(|cx| socket.poll_send_to(cx, payload, to, df)).await
    }

    async fn receive(socket: &mut DatagramSocket) -> (Arrival, Vec<u8>) {
        let mut space = vec![0; 2048];
        let mut buffer = ReadBuf::new(&mut space);
        let arrival = poll_fn(|cx| socket.poll_recv_from(cx, &mut buffer)).await.unwrap();
        (arrival, buffer.filled().to_vec())
    }

    fn bound(to: &str) -> UdpSocket {
        let socket = UdpSocket::bind(to).unwrap();
        socket.set_nonblocking(true).unwrap();
        socket
    }

    #[tokio::test]
    async fn a_closed_port_is_told_without_another_send_and_others_go_on() {
        for local in ["127.0.0.1:0", "[::1]:0"] {
            let closed = bound(local).local_addr().unwrap();
            let peer = bound(local);
            let mut socket = DatagramSocket::new(bound(local)).unwrap();
            send_to(&mut socket, b"one", closed, true).await.unwrap();
            let (arrival, payload) = receive(&mut socket).await;
            assert_eq!(arrival, Arrival::Failed { to: closed, why: Reach::Port });
            assert!(payload.is_empty());

            // The echo of another peer's error must not hit a good send.
            send_to(&mut socket, b"two", closed, false).await.unwrap();
            send_to(&mut socket, b"three", peer.local_addr().unwrap(), false).await.unwrap();
            peer.set_nonblocking(false).unwrap();
            let mut space = [0; 16];
            let (length, from) = peer.recv_from(&mut space).unwrap();
            assert_eq!((&space[..length], from), (&b"three"[..], socket.local_addr().unwrap()));
            assert_eq!(receive(&mut socket).await.0, Arrival::Failed { to: closed, why: Reach::Port });

            peer.send_to(b"answer", from).unwrap();
            let (arrival, payload) = receive(&mut socket).await;
            assert_eq!(arrival, Arrival::Payload(peer.local_addr().unwrap()));
            assert_eq!(payload, b"answer");
        }
    }

    #[tokio::test]
    async fn the_first_datagram_of_a_new_socket_goes_out_at_once() {
        let peer = bound("127.0.0.1:0");
        let mut socket = DatagramSocket::new(bound("127.0.0.1:0")).unwrap();
        let mut cx = Context::from_waker(std::task::Waker::noop());
        let to = peer.local_addr().unwrap();
        assert!(matches!(socket.poll_send_to(&mut cx, b"first", to, false), Poll::Ready(Ok(()))));
        assert_eq!(peer.recv_from(&mut [0; 8]).unwrap().0, 5);
    }

    #[tokio::test]
    async fn what_does_not_fit_is_refused_at_once_and_the_mtu_is_told() {
        let mut socket = DatagramSocket::new(bound("127.0.0.1:0")).unwrap();
        let to = socket.local_addr().unwrap();
        let error = send_to(&mut socket, &[0; 65_508], to, true).await.unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EMSGSIZE));
        let (arrival, _) = receive(&mut socket).await;
        assert!(matches!(arrival, Arrival::Failed { to: told, why: Reach::TooBig(mtu) } if told == to && mtu > 0));
        send_to(&mut socket, b"small", to, true).await.unwrap();
        assert_eq!(receive(&mut socket).await, (Arrival::Payload(to), b"small".to_vec()));
    }
}
