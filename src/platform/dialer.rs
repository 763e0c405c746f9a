//! Sockets of our own, made so that they never come back to us.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::TcpStream;

use super::imp;
use super::{EchoSocket, OwnSockets};
use crate::net::{DialError, Reach, keep_alive};

pub use tokio::net::UdpSocket;

/// How long a TCP dial may take.
pub(super) const DIAL_TIMEOUT: Duration = Duration::from_secs(30);

/// Descriptors that flows leave free, so that DNS and control work when flows have taken all the rest.
const SPARE: u64 = 64;

/// A firewall mark: every packet of a socket that carries it skips our rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Fwmark(pub u32);

/// Makes marked sockets. It refuses to dial fake addresses: such a packet could only come back to us.
#[derive(Debug, Clone, Default)]
pub struct Dialer {
    /// Our own mark; none where a private namespace makes it needless.
    pub mark: Option<Fwmark>,
    /// `interface-name`: bind to this device. None lets the kernel's routes choose.
    pub interface: Option<String>,
    /// Ranges that lead nowhere but to us.
    pub fake: Vec<IpNet>,
    /// Its sockets are those of flows, which may not take the last descriptors.
    pub for_flows: bool,
    /// Where it is noted what they send to; None where nothing of it can come back to us.
    pub own: Option<Arc<OwnSockets>>,
}

/// How many descriptors this process may have.
#[must_use]
pub fn descriptors() -> u64 {
    imp::socket::descriptors()
}

/// How many descriptors flows may take, all together.
#[must_use]
pub fn descriptors_for_flows() -> u64 {
    for_flows(imp::socket::descriptors())
}

/// Of a limit that is small, the greater part is for flows still.
fn for_flows(limit: u64) -> u64 {
    limit - SPARE.min(limit / 4)
}

/// Whether a descriptor is one of those that flows leave free. The kernel gives out the lowest that is free: such a
/// number says that all below it are taken.
pub fn is_spare(descriptor: impl AsFd) -> bool {
    spare(descriptor.as_fd(), imp::socket::descriptors())
}

fn spare(descriptor: BorrowedFd<'_>, limit: u64) -> bool {
    u64::try_from(descriptor.as_raw_fd()).is_ok_and(|number| number >= for_flows(limit))
}

impl Dialer {
    /// Connects to `to` within [`DIAL_TIMEOUT`].
    ///
    /// # Errors
    /// What the kernel reports, told apart as clients would see it.
    pub async fn tcp(&self, to: SocketAddr) -> Result<TcpStream, DialError> {
        let socket = self.stream(to.ip())?;
        let connected = tokio::time::timeout(DIAL_TIMEOUT, self.connect(socket, to));
        let stream = connected.await.map_err(|_| DialError::TimedOut)??;
        // Small writes of a client are small writes of ours: the kernel must not wait to join them.
        stream.set_nodelay(true)?;
        Ok(stream)
    }

    /// Whether a connection to `to` comes about within `time`, of which two seconds are needed to find out that this host's
    /// own firewall is in the way.
    ///
    /// # Errors
    /// As [`Dialer::tcp`]; EPERM if what was sent has not left this host.
    pub async fn try_tcp(&self, to: SocketAddr, time: Duration) -> Result<(), DialError> {
        let socket = self.stream(to.ip())?;
        let same = socket.try_clone()?;
        match tokio::time::timeout(time, self.connect(socket, to)).await {
            Ok(connected) => connected.map(drop),
            Err(_) if imp::socket::is_kept_in(&same) => Err(DialError::Io(io::Error::from_raw_os_error(libc::EPERM))),
            Err(_) => Err(DialError::TimedOut),
        }
    }

    /// A socket for a connection to `to`.
    fn stream(&self, to: IpAddr) -> Result<Socket, DialError> {
        self.refuse_fake(to)?;
        let domain = if to.is_ipv4() { Domain::IPV4 } else { Domain::IPV6 };
        let socket = Socket::new(domain, Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
        self.prepare(&socket2::SockRef::from(&socket))?;
        keep_alive(&socket);
        Ok(socket)
    }

    async fn connect(&self, socket: Socket, to: SocketAddr) -> Result<TcpStream, DialError> {
        match socket.connect(&to.into()) {
            // Not for want of a port: it has no address to send from either.
            Err(error) if error.raw_os_error() == Some(libc::EADDRNOTAVAIL) && !self.has_route(to.ip()) => {
                return Err(DialError::Unreachable(Reach::Network));
            }
            Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => return Err(error.into()),
            _ => {}
        }
        // The kernel has chosen the address by now, and the first packet is on its way.
        let from = || socket.local_addr().ok()?.as_socket();
        let _sending = self.own.as_ref().and_then(|own| Some(own.connects(from()?, to)));
        let stream = TcpStream::from_std(socket.into())?;
        stream.writable().await?;
        // Accepted and reset since: its reader hears of that, and of what was said before, as behind any connection. Asking
        // for the error would take it away.
        if imp::socket::is_acknowledged(&stream) {
            return Ok(stream);
        }
        match stream.take_error()? {
            Some(error) => Err(not_connected(error)),
            None => Ok(stream),
        }
    }

    /// An unconnected socket on a free port of the family of `to`.
    ///
    /// # Errors
    /// What the kernel reports; too many open files, for instance.
    pub fn udp(&self, to: IpAddr) -> Result<UdpSocket, DialError> {
        self.refuse_fake(to)?;
        let any = match to {
            IpAddr::V4(_) => SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)),
            IpAddr::V6(_) => SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)),
        };
        let socket = self.datagrams(to)?;
        imp::socket::deepen(&socket);
        socket.bind(&any.into())?;
        Ok(UdpSocket::from_std(socket.into())?)
    }

    /// A socket for echo requests of one family.
    ///
    /// # Errors
    /// What the kernel reports: an unreachable of kind `Prohibited` if it lets us have none.
    pub fn echo(&self, ipv6: bool) -> Result<EchoSocket, DialError> {
        Ok(EchoSocket::open(ipv6, |socket| self.prepare(&socket2::SockRef::from(socket)))?)
    }

    /// The largest packet that goes out towards `ip` in one piece, as far as the kernel knows. Nothing is sent.
    #[must_use]
    pub fn path_mtu(&self, ip: IpAddr) -> Option<u32> {
        let socket = self.datagrams(ip).ok()?;
        socket.connect(&SocketAddr::new(ip, 9).into()).ok()?;
        imp::socket::path_mtu(&socket, ip.is_ipv6())
    }

    /// Whether the kernel has a way to `ip` for sockets like these. Nothing is sent.
    #[must_use]
    pub fn has_route(&self, ip: IpAddr) -> bool {
        // Any port but 0 will do: connecting a datagram socket asks for the route and no more.
        let connected = self.datagrams(ip).and_then(|socket| socket.connect(&SocketAddr::new(ip, 9).into()));
        // Whatever else is wrong has nothing to do with the address.
        !connected.is_err_and(|error| {
            let no_way = [libc::ENETUNREACH, libc::EHOSTUNREACH, libc::EADDRNOTAVAIL, libc::EAFNOSUPPORT];
            error.raw_os_error().is_some_and(|code| no_way.contains(&code))
        })
    }

    /// The address that sockets like these would send from to `to` now; None: there is no way. Nothing is sent.
    #[must_use]
    pub fn source_for(&self, to: SocketAddr) -> Option<IpAddr> {
        let socket = self.datagrams(to.ip()).ok()?;
        socket.connect(&to.into()).ok()?;
        Some(socket.local_addr().ok()?.as_socket()?.ip())
    }

    /// Whether `ip` is one of the addresses that only we hand out.
    #[must_use]
    pub fn is_fake(&self, ip: IpAddr) -> bool {
        self.fake.iter().any(|range| range.contains(&ip))
    }

    fn refuse_fake(&self, ip: IpAddr) -> Result<(), DialError> {
        if self.is_fake(ip) { Err(DialError::Unreachable(Reach::Host)) } else { Ok(()) }
    }

    fn datagrams(&self, to: IpAddr) -> io::Result<Socket> {
        let domain = if to.is_ipv4() { Domain::IPV4 } else { Domain::IPV6 };
        let socket = Socket::new(domain, Type::DGRAM.nonblocking(), Some(Protocol::UDP))?;
        self.prepare(&socket2::SockRef::from(&socket))?;
        Ok(socket)
    }

    fn prepare(&self, socket: &socket2::SockRef<'_>) -> io::Result<()> {
        if self.for_flows && is_spare(&**socket) {
            return Err(io::Error::from_raw_os_error(libc::EMFILE));
        }
        if let Some(mark) = self.mark {
            imp::socket::set_mark(&**socket, mark)?;
        }
        if let Some(interface) = &self.interface {
            socket.bind_device(Some(interface.as_bytes()))?;
        }
        Ok(())
    }
}

/// What a handshake met. Some ICMP errors have an errno of their own (icmp_err_convert, icmpv6_err_convert).
fn not_connected(error: io::Error) -> DialError {
    DialError::Unreachable(match error.raw_os_error() {
        Some(libc::ENOPROTOOPT | libc::EPROTO) => Reach::Protocol,
        // A source route that failed, a host that nobody knows, and one that is cut off.
        Some(libc::EOPNOTSUPP) => Reach::Coded(5),
        Some(libc::EHOSTDOWN) => Reach::Coded(7),
        Some(libc::ENONET) => Reach::Coded(8),
        _ => return error.into(),
    })
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use tokio::io::AsyncReadExt;

    use super::*;

    #[test]
    fn flows_leave_the_last_descriptors_to_others() {
        for (limit, flows) in [(1024, 960), (1 << 20, (1 << 20) - 64), (64, 48), (0, 0)] {
            assert_eq!(for_flows(limit), flows, "{limit}");
        }
        let descriptor = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let number = u64::try_from(descriptor.as_raw_fd()).unwrap();
        assert!(!spare(descriptor.as_fd(), number + 65 + SPARE));
        assert!(spare(descriptor.as_fd(), number + 1));
    }

    #[tokio::test]
    async fn what_was_accepted_and_reset_at_once_is_connected_and_its_reader_hears_the_rest() {
        // After the end of the stream the kernel tells its reader of no reset any more.
        for (half_closed, end) in [(false, Err(io::ErrorKind::ConnectionReset)), (true, Ok(0))] {
            let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            let dialer = Dialer::default();
            let server = async {
                // The dial has begun and does not know yet that it has succeeded.
                let (mut stream, _) = listener.accept().unwrap();
                stream.write_all(b"busy").unwrap();
                if half_closed {
                    stream.shutdown(std::net::Shutdown::Write).unwrap();
                }
                socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
            };
            let (dialled, ()) = tokio::join!(biased; dialer.tcp(listener.local_addr().unwrap()), server);
            let (mut stream, mut heard) = (dialled.unwrap(), [0; 16]);
            assert_eq!(stream.read(&mut heard).await.unwrap(), 4);
            assert_eq!(stream.read(&mut heard).await.map_err(|error| error.kind()), end);
        }
    }

    #[test]
    fn a_handshake_fails_by_the_word_of_the_network() {
        let errors = [
            (libc::ECONNREFUSED, "Refused"),
            (libc::ENOPROTOOPT, "Unreachable(Protocol)"),
            (libc::EPROTO, "Unreachable(Protocol)"),
            (libc::EHOSTDOWN, "Unreachable(Coded(7))"),
            (libc::ENONET, "Unreachable(Coded(8))"),
            (libc::EHOSTUNREACH, "Unreachable(Host)"),
        ];
        for (error, expected) in errors {
            assert_eq!(format!("{:?}", not_connected(io::Error::from_raw_os_error(error))), expected);
        }
    }
}
