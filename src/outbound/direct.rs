//! DIRECT: the host's own network. It resolves names itself, so one association serves all peers of a source.

mod datagram;
mod echo;

use std::sync::Arc;

use self::datagram::DirectDatagram;
use self::echo::DirectEcho;
use super::egress::Egress;
use super::kind::{self, Context, Kind};
use super::{Networks, Outbound};
use crate::net::{Address, BoxDatagram, BoxEchoSocket, BoxFuture, BoxStream, DialError, Host};
use crate::profile::Fields;
use crate::session::Session;

/// The registry's entry.
pub(super) const KIND: Kind = Kind { name: "direct", keys: &["udp", "ip-version", "interface-name"], build };

fn build(fields: &mut Fields<'_>, name: &str, context: &Context) -> Option<Arc<dyn Outbound>> {
    let egress = kind::egress(fields, context);
    let networks = Networks { icmp: true, ..kind::networks(fields, true) };
    Some(Arc::new(Direct::new(name, Arc::new(egress), networks)))
}

/// Dials destinations from this host.
pub struct Direct {
    name: String,
    egress: Arc<Egress>,
    networks: Networks,
}

impl Direct {
    /// An outbound called `name`.
    #[must_use]
    pub fn new(name: &str, egress: Arc<Egress>, networks: Networks) -> Self {
        Self { name: name.to_owned(), egress, networks }
    }
}

impl Outbound for Direct {
    fn name(&self) -> &str {
        &self.name
    }

    fn networks(&self) -> Networks {
        self.networks
    }

    fn connect<'a>(&'a self, session: &'a Session) -> BoxFuture<'a, Result<BoxStream, DialError>> {
        Box::pin(async { Ok(Box::new(self.egress.tcp(&session.destination).await?) as BoxStream) })
    }

    fn peer<'a>(&'a self, session: &'a Session) -> BoxFuture<'a, Result<Address, DialError>> {
        Box::pin(async {
            let Address { host, port } = &session.destination;
            let ip = match host {
                Host::Ip(ip) => *ip,
                Host::Name(name) => self.egress.reachable(name, session.source.is_ipv4()).await?,
            };
            Ok(Address { host: Host::Ip(ip), port: *port })
        })
    }

    fn associate<'a>(&'a self, session: &'a Session) -> BoxFuture<'a, Result<BoxDatagram, DialError>> {
        Box::pin(async {
            let mut datagram = DirectDatagram::new(Arc::clone(&self.egress));
            // Whether there is a socket for it shows now, and not with the first datagram.
            if let Host::Ip(ip) = session.destination.host {
                datagram.open(ip)?;
            }
            Ok(Box::new(datagram) as BoxDatagram)
        })
    }

    fn echo(&self, ipv6: bool) -> Result<BoxEchoSocket, DialError> {
        Ok(Box::new(DirectEcho::open(Arc::clone(&self.egress), ipv6)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::outbound::fixture::{Names, closed_port, session};
    use crate::platform::Dialer;
    use crate::session::Network;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    fn direct(names: &[(&str, &[&str])]) -> Direct {
        let egress = Egress::new(Dialer::default(), Names::shared(names));
        Direct::new("DIRECT", Arc::new(egress), Networks::ALL)
    }

    #[tokio::test]
    async fn a_closed_port_is_refused() {
        let closed = closed_port();
        let outcome = direct(&[]).connect(&session(Network::Tcp, "127.0.0.1", closed.address.port())).await;
        assert!(matches!(outcome.err(), Some(DialError::Refused)));
    }

    #[tokio::test]
    async fn half_closing_keeps_the_other_direction() {
        let listener = tokio::net::TcpListener::bind("[::1]:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let server = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut asked = String::new();
            stream.read_to_string(&mut asked).await.unwrap();
            stream.write_all(asked.to_uppercase().as_bytes()).await.unwrap();
        };
        let client = async {
            let direct = direct(&[("six.test", &["::1"])]);
            let mut stream = direct.connect(&session(Network::Tcp, "six.test", port)).await.unwrap();
            stream.write_all(b"question").await.unwrap();
            stream.shutdown().await.unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await.unwrap();
            answer
        };
        assert_eq!(tokio::join!(server, client).1, "QUESTION");
    }

    #[tokio::test]
    async fn a_reset_stream_is_a_reset_for_the_peer() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let mut ours = direct(&[]).connect(&session(Network::Tcp, "127.0.0.1", port)).await.unwrap();
        let (mut theirs, _) = listener.accept().await.unwrap();
        ours.reset();
        drop(ours);
        let error = theirs.read(&mut [0; 1]).await.unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    }
}
