//! Where flows go: one file per kind of outbound, and groups made of outbounds.

mod direct;
mod egress;
#[cfg(test)]
pub(crate) mod fixture;
mod group;
mod http;
mod kind;
mod prefixed;
mod reject;
pub mod socks5;
mod table;
mod tls;
mod unsupported;
mod upstream;

use crate::net::{Address, BoxDatagram, BoxEchoSocket, BoxFuture, BoxStream, DialError};
use crate::session::{Network, Session};

pub use direct::Direct;
pub use egress::{Egress, IpVersion};
pub use group::{Member, Select};
pub use http::Http;
pub use kind::{Context, KINDS, Kind};
pub use prefixed::Prefixed;
pub use reject::Reject;
pub use table::{Index, Outbounds, SelectError};
pub use tls::Roots;
pub use unsupported::Unsupported;

pub(crate) use http::base64;

/// Which networks an outbound carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Networks {
    /// TCP flows.
    pub tcp: bool,
    /// UDP associations.
    pub udp: bool,
    /// Echo requests.
    pub icmp: bool,
}

impl Networks {
    /// Every one.
    pub const ALL: Self = Self { tcp: true, udp: true, icmp: true };

    /// Whether `network` is among them.
    #[must_use]
    pub fn carries(self, network: Network) -> bool {
        match network {
            Network::Tcp => self.tcp,
            Network::Udp => self.udp,
            Network::Icmp => self.icmp,
        }
    }
}

/// A way out. Its futures are called in the context of the worker that owns the flow, so sockets live there.
pub trait Outbound: Send + Sync {
    /// The name that rules use.
    fn name(&self) -> &str;

    /// What it carries now (a group: what its present member carries).
    fn networks(&self) -> Networks;

    /// The chain from this outbound to the one that dials, outermost first; a group adds its present member.
    fn chain(&self) -> Vec<String> {
        vec![self.name().to_owned()]
    }

    /// Opens a stream to the session's destination.
    fn connect<'a>(&'a self, session: &'a Session) -> BoxFuture<'a, Result<BoxStream, DialError>>;

    /// The session's destination as the associations of this outbound want it written. An address: one association
    /// serves all peers of a source, and DIRECT looks names up for that. A name, which is handed on to an upstream: each
    /// has an association of its own, because answers come back from an address.
    fn peer<'a>(&'a self, session: &'a Session) -> BoxFuture<'a, Result<Address, DialError>> {
        Box::pin(async { Ok(session.destination.clone()) })
    }

    /// Opens an association for datagrams of the session's source; the session's destination is the first peer, as
    /// [`peer`](Self::peer) wrote it.
    fn associate<'a>(&'a self, session: &'a Session) -> BoxFuture<'a, Result<BoxDatagram, DialError>>;

    /// Opens a socket for the echo requests of all sources to hosts of one family.
    ///
    /// # Errors
    /// The outbound carries none, or this host allows none.
    fn echo(&self, ipv6: bool) -> Result<BoxEchoSocket, DialError> {
        let _ = ipv6;
        Err(DialError::Unsupported(format!("{} carries no echo requests", self.name())))
    }
}
