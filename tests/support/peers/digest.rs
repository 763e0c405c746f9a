//! Bulk data whose every byte is known, and its SHA-256.

use std::fmt::Write;
use std::sync::LazyLock;

use tokio_rustls::rustls::crypto::aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256;
use tokio_rustls::rustls::crypto::hash::Context;

/// A prime, so that lost or doubled segments and pages never fall on the same bytes again.
const PERIOD: usize = 65_521;

static BLOCK: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut state = 0x2545_f491_u32;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state.to_le_bytes()[0]
    };
    (0..PERIOD).map(|_| next()).collect()
});

/// The bytes of the endless test stream at `offset`: as many as lie before the next turn, at most `at_most`.
pub(crate) fn pattern(offset: u64, at_most: u64) -> &'static [u8] {
    let start = usize::try_from(offset % PERIOD as u64).expect("below the period");
    let end = usize::try_from(at_most).map_or(PERIOD, |most| PERIOD.min(start.saturating_add(most)));
    &BLOCK[start..end]
}

/// SHA-256 of what is fed to it.
pub(crate) struct Sha256(Box<dyn Context>);

impl Sha256 {
    /// Of nothing yet.
    pub(crate) fn new() -> Self {
        let suite = TLS13_AES_128_GCM_SHA256.tls13().expect("a suite of TLS 1.3");
        Self(suite.common.hash_provider.start())
    }

    /// Takes in `data`.
    pub(crate) fn update(&mut self, data: &[u8]) {
        self.0.update(data);
    }

    /// The digest in lower-case hexadecimal.
    pub(crate) fn hex(self) -> String {
        self.0.finish().as_ref().iter().fold(String::new(), |mut hex, byte| {
            let _ = write!(hex, "{byte:02x}");
            hex
        })
    }
}

/// The digest of the first `length` bytes of the test stream.
pub(crate) fn of_pattern(length: u64) -> String {
    let mut sha = Sha256::new();
    let mut offset = 0;
    while offset < length {
        let chunk = pattern(offset, length - offset);
        sha.update(chunk);
        offset += chunk.len() as u64;
    }
    sha.hex()
}
