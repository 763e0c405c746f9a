//! `type: socks5`: TCP by CONNECT, UDP by UDP ASSOCIATE (RFC 1928), user and password (RFC 1929), TLS.

mod associate;
mod options;
pub mod wire;

use std::borrow::Cow;
use std::sync::Arc;

use tokio::time::timeout;
use tokio_socks::tcp::Socks5Stream;
use tokio_socks::{Error as SocksError, TargetAddr};

use self::wire::reply;
use super::kind::Kind;
use super::upstream::{REPLY, Upstream};
use super::{Networks, Outbound};
use crate::net::{Address, BoxDatagram, BoxFuture, BoxStream, DialError, Host, Reach};
use crate::session::Session;

pub use self::associate::Drops;

/// The registry's entry.
pub(super) const KIND: Kind = Kind { name: "socks5", keys: options::KEYS, build: options::build };

/// tokio-socks has one word for two things.
const UNKNOWN_CODE: &str = "chose a method that was not offered, or its reply has a code that SOCKS5 does not know";

/// A SOCKS5 proxy.
pub struct Socks5 {
    upstream: Arc<Upstream>,
    credentials: Option<Credentials>,
    udp: bool,
    drops: Arc<Drops>,
}

/// User name and password, each of 1 to 255 bytes (RFC 1929 section 2).
#[derive(Clone)]
pub(super) struct Credentials {
    pub(super) username: String,
    pub(super) password: String,
}

impl Socks5 {
    /// What came back from relays and was no datagram for a client.
    #[must_use]
    pub fn drops(&self) -> &Drops {
        &self.drops
    }

    async fn dial(&self, to: &Address) -> Result<BoxStream, DialError> {
        let stream = self.upstream.open().await?.stream;
        let target = match &to.host {
            Host::Ip(ip) => TargetAddr::Ip((*ip, to.port).into()),
            Host::Name(name) => TargetAddr::Domain(Cow::Borrowed(name.as_str()), to.port),
        };
        let handshake = async {
            match &self.credentials {
                None => Socks5Stream::connect_with_socket(stream, target).await,
                Some(Credentials { username, password }) => {
                    Socks5Stream::connect_with_password_and_socket(stream, target, username, password).await
                }
            }
        };
        match timeout(REPLY, handshake).await {
            Ok(Ok(stream)) => Ok(stream.into_inner()),
            Ok(Err(error)) => Err(self.failed(error, to)),
            Err(_) => Err(self.upstream.silent("did not answer the request in time")),
        }
    }

    /// What tokio-socks says, as a client of the real thing would see it.
    fn failed(&self, error: SocksError, to: &Address) -> DialError {
        let code = match error {
            SocksError::GeneralSocksServerFailure => reply::FAILURE,
            SocksError::ConnectionNotAllowedByRuleset => reply::NOT_ALLOWED,
            SocksError::NetworkUnreachable => reply::NETWORK_UNREACHABLE,
            SocksError::HostUnreachable => reply::HOST_UNREACHABLE,
            SocksError::ConnectionRefused => reply::REFUSED,
            SocksError::TtlExpired => reply::TTL_EXPIRED,
            SocksError::CommandNotSupported => reply::COMMAND_UNSUPPORTED,
            SocksError::AddressTypeNotSupported => reply::ADDRESS_UNSUPPORTED,
            SocksError::NoAcceptableAuthMethods | SocksError::AuthorizationRequired => {
                return self.upstream.denied(associate::NO_METHOD);
            }
            SocksError::PasswordAuthFailure(_) => return self.upstream.denied(associate::WRONG_PASSWORD),
            SocksError::Io(error) => return self.upstream.broken(&error),
            SocksError::UnknownAuthMethod => return self.upstream.denied(UNKNOWN_CODE),
            other => return self.upstream.denied(&format!("does not speak SOCKS5 as it should: {other}")),
        };
        refusal(&self.upstream, code, to)
    }
}

/// A reply code as a client would see it.
fn refusal(upstream: &Upstream, code: u8, to: &Address) -> DialError {
    match code {
        reply::NOT_ALLOWED => upstream.denied(&format!("does not allow {to}")),
        reply::NETWORK_UNREACHABLE => DialError::Unreachable(Reach::Network),
        reply::HOST_UNREACHABLE => DialError::Unreachable(Reach::Host),
        reply::REFUSED => DialError::Refused,
        reply::TTL_EXPIRED => DialError::TimedOut,
        reply::COMMAND_UNSUPPORTED => upstream.denied("does not support the command"),
        reply::ADDRESS_UNSUPPORTED => upstream.denied(&format!("does not support the kind of address of {to}")),
        _ => upstream.denied(&format!("failed to reach {to} (reply {code})")),
    }
}

impl Outbound for Socks5 {
    fn name(&self) -> &str {
        &self.upstream.name
    }

    fn networks(&self) -> Networks {
        Networks { tcp: true, udp: self.udp, icmp: false }
    }

    fn connect<'a>(&'a self, session: &'a Session) -> BoxFuture<'a, Result<BoxStream, DialError>> {
        Box::pin(self.dial(&session.destination))
    }

    fn associate<'a>(&'a self, _: &'a Session) -> BoxFuture<'a, Result<BoxDatagram, DialError>> {
        Box::pin(async {
            if !self.udp {
                return Err(DialError::Unsupported(format!("{} has no `udp: true`", self.name())));
            }
            let associate = associate::open(&self.upstream, self.credentials.as_ref(), Arc::clone(&self.drops));
            match timeout(REPLY, associate).await {
                Ok(outcome) => Ok(Box::new(outcome?) as BoxDatagram),
                Err(_) => Err(self.upstream.silent("did not answer the request in time")),
            }
        })
    }
}

#[cfg(test)]
mod tests;
