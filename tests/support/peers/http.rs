//! A web site that says who asked whom for what.

use std::io;
use std::net::SocketAddr;

use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufStream};

use super::digest::{Sha256, of_pattern};
use super::tcp::send_pattern;
use super::{Peer, Peers};

impl Peers {
    /// A site over HTTP/1.1. `GET /bytes/N` sends N bytes of the test stream with their digest in `x-sha256`, a POST
    /// is answered with length and digest of its body, anything else with the line of [`Request::line`].
    pub(crate) fn http(&self, address: SocketAddr) -> Peer {
        self.tcp(address, async |stream, client| serve(stream, client).await)
    }
}

/// The head of a request.
struct Request {
    method: String,
    path: String,
    host: String,
    length: u64,
    /// The client waits for leave to send its body (RFC 9110, 10.1.1).
    expects: bool,
    close: bool,
}

impl Request {
    /// `host=www.example.test path=/ client=192.0.2.1`: what a test looks for in curl's output.
    fn line(&self, client: SocketAddr) -> String {
        format!("host={} path={} client={}\n", self.host, self.path, client.ip())
    }
}

/// Serves one connection until the client closes it or asks for that.
pub(crate) async fn serve(stream: impl AsyncRead + AsyncWrite + Unpin, client: SocketAddr) -> io::Result<()> {
    let mut stream = BufStream::with_capacity(64 << 10, 64 << 10, stream);
    while let Some(request) = read_head(&mut stream).await? {
        if request.expects {
            stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").await?;
            stream.flush().await?;
        }
        answer(&mut stream, &request, client).await?;
        stream.flush().await?;
        if request.close {
            break;
        }
    }
    stream.shutdown().await
}

async fn answer<S>(stream: &mut S, request: &Request, client: SocketAddr) -> io::Result<()>
where
    S: AsyncBufRead + AsyncWrite + Unpin,
{
    if request.method == "POST" || request.method == "PUT" {
        let digest = digest_of_body(stream, request.length).await?;
        return text(stream, &format!("bytes={} sha256={digest}\n", request.length)).await;
    }
    let Some(length) = request.path.strip_prefix("/bytes/").and_then(|n| n.parse::<u64>().ok()) else {
        return text(stream, &request.line(client)).await;
    };
    let digest = of_pattern(length);
    let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\nx-sha256: {digest}\r\n\r\n");
    stream.write_all(head.as_bytes()).await?;
    send_pattern(stream, length).await
}

async fn text(stream: &mut (impl AsyncWrite + Unpin), body: &str) -> io::Result<()> {
    let head = format!("HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: {}\r\n\r\n", body.len());
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(body.as_bytes()).await
}

async fn digest_of_body(stream: &mut (impl AsyncBufRead + Unpin), length: u64) -> io::Result<String> {
    let mut sha = Sha256::new();
    let mut body = stream.take(length);
    let mut left = length;
    while left > 0 {
        let chunk = body.fill_buf().await?;
        if chunk.is_empty() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        sha.update(chunk);
        let taken = chunk.len();
        body.consume(taken);
        left -= taken as u64;
    }
    Ok(sha.hex())
}

async fn read_head(stream: &mut (impl AsyncBufRead + Unpin)) -> io::Result<Option<Request>> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        if stream.read_until(b'\n', &mut head).await? == 0 {
            return Ok(None);
        }
    }
    let mut headers = [httparse::EMPTY_HEADER; 64];
    let mut parsed = httparse::Request::new(&mut headers);
    parsed.parse(&head).map_err(io::Error::other)?;
    let value = |name: &str| {
        let found = parsed.headers.iter().find(|header| header.name.eq_ignore_ascii_case(name));
        found.map(|header| String::from_utf8_lossy(header.value).into_owned()).unwrap_or_default()
    };
    Ok(Some(Request {
        method: parsed.method.unwrap_or_default().to_owned(),
        path: parsed.path.unwrap_or_default().to_owned(),
        host: value("host"),
        length: value("content-length").parse().unwrap_or(0),
        expects: value("expect").eq_ignore_ascii_case("100-continue"),
        close: value("connection").eq_ignore_ascii_case("close"),
    }))
}
