//! TLS towards a proxy server. The certificate is checked against the system's and Mozilla's roots unless the profile
//! pins it (`fingerprint`) or says not to look (`skip-cert-verify`).

use std::fmt;
use std::io;
use std::sync::{Arc, OnceLock};

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, InvalidDnsNameError, ServerName, UnixTime};
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::net::{Host, Stream};

/// The SHA-256 of a certificate in DER.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Fingerprint([u8; 32]);

impl Fingerprint {
    /// Reads 64 hexadecimal digits; colons between bytes are allowed.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let digits: Vec<u8> = text.bytes().filter(|byte| *byte != b':').collect();
        if digits.len() != 64 {
            return None;
        }
        let mut bytes = [0; 32];
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
            let nibble = |digit: u8| char::from(digit).to_digit(16).and_then(|value| u8::try_from(value).ok());
            *byte = nibble(pair[0])? << 4 | nibble(pair[1])?;
        }
        Some(Self(bytes))
    }

    /// The fingerprint of a certificate.
    pub(super) fn of(certificate: &[u8]) -> Self {
        let mut bytes = [0; 32];
        // The suite's own hash: aws-lc's SHA-256 without another dependency.
        if let Some(suite) = aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256.tls13() {
            bytes.copy_from_slice(suite.common.hash_provider.hash(certificate).as_ref());
        }
        Self(bytes)
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// Whom to believe.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Trust {
    /// The usual roots.
    #[default]
    Roots,
    /// The server's own certificate has this fingerprint, or one of its issuers has it and signed the server's.
    Pinned(Fingerprint),
    /// Anybody.
    Anyone,
}

/// What the profile says of TLS.
#[derive(Debug, Clone, Default)]
pub(super) struct Options {
    /// The name to ask for and to check, instead of the server's.
    pub(super) sni: Option<String>,
    /// Whom to believe.
    pub(super) trust: Trust,
}

/// The root certificates, read when first needed and then shared.
#[derive(Debug, Clone, Default)]
pub struct Roots(Arc<OnceLock<Arc<RootCertStore>>>);

impl Roots {
    fn store(&self) -> Arc<RootCertStore> {
        let load = || {
            let mut store = RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() };
            let native = rustls_native_certs::load_native_certs();
            store.add_parsable_certificates(native.certs);
            Arc::new(store)
        };
        Arc::clone(self.0.get_or_init(load))
    }
}

/// TLS for one server; connections share the configuration and with it the session tickets.
#[derive(Clone)]
pub(super) struct Tls {
    connector: TlsConnector,
    name: ServerName<'static>,
}

impl Tls {
    /// TLS to a server at `host`.
    ///
    /// # Errors
    /// Neither `sni` nor `host` is a name that TLS can carry.
    pub(super) fn new(options: &Options, host: &Host, roots: &Roots) -> Result<Self, InvalidDnsNameError> {
        let name = match (&options.sni, host) {
            (Some(sni), _) => ServerName::try_from(sni.clone())?,
            (None, Host::Ip(ip)) => ServerName::from(*ip),
            (None, Host::Name(name)) => ServerName::try_from(name.as_str().to_owned())?,
        };
        let provider = Arc::new(aws_lc_rs::default_provider());
        let versions = [&rustls::version::TLS13, &rustls::version::TLS12];
        // The provider has suites for both versions; this cannot fail with aws-lc-rs as it is built here.
        let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&versions)
            .map_err(|_| InvalidDnsNameError)?;
        let config = match options.trust {
            Trust::Roots => builder.with_root_certificates(roots.store()),
            trust => builder.dangerous().with_custom_certificate_verifier(Arc::new(Verifier { trust, provider })),
        };
        Ok(Self { connector: TlsConnector::from(Arc::new(config.with_no_client_auth())), name })
    }

    pub(super) async fn connect(&self, stream: TcpStream) -> io::Result<TlsStream<TcpStream>> {
        self.connector.connect(self.name.clone(), stream).await
    }
}

impl Stream for TlsStream<TcpStream> {
    fn reset(&mut self) {
        self.get_mut().0.reset();
    }
}

/// Checks signatures always, and the certificate as [`Trust`] says.
#[derive(Debug)]
struct Verifier {
    trust: Trust,
    provider: Arc<CryptoProvider>,
}

impl Verifier {
    /// An issuer is pinned: the certificate must lead to it, and be for `name`.
    fn issued_by(
        &self,
        issuer: &CertificateDer<'_>,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let mut roots = RootCertStore::empty();
        roots.add(issuer.clone().into_owned())?;
        WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&self.provider))
            .build()
            .map_err(|error| rustls::Error::General(error.to_string()))?
            .verify_server_cert(certificate, intermediates, name, &[], now)
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let Trust::Pinned(pin) = self.trust else { return Ok(ServerCertVerified::assertion()) };
        if Fingerprint::of(certificate) == pin {
            return Ok(ServerCertVerified::assertion());
        }
        match intermediates.iter().find(|issuer| Fingerprint::of(issuer) == pin) {
            Some(issuer) => self.issued_by(issuer, certificate, intermediates, name, now),
            None => Err(rustls::Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure)),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signature, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
