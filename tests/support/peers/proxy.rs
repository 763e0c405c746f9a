//! An HTTP proxy that knows only CONNECT, and what both kinds of proxy share.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, copy_bidirectional};
use tokio::net::TcpStream;

use super::{Peer, Peers, Record, hand_on};

/// The names a proxy resolves: it has no resolver beside this.
pub(crate) type Names = Arc<HashMap<String, IpAddr>>;

/// What a proxy of the lab asks of its clients and knows of the world.
#[derive(Clone, Default)]
pub(crate) struct Door {
    /// User and password, if it wants them.
    pub(crate) credentials: Option<(String, String)>,
    /// The names it can resolve.
    pub(crate) names: Names,
    /// A line per request: `tcp www.example.test:80`, `udp 203.0.113.9:7`; `associate` where it is not answered.
    pub(crate) requests: Record,
    /// It never answers UDP ASSOCIATE.
    pub(crate) mute_for_datagrams: bool,
    /// It takes datagrams only from the address that asked for the association, as most servers do (RFC 1928, 6).
    pub(crate) datagrams_from_asker: bool,
}

impl Door {
    /// Open to all, knowing these names.
    pub(crate) fn knowing(names: &[(&str, &str)]) -> Self {
        let parse = |(name, address): &(&str, &str)| ((*name).to_owned(), address.parse().expect("an address"));
        Self { names: Arc::new(names.iter().map(parse).collect()), ..Self::default() }
    }

    /// Asks for this user and password.
    #[must_use]
    pub(crate) fn with_credentials(mut self, user: &str, password: &str) -> Self {
        self.credentials = Some((user.to_owned(), password.to_owned()));
        self
    }

    /// The address that `host` means.
    pub(crate) fn resolve(&self, host: &str, port: u16) -> io::Result<SocketAddr> {
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let address = host.parse().ok().or_else(|| self.names.get(host).copied());
        Ok(SocketAddr::new(address.ok_or(io::ErrorKind::NotFound)?, port))
    }
}

impl Peers {
    /// An HTTP proxy for CONNECT (RFC 9110, 9.3.6): 407 without the right credentials, 502 for a dial that fails.
    pub(crate) fn http_proxy(&self, address: SocketAddr, door: Door) -> Peer {
        self.tcp(address, move |stream, _| connect(stream, door.clone()))
    }
}

async fn connect(stream: TcpStream, door: Door) -> io::Result<()> {
    let mut stream = BufReader::new(stream);
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        if stream.read_until(b'\n', &mut head).await? == 0 {
            return Ok(());
        }
    }
    let mut headers = [httparse::EMPTY_HEADER; 32];
    let mut request = httparse::Request::new(&mut headers);
    request.parse(&head).map_err(io::Error::other)?;
    let (method, target) = (request.method.unwrap_or_default(), request.path.unwrap_or_default());
    let given = request.headers.iter().find(|h| h.name.eq_ignore_ascii_case("proxy-authorization"));
    if !admitted(&door, given.map(|header| header.value)) {
        let refusal = "HTTP/1.1 407 Proxy Authentication Required\r\nproxy-authenticate: Basic\r\n\r\n";
        return stream.write_all(refusal.as_bytes()).await;
    }
    let Some((host, port)) = target.rsplit_once(':').filter(|_| method == "CONNECT") else {
        return stream.write_all(b"HTTP/1.1 405 Method Not Allowed\r\n\r\n").await;
    };
    door.requests.note(format!("tcp {target}"));
    let dialled = match door.resolve(host, port.parse().map_err(io::Error::other)?) {
        Ok(to) => TcpStream::connect(to).await,
        Err(unknown) => Err(unknown),
    };
    let Ok(mut upstream) = dialled else {
        return stream.write_all(b"HTTP/1.1 502 Bad Gateway\r\n\r\n").await;
    };
    stream.write_all(b"HTTP/1.1 200 Connection established\r\n\r\n").await?;
    let carried = copy_bidirectional(&mut stream, &mut upstream).await;
    hand_on(carried, [stream.get_ref(), &upstream])
}

fn admitted(door: &Door, given: Option<&[u8]>) -> bool {
    let Some((user, password)) = &door.credentials else { return true };
    given == Some(format!("Basic {}", base64(format!("{user}:{password}").as_bytes())).as_bytes())
}

/// RFC 4648, section 4.
fn base64(input: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let sextets = |chunk: &[u8]| {
        let bits = chunk.iter().chain([0, 0].iter()).take(3).fold(0_u32, |bits, byte| bits << 8 | u32::from(*byte));
        let digit = |n: usize| char::from(ALPHABET[(bits >> (18 - 6 * n)) as usize & 63]);
        (0..4).map(|n| if n <= chunk.len() { digit(n) } else { '=' }).collect::<String>()
    };
    input.chunks(3).map(sextets).collect()
}
