//! What programs on a host do with their sockets, and what they see of it.
//!
//! An act is a line of words, so that it can be done on a thread of any namespace ([`act`]) and just as well by a
//! process of its own, the one that `tunproxy exec` starts ([`super::world::client_command`], [`outcome`]).

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream, ToSocketAddrs, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::panic::resume_unwind;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use std::{env, process, thread};

use nix::errno::Errno;
use socket2::{Domain, Socket, Type};

use super::Netns;
use super::peers::digest::{Sha256, of_pattern, pattern};
use super::{load, probe};

/// The variable that holds an act for this test binary to do instead of its test.
pub(crate) const ACT: &str = "TUNPROXY_LAB_ACT";

/// How long an act waits for one answer. Only silence ever takes that long.
const PATIENCE: Duration = Duration::from_secs(30);

/// What an act came to: what was learnt, or the name of the error, like `ECONNREFUSED`.
pub(crate) type Outcome = Result<String, String>;

/// Does what the words say:
///
/// - `connect ADDR [SECONDS]`: a TCP handshake, given up after that time;
/// - `ask ADDR WORD`: sends WORD over TCP and reads as many bytes back;
/// - `up ADDR N`, `down ADDR N`, `both ADDR N`: with [`tcp_exchange`](super::Peers::tcp_exchange); the digests must agree;
/// - `churn COUNT IN_FLIGHT ADDR…`: short connections to an echo server, each one byte there and back;
/// - `datagram ADDR WORD [SECONDS]`: sends WORD over connected UDP and reads one answer;
/// - `echo ADDR LENGTH`: that many bytes over UDP, there and back;
/// - `whole ADDR LENGTH`: sends that many bytes over UDP in one datagram that nobody may cut, and again in one that
///   fits once the path has said what does; learns the path's MTU, or `fits` where nobody complained;
/// - `datagrams COUNT ADDR`: an exchange over UDP from each of that many sockets, all of which stay open to the end;
/// - `scan HOST FIRST COUNT SECONDS`, `reuse COUNT PORTS ADDR`: see [`probe`];
/// - `sprinkle COUNT IN_FLIGHT ADDR`, `crowd COUNT ADDR`, `greedy COUNT ADDR`: see [`load`];
/// - `lookup NAME`: the first IPv4 address that the system finds;
/// - `relay PROXY ADDR WORD [PORT]`: a datagram and its answer through UDP ASSOCIATE of a SOCKS5 server without
///   credentials, from that port of ours.
/// - `knock PATH`: what whoever listens on a socket at that path says at once;
/// - `report`: tells a service manager what a command has got of what the manager gave (sd_notify(3)).
///
/// An address may be a name with a port, which the system resolves.
pub(crate) fn act(words: &str) -> Outcome {
    perform(&words.split_whitespace().collect::<Vec<_>>()).map_err(|error| name_of(&error))
}

/// Does `words` on a thread of `ns`.
pub(crate) fn act_in(ns: &Netns, words: &str) -> Outcome {
    let words = words.to_owned();
    ns.enter(move || act(&words))
}

/// Does all of `acts` at once, each on a thread of its namespace: their outcomes in the same order.
pub(crate) fn acts_in<'a>(acts: impl IntoIterator<Item = (&'a Netns, String)>) -> Vec<Outcome> {
    let threads: Vec<_> = acts.into_iter().map(|(ns, words)| ns.spawn(move || act(&words))).collect();
    let end = |thread: thread::JoinHandle<Outcome>| thread.join().unwrap_or_else(|panic| resume_unwind(panic));
    threads.into_iter().map(end).collect()
}

/// What the process that did an act said of it, from its stdout.
pub(crate) fn outcome(stdout: &str) -> Option<Outcome> {
    let said = stdout.lines().find_map(|line| line.split_once("lab: ").map(|(_, said)| said))?;
    let (verdict, rest) = said.split_once(' ').unwrap_or((said, ""));
    Some(if verdict == "ok" { Ok(rest.to_owned()) } else { Err(rest.to_owned()) })
}

/// If the environment holds an act: does it, says how it ended, and ends the process.
pub(crate) fn act_if_asked() {
    let Ok(words) = env::var(ACT) else { return };
    let outcome = act(&words);
    let mut stdout = io::stdout().lock();
    let _ = match &outcome {
        Ok(learnt) => writeln!(stdout, "\nlab: ok {learnt}"),
        Err(error) => writeln!(stdout, "\nlab: error {error}"),
    };
    let _ = stdout.flush();
    process::exit(i32::from(outcome.is_err()));
}

/// The name of an error as programs know it.
pub(crate) fn name_of(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(code) => format!("{:?}", Errno::from_raw(code)),
        None if error.kind() == io::ErrorKind::TimedOut => "ETIMEDOUT".to_owned(),
        None => error.to_string(),
    }
}

fn perform(words: &[&str]) -> io::Result<String> {
    match *words {
        ["connect", to] => dial(to, PATIENCE).map(|_| String::new()),
        ["connect", to, seconds] => dial(to, Duration::from_secs(number(seconds)?)).map(|_| String::new()),
        ["ask", to, word] => ask(to, word),
        ["up", to, length] => up(to, number(length)?),
        ["down", to, length] => down(to, number(length)?),
        ["both", to, length] => both(to, number(length)?),
        ["churn", count, in_flight, ref to @ ..] => churn(number(count)?, number(in_flight)?, to),
        ["datagram", to, word] => datagram(to, word, PATIENCE),
        ["datagram", to, word, seconds] => datagram(to, word, Duration::from_secs(number(seconds)?)),
        ["echo", to, length] => echo(resolve(to)?, number(length)?),
        ["whole", to, length] => whole(to, number(length)?),
        ["datagrams", count, to] => datagrams(number(count)?, to),
        ["hold", count, to] => load::hold(number(count)?, resolve(to)?),
        ["scan", host, first, count, seconds] => probe::scan(host, number(first)?, number(count)?, number(seconds)?),
        ["reuse", count, ports, to] => probe::reuse(number(count)?, number(ports)?, resolve(to)?),
        ["sprinkle", count, in_flight, to] => load::sprinkle(number(count)?, number(in_flight)?, resolve(to)?),
        ["crowd", count, to] => load::crowd(number(count)?, resolve(to)?),
        ["greedy", count, to] => load::greedy(number(count)?, resolve(to)?),
        ["lookup", name] => {
            let found = (name, 0).to_socket_addrs()?.find(SocketAddr::is_ipv4);
            found.map(|at| at.ip().to_string()).ok_or_else(|| io::ErrorKind::NotFound.into())
        }
        ["relay", proxy, to, word] => relay(proxy, to, word, 0),
        ["relay", proxy, to, word, port] => relay(proxy, to, word, number(port)?),
        ["knock", path] => knock(path),
        ["report"] => report(),
        _ => Err(io::Error::other(format!("no such act: {words:?}"))),
    }
}

fn number<T: std::str::FromStr>(word: &str) -> io::Result<T> {
    word.parse().map_err(|_| io::Error::other(format!("not a number: {word}")))
}

/// `192.0.2.1:80`, `[2001:db8::1]:80`, or a name and a port: then the first address of it.
fn resolve(to: &str) -> io::Result<SocketAddr> {
    to.to_socket_addrs()?.next().ok_or_else(|| io::ErrorKind::NotFound.into())
}

fn dial(to: &str, patience: Duration) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&resolve(to)?, patience)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(stream)
}

fn knock(path: &str) -> io::Result<String> {
    let mut said = String::new();
    UnixStream::connect(path)?.read_to_string(&mut said)?;
    Ok(said)
}

fn report() -> io::Result<String> {
    let ours = |variable| env::var(variable).is_ok_and(|pid| pid == process::id().to_string());
    // SAFETY: the first descriptor that a manager gives, which nobody else here uses.
    let given = unsafe { Socket::from_raw_fd(3) }.local_addr()?.as_socket().ok_or(io::ErrorKind::InvalidData)?;
    let input = io::stdin().read(&mut [0])?;
    let terminal = std::fs::File::open("/dev/tty").map_or_else(|error| name_of(&error), |_| "one".to_owned());
    let manager = env::var("NOTIFY_SOCKET").map_err(io::Error::other)?;
    let status = format!(
        "READY=1\nSTATUS=listen {}, watchdog {}, socket {given}, input {input}, terminal {terminal}",
        ours("LISTEN_PID"),
        ours("WATCHDOG_PID")
    );
    UnixDatagram::unbound()?.send_to(status.as_bytes(), manager)?;
    Ok(status)
}

fn ask(to: &str, word: &str) -> io::Result<String> {
    let mut stream = dial(to, PATIENCE)?;
    stream.write_all(word.as_bytes())?;
    let mut answer = vec![0; word.len()];
    stream.read_exact(&mut answer)?;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

fn up(to: &str, length: u64) -> io::Result<String> {
    let mut stream = dial(to, PATIENCE)?;
    let sent = send(&mut stream, "up 0\n", length)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    agree(&sent, answer.trim())
}

fn down(to: &str, length: u64) -> io::Result<String> {
    let mut stream = dial(to, PATIENCE)?;
    stream.write_all(format!("down {length}\n").as_bytes())?;
    let received = digest_of(&mut stream)?;
    // The other side has closed its half: ours must still carry data.
    stream.write_all(received.as_bytes())?;
    stream.shutdown(Shutdown::Write)?;
    agree(&of_pattern(length), &received)
}

fn both(to: &str, length: u64) -> io::Result<String> {
    let mut stream = dial(to, PATIENCE)?;
    let sent = send(&mut stream, &format!("both {length}\n"), length)?;
    let mut reader = BufReader::new(stream);
    let mut answer = String::new();
    reader.read_line(&mut answer)?;
    agree(&sent, answer.trim())?;
    agree(&sent, &digest_of(&mut reader)?)
}

/// Writes the order and the test stream, closes this half, and returns the digest of the stream.
fn send(stream: &mut TcpStream, order: &str, length: u64) -> io::Result<String> {
    stream.write_all(order.as_bytes())?;
    let mut offset = 0;
    while offset < length {
        let chunk = pattern(offset, length - offset);
        stream.write_all(chunk)?;
        offset += chunk.len() as u64;
    }
    stream.shutdown(Shutdown::Write)?;
    Ok(of_pattern(length))
}

fn digest_of(from: &mut impl Read) -> io::Result<String> {
    let mut sha = Sha256::new();
    let mut buffer = vec![0; 256 << 10];
    loop {
        let length = from.read(&mut buffer)?;
        if length == 0 {
            return Ok(sha.hex());
        }
        sha.update(&buffer[..length]);
    }
}

fn agree(sent: &str, received: &str) -> io::Result<String> {
    if sent == received {
        return Ok(sent.to_owned());
    }
    Err(io::Error::other(format!("digest of what was sent: {sent}, of what arrived: {received}")))
}

/// Opens `count` connections, `in_flight` at a time, turning through the addresses.
fn churn(count: usize, in_flight: usize, to: &[&str]) -> io::Result<String> {
    let next = AtomicUsize::new(0);
    let work = || -> io::Result<()> {
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= count {
                return Ok(());
            }
            ask(to[number % to.len()], "x").map_err(|error| {
                next.store(count, Ordering::Relaxed);
                io::Error::other(format!("connection {number}: {}", name_of(&error)))
            })?;
        }
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..in_flight).map(|_| scope.spawn(work)).collect();
        workers.into_iter().try_for_each(|worker| worker.join().expect("no panic in a worker"))
    })?;
    Ok(count.to_string())
}

fn datagrams(count: usize, to: &str) -> io::Result<String> {
    let to = resolve(to)?;
    load::raise_descriptor_limit();
    let mut open = Vec::new();
    for number in 0..count {
        let socket = exchange(to, "x", PATIENCE)
            .map_err(|error| io::Error::other(format!("socket {number}: {}", name_of(&error))))?;
        open.push(socket);
    }
    Ok(open.len().to_string())
}

fn datagram(to: &str, word: &str, patience: Duration) -> io::Result<String> {
    exchange(resolve(to)?, word, patience).map(|(_, answer)| answer)
}

/// Sends a word from a socket of its own; returns the socket and the answer.
fn exchange(to: SocketAddr, word: &str, patience: Duration) -> io::Result<(UdpSocket, String)> {
    let socket = UdpSocket::bind(if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" })?;
    socket.connect(to)?;
    socket.set_read_timeout(Some(patience))?;
    socket.send(word.as_bytes())?;
    let mut answer = vec![0; 65_536];
    let length = socket.recv(&mut answer)?;
    let answer = String::from_utf8_lossy(&answer[..length]).into_owned();
    Ok((socket, answer))
}

fn echo(to: SocketAddr, length: usize) -> io::Result<String> {
    let socket = UdpSocket::bind(if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" })?;
    socket.connect(to)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    let payload: Vec<u8> = (0..length).map(|at| (at % 251) as u8).collect();
    socket.send(&payload)?;
    let mut answer = vec![0; 65_536];
    let received = socket.recv(&mut answer)?;
    let same = answer[..received] == payload[..];
    if same { Ok(length.to_string()) } else { Err(io::Error::other(format!("{received} other bytes came back"))) }
}

/// Path MTU discovery as a program does it: RFC 1191, RFC 8201.
fn whole(to: &str, length: usize) -> io::Result<String> {
    let to = resolve(to)?;
    let socket = UdpSocket::bind(if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" })?;
    let (level, discover, mtu, do_it) = match to {
        SocketAddr::V4(_) => (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_MTU, libc::IP_PMTUDISC_DO),
        SocketAddr::V6(_) => (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::IPV6_MTU, libc::IPV6_PMTUDISC_DO),
    };
    option(&socket, level, discover, Some(do_it))?;
    socket.connect(to)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    let echoed = |length: usize| -> io::Result<()> {
        let payload = vec![b'w'; length];
        socket.send(&payload)?;
        let mut answer = vec![0; 65_536];
        let received = socket.recv(&mut answer)?;
        agree(&length.to_string(), &received.to_string()).map(drop)
    };
    match echoed(length) {
        Ok(()) => return Ok("fits".to_owned()),
        Err(error) if error.raw_os_error() == Some(libc::EMSGSIZE) => {}
        Err(error) => return Err(error),
    }
    let mtu = option(&socket, level, mtu, None)?;
    let headers = if to.is_ipv4() { 28 } else { 48 };
    echoed(usize::try_from(mtu).unwrap_or(0) - headers)?;
    Ok(mtu.to_string())
}

/// Sets or reads a socket option that is a number.
fn option(socket: &UdpSocket, level: i32, name: i32, value: Option<i32>) -> io::Result<i32> {
    let mut number = value.unwrap_or_default();
    let mut length = size_of::<i32>() as libc::socklen_t;
    // SAFETY: the kernel reads or writes one number at a place of that size.
    let failed = unsafe {
        match value {
            Some(_) => libc::setsockopt(socket.as_raw_fd(), level, name, (&raw const number).cast(), length),
            None => libc::getsockopt(socket.as_raw_fd(), level, name, (&raw mut number).cast(), &raw mut length),
        }
    };
    if failed == 0 { Ok(number) } else { Err(io::Error::last_os_error()) }
}

/// RFC 1928, sections 4, 6 and 7.
fn relay(proxy: &str, to: &str, word: &str, port: u16) -> io::Result<String> {
    let mut control = dial(proxy, PATIENCE)?;
    control.write_all(&[5, 1, 0])?;
    control.read_exact(&mut [0; 2])?;
    control.write_all(&[5, 3, 0, 1, 0, 0, 0, 0, 0, 0])?;
    let mut reply = [0; 10];
    control.read_exact(&mut reply)?;
    if reply[1] != 0 || reply[3] != 1 {
        return Err(io::Error::other(format!("UDP ASSOCIATE: {reply:?}")));
    }
    let socket = UdpSocket::bind(("0.0.0.0", port))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    // The address of the relay may be unspecified: then it is the proxy's own.
    socket.connect((control.peer_addr()?.ip(), u16::from_be_bytes([reply[8], reply[9]])))?;
    let header = match resolve(to)? {
        SocketAddr::V4(v4) => [&[0, 0, 0, 1][..], &v4.ip().octets(), &v4.port().to_be_bytes()].concat(),
        SocketAddr::V6(v6) => [&[0, 0, 0, 4][..], &v6.ip().octets(), &v6.port().to_be_bytes()].concat(),
    };
    socket.send(&[&header, word.as_bytes()].concat())?;
    let mut answer = vec![0; 65_536];
    let length = socket.recv(&mut answer)?;
    let payload = answer[..length].strip_prefix(&header[..]).ok_or_else(|| io::Error::other("from somebody else"))?;
    Ok(String::from_utf8_lossy(payload).into_owned())
}

/// A connection that somebody works in: it must live on whatever happens to the host.
pub(crate) struct Session {
    stream: TcpStream,
    said: u32,
}

impl Session {
    /// Connects from `source` on `ns` to an echo server.
    ///
    /// # Panics
    /// If that fails.
    pub(crate) fn open(ns: &Netns, source: SocketAddr, to: SocketAddr) -> Self {
        let stream = ns.enter(move || -> io::Result<TcpStream> {
            let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
            socket.bind(&source.into())?;
            socket.connect_timeout(&to.into(), PATIENCE)?;
            socket.set_read_timeout(Some(PATIENCE))?;
            Ok(socket.into())
        });
        Self { stream: stream.unwrap_or_else(|error| panic!("{source} -> {to}: {error}")), said: 0 }
    }

    /// The port that it has at this end.
    ///
    /// # Panics
    /// If the system does not know it.
    pub(crate) fn port(&self) -> u16 {
        self.stream.local_addr().expect("a connected socket").port()
    }

    /// Waits no longer than `limit` for what it hears.
    ///
    /// # Panics
    /// If the system refuses that.
    #[must_use]
    pub(crate) fn patient_for(self, limit: Duration) -> Self {
        self.stream.set_read_timeout(Some(limit)).expect("a time limit");
        self
    }

    /// Says a line and hears it back.
    ///
    /// # Errors
    /// The name of what happened to the connection.
    pub(crate) fn alive(&mut self) -> Outcome {
        self.said += 1;
        let line = format!("line {}\n", self.said);
        let mut heard = vec![0; line.len()];
        let exchanged = self.stream.write_all(line.as_bytes()).and_then(|()| self.stream.read_exact(&mut heard));
        exchanged.map_err(|error| name_of(&error))?;
        agree(&line, &String::from_utf8_lossy(&heard)).map_err(|error| error.to_string())
    }
}
