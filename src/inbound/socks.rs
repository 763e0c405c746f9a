//! SOCKS4, SOCKS4a and SOCKS5 for clients: CONNECT, and UDP ASSOCIATE (RFC 1928, RFC 1929).

mod relay;

use std::io;
use std::net::{Ipv4Addr, SocketAddr};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

use super::mixed::{Client, Facts, HANDSHAKE, SILENCE, gone};
use super::refusal::Refusal;
use crate::dispatch::Entry;
use crate::net::{Address, Host};
use crate::outbound::socks5::wire::{self, command, method, reply};
use crate::session::Network;

/// The most bytes of a SOCKS4 user or name, with its final zero.
const MAX_TEXT: usize = 256;

/// SOCKS4 replies: granted; rejected or failed.
const GRANTED: u8 = 90;
const REJECTED: u8 = 91;

/// What a client wants.
#[derive(Debug, PartialEq, Eq)]
enum Request {
    /// A TCP connection, asked for in this version of the protocol.
    Connect(Version, Address),
    /// A relay for datagrams, which will come from this address (zeros: not known yet).
    Associate(Address),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Version {
    Four,
    Five,
}

impl Version {
    /// A reply; `code` is one of SOCKS5's.
    fn reply(self, code: u8) -> Vec<u8> {
        let mut bytes = Vec::new();
        match self {
            Self::Five => wire::put_reply(code, SocketAddr::from(([0, 0, 0, 0], 0)), &mut bytes),
            Self::Four => {
                let code = if code == reply::SUCCEEDED { GRANTED } else { REJECTED };
                bytes.extend_from_slice(&[0, code, 0, 0, 0, 0, 0, 0]);
            }
        }
        bytes
    }
}

/// Serves one client.
///
/// # Errors
/// It broke the protocol or the connection.
pub(super) async fn serve<E: Entry>(client: Client, entry: E) -> io::Result<()> {
    let Client { mut stream, facts } = client;
    match timeout(HANDSHAKE, handshake(&mut stream, &facts)).await?? {
        Some(Request::Connect(version, to)) => connect(stream, &facts, entry, version, to).await,
        Some(Request::Associate(from)) => relay::serve(stream, &facts, entry, &from).await,
        None => Ok(()),
    }
}

async fn connect<E: Entry>(
    mut stream: TcpStream,
    facts: &Facts,
    entry: E,
    version: Version,
    to: Address,
) -> io::Result<()> {
    let session = facts.session(Network::Tcp, facts.peer, to);
    let dialled = tokio::select! {
        dialled = entry.dial(session) => dialled,
        () = gone(&stream) => return Ok(()),
    };
    match dialled {
        Ok(upstream) => {
            stream.write_all(&version.reply(reply::SUCCEEDED)).await?;
            entry.relay(upstream, Box::new(stream)).await;
        }
        Err(error) => match Refusal::from(&error).socks5() {
            Some(code) => {
                stream.write_all(&version.reply(code)).await?;
                stream.shutdown().await?;
            }
            None => tokio::select! {
                () = sleep(SILENCE) => {}
                () = gone(&stream) => {}
            },
        },
    }
    Ok(())
}

/// Reads what the client wants; None: it was told that it does not get it.
async fn handshake(stream: &mut (impl AsyncRead + AsyncWrite + Unpin), facts: &Facts) -> io::Result<Option<Request>> {
    match stream.read_u8().await? {
        4 => four(stream, facts).await,
        wire::VERSION => five(stream, facts).await,
        other => Err(invalid(format!("{other} is no version of SOCKS"))),
    }
}

/// SOCKS4 has no password, so it is not for clients that must have one.
async fn four(stream: &mut (impl AsyncRead + AsyncWrite + Unpin), facts: &Facts) -> io::Result<Option<Request>> {
    let asked = stream.read_u8().await?;
    let port = stream.read_u16().await?;
    let ip = Ipv4Addr::from(stream.read_u32().await?);
    text(stream).await?;
    // SOCKS4a: 0.0.0.x with x not 0 says that a name follows.
    let named = ip.octets()[..3] == [0; 3] && ip.octets()[3] != 0;
    let host = if named {
        let name = String::from_utf8(text(stream).await?).map_err(|_| invalid("the name is not text"))?;
        Host::parse(&name).map_err(invalid)?
    } else {
        Host::Ip(ip.into())
    };
    if asked != command::CONNECT || facts.asks() {
        stream.write_all(&Version::Four.reply(reply::NOT_ALLOWED)).await?;
        return Ok(None);
    }
    Ok(Some(Request::Connect(Version::Four, Address { host, port })))
}

/// A text that ends with a zero byte.
async fn text(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Vec<u8>> {
    let mut text = Vec::new();
    loop {
        match stream.read_u8().await? {
            0 => return Ok(text),
            _ if text.len() >= MAX_TEXT => return Err(invalid("a SOCKS4 text is too long")),
            byte => text.push(byte),
        }
    }
}

async fn five(stream: &mut (impl AsyncRead + AsyncWrite + Unpin), facts: &Facts) -> io::Result<Option<Request>> {
    let mut methods = vec![0; usize::from(stream.read_u8().await?)];
    stream.read_exact(&mut methods).await?;
    let wanted = if facts.asks() { method::PASSWORD } else { method::NONE };
    // Who offers only a password is let in with any, where none is asked.
    let chosen = [wanted, method::PASSWORD].into_iter().find(|method| methods.contains(method));
    let chosen = chosen.unwrap_or(method::UNACCEPTABLE);
    stream.write_all(&[wire::VERSION, chosen]).await?;
    if chosen == method::UNACCEPTABLE || (chosen == method::PASSWORD && !password(stream, facts).await?) {
        return Ok(None);
    }
    let mut head = [0; 3];
    stream.read_exact(&mut head).await?;
    if head[0] != wire::VERSION {
        return Err(invalid("the request is not SOCKS5"));
    }
    let to = match wire::read_address(stream).await {
        Err(error) if error.kind() == io::ErrorKind::InvalidData => {
            stream.write_all(&Version::Five.reply(reply::ADDRESS_UNSUPPORTED)).await?;
            return Err(error);
        }
        to => to?,
    };
    match head[1] {
        command::CONNECT => Ok(Some(Request::Connect(Version::Five, to))),
        command::UDP_ASSOCIATE => Ok(Some(Request::Associate(to))),
        _ => {
            stream.write_all(&Version::Five.reply(reply::COMMAND_UNSUPPORTED)).await?;
            Ok(None)
        }
    }
}

/// RFC 1929: whether the user may go on.
async fn password(stream: &mut (impl AsyncRead + AsyncWrite + Unpin), facts: &Facts) -> io::Result<bool> {
    if stream.read_u8().await? != wire::PASSWORD_VERSION {
        return Err(invalid("the authentication is not that of RFC 1929"));
    }
    let mut name = vec![0; usize::from(stream.read_u8().await?)];
    stream.read_exact(&mut name).await?;
    let mut word = vec![0; usize::from(stream.read_u8().await?)];
    stream.read_exact(&mut word).await?;
    let good = !facts.asks() || facts.access.knows(&name, &word);
    stream.write_all(&[wire::PASSWORD_VERSION, u8::from(!good)]).await?;
    Ok(good)
}

fn invalid(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

#[cfg(test)]
mod tests;
