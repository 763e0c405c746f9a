//! `dns.listen`: the service on sockets of its own.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::{TcpListener, UdpSocket};

use super::Dns;

mod places;
mod tcp;
mod udp;

pub use tcp::serve_stream;

/// The listening sockets of `dns.listen`, bound but not served yet: so that a port in use is known before anything
/// else is changed.
#[derive(Debug)]
pub struct Server {
    udp: UdpSocket,
    tcp: TcpListener,
    wildcard: bool,
}

impl Server {
    /// Binds UDP and TCP to `listen`. `[::]` takes IPv4 as well.
    ///
    /// # Errors
    /// What the kernel reports: the port is in use, or not ours to take.
    pub fn bind(dns: &Dns, listen: SocketAddr) -> io::Result<Self> {
        let tcp = socket(dns, listen, Type::STREAM)?;
        tcp.set_reuse_address(true)?;
        tcp.bind(&listen.into())?;
        tcp.listen(1024)?;
        let tcp = TcpListener::from_std(tcp.into())?;
        // Port 0 means any free one, but the same for both.
        let listen = SocketAddr::new(listen.ip(), tcp.local_addr()?.port());
        let udp = socket(dns, listen, Type::DGRAM)?;
        let wildcard = listen.ip().is_unspecified();
        if wildcard {
            udp::ask_for_destinations(&udp, listen)?;
        }
        udp.bind(&listen.into())?;
        Ok(Self { udp: UdpSocket::from_std(udp.into())?, tcp, wildcard })
    }

    /// Where it listens.
    ///
    /// # Errors
    /// What the kernel reports.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.tcp.local_addr()
    }

    /// Serves until dropped.
    ///
    /// # Errors
    /// A socket broke for good.
    pub async fn run(self, dns: Arc<Dns>) -> io::Result<()> {
        tokio::try_join!(udp::serve(&dns, &self.udp, self.wildcard), tcp::serve(&dns, &self.tcp)).map(|_| ())
    }
}

/// Binds `listen` and serves it until dropped: [`Server::bind`] and [`Server::run`] in one.
///
/// # Errors
/// Those of both.
pub async fn serve(dns: Arc<Dns>, listen: SocketAddr) -> io::Result<()> {
    Server::bind(&dns, listen)?.run(dns).await
}

fn socket(dns: &Dns, listen: SocketAddr, kind: Type) -> io::Result<Socket> {
    let protocol = if kind == Type::DGRAM { Protocol::UDP } else { Protocol::TCP };
    let socket = Socket::new(Domain::for_address(listen), kind.nonblocking(), Some(protocol))?;
    if !listen.ip().is_unspecified() && !listen.ip().is_loopback() {
        // The address may come later: at boot, or with the lease.
        if listen.is_ipv4() { socket.set_freebind_v4(true)? } else { socket.set_freebind_v6(true)? }
    }
    if listen.is_ipv6() {
        socket.set_only_v6(!listen.ip().is_unspecified())?;
    }
    if let Some(mark) = dns.mark {
        // Answers leave by the way the question came, not through our own device.
        socket.set_mark(mark)?;
    }
    Ok(socket)
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
