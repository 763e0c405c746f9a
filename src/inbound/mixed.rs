//! One accepted client, from its first byte: `mixed-port` speaks SOCKS4, SOCKS4a, SOCKS5 and HTTP.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::time::timeout;

use super::access::Access;
use super::listener::{Accepted, Drops};
use super::{http, socks};
use crate::dispatch::Entry;
use crate::net::Address;
use crate::session::{Inbound, Network, Session};

/// How long a client may take to say what it wants.
pub(super) const HANDSHAKE: Duration = Duration::from_secs(10);

/// How long a client of REJECT-DROP is left waiting (as mihomo does).
pub(super) const SILENCE: Duration = Duration::from_secs(60);

/// A client's connection, and what is known of the client.
pub(super) struct Client {
    pub(super) stream: TcpStream,
    pub(super) facts: Facts,
}

/// What is known of a client.
#[derive(Clone)]
pub(super) struct Facts {
    pub(super) peer: SocketAddr,
    pub(super) inbound: Inbound,
    pub(super) access: Arc<Access>,
    pub(super) drops: Arc<Drops>,
}

impl Facts {
    /// The session of a flow of this client.
    pub(super) fn session(&self, network: Network, source: SocketAddr, destination: Address) -> Session {
        Session::new(network, self.inbound, source, destination)
    }

    /// Whether the client must say who it is.
    pub(super) fn asks(&self) -> bool {
        self.access.asks(self.peer.ip())
    }
}

/// Serves one client to its end, in a worker's `LocalSet`. What goes wrong ends this client alone.
pub async fn serve<E: Entry>(accepted: Accepted, entry: E) {
    let Accepted { stream, peer, inbound, access, drops, permit } = accepted;
    if let Err(error) = speak(stream, Facts { peer, inbound, access, drops }, entry).await {
        tracing::debug!(%peer, %inbound, "client failed: {error}");
    }
    drop(permit);
}

async fn speak<E: Entry>(stream: std::net::TcpStream, facts: Facts, entry: E) -> io::Result<()> {
    let stream = TcpStream::from_std(stream)?;
    // Small writes of an upstream are small writes of ours.
    stream.set_nodelay(true)?;
    let mut first = [0];
    let said = timeout(HANDSHAKE, stream.peek(&mut first)).await?;
    if said? == 0 {
        return Ok(());
    }
    let is_socks = matches!(first[0], 4 | 5);
    let client = Client { stream, facts };
    match client.facts.inbound {
        Inbound::Http => http::serve(client, entry).await,
        Inbound::Socks => socks::serve(client, entry).await,
        Inbound::Mixed | Inbound::Tun if is_socks => socks::serve(client, entry).await,
        Inbound::Mixed | Inbound::Tun => http::serve(client, entry).await,
    }
}

/// Ends when the client closes or breaks its connection; never, once it has sent more bytes.
pub(super) async fn gone(stream: &TcpStream) {
    match stream.peek(&mut [0]).await {
        Ok(0) | Err(_) => {}
        Ok(_) => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests;
