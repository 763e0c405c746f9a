//! What the tests of several outbounds and inbounds share: names that resolve, and peers that fail.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr, TcpListener as StdListener, TcpStream as StdStream};
use std::sync::Arc;

use super::tls::Fingerprint;
use super::{Context, Egress, Outbound, Outbounds, Roots};
use crate::net::{Address, BoxFuture, Host, Lookup, LookupError, Name};
use crate::platform::Dialer;
use crate::profile::{Report, read};
use crate::session::{Inbound, Network, Session};

/// A resolver that knows a few names.
pub(crate) struct Names(HashMap<Name, Arc<[IpAddr]>>);

impl Names {
    pub(crate) fn shared(names: &[(&str, &[&str])]) -> Arc<dyn Lookup> {
        let known = names.iter().map(|(name, addresses)| {
            (Name::new(name).unwrap(), addresses.iter().map(|address| address.parse().unwrap()).collect())
        });
        Arc::new(Self(known.collect()))
    }
}

impl Lookup for Names {
    fn lookup<'a>(&'a self, name: &'a Name) -> BoxFuture<'a, Result<Arc<[IpAddr]>, LookupError>> {
        Box::pin(async move { self.0.get(name).cloned().ok_or(LookupError::NoSuchName) })
    }
}

/// A TCP port that is taken, so that no other test gets it, and where nobody listens.
pub(crate) struct ClosedPort {
    pub(crate) address: SocketAddr,
    _socket: socket2::Socket,
}

pub(crate) fn closed_port() -> ClosedPort {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    let address = socket.local_addr().unwrap().as_socket().unwrap();
    ClosedPort { address, _socket: socket }
}

/// A listener whose queue is full, so that the kernel ignores whoever connects.
pub(crate) struct BlackHole {
    pub(crate) address: SocketAddr,
    _listener: StdListener,
    _queued: Vec<StdStream>,
}

pub(crate) fn black_hole() -> BlackHole {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    socket.listen(0).unwrap();
    let listener = StdListener::from(socket);
    let address = listener.local_addr().unwrap();
    let queued = vec![StdStream::connect(address).unwrap()];
    BlackHole { address, _listener: listener, _queued: queued }
}

/// A session towards `host` and `port`.
pub(crate) fn session(network: Network, host: &str, port: u16) -> Session {
    Session::new(
        network,
        Inbound::Tun,
        SocketAddr::from(([127, 0, 0, 1], 40_000)),
        Address { host: Host::parse(host).unwrap(), port },
    )
}

/// What [`build`] makes.
pub(crate) type Tested = Arc<dyn Outbound>;

/// Builds the proxy that `yaml` describes, by way of the table.
pub(crate) fn build(yaml: &str) -> Tested {
    let (table, report) = table(&format!("proxies: [{yaml}]"));
    assert!(!report.has_errors(), "{report}");
    Arc::clone(table.outbound(table.index("up").unwrap()))
}

/// Builds the table of a profile's text.
pub(crate) fn table(yaml: &str) -> (Outbounds, Report) {
    table_knowing(yaml, &[("localhost.test", &["127.0.0.1"])])
}

/// The same, where these names have addresses.
pub(crate) fn table_knowing(yaml: &str, names: &[(&str, &[&str])]) -> (Outbounds, Report) {
    let (profile, mut report) = read("test.yaml", yaml.as_bytes());
    let profile = profile.unwrap_or_else(|| panic!("{report}"));
    let context = Context { egress: Egress::new(Dialer::default(), Names::shared(names)), roots: Roots::default() };
    let built = Outbounds::build(&profile.proxies, &profile.groups, &context, &mut report);
    (built, report)
}

/// A TLS listener with a certificate of its own for `name`, and that certificate's fingerprint.
pub(crate) fn tls_server(name: &str) -> (StdListener, tokio_rustls::TlsAcceptor, String) {
    let issued = rcgen::generate_simple_self_signed([name.to_owned()]).unwrap();
    let pin = format!("{:?}", Fingerprint::of(issued.cert.der()));
    let key = rustls::pki_types::PrivateKeyDer::try_from(issued.signing_key.serialize_der()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![issued.cert.der().clone()], key)
        .unwrap();
    let listener = StdListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    (listener, tokio_rustls::TlsAcceptor::from(Arc::new(config)), pin)
}
