//! The server behind a proxy outbound: reaching it, and saying that it was the proxy that failed.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::timeout;

use super::egress::Egress;
use super::tls::Tls;
use crate::net::{Address, BoxStream, DialError, Reach};

/// How long a TLS handshake with the proxy may take.
const TLS_HANDSHAKE: Duration = Duration::from_secs(10);

/// How long the proxy may take to reach the destination and say so; it dials as long as we would.
pub(super) const REPLY: Duration = Duration::from_secs(30);

/// One proxy server.
pub(super) struct Upstream {
    /// The outbound's name.
    pub(super) name: String,
    /// Where the server is.
    pub(super) server: Address,
    /// The way to it.
    pub(super) egress: Arc<Egress>,
    /// TLS around the proxy protocol.
    pub(super) tls: Option<Tls>,
}

/// A stream to the server, and the server's real address.
pub(super) struct Opened {
    pub(super) stream: BoxStream,
    pub(super) peer: SocketAddr,
}

impl Upstream {
    /// Connects to the server, with TLS if it is to be.
    ///
    /// # Errors
    /// In words that name the proxy: a dead proxy is not a refused destination.
    pub(super) async fn open(&self) -> Result<Opened, DialError> {
        let stream = self.egress.tcp(&self.server).await.map_err(|error| self.dead(&error))?;
        let peer = stream.peer_addr()?;
        let stream: BoxStream = match &self.tls {
            None => Box::new(stream),
            Some(tls) => match timeout(TLS_HANDSHAKE, tls.connect(stream)).await {
                Ok(Ok(stream)) => Box::new(stream),
                Ok(Err(error)) => return Err(self.denied(&format!("failed the TLS handshake: {error}"))),
                Err(_) => return Err(self.silent("did not finish the TLS handshake in time")),
            },
        };
        Ok(Opened { stream, peer })
    }

    /// The proxy refuses us or the request; a client sees a refused connection.
    pub(super) fn denied(&self, words: &str) -> DialError {
        DialError::Denied(format!("upstream proxy {self} {words}"))
    }

    /// The proxy does not answer; a client sees a timeout.
    pub(super) fn silent(&self, words: &str) -> DialError {
        DialError::Io(io::Error::new(io::ErrorKind::TimedOut, format!("upstream proxy {self} {words}")))
    }

    /// The conversation with the proxy broke.
    pub(super) fn broken(&self, error: &io::Error) -> DialError {
        match error.kind() {
            io::ErrorKind::UnexpectedEof => self.denied("closed the connection in the middle of the handshake"),
            _ => self.denied(&format!("broke the handshake: {error}")),
        }
    }

    fn dead(&self, error: &DialError) -> DialError {
        let unreachable = |kind: io::ErrorKind| {
            DialError::Io(io::Error::new(kind, format!("upstream proxy {self} is unreachable: {error}")))
        };
        match error {
            // It is we who have no room; that says nothing of the proxy.
            DialError::Exhausted | DialError::NoPort => error.again(),
            DialError::Refused => self.denied("refused the connection"),
            DialError::TimedOut => self.silent("did not answer in time"),
            DialError::Unreachable(Reach::Network) => unreachable(io::ErrorKind::NetworkUnreachable),
            DialError::Unreachable(_) => unreachable(io::ErrorKind::HostUnreachable),
            DialError::Io(io) => unreachable(io.kind()),
            _ => self.denied(&format!("cannot be used: {error}")),
        }
    }
}

impl std::fmt::Display for Upstream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({})", self.name, self.server)
    }
}
