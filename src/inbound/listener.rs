//! The proxy ports: bound and accepted on the control runtime, so that a port in use is seen; served by the workers.

use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpListener as StdListener, TcpStream as StdStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use futures_util::future::join_all;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::TcpListener;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::sleep;

use super::access::Access;
use crate::net::keep_alive;
use crate::platform::{is_spare, tcp_listener};
use crate::session::Inbound;

/// How many clients one port serves at a time.
const CLIENTS: usize = 8192;

/// Connections that may wait for us to accept them.
const BACKLOG: i32 = 1024;

/// How long accepting rests after the system could not give us a socket.
const REST: Duration = Duration::from_millis(100);

/// Why a port could not be opened.
#[derive(Debug, thiserror::Error)]
#[error("{key}: {port}: cannot listen on {address}: {source}{}", Held(.holder))]
pub struct BindError {
    /// The profile's key.
    pub key: &'static str,
    /// The port.
    pub port: u16,
    /// The address of it that failed.
    pub address: SocketAddr,
    /// Who has the port, if it is in use and we may know.
    pub holder: Option<String>,
    /// What the system said.
    pub source: io::Error,
}

struct Held<'a>(&'a Option<String>);

impl fmt::Display for Held<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.as_ref().map_or(Ok(()), |holder| write!(f, "; {holder} has it"))
    }
}

/// What clients sent and nobody got.
#[derive(Debug, Default)]
pub struct Drops {
    /// Connections beyond the limit.
    pub clients: AtomicU64,
    /// Connections from addresses that are not admitted.
    pub strangers: AtomicU64,
    /// Parts of larger datagrams (FRAG not 0).
    pub fragments: AtomicU64,
    /// Datagrams that are no SOCKS datagrams.
    pub malformed: AtomicU64,
    /// Datagrams from others than the association's client.
    pub foreign: AtomicU64,
}

/// One open port.
pub struct Listener {
    inbound: Inbound,
    sockets: Vec<StdListener>,
    access: Arc<Access>,
    drops: Arc<Drops>,
    clients: Arc<Semaphore>,
}

/// A client that may be served, by any worker.
pub struct Accepted {
    pub(super) stream: StdStream,
    pub(super) peer: SocketAddr,
    pub(super) inbound: Inbound,
    pub(super) access: Arc<Access>,
    pub(super) drops: Arc<Drops>,
    pub(super) permit: Option<OwnedSemaphorePermit>,
}

impl Listener {
    /// Opens `port` for this kind of inbound: [`Inbound::Mixed`], [`Inbound::Http`] or [`Inbound::Socks`].
    ///
    /// # Errors
    /// Names the profile's key, the port, and whoever has it.
    pub fn bind(inbound: Inbound, port: u16, access: Arc<Access>) -> Result<Self, BindError> {
        let mut sockets = Vec::new();
        let mut port = port;
        for ip in access.addresses() {
            let address = SocketAddr::new(ip, port);
            match listen(address) {
                Ok(socket) => {
                    // Port 0 means any; both families then share the one that was found.
                    port = socket.local_addr().map_or(port, |bound| bound.port());
                    sockets.push(socket);
                }
                // A host without IPv6 is served on IPv4.
                Err(error) if !sockets.is_empty() && no_such_family(&error) => {}
                Err(source) => {
                    let holder = (source.kind() == io::ErrorKind::AddrInUse).then(|| tcp_listener(port)).flatten();
                    return Err(BindError { key: key(inbound), port, address, holder, source });
                }
            }
        }
        let (drops, clients) = (Arc::default(), Arc::new(Semaphore::new(CLIENTS)));
        Ok(Self { inbound, sockets, access, drops, clients })
    }

    /// Where it listens.
    #[must_use]
    pub fn addresses(&self) -> Vec<SocketAddr> {
        self.sockets.iter().filter_map(|socket| socket.local_addr().ok()).collect()
    }

    /// What was dropped so far; it counts on while the port is served.
    #[must_use]
    pub fn drops(&self) -> Arc<Drops> {
        Arc::clone(&self.drops)
    }

    /// Accepts for ever, and gives each client to `hand`, which passes it to a worker.
    ///
    /// # Errors
    /// The runtime does not take the sockets.
    pub async fn run(self, hand: impl Fn(Accepted)) -> io::Result<()> {
        let sockets = self.sockets.iter().map(|socket| TcpListener::from_std(socket.try_clone()?));
        let sockets: Vec<TcpListener> = sockets.collect::<io::Result<_>>()?;
        join_all(sockets.iter().map(|socket| self.accept(socket, &hand))).await;
        Ok(())
    }

    async fn accept(&self, socket: &TcpListener, hand: &impl Fn(Accepted)) {
        let mut troubled = false;
        loop {
            match socket.accept().await {
                // Closing it tells the client at once; left in the backlog it would only wait.
                Ok((stream, _)) if is_spare(&stream) => {
                    self.drops.clients.fetch_add(1, Relaxed);
                    if !troubled {
                        tracing::warn!("{}: no descriptors are left for more clients", key(self.inbound));
                    }
                    troubled = true;
                }
                Ok((stream, peer)) => {
                    troubled = false;
                    if let Some(accepted) = self.admit(stream, peer) {
                        hand(accepted);
                    }
                }
                Err(error) => {
                    // Out of descriptors, as a rule: the client waits in the backlog until one is free.
                    if !troubled {
                        tracing::warn!("{}: cannot accept connections for now: {error}", key(self.inbound));
                    }
                    troubled = true;
                    sleep(REST).await;
                }
            }
        }
    }

    fn admit(&self, stream: tokio::net::TcpStream, peer: SocketAddr) -> Option<Accepted> {
        if !self.access.admits(peer.ip()) {
            self.drops.strangers.fetch_add(1, Relaxed);
            return None;
        }
        let Ok(permit) = Arc::clone(&self.clients).try_acquire_owned() else {
            if self.drops.clients.fetch_add(1, Relaxed) == 0 {
                tracing::warn!(
                    "{}: {CLIENTS} clients at a time are the limit; more are turned away",
                    key(self.inbound)
                );
            }
            return None;
        };
        keep_alive(&stream);
        Some(Accepted {
            stream: stream.into_std().ok()?,
            peer,
            inbound: self.inbound,
            access: Arc::clone(&self.access),
            drops: Arc::clone(&self.drops),
            permit: Some(permit),
        })
    }
}

fn key(inbound: Inbound) -> &'static str {
    match inbound {
        Inbound::Mixed | Inbound::Tun => "mixed-port",
        Inbound::Http => "port",
        Inbound::Socks => "socks-port",
    }
}

fn listen(address: SocketAddr) -> io::Result<StdListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM.nonblocking().cloexec(), Some(Protocol::TCP))?;
    if address.is_ipv6() {
        // Each family has its own socket: clients then never appear as IPv4-mapped addresses.
        socket.set_only_v6(true)?;
    }
    if !address.ip().is_unspecified() && !address.ip().is_loopback() {
        // `bind-address` may come later: at boot, or with the lease.
        if address.is_ipv4() { socket.set_freebind_v4(true)? } else { socket.set_freebind_v6(true)? }
    }
    // After a restart, connections of the last run may still be in TIME_WAIT.
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

fn no_such_family(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EADDRNOTAVAIL | libc::EAFNOSUPPORT))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_in_use_is_told_with_its_key_and_holder() {
        let first = Listener::bind(Inbound::Mixed, 0, Arc::default()).unwrap();
        let port = first.addresses()[0].port();
        assert!(first.addresses().iter().all(|address| address.port() == port && address.ip().is_loopback()));
        let error = Listener::bind(Inbound::Socks, port, Arc::default()).err().unwrap().to_string();
        assert!(error.starts_with(&format!("socks-port: {port}: cannot listen on 127.0.0.1:{port}:")), "{error}");
        assert!(error.ends_with(&format!("(pid {}) has it", std::process::id())), "{error}");
    }

    #[tokio::test]
    async fn who_is_not_admitted_is_turned_away_and_counted() {
        let access = Access { lan_allowed: vec!["192.0.2.0/24".parse().unwrap()], ..Access::default() };
        let listener = Listener::bind(Inbound::Http, 0, Arc::new(access)).unwrap();
        let server = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let _client = std::net::TcpStream::connect(server.local_addr().unwrap()).unwrap();
        let (stream, _) = server.accept().await.unwrap();
        assert!(listener.admit(stream, SocketAddr::from(([198, 51, 100, 1], 9))).is_none());
        assert_eq!(listener.drops().strangers.load(Relaxed), 1);
    }
}
