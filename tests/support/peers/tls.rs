//! The same site behind TLS, with a certificate of its own making.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use tokio::io::copy_bidirectional;
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::aws_lc_rs;
use tokio_rustls::rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};

use super::digest::Sha256;
use super::{Peer, Peers, hand_on, http};
use crate::support::world;

/// A key and a certificate that signs itself.
pub(crate) struct Identity {
    /// The certificate in PEM, for `curl --cacert`.
    pub(crate) certificate: PathBuf,
    /// The SHA-256 of the certificate, as a profile pins it.
    pub(crate) fingerprint: String,
    acceptor: TlsAcceptor,
}

impl Identity {
    /// For these names or addresses.
    ///
    /// # Panics
    /// If the crypto library refuses.
    pub(crate) fn new(names: &[&str]) -> Self {
        let names: Vec<String> = names.iter().map(ToString::to_string).collect();
        let made = rcgen::generate_simple_self_signed(names).expect("names that a certificate can hold");
        let certificate = world::fresh_dir("tls").join("certificate.pem");
        std::fs::write(&certificate, made.cert.pem()).expect("a file on the lab's desk");
        let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(made.signing_key.serialize_der()));
        let config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_safe_default_protocol_versions()
            .expect("versions of the provider")
            .with_no_client_auth()
            .with_single_cert(vec![made.cert.der().clone()], key)
            .expect("a key that fits");
        let mut digest = Sha256::new();
        digest.update(made.cert.der());
        Self { certificate, fingerprint: digest.hex(), acceptor: TlsAcceptor::from(Arc::new(config)) }
    }
}

impl Peers {
    /// [`Peers::http`] over TLS.
    pub(crate) fn https(&self, address: SocketAddr, identity: &Identity) -> Peer {
        let acceptor = identity.acceptor.clone();
        self.tcp(address, move |stream, client| {
            let acceptor = acceptor.clone();
            async move { http::serve(acceptor.accept(stream).await?, client).await }
        })
    }

    /// TLS in front of a server that knows nothing of it.
    pub(crate) fn tls_in_front_of(&self, plain: SocketAddr, address: SocketAddr, identity: &Identity) -> Peer {
        let acceptor = identity.acceptor.clone();
        self.tcp(address, move |stream, _client| {
            let acceptor = acceptor.clone();
            async move {
                let mut outer = acceptor.accept(stream).await?;
                let mut inner = TcpStream::connect(plain).await?;
                let carried = copy_bidirectional(&mut outer, &mut inner).await;
                hand_on(carried, [outer.get_ref().0, &inner])
            }
        })
    }
}
