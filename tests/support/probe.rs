//! Connections made to learn something: which ports are open, and whether a pair of ports can be used again.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::thread;
use std::time::Duration;

use socket2::{Domain, Socket, Type};

use super::client::name_of;
use super::world::poll_until;

/// How long one connection may take. Only silence ever takes that long.
const PATIENCE: Duration = Duration::from_secs(30);

/// A connect scan of `count` ports from `first` on, all at once: what became of each, joined by commas. After `seconds`
/// a port counts as silent.
pub(crate) fn scan(host: &str, first: u16, count: u16, seconds: u64) -> io::Result<String> {
    let limit = Duration::from_secs(seconds);
    let probe = |port: u16| -> io::Result<String> {
        let to: SocketAddr = format!("{host}:{port}").parse().map_err(io::Error::other)?;
        let seen = TcpStream::connect_timeout(&to, limit).map_or_else(|error| name_of(&error), |_| "open".to_owned());
        Ok(format!("{port} {seen}"))
    };
    let seen: io::Result<Vec<String>> = thread::scope(|scope| {
        let probes: Vec<_> = (first..first + count).map(|port| scope.spawn(move || probe(port))).collect();
        probes.into_iter().map(|probe| probe.join().expect("no panic in a probe")).collect()
    });
    Ok(seen?.join(","))
}

/// `count` connections to an echo server from `ports` source ports, each used again as soon as it is free. They end in
/// turn in the ways that leave the server's side with something to remember: by a reset before any data, by a reset after
/// it, and by the server's own FIN first. Returns how many were answered.
pub(crate) fn reuse(count: usize, ports: u16, to: SocketAddr) -> io::Result<String> {
    let from = |port: u16| -> io::Result<usize> {
        let rounds = count / usize::from(ports);
        for round in 0..rounds {
            visit(port, to, round)
                .map_err(|error| io::Error::other(format!("port {port}, round {round}: {}", name_of(&error))))?;
        }
        Ok(rounds)
    };
    let answered = thread::scope(|scope| {
        let visits: Vec<_> = (0..ports).map(|number| scope.spawn(move || from(20_000 + number))).collect();
        let each = visits.into_iter().map(|visit| visit.join().expect("no panic in a visit"));
        each.sum::<io::Result<usize>>()
    });
    answered.map(|rounds| rounds.to_string())
}

fn visit(port: u16, to: SocketAddr, round: usize) -> io::Result<()> {
    let mut dialled = Err(io::ErrorKind::AddrNotAvailable.into());
    poll_until(PATIENCE, || {
        dialled = dial_from(port, to);
        // Its last acknowledgement is still under way to our own kernel.
        let busy = matches!(&dialled, Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable);
        (!busy).then_some(())
    });
    let mut stream = dialled?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let way = round % 3;
    if way > 0 {
        // The server sends so many bytes and is the first to close.
        stream.write_all(b"down 5\n")?;
        let mut answer = Vec::new();
        (&stream).take(5).read_to_end(&mut answer)?;
        if answer.len() != 5 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    if way == 2 {
        // Its FIN, and then ours: it waits in TIME-WAIT, we do not.
        return if stream.read(&mut [0])? == 0 { Ok(()) } else { Err(io::ErrorKind::InvalidData.into()) };
    }
    socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO))
}

fn dial_from(port: u16, to: SocketAddr) -> io::Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    let any = if to.is_ipv4() { "0.0.0.0" } else { "::" };
    socket.bind(&SocketAddr::new(any.parse().expect("an address"), port).into())?;
    socket.connect_timeout(&to.into(), PATIENCE)?;
    Ok(socket.into())
}
