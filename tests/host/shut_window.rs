//! A client that says much before it reads anything: what it says is acknowledged while its own window is shut.

use std::io::{self, Read, Write};
use std::mem::MaybeUninit;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use socket2::{Domain, Socket, Type};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::support::client::name_of;
use super::support::peers::digest::{Sha256, of_pattern, pattern};
use super::support::peers::tcp::send_pattern;
use super::support::peers::{Peer, Peers};
use super::support::sites::{V4, V6};
use super::support::tunproxy::Place;
use super::support::{Topology, run, world};

const TUN: &str = "/dev/net/tun";
/// What the site says first: more than the client's buffer holds, less than ours.
const GREETING: u64 = 400_000;
/// What the client says before it reads: many windows.
const UPLOAD: u64 = 16_000_000;
const BUFFER: usize = 16_384;
/// A shut window is probed within a second, and again after two: so many segments come that bring nothing.
const PROBES: u32 = 2;
/// Far more than it takes, and less than a probe for each window of the upload.
const PATIENCE: Duration = Duration::from_secs(30);

/// Greets at length, reads to the client's end, and says what it has read.
fn greets(sites: &Peers, address: SocketAddr) -> Peer {
    sites.tcp(address, async |mut stream, _| {
        send_pattern(&mut stream, GREETING).await?;
        let (mut space, mut sha) = (vec![0; 65_536], Sha256::new());
        loop {
            let length = stream.read(&mut space).await?;
            if length == 0 {
                break;
            }
            sha.update(&space[..length]);
        }
        stream.write_all(sha.hex().as_bytes()).await?;
        stream.shutdown().await
    })
}

/// Returns when the window of `stream`, of which nobody reads, is shut and has been probed: when segments come, and no more bytes
/// with them.
fn until_probed(stream: &TcpStream) -> io::Result<()> {
    let mut last = told(stream)?;
    let probed = || match told(stream) {
        Ok(now) if now.tcpi_bytes_received != last.tcpi_bytes_received => {
            last = now;
            None
        }
        Ok(now) => (now.tcpi_segs_in >= last.tcpi_segs_in + PROBES).then_some(Ok(())),
        Err(error) => Some(Err(error)),
    };
    let late = || Err(io::Error::new(io::ErrorKind::TimedOut, "its shut window is not probed"));
    world::poll_until(PATIENCE, probed).unwrap_or_else(late)
}

/// What the kernel tells of a connection (tcp(7)).
fn told(stream: &TcpStream) -> io::Result<libc::tcp_info> {
    let mut info = MaybeUninit::<libc::tcp_info>::zeroed();
    let mut length = size_of::<libc::tcp_info>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes of plain numbers, of which all are zero before.
    unsafe {
        let got = libc::getsockopt(
            stream.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &raw mut length,
        );
        if got == 0 { Ok(info.assume_init()) } else { Err(io::Error::last_os_error()) }
    }
}

/// Uploads while its window is shut. Returns the digest of what it was greeted with and the one that the site tells.
fn uploads_first(to: SocketAddr) -> io::Result<(String, String)> {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
    socket.set_recv_buffer_size(BUFFER)?;
    socket.connect_timeout(&to.into(), PATIENCE)?;
    let mut stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(Duration::from_secs(1)))?;
    until_probed(&stream)?;
    let (start, mut sent) = (Instant::now(), 0);
    while sent < UPLOAD {
        match stream.write(pattern(sent, UPLOAD - sent)) {
            Ok(length) => sent += length as u64,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
        if start.elapsed() > PATIENCE {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "its upload stalls"));
        }
    }
    stream.shutdown(std::net::Shutdown::Write)?;
    let mut all = Vec::new();
    stream.read_to_end(&mut all)?;
    let (greeting, digest) = all.split_at(all.len().min(GREETING as usize));
    let mut sha = Sha256::new();
    sha.update(greeting);
    Ok((sha.hex(), String::from_utf8_lossy(digest).into_owned()))
}

#[test]
fn a_client_that_uploads_before_it_reads_is_not_held_up_by_its_own_shut_window() {
    run(&[TUN], || {
        let lab = Topology::with_lan();
        let sites = [V4, V6].map(|host| greets(&lab.sites, format!("{host}:9400").parse().expect("an address")));
        let place = Place::new(
            "ipv6: true\ntun: { enable: true }\ndns: { enable: true, enhanced-mode: fake-ip, nameserver: [192.168.1.1] }\nrules: ['MATCH,DIRECT']\n",
        );
        let tunproxy = place.start(&lab.host);
        tunproxy.assert_carries(&lab.host);
        let mut clients = Vec::new();
        for ns in [&lab.host, lab.client()] {
            for to in sites.iter().map(|site| site.address) {
                clients.push((ns.name(), to, ns.spawn(move || uploads_first(to))));
            }
        }
        for (who, to, client) in clients {
            let outcome = client.join().expect("no panic").map_err(|error| format!("{}: {error}", name_of(&error)));
            assert_eq!(outcome, Ok((of_pattern(GREETING), of_pattern(UPLOAD))), "{who} to {to}\n{}", tunproxy.output());
        }
        assert!(tunproxy.stop().success());
    });
}
