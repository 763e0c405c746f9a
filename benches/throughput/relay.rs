//! A plain relay beside which tunproxy is measured: the kernel's TCP on both sides, one thread for each direction, and
//! nothing else to do. What any proxy on sockets pays here at least.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::{process, thread};

use super::lab::IPERF_PORTS;

/// Bytes read at once: larger ones gain nothing.
const CHUNK: usize = 256 << 10;

/// Carries connections to the ports of iperf3 on to the same ports at `server`, until killed.
pub(crate) fn serve(server: IpAddr) -> ! {
    let listeners = IPERF_PORTS.map(|port| TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).expect("a free port"));
    let _ = writeln!(io::stdout(), "serving");
    let accepting = listeners.map(|listener| thread::spawn(move || accept(&listener, server)));
    accepting.into_iter().for_each(|thread| thread.join().expect("no panic"));
    process::exit(0)
}

fn accept(listener: &TcpListener, server: IpAddr) {
    while let Ok((client, _)) = listener.accept() {
        let port = client.local_addr().expect("an address").port();
        // The client sees an end, and the benchmark fails.
        let _ = TcpStream::connect(SocketAddr::new(server, port)).and_then(|upstream| join(client, upstream));
    }
}

fn join(client: TcpStream, upstream: TcpStream) -> io::Result<()> {
    let (from_client, to_upstream) = (client.try_clone()?, upstream.try_clone()?);
    thread::spawn(move || carry(from_client, to_upstream));
    thread::spawn(move || carry(upstream, client));
    Ok(())
}

fn carry(mut from: TcpStream, mut to: TcpStream) {
    let mut chunk = vec![0; CHUNK];
    while let Ok(length @ 1..) = from.read(&mut chunk) {
        if to.write_all(&chunk[..length]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Write);
}
