//! `type: http`: TCP by the CONNECT method (RFC 9110 section 9.3.6), basic authentication, own headers, TLS.

mod options;

use bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

use super::kind::Kind;
use super::prefixed::Prefixed;
use super::upstream::{REPLY, Upstream};
use super::{Networks, Outbound};
use crate::net::{Address, BoxDatagram, BoxFuture, BoxStream, DialError};
use crate::session::Session;

/// The registry's entry.
pub(super) const KIND: Kind = Kind { name: "http", keys: options::KEYS, build: options::build };

/// The most bytes and header lines that a proxy's answer may have.
const MAX_HEAD: usize = 16 * 1024;
const MAX_HEADERS: usize = 128;

/// An HTTP proxy.
pub struct Http {
    upstream: Upstream,
    /// Header lines that go with every request, each ended by CRLF.
    headers: String,
}

impl Http {
    async fn dial(&self, to: &Address) -> Result<BoxStream, DialError> {
        let mut stream = self.upstream.open().await?.stream;
        let request = format!("CONNECT {to} HTTP/1.1\r\nHost: {to}\r\n{}\r\n", self.headers);
        let exchange = async {
            let sent = async {
                stream.write_all(request.as_bytes()).await?;
                stream.flush().await
            };
            sent.await.map_err(|error| self.upstream.broken(&error))?;
            self.answer(&mut stream, to).await
        };
        match timeout(REPLY, exchange).await {
            Ok(early) => Ok(Prefixed::boxed(early?, stream)),
            Err(_) => Err(self.upstream.silent("did not answer the request in time")),
        }
    }

    /// Reads the proxy's answer; what the destination already said behind it is returned.
    async fn answer(&self, stream: &mut BoxStream, to: &Address) -> Result<Bytes, DialError> {
        let mut head = Vec::with_capacity(512);
        loop {
            match parse(&head) {
                Ok(Some((100..=199, length))) => {
                    // Interim answers say nothing yet (RFC 9110 section 15.2).
                    head.drain(..length);
                    continue;
                }
                Ok(Some((200..=299, length))) => {
                    head.drain(..length);
                    return Ok(head.into());
                }
                Ok(Some((status, _))) => return Err(self.refused(status, to)),
                Ok(None) => {}
                Err(error) => return Err(self.upstream.denied(&format!("does not speak HTTP as it should: {error}"))),
            }
            if head.len() >= MAX_HEAD {
                return Err(self.upstream.denied("sent an answer that is too long"));
            }
            let read = stream.read_buf(&mut head).await.map_err(|error| self.upstream.broken(&error))?;
            if read == 0 {
                return Err(self.upstream.denied("closed the connection in the middle of the handshake"));
            }
        }
    }

    /// A status as a client would see it.
    fn refused(&self, status: u16, to: &Address) -> DialError {
        match status {
            407 => self.upstream.denied("refused the user name and password (407)"),
            401 | 403 => self.upstream.denied(&format!("does not allow {to} ({status})")),
            // RFC 9110 section 15.6: the gateway could not reach the destination, or got no answer in time.
            502 | 503 => DialError::Refused,
            504 => DialError::TimedOut,
            _ => self.upstream.denied(&format!("answered {status} to CONNECT {to}")),
        }
    }
}

/// The status and the length of a complete answer's head; None while it is not complete.
fn parse(bytes: &[u8]) -> Result<Option<(u16, usize)>, httparse::Error> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut response = httparse::Response::new(&mut headers);
    // A folded line is one line still (RFC 9112 section 5.2).
    let mut config = httparse::ParserConfig::default();
    config.allow_obsolete_multiline_headers_in_responses(true);
    let status = config.parse_response(&mut response, bytes)?;
    Ok(match (status, response.code) {
        (httparse::Status::Complete(length), Some(code)) => Some((code, length)),
        _ => None,
    })
}

/// RFC 4648 section 4.
pub(crate) fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let group = chunk.iter().fold(0, |group, byte| group << 8 | u32::from(*byte)) << (8 * (3 - chunk.len()));
        for digit in 0..4 {
            let value = (group >> (18 - 6 * digit)) & 0x3f;
            text.push(if digit <= chunk.len() { char::from(DIGITS[value as usize]) } else { '=' });
        }
    }
    text
}

impl Outbound for Http {
    fn name(&self) -> &str {
        &self.upstream.name
    }

    fn networks(&self) -> Networks {
        Networks { tcp: true, udp: false, icmp: false }
    }

    fn connect<'a>(&'a self, session: &'a Session) -> BoxFuture<'a, Result<BoxStream, DialError>> {
        Box::pin(self.dial(&session.destination))
    }

    fn associate<'a>(&'a self, _: &'a Session) -> BoxFuture<'a, Result<BoxDatagram, DialError>> {
        Box::pin(async { Err(DialError::Unsupported(format!("{}: an HTTP proxy does not carry UDP", self.name()))) })
    }
}

#[cfg(test)]
mod tests;
