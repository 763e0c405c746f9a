//! A SOCKS5 server: CONNECT and UDP ASSOCIATE, with user and password if wanted (RFC 1928, 1929).

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional};
use tokio::net::{TcpStream, UdpSocket};

use super::proxy::Door;
use super::{Peer, Peers, hand_on};

const VERSION: u8 = 5;
const SUCCEEDED: u8 = 0;
const HOST_UNREACHABLE: u8 = 4;
const REFUSED: u8 = 5;
const NOT_SUPPORTED: u8 = 7;

impl Peers {
    /// A SOCKS5 server.
    pub(crate) fn socks5(&self, address: SocketAddr, door: Door) -> Peer {
        self.tcp(address, move |stream, client| serve(stream, client, door.clone()))
    }
}

async fn serve(mut stream: TcpStream, client: SocketAddr, door: Door) -> io::Result<()> {
    greet(&mut stream, &door).await?;
    let mut request = [0; 3];
    stream.read_exact(&mut request).await?;
    let (host, port) = read_address(&mut stream).await?;
    match request[1] {
        1 => connect(stream, &door, &host, port).await,
        3 => associate(stream, client, door).await,
        _ => reply(&mut stream, NOT_SUPPORTED, client).await,
    }
}

async fn greet(stream: &mut TcpStream, door: &Door) -> io::Result<()> {
    let mut head = [0; 2];
    stream.read_exact(&mut head).await?;
    let mut methods = vec![0; usize::from(head[1])];
    stream.read_exact(&mut methods).await?;
    let method = if door.credentials.is_some() { 2 } else { 0 };
    if head[0] != VERSION || !methods.contains(&method) {
        stream.write_all(&[VERSION, 0xff]).await?;
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    stream.write_all(&[VERSION, method]).await?;
    let Some((user, password)) = &door.credentials else { return Ok(()) };
    stream.read_u8().await?;
    let given = (read_string(stream).await?, read_string(stream).await?);
    let wrong = given != (user.clone(), password.clone());
    stream.write_all(&[1, u8::from(wrong)]).await?;
    if wrong { Err(io::ErrorKind::PermissionDenied.into()) } else { Ok(()) }
}

async fn connect(mut stream: TcpStream, door: &Door, host: &str, port: u16) -> io::Result<()> {
    door.requests.note(format!("tcp {host}:{port}"));
    let dialled = match door.resolve(host, port) {
        Ok(to) => TcpStream::connect(to).await,
        Err(unknown) => Err(unknown),
    };
    let here = stream.local_addr()?;
    match dialled {
        Ok(mut upstream) => {
            reply(&mut stream, SUCCEEDED, upstream.local_addr()?).await?;
            let carried = copy_bidirectional(&mut stream, &mut upstream).await;
            hand_on(carried, [&stream, &upstream])
        }
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => reply(&mut stream, REFUSED, here).await,
        Err(_) => reply(&mut stream, HOST_UNREACHABLE, here).await,
    }
}

/// Relays datagrams until the client closes the TCP connection that asked for it.
async fn associate(mut stream: TcpStream, client: SocketAddr, door: Door) -> io::Result<()> {
    if door.mute_for_datagrams {
        door.requests.note("associate");
        return stream.read_u8().await.map(drop);
    }
    let relay = UdpSocket::bind(SocketAddr::new(stream.local_addr()?.ip(), 0)).await?;
    let outward = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0)).await?;
    reply(&mut stream, SUCCEEDED, relay.local_addr()?).await?;
    let (mut inward, mut answers) = (vec![0; 65_536], vec![0; 65_536]);
    let mut sender = client;
    loop {
        tokio::select! {
            closed = stream.read_u8() => return closed.map(drop),
            Ok((length, from)) = relay.recv_from(&mut inward) => {
                if door.datagrams_from_asker && from.ip() != client.ip() {
                    door.requests.note(format!("stranger {from}"));
                    continue;
                }
                sender = from;
                if let Some((host, port, payload)) = unwrap(&inward[..length]) {
                    door.requests.note(format!("udp {host}:{port}"));
                    if let Ok(to) = door.resolve(&host, port) {
                        let _ = outward.send_to(payload, mapped(to)).await;
                    }
                }
            }
            Ok((length, from)) = outward.recv_from(&mut answers) => {
                let from = SocketAddr::new(from.ip().to_canonical(), from.port());
                let datagram = [&[0, 0, 0][..], &encode(from), &answers[..length]].concat();
                let _ = relay.send_to(&datagram, sender).await;
            }
        }
    }
}

/// One socket sends to both families: IPv4 in the mapped form.
fn mapped(to: SocketAddr) -> SocketAddr {
    match to.ip() {
        IpAddr::V4(v4) => SocketAddr::new(v4.to_ipv6_mapped().into(), to.port()),
        IpAddr::V6(_) => to,
    }
}

/// The parts of a relay request that is not a fragment (RFC 1928, 7).
fn unwrap(datagram: &[u8]) -> Option<(String, u16, &[u8])> {
    let (&[0, 0, 0, kind], rest) = datagram.split_first_chunk::<4>()? else { return None };
    let (host, rest) = match kind {
        1 => rest.split_first_chunk::<4>().map(|(ip, rest)| (Ipv4Addr::from(*ip).to_string(), rest))?,
        4 => rest.split_first_chunk::<16>().map(|(ip, rest)| (format!("[{}]", Ipv6Addr::from(*ip)), rest))?,
        3 => {
            let (length, rest) = rest.split_first()?;
            let (name, rest) = rest.split_at_checked(usize::from(*length))?;
            (String::from_utf8_lossy(name).into_owned(), rest)
        }
        _ => return None,
    };
    let (port, payload) = rest.split_first_chunk::<2>()?;
    Some((host, u16::from_be_bytes(*port), payload))
}

async fn reply(stream: &mut TcpStream, code: u8, bound: SocketAddr) -> io::Result<()> {
    stream.write_all(&[&[VERSION, code, 0][..], &encode(bound)].concat()).await
}

fn encode(address: SocketAddr) -> Vec<u8> {
    let port = address.port().to_be_bytes();
    match address.ip() {
        IpAddr::V4(ip) => [&[1][..], &ip.octets(), &port].concat(),
        IpAddr::V6(ip) => [&[4][..], &ip.octets(), &port].concat(),
    }
}

async fn read_address(stream: &mut TcpStream) -> io::Result<(String, u16)> {
    let host = match stream.read_u8().await? {
        1 => Ipv4Addr::from(stream.read_u32().await?).to_string(),
        4 => format!("[{}]", Ipv6Addr::from(stream.read_u128().await?)),
        3 => read_string(stream).await?,
        _ => return Err(io::ErrorKind::InvalidData.into()),
    };
    Ok((host, stream.read_u16().await?))
}

async fn read_string(stream: &mut TcpStream) -> io::Result<String> {
    let mut text = vec![0; usize::from(stream.read_u8().await?)];
    stream.read_exact(&mut text).await?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}
