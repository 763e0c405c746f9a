//! Sockets of our own, made so that they never come back to us.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use ipnet::IpNet;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::{TcpSocket, TcpStream};

use super::imp;
use crate::net::{DialError, Reach, keep_alive};

pub use tokio::net::UdpSocket;

/// How long a TCP dial may take.
pub(super) const DIAL_TIMEOUT: Duration = Duration::from_secs(30);

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
}

impl Dialer {
    /// Connects to `to` within [`DIAL_TIMEOUT`].
    ///
    /// # Errors
    /// What the kernel reports, told apart as clients would see it.
    pub async fn tcp(&self, to: SocketAddr) -> Result<TcpStream, DialError> {
        self.refuse_fake(to.ip())?;
        let socket = if to.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        self.prepare(&socket2::SockRef::from(&socket))?;
        keep_alive(&socket);
        let stream =
            tokio::time::timeout(DIAL_TIMEOUT, socket.connect(to)).await.map_err(|_| DialError::TimedOut)??;
        // Small writes of a client are small writes of ours: the kernel must not wait to join them.
        stream.set_nodelay(true)?;
        Ok(stream)
    }

    /// An unconnected socket on a free port of the family of `to`.
    ///
    /// # Errors
    /// What the kernel reports; too many open files, for instance.
    pub fn udp(&self, to: IpAddr) -> Result<UdpSocket, DialError> {
        self.refuse_fake(to)?;
        let (domain, any) = match to {
            IpAddr::V4(_) => (Domain::IPV4, SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0))),
            IpAddr::V6(_) => (Domain::IPV6, SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0))),
        };
        let socket = Socket::new(domain, Type::DGRAM.nonblocking(), Some(Protocol::UDP))?;
        self.prepare(&socket2::SockRef::from(&socket))?;
        imp::socket::deepen(&socket);
        socket.bind(&any.into())?;
        Ok(UdpSocket::from_std(socket.into())?)
    }

    /// Whether `ip` is one of the addresses that only we hand out.
    #[must_use]
    pub fn is_fake(&self, ip: IpAddr) -> bool {
        self.fake.iter().any(|range| range.contains(&ip))
    }

    fn refuse_fake(&self, ip: IpAddr) -> Result<(), DialError> {
        if self.is_fake(ip) { Err(DialError::Unreachable(Reach::Host)) } else { Ok(()) }
    }

    fn prepare(&self, socket: &socket2::SockRef<'_>) -> io::Result<()> {
        if let Some(mark) = self.mark {
            imp::socket::set_mark(&**socket, mark)?;
        }
        if let Some(interface) = &self.interface {
            socket.bind_device(Some(interface.as_bytes()))?;
        }
        Ok(())
    }
}
