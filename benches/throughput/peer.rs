//! The servers that the benchmark talks to, in a process of their own: ten thousand flows need their own descriptors.

use std::io::{self, Write};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::{process, thread};

use socket2::{Domain, SockRef, Socket, Type};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Builder;
use tokio::task::{JoinSet, LocalSet, spawn_local};

/// TCP echo, on as many ports as a client needs to have enough tuples.
pub(crate) const TCP_PORTS: std::ops::RangeInclusive<u16> = 7001..=7008;
/// UDP echo.
pub(crate) const UDP_PORT: u16 = 7000;
/// Room for datagrams while the server is not scheduled.
const ROOM: usize = 4 << 20;

/// Serves until killed.
pub(crate) fn serve(address: IpAddr) -> ! {
    super::process::raise_descriptor_limit();
    let datagrams = UdpSocket::bind((address, UDP_PORT)).expect("a free port");
    SockRef::from(&datagrams).set_recv_buffer_size(ROOM).expect("a buffer");
    let listeners: io::Result<Vec<_>> = TCP_PORTS.map(|port| listen((address, port).into())).collect();
    let listeners = listeners.expect("free ports");
    thread::spawn(move || echo_datagrams(&datagrams));
    let _ = writeln!(io::stdout(), "serving");
    let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
    LocalSet::new().block_on(&runtime, async move {
        let mut accepting = JoinSet::new();
        for listener in listeners {
            accepting.spawn_local(accept(TcpListener::from_std(listener).expect("a runtime")));
        }
        accepting.join_all().await;
    });
    process::exit(0)
}

fn listen(address: SocketAddr) -> io::Result<std::net::TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM.nonblocking(), None)?;
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    socket.listen(4096)?;
    Ok(socket.into())
}

async fn accept(listener: TcpListener) {
    loop {
        if let Ok((stream, _)) = listener.accept().await {
            spawn_local(echo(stream));
        }
    }
}

/// Sends back what comes. An error ends this connection alone.
async fn echo(mut stream: TcpStream) {
    let mut buffer = [0; 4096];
    while let Ok(length @ 1..) = stream.read(&mut buffer).await {
        if stream.write_all(&buffer[..length]).await.is_err() {
            return;
        }
    }
}

fn echo_datagrams(socket: &UdpSocket) {
    let mut buffer = [0; 2048];
    loop {
        // An error here is an ICMP answer to an earlier reply, no reason to stop.
        if let Ok((length, from)) = socket.recv_from(&mut buffer) {
            let _ = socket.send_to(&buffer[..length], from);
        }
    }
}
