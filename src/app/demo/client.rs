//! The client: an ordinary program that knows nothing of tunproxy. It asks the C library for addresses and the kernel
//! for sockets, one request after the other, and reports each in a line of JSON.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpStream, ToSocketAddrs, UdpSocket};
use std::time::{Duration, Instant};

use hickory_proto::op::{Message, Query};
use hickory_proto::rr::{Name, RData, RecordType};
use serde::{Deserialize, Serialize};
use socket2::{Domain, Socket, Type};

use super::requests::{Act, DOWNLOAD, ECHO, REQUESTS, byte_at};
use crate::platform::rootless;

/// How long the client waits for whatever it waits for.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long where silence is expected.
const BRIEFLY: Duration = Duration::from_millis(400);

/// What came of one request.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Report {
    /// Its index in [`REQUESTS`].
    pub(super) request: usize,
    /// The client's own address, once it has a socket.
    pub(super) from: Option<SocketAddr>,
    /// Where the client wrote to.
    pub(super) to: Option<SocketAddr>,
    /// What came back, in words.
    pub(super) back: String,
    /// How long it took, name look-up included, in microseconds.
    pub(super) micros: u64,
}

/// Makes the requests and writes the reports to the standard output.
///
/// # Errors
/// Nobody reads the reports.
pub fn client() -> anyhow::Result<()> {
    let v6 = rootless::has_ipv6();
    let mut output = io::stdout().lock();
    for (index, request) in REQUESTS.iter().enumerate().filter(|(_, request)| v6 || !request.act.needs_v6()) {
        let mut report = Report { request: index, from: None, to: None, back: String::new(), micros: 0 };
        let started = Instant::now();
        let outcome = perform(request.act, &mut report);
        report.micros = u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX);
        report.back = outcome.unwrap_or_else(|error| in_words(&error));
        writeln!(output, "{}", serde_json::to_string(&report)?)?;
    }
    Ok(())
}

fn in_words(error: &io::Error) -> String {
    match error.kind() {
        // The same for a datagram: the kernel learned that nobody listens on the port.
        io::ErrorKind::ConnectionRefused => "refused".to_owned(),
        io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => "no answer, gave up".to_owned(),
        _ => error.to_string(),
    }
}

fn perform(act: Act, report: &mut Report) -> io::Result<String> {
    match act {
        Act::Get(host, port, path) => get(connect((host, port), |_| true, PATIENCE, report)?, host, path),
        Act::Get4(host, port, path) => get(connect((host, port), SocketAddr::is_ipv4, PATIENCE, report)?, host, path),
        Act::Get6(host, port, path) => get(connect((host, port), SocketAddr::is_ipv6, PATIENCE, report)?, host, path),
        Act::GetBriefly(host, port, path) => get(connect((host, port), |_| true, BRIEFLY, report)?, host, path),
        Act::Echo(host, port) => echo(connect((host, port), |_| true, PATIENCE, report)?),
        Act::Datagram(host, port) => datagram((host, port), report),
        Act::Reverse(host) => reverse(host, report),
    }
}

fn find(target: (&str, u16), wanted: fn(&SocketAddr) -> bool, report: &mut Report) -> io::Result<SocketAddr> {
    let found = target.to_socket_addrs()?.find(wanted).ok_or_else(|| io::Error::other("no such address"))?;
    report.to = Some(found);
    Ok(found)
}

/// Any address and port of the family of `to`.
fn any(to: SocketAddr) -> SocketAddr {
    let ip = if to.is_ipv4() { IpAddr::V4(Ipv4Addr::UNSPECIFIED) } else { IpAddr::V6(Ipv6Addr::UNSPECIFIED) };
    SocketAddr::new(ip, 0)
}

fn connect(
    target: (&str, u16),
    wanted: fn(&SocketAddr) -> bool,
    patience: Duration,
    report: &mut Report,
) -> io::Result<TcpStream> {
    let to = find(target, wanted, report)?;
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
    // Bound before, so that the port is known even of a connection that never comes to be.
    socket.bind(&any(to).into())?;
    report.from = socket.local_addr()?.as_socket();
    socket.connect_timeout(&to.into(), patience)?;
    let stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(stream)
}

fn get(mut stream: TcpStream, host: &str, path: &str) -> io::Result<String> {
    write!(stream, "GET {path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    let end = answer.windows(4).position(|window| window == b"\r\n\r\n");
    let (head, body) = answer.split_at(end.map_or(answer.len(), |at| at + 4));
    let head = String::from_utf8_lossy(head);
    let status = head.lines().next().and_then(|line| line.strip_prefix("HTTP/1.1 ")).unwrap_or("not HTTP");
    if status == "200 OK" && body.len() == DOWNLOAD {
        let right = body.iter().enumerate().all(|(offset, byte)| *byte == byte_at(offset));
        let size = DOWNLOAD >> 20;
        return Ok(format!("{size} MiB, {}", if right { "every byte right" } else { "with wrong bytes" }));
    }
    Ok(format!("{status}, {}", String::from_utf8_lossy(body)))
}

fn echo(mut stream: TcpStream) -> io::Result<String> {
    let said: Vec<u8> = (0..ECHO).map(byte_at).collect();
    stream.write_all(&said)?;
    stream.shutdown(Shutdown::Write)?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    match answer.strip_prefix(&said[..]) {
        Some(rest) => Ok(format!("{} KiB back, {}", ECHO >> 10, String::from_utf8_lossy(rest))),
        None => Err(io::Error::other("other bytes came back")),
    }
}

fn datagram(target: (&str, u16), report: &mut Report) -> io::Result<String> {
    const SAID: &[u8] = b"echo, ";
    let to = find(target, |_| true, report)?;
    let socket = UdpSocket::bind(any(to))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    // A connected socket takes answers from `to` alone, and hears of ICMP errors.
    socket.connect(to)?;
    report.from = Some(socket.local_addr()?);
    socket.send(SAID)?;
    let mut answer = [0; 2048];
    let length = socket.recv(&mut answer)?;
    Ok(String::from_utf8_lossy(&answer[..length]).into_owned())
}

/// Asks the nameserver of /etc/resolv.conf for the name of the address that `host` has.
fn reverse(host: &str, report: &mut Report) -> io::Result<String> {
    let ip = find((host, 0), |_| true, report)?.ip();
    let mut question = Message::query();
    question.metadata.recursion_desired = true;
    question.add_query(Query::query(Name::from(ip), RecordType::PTR));
    let server = SocketAddr::new(nameserver()?, 53);
    let socket = UdpSocket::bind(any(server))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.connect(server)?;
    report.from = Some(socket.local_addr()?);
    socket.send(&question.to_vec().map_err(io::Error::other)?)?;
    let mut answer = [0; 2048];
    let length = socket.recv(&mut answer)?;
    let answer = Message::from_vec(&answer[..length]).map_err(io::Error::other)?;
    let name = answer.answers.iter().find_map(|record| match &record.data {
        RData::PTR(name) => Some(name.0.to_ascii()),
        _ => None,
    });
    Ok(name.map_or_else(|| "no name".to_owned(), |name| name.trim_end_matches('.').to_owned()))
}

fn nameserver() -> io::Result<IpAddr> {
    let text = std::fs::read_to_string("/etc/resolv.conf")?;
    let mut servers = text.lines().filter_map(|line| line.strip_prefix("nameserver ")?.trim().parse().ok());
    servers.next().ok_or_else(|| io::Error::other("/etc/resolv.conf names no nameserver"))
}
