//! Clients in great number.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::thread;
use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use super::client::name_of;

/// How long one exchange may take. Only silence ever takes that long.
const PATIENCE: Duration = Duration::from_secs(30);
/// How many threads share the work where nothing else is said.
const HANDS: usize = 64;

/// Thousands of sockets are thousands of descriptors.
pub(crate) fn raise_descriptor_limit() {
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}

/// Has `hands` threads do `act` `count` times in all; the first error ends it.
fn share(count: usize, hands: usize, act: impl Fn(usize) -> io::Result<()> + Sync) -> io::Result<()> {
    let next = AtomicUsize::new(0);
    let work = || -> io::Result<()> {
        loop {
            let number = next.fetch_add(1, Relaxed);
            if number >= count {
                return Ok(());
            }
            act(number).map_err(|error| {
                next.store(count, Relaxed);
                io::Error::other(format!("number {number}: {}", name_of(&error)))
            })?;
        }
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..hands).map(|_| scope.spawn(work)).collect();
        workers.into_iter().try_for_each(|worker| worker.join().expect("no panic in a worker"))
    })
}

/// An exchange over UDP from each of `count` sockets, `in_flight` of which are open at a time. A datagram that is lost is
/// sent again, as any program does.
pub(crate) fn sprinkle(count: usize, in_flight: usize, to: SocketAddr) -> io::Result<String> {
    share(count, in_flight, |_| {
        let socket = UdpSocket::bind(if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" })?;
        socket.connect(to)?;
        socket.set_read_timeout(Some(Duration::from_secs(1)))?;
        for attempt in 1.. {
            socket.send(b"x")?;
            match socket.recv(&mut [0; 8]) {
                Ok(_) => break,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && attempt < 10 => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    })?;
    Ok(count.to_string())
}

/// An exchange over UDP from each of `count` sockets, all of which stay open for ten seconds. Says how many were answered.
pub(crate) fn hold(count: usize, to: SocketAddr) -> io::Result<String> {
    raise_descriptor_limit();
    let open = parking_lot::Mutex::new(Vec::new());
    share(count, 8, |_| {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        socket.connect(to)?;
        socket.set_read_timeout(Some(Duration::from_secs(5)))?;
        socket.send(b"x")?;
        socket.recv(&mut [0; 8])?;
        open.lock().push(socket);
        Ok(())
    })?;
    thread::sleep(Duration::from_secs(10));
    let many = open.lock().len();
    Ok(many.to_string())
}

/// Opens `count` connections to an echo server, all of which stay open; says how many of them were served. The others
/// must have been told so at once.
pub(crate) fn crowd(count: usize, to: SocketAddr) -> io::Result<String> {
    raise_descriptor_limit();
    let served = parking_lot::Mutex::new(Vec::new());
    share(count, HANDS, |_| {
        let opened = TcpStream::connect_timeout(&to, PATIENCE).and_then(|mut stream| {
            stream.set_read_timeout(Some(PATIENCE))?;
            stream.write_all(b"x")?;
            stream.read_exact(&mut [0])?;
            Ok(stream)
        });
        match opened {
            Ok(stream) => served.lock().push(stream),
            Err(error) if matches!(error.kind(), io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock) => {
                return Err(error);
            }
            Err(_) => {}
        }
        Ok(())
    })?;
    let many = served.lock().len();
    Ok(many.to_string())
}

/// Opens `count` connections, has each send what it can and ask for much more, and reads nothing of it; all stay open for
/// ten seconds. Says how many were opened.
pub(crate) fn greedy(count: usize, to: SocketAddr) -> io::Result<String> {
    raise_descriptor_limit();
    let open = parking_lot::Mutex::new(Vec::new());
    share(count, HANDS, |_| {
        let mut stream = TcpStream::connect_timeout(&to, PATIENCE)?;
        stream.write_all(b"down 8000000\n")?;
        open.lock().push(stream);
        Ok(())
    })?;
    thread::sleep(Duration::from_secs(10));
    let many = open.lock().len();
    Ok(many.to_string())
}
