//! Somebody on a host who tries every way out: each protocol, in each family, from sockets tied to the uplink in every
//! way that there is.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;
use std::{io, thread};

use socket2::{Domain, Protocol, Socket, Type};

use super::Netns;
use super::frames::checksum;
use super::packet::Packet;
use super::program::PATIENCE;
use super::topology::{HOST_V4, HOST_V6};
use super::world::poll_until;

/// An address that nobody but these attempts ever sends to.
pub(crate) const TARGET_V4: &str = "203.0.113.77";
/// The same for IPv6.
pub(crate) const TARGET_V6: &str = "2001:db8:1::77";
/// The uplink of the host under test, and of a LAN client.
const UPLINK: &str = "eth0";
/// The port that is tried.
const PORT: u16 = 4711;

/// How a socket is tied to the uplink.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tie {
    /// Not at all.
    Free,
    /// To the host's address there.
    Address,
    /// `SO_BINDTODEVICE`.
    Device,
    /// `IP_UNICAST_IF`, as systemd-resolved does it.
    UnicastIf,
}

/// All of them.
pub(crate) const TIES: [Tie; 4] = [Tie::Free, Tie::Address, Tie::Device, Tie::UnicastIf];

/// What is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// One datagram.
    Udp,
    /// The first segment of a connection.
    Tcp,
    /// An echo request from a raw socket.
    Ping,
}

/// Sends `payload` to `to` in one way, from the namespace of this thread. What came of it does not matter: whether
/// something left is for a capture to say.
///
/// # Errors
/// What the kernel refused.
pub(crate) fn send(kind: Kind, tie: Tie, to: SocketAddr, payload: &[u8]) -> io::Result<()> {
    let domain = Domain::for_address(to);
    let socket = match (kind, to) {
        (Kind::Udp, _) => Socket::new(domain, Type::DGRAM, Some(Protocol::UDP))?,
        (Kind::Tcp, _) => Socket::new(domain, Type::STREAM, Some(Protocol::TCP))?,
        (Kind::Ping, SocketAddr::V4(_)) => Socket::new(domain, Type::RAW, Some(Protocol::ICMPV4))?,
        (Kind::Ping, SocketAddr::V6(_)) => Socket::new(domain, Type::RAW, Some(Protocol::ICMPV6))?,
    };
    socket.set_nonblocking(true)?;
    tie_to_uplink(&socket, tie, to)?;
    match kind {
        Kind::Udp => socket.send_to(payload, &to.into()).map(drop),
        Kind::Ping => socket.send_to(&echo_request(to, payload), &SocketAddr::new(to.ip(), 0).into()).map(drop),
        Kind::Tcp => match socket.connect(&to.into()) {
            // The segment is on its way, or nowhere.
            Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => Ok(()),
            other => other,
        },
    }
}

fn tie_to_uplink(socket: &Socket, tie: Tie, to: SocketAddr) -> io::Result<()> {
    let index = || nix::net::if_::if_nametoindex(UPLINK).map_err(io::Error::from);
    match tie {
        Tie::Free => Ok(()),
        Tie::Device => socket.bind_device(Some(UPLINK.as_bytes())),
        Tie::Address => {
            let address: IpAddr = if to.is_ipv4() { HOST_V4 } else { HOST_V6 }.parse().map_err(io::Error::other)?;
            socket.bind(&SocketAddr::new(address, 0).into())
        }
        Tie::UnicastIf if to.is_ipv6() => set_number(socket, libc::IPPROTO_IPV6, libc::IPV6_UNICAST_IF, index()?),
        Tie::UnicastIf => set_number(socket, libc::IPPROTO_IP, libc::IP_UNICAST_IF, index()?),
    }
}

/// Both options take the index in network byte order.
fn set_number(socket: &Socket, level: libc::c_int, option: libc::c_int, index: u32) -> io::Result<()> {
    let index = index.to_be();
    // SAFETY: the kernel reads one number from a place of that size.
    let failed = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            (&raw const index).cast(),
            size_of::<u32>() as libc::socklen_t,
        )
    };
    if failed == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// An echo request; the kernel fills the checksum in for IPv6 alone.
fn echo_request(to: SocketAddr, payload: &[u8]) -> Vec<u8> {
    let kind = if to.is_ipv4() { 8 } else { 128 };
    let mut message = [&[kind, 0, 0, 0, 0x47, 0x11, 0, 1][..], payload].concat();
    let sum = checksum(&message);
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    message
}

/// Every way, to the targets, once; returns how many there are.
pub(crate) fn all_ways() -> usize {
    let mut ways = 0;
    for target in [TARGET_V4, TARGET_V6] {
        let to = SocketAddr::new(target.parse().expect("an address"), PORT);
        for kind in [Kind::Udp, Kind::Tcp, Kind::Ping] {
            for tie in TIES {
                let _ = send(kind, tie, to, b"an attempt to get out");
                ways += 1;
            }
        }
    }
    ways
}

/// Whether the packet is one of these attempts.
pub(crate) fn escaped(packet: &Packet) -> bool {
    let targets = [TARGET_V4, TARGET_V6];
    packet.ip.is_some_and(|ip| targets.contains(&ip.destination.ip().to_string().as_str()))
}

/// Attempts from a thread of their own, in a namespace, until it is dropped.
pub(crate) struct Attempts {
    made: Arc<AtomicUsize>,
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Attempts {
    /// Begins.
    pub(crate) fn from(ns: &Netns) -> Self {
        let (made, over) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        let (count, end) = (made.clone(), over.clone());
        let thread = ns.spawn(move || {
            while !end.load(Ordering::Relaxed) {
                count.fetch_add(all_ways(), Ordering::Relaxed);
                // About ten a millisecond: what is under test shares the machine.
                thread::sleep(Duration::from_millis(2));
            }
        });
        Self { made, over, thread: Some(thread) }
    }

    /// Waits for so many more.
    ///
    /// # Panics
    /// If they are not made.
    pub(crate) fn wait(&self, many: usize) {
        let wanted = self.made.load(Ordering::Relaxed) + many;
        let made = || (self.made.load(Ordering::Relaxed) >= wanted).then_some(());
        assert!(poll_until(PATIENCE, made).is_some(), "the attempts have ended");
    }
}

impl Drop for Attempts {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}
