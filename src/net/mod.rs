//! The words every other module shares: names, addresses, the two transports and how a dial fails.

mod echo;
mod name;

use std::future::Future;
use std::io;
use std::net::{IpAddr, Ipv6Addr};
use std::num::NonZeroU16;
use std::os::fd::{AsFd, AsRawFd};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};

pub use echo::{BoxEchoSocket, Echo, EchoArrival, EchoError, EchoFailure, EchoSocket};
pub use name::{Address, Host, InvalidName, Name};

/// Bytes by which the header of IPv6 is longer than that of IPv4.
pub const LONGER_HEADER: u32 = 20;

/// What stands for a client where each has its part: its address, and of IPv6 the /64, of which a client has all. Hosts of
/// one link share the network of link-local addresses.
#[must_use]
pub fn client_of(ip: IpAddr) -> IpAddr {
    match ip.to_canonical() {
        IpAddr::V6(ip) if !ip.is_unicast_link_local() => Ipv6Addr::from_bits(ip.to_bits() >> 64 << 64).into(),
        ip => ip,
    }
}

/// A boxed future that may cross threads.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// A byte stream towards an upstream or a client.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {
    /// Makes the coming drop an abort: the peer sees a reset (`SO_LINGER` 0), not an orderly end.
    fn reset(&mut self) {}

    /// Ready when the peer has reset the stream or is lost, for one who neither reads nor writes; None where that shows
    /// in no other way.
    fn broken(&self) -> Option<BoxFuture<'static, ()>> {
        None
    }

    /// Bytes that were written and that the peer has not acknowledged, as far as that is known. An abort loses them.
    fn unacknowledged(&self) -> usize {
        0
    }
}

/// A [`Stream`] of any kind.
pub type BoxStream = Box<dyn Stream>;

impl Stream for BoxStream {
    fn reset(&mut self) {
        (**self).reset();
    }

    fn broken(&self) -> Option<BoxFuture<'static, ()>> {
        (**self).broken()
    }

    fn unacknowledged(&self) -> usize {
        (**self).unacknowledged()
    }
}

impl Stream for tokio::net::TcpStream {
    fn reset(&mut self) {
        // A failure leaves an orderly close, which is the next best thing.
        let _ = socket2::SockRef::from(&*self).set_linger(Some(Duration::ZERO));
    }

    fn broken(&self) -> Option<BoxFuture<'static, ()>> {
        // The socket's own readiness has no place for one who waits for errors alone.
        let twin = self.as_fd().try_clone_to_owned().ok()?;
        // SAFETY: the twin is its own one descriptor, which nobody exchanges.
        let twin = unsafe { AsyncFd::register_with_interest(twin, Interest::ERROR) }.ok()?;
        Some(Box::pin(async move { drop(twin.ready(Interest::ERROR).await) }))
    }

    fn unacknowledged(&self) -> usize {
        let mut bytes = 0;
        // SAFETY: the request writes one int, to which the pointer leads (tcp(7), SIOCOUTQ).
        match unsafe { unacknowledged(self.as_raw_fd(), &raw mut bytes) } {
            Ok(_) => usize::try_from(bytes).unwrap_or(0),
            Err(_) => 0,
        }
    }
}

/// An idle peer is asked for a sign of life after this time, and again each time that it gives none (mihomo, as all
/// programs in Go: 15 s).
const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// Questions without an answer after which the connection is given up.
const KEEP_ALIVE_RETRIES: u32 = 9;

/// Has the kernel find out by itself whether the peer of an idle TCP connection is still there. That costs packets, and
/// no wake-up of ours.
pub fn keep_alive(socket: &impl AsFd) {
    let keep_alive =
        socket2::TcpKeepalive::new().with_time(KEEP_ALIVE).with_interval(KEEP_ALIVE).with_retries(KEEP_ALIVE_RETRIES);
    // Without it a vanished peer is noticed later.
    let _ = socket2::SockRef::from(socket).set_tcp_keepalive(&keep_alive);
}

nix::ioctl_read_bad!(
    /// SIOCOUTQ.
    unacknowledged,
    libc::TIOCOUTQ,
    libc::c_int
);

/// What came back on a [`Datagram`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Received {
    /// A payload, now in the caller's buffer, from this peer.
    Payload(Address),
    /// Several payloads of one peer, now one behind the other in the caller's buffer.
    Train {
        /// The peer.
        from: Address,
        /// The bytes of each; the last may be shorter.
        size: NonZeroU16,
    },
    /// The network answered an earlier datagram to `to` with an ICMP error.
    Failed {
        /// Where the failed datagram was sent.
        to: Address,
        /// What the network said.
        why: Reach,
    },
}

/// A socket-like thing that carries datagrams to and from many peers (endpoint-independent, RFC 4787).
pub trait Datagram: Send {
    /// Sends one datagram. `dont_fragment` asks for DF on the wire; what does not fit is `EMSGSIZE`.
    ///
    /// # Errors
    /// Those of the socket; the association lives on unless the kind is `BrokenPipe`.
    fn poll_send_to(
        &mut self,
        cx: &mut Context<'_>,
        payload: &[u8],
        to: &Address,
        dont_fragment: bool,
    ) -> Poll<io::Result<()>>;

    /// Sends the first datagrams of `train`, which holds several of `size` bytes each one behind the other (the last may
    /// be shorter), as many as go out at once. Returns the bytes that are done with, those of one datagram at least.
    ///
    /// # Errors
    /// Those of [`poll_send_to`](Self::poll_send_to) for the first datagram alone: what follows it is still to be sent.
    fn poll_send_train(
        &mut self,
        cx: &mut Context<'_>,
        train: &[u8],
        size: NonZeroU16,
        to: &Address,
        dont_fragment: bool,
    ) -> Poll<io::Result<usize>> {
        let first = &train[..train.len().min(usize::from(size.get()))];
        self.poll_send_to(cx, first, to, dont_fragment).map_ok(|()| first.len())
    }

    /// The port of this host by which datagrams for `to` leave, where they go there themselves.
    fn port_towards(&mut self, to: &Address) -> Option<u16> {
        let _ = to;
        None
    }

    /// The address of this host to which was sent what was received last, where that is known.
    fn reached_at(&self) -> Option<IpAddr> {
        None
    }

    /// Receives one datagram or one train of them into `buffer`, or the error that an earlier one met.
    ///
    /// # Errors
    /// The transport itself is gone, for instance the proxy closed the control connection.
    fn poll_recv_from(&mut self, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<Received>>;
}

/// A [`Datagram`] of any kind.
pub type BoxDatagram = Box<dyn Datagram>;

/// How far a packet got before the network gave up: the codes of RFC 792 and RFC 4443 that clients tell apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    /// No route to the network (ICMP 3/0, ICMPv6 1/0).
    Network,
    /// No answer from the host (3/1, 1/3).
    Host,
    /// Nobody listens on the port (3/3, 1/4).
    Port,
    /// Nobody speaks the protocol (3/2, 4/1).
    Protocol,
    /// A firewall on the way refuses (3/13, 1/1).
    Prohibited,
    /// The packet is larger than a link on the way; the MTU in bytes, 0 if unknown (3/4, 2/0).
    TooBig(u32),
    /// What only IPv4 has a code for: another one of type 3 (RFC 792, RFC 1122 section 3.2.2.1, RFC 1812 section 5.2.7.1).
    /// Programs hear at once of some (9 and 10: prohibited), and of others never.
    Coded(u8),
}

/// Why a rule's own outbound turned a flow away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reject {
    /// Say so at once: TCP reset, UDP port unreachable.
    Answer,
    /// Say nothing.
    Drop,
}

/// Why an outbound could not be reached. Each becomes what a client of the real thing would see.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// The destination, or a proxy on its behalf, refused the connection.
    #[error("connection refused")]
    Refused,
    /// The network is in the way.
    #[error("unreachable ({0:?})")]
    Unreachable(Reach),
    /// Nobody answered in time.
    #[error("timed out")]
    TimedOut,
    /// The profile's own REJECT or REJECT-DROP.
    #[error("rejected by the profile")]
    Rejected(Reject),
    /// The outbound does not carry this kind of flow.
    #[error("{0}")]
    Unsupported(String),
    /// The upstream proxy, or a rule of ours, does not allow it; the text says who and why.
    #[error("{0}")]
    Denied(String),
    /// This host has no descriptor left for the flow. It says nothing about the destination.
    #[error("no file descriptors are left here")]
    Exhausted,
    /// This host has no local port left for the flow, at all or to this destination. That says nothing about it either.
    #[error("no local ports are left here")]
    NoPort,
    /// The same of the connection to an upstream proxy that a UDP association needs: ports of UDP are no help.
    #[error("no local ports are left here for connections to the upstream proxy")]
    NoControlPort,
    /// Anything else that the operating system or the upstream reports.
    #[error("{0}")]
    Io(#[source] io::Error),
}

impl DialError {
    /// What happened, whoever reports it and in whatever words: [`DialError::Io`] may carry a time-out or a missing route
    /// of an upstream proxy or of a look-up, which a client must see as such.
    #[must_use]
    pub fn kind(&self) -> io::ErrorKind {
        match self {
            Self::Refused | Self::Denied(_) | Self::Unreachable(Reach::Port) => io::ErrorKind::ConnectionRefused,
            Self::Unreachable(Reach::Network) => io::ErrorKind::NetworkUnreachable,
            Self::Unreachable(Reach::Host | Reach::Protocol | Reach::Coded(_) | Reach::TooBig(_)) => {
                io::ErrorKind::HostUnreachable
            }
            Self::Unreachable(Reach::Prohibited) | Self::Rejected(_) => io::ErrorKind::PermissionDenied,
            Self::TimedOut => io::ErrorKind::TimedOut,
            Self::Unsupported(_) => io::ErrorKind::Unsupported,
            Self::Exhausted | Self::NoPort | Self::NoControlPort => io::ErrorKind::ResourceBusy,
            Self::Io(error) => error.kind(),
        }
    }

    /// The same once more, for another flow that waited for the same dial.
    #[must_use]
    pub fn again(&self) -> Self {
        match self {
            Self::Refused => Self::Refused,
            Self::Unreachable(why) => Self::Unreachable(*why),
            Self::TimedOut => Self::TimedOut,
            Self::Rejected(manner) => Self::Rejected(*manner),
            Self::Unsupported(words) => Self::Unsupported(words.clone()),
            Self::Denied(words) => Self::Denied(words.clone()),
            Self::Exhausted => Self::Exhausted,
            Self::NoPort => Self::NoPort,
            Self::NoControlPort => Self::NoControlPort,
            Self::Io(error) => Self::Io(io::Error::new(error.kind(), error.to_string())),
        }
    }
}

impl From<io::Error> for DialError {
    fn from(error: io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::ECONNREFUSED) => Self::Refused,
            Some(libc::ENETUNREACH | libc::ENETDOWN) => Self::Unreachable(Reach::Network),
            Some(libc::EHOSTUNREACH | libc::EHOSTDOWN) => Self::Unreachable(Reach::Host),
            Some(libc::EACCES | libc::EPERM) => Self::Unreachable(Reach::Prohibited),
            Some(libc::ETIMEDOUT) => Self::TimedOut,
            Some(libc::EMFILE | libc::ENFILE) => Self::Exhausted,
            Some(libc::EADDRNOTAVAIL | libc::EADDRINUSE | libc::EAGAIN) => Self::NoPort,
            _ if error.kind() == io::ErrorKind::TimedOut => Self::TimedOut,
            _ if error.kind() == io::ErrorKind::ConnectionRefused => Self::Refused,
            _ => Self::Io(error),
        }
    }
}

/// Opens streams through whatever the composition root chose; cuts the cycle between DNS and outbounds.
pub trait Connect: Send + Sync {
    /// Opens a stream to `to`.
    fn connect<'a>(&'a self, to: &'a Address) -> BoxFuture<'a, Result<BoxStream, DialError>>;
}

/// Why a name has no address for us.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum LookupError {
    /// The name does not exist (NXDOMAIN).
    #[error("no such name")]
    NoSuchName,
    /// The name exists, without an address of a family we use.
    #[error("the name has no address")]
    NoAddress,
    /// No nameserver answered in time.
    #[error("no nameserver answered in time")]
    TimedOut,
    /// Every nameserver failed; the text is the last one's failure.
    #[error("{0}")]
    Failed(Arc<str>),
}

/// Finds the real addresses of a name. A fake address never comes out of it.
pub trait Lookup: Send + Sync {
    /// The addresses of `name`, preferred first, never empty. Those of a family that takes long are missing where the other
    /// has some.
    fn lookup<'a>(&'a self, name: &'a Name) -> BoxFuture<'a, Result<Arc<[IpAddr]>, LookupError>>;

    /// Its addresses of one family, never empty, for whoever has no use for the other and therefore waits.
    fn lookup_family<'a>(&'a self, name: &'a Name, ipv4: bool) -> BoxFuture<'a, Result<Arc<[IpAddr]>, LookupError>> {
        Box::pin(async move {
            let found: Arc<[IpAddr]> =
                self.lookup(name).await?.iter().copied().filter(|ip| ip.is_ipv4() == ipv4).collect();
            if found.is_empty() { Err(LookupError::NoAddress) } else { Ok(found) }
        })
    }
}
