//! Two proxies of other people: SOCKS5 (RFC 1928) without a password, and HTTP CONNECT with one. Both leave from their
//! own address, so that sites see it.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, copy_bidirectional};
use tokio::net::{TcpSocket, TcpStream, UdpSocket};

use super::{ABROAD, OFFICE, locate};
use crate::net::{Address, Host};
use crate::outbound::socks5::wire::{self, command, method, reply};

/// `demo:demo`, as profiles/demo.yaml says it, in base64 (RFC 7617).
const CREDENTIALS: &str = "Basic ZGVtbzpkZW1v";

/// Serves one SOCKS5 client.
pub(super) async fn socks5(mut stream: TcpStream) -> io::Result<()> {
    let mut head = [0; 2];
    stream.read_exact(&mut head).await?;
    let mut offered = vec![0; usize::from(head[1])];
    stream.read_exact(&mut offered).await?;
    stream.write_all(&[wire::VERSION, method::NONE]).await?;
    let mut request = [0; 3];
    stream.read_exact(&mut request).await?;
    let to = wire::read_address(&mut stream).await?;
    let here = stream.local_addr()?;
    match request[1] {
        command::CONNECT => match dial(ABROAD, &to).await {
            Ok(mut upstream) => {
                say(&mut stream, reply::SUCCEEDED, here).await?;
                copy_bidirectional(&mut stream, &mut upstream).await.map(drop)
            }
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                say(&mut stream, reply::REFUSED, here).await
            }
            Err(_) => say(&mut stream, reply::HOST_UNREACHABLE, here).await,
        },
        command::UDP_ASSOCIATE => relay(stream).await,
        _ => say(&mut stream, reply::COMMAND_UNSUPPORTED, here).await,
    }
}

async fn say(stream: &mut TcpStream, code: u8, bound: SocketAddr) -> io::Result<()> {
    let mut words = Vec::new();
    wire::put_reply(code, bound, &mut words);
    stream.write_all(&words).await
}

/// Relays datagrams until the client closes the connection that asked for it.
async fn relay(mut stream: TcpStream) -> io::Result<()> {
    let inner = UdpSocket::bind((ABROAD, 0)).await?;
    let outer = UdpSocket::bind((ABROAD, 0)).await?;
    say(&mut stream, reply::SUCCEEDED, inner.local_addr()?).await?;
    let (mut requests, mut answers) = (vec![0; 4096], vec![0; 4096]);
    let mut client = None;
    loop {
        tokio::select! {
            end = stream.read_u8() => return end.map(drop),
            Ok((length, from)) = inner.recv_from(&mut requests) => {
                client = Some(from);
                let Ok((to, payload)) = wire::take_datagram(&requests[..length]) else { continue };
                if let Ok(to) = locate(&to) {
                    let _ = outer.send_to(payload, to).await;
                }
            }
            Ok((length, from)) = outer.recv_from(&mut answers) => {
                let Some(client) = client else { continue };
                let mut datagram = Vec::new();
                wire::put_datagram_header(&from.into(), &mut datagram);
                datagram.extend_from_slice(&answers[..length]);
                let _ = inner.send_to(&datagram, client).await;
            }
        }
    }
}

/// Serves one client of the HTTP proxy.
pub(super) async fn http(stream: TcpStream) -> io::Result<()> {
    let mut stream = BufReader::new(stream);
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if head.len() > 16 << 10 || stream.read_line(&mut head).await? == 0 {
            return Ok(());
        }
    }
    let known = head.lines().filter_map(|line| line.split_once(": "));
    let known = known.filter(|(name, _)| name.eq_ignore_ascii_case("proxy-authorization"));
    if !known.into_iter().any(|(_, value)| value == CREDENTIALS) {
        return stream.write_all(b"HTTP/1.1 407 Proxy Authentication Required\r\ncontent-length: 0\r\n\r\n").await;
    }
    let target = head.strip_prefix("CONNECT ").and_then(|rest| rest.split(' ').next()).and_then(target);
    let Some(target) = target else {
        return stream.write_all(b"HTTP/1.1 405 Method Not Allowed\r\ncontent-length: 0\r\n\r\n").await;
    };
    let Ok(mut upstream) = dial(OFFICE, &target).await else {
        return stream.write_all(b"HTTP/1.1 502 Bad Gateway\r\ncontent-length: 0\r\n\r\n").await;
    };
    stream.write_all(b"HTTP/1.1 200 Connection established\r\n\r\n").await?;
    copy_bidirectional(&mut stream, &mut upstream).await.map(drop)
}

/// The request target of CONNECT: host and port (RFC 9112 section 3.2.3).
fn target(text: &str) -> Option<Address> {
    let (host, port) = text.rsplit_once(':')?;
    Some(Address { host: Host::parse(host).ok()?, port: port.parse().ok()? })
}

/// Connects from the address `exit`, which sites tell visitors by.
async fn dial(exit: Ipv4Addr, to: &Address) -> io::Result<TcpStream> {
    let to = locate(to)?;
    if to.is_ipv6() {
        return TcpStream::connect(to).await;
    }
    let socket = TcpSocket::new_v4()?;
    socket.bind(SocketAddr::new(IpAddr::V4(exit), 0))?;
    socket.connect(to).await
}
