//! The servers of the lab's internet, in this process: exact, countable, and able to misbehave on request.

pub(crate) mod digest;
pub(crate) mod dns;
pub(crate) mod http;
pub(crate) mod proxy;
pub(crate) mod refusing;
pub(crate) mod socks;
pub(crate) mod tcp;
pub(crate) mod tls;
pub(crate) mod udp;

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle as Thread;
use std::time::Duration;

use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;
use tokio::task::{JoinHandle, JoinSet};

use super::Netns;

/// One thread of a namespace on which servers run; they end with it. Sockets they open are of that namespace.
pub(crate) struct Peers {
    ns: Netns,
    handle: Handle,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<Thread<()>>,
}

/// A running server. Dropping it closes its sockets and connections before it returns.
pub(crate) struct Peer {
    /// Where it listens.
    pub(crate) address: SocketAddr,
    handle: Handle,
    task: Option<JoinHandle<()>>,
}

/// What servers write down for the test to read.
#[derive(Clone, Default)]
pub(crate) struct Record(Arc<Mutex<Vec<String>>>);

impl Peers {
    /// Starts a thread in `ns`.
    ///
    /// # Panics
    /// If no runtime can be had.
    pub(crate) fn new(ns: &Netns) -> Self {
        let (started, start) = std::sync::mpsc::channel();
        let (stop, stopped) = oneshot::channel();
        let thread = ns.spawn(move || {
            let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
            let _ = started.send(runtime.handle().clone());
            let _ = runtime.block_on(stopped);
        });
        Self { ns: ns.clone(), handle: start.recv().expect("the thread"), stop: Some(stop), thread: Some(thread) }
    }

    /// Listens at `address` and serves every connection as `serve` says. An error of one connection ends only that.
    ///
    /// # Panics
    /// If the address is taken.
    pub(crate) fn tcp<F, S>(&self, address: SocketAddr, serve: F) -> Peer
    where
        F: Fn(TcpStream, SocketAddr) -> S + Send + 'static,
        S: Future<Output = io::Result<()>> + Send + 'static,
    {
        let listener = self.ns.enter(move || listen(address)).unwrap_or_else(|error| panic!("{address}: {error}"));
        let address = listener.local_addr().expect("a bound socket");
        self.start(address, async move {
            let listener = TcpListener::from_std(listener).expect("a runtime");
            let mut connections = JoinSet::new();
            loop {
                tokio::select! {
                    accepted = listener.accept() => if let Ok((stream, client)) = accepted {
                        connections.spawn(serve(stream, client));
                    },
                    Some(_) = connections.join_next() => {}
                }
            }
        })
    }

    /// Binds a datagram socket to `address` and hands it to `serve`.
    ///
    /// # Panics
    /// If the address is taken.
    pub(crate) fn udp<F, S>(&self, address: SocketAddr, serve: F) -> Peer
    where
        F: FnOnce(UdpSocket) -> S + Send + 'static,
        S: Future<Output = io::Result<()>> + Send + 'static,
    {
        let socket = self.ns.enter(move || datagrams(address)).unwrap_or_else(|error| panic!("{address}: {error}"));
        let address = socket.local_addr().expect("a bound socket");
        self.start(address, async move {
            let _ = serve(UdpSocket::from_std(socket).expect("a runtime")).await;
        })
    }

    fn start(&self, address: SocketAddr, serve: impl Future<Output = ()> + Send + 'static) -> Peer {
        Peer { address, handle: self.handle.clone(), task: Some(self.handle.spawn(serve)) }
    }
}

impl Drop for Peers {
    fn drop(&mut self) {
        drop(self.stop.take());
        let _ = self.thread.take().map(Thread::join);
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        if let Some(task) = self.task.take() {
            task.abort();
            let _ = self.handle.block_on(task);
        }
    }
}

impl Record {
    /// Adds a line.
    pub(crate) fn note(&self, line: impl Into<String>) {
        self.0.lock().expect("no panic while held").push(line.into());
    }

    /// All lines so far.
    pub(crate) fn all(&self) -> Vec<String> {
        self.0.lock().expect("no panic while held").clone()
    }

    /// How many lines `wanted` accepts.
    pub(crate) fn count(&self, wanted: impl Fn(&str) -> bool) -> usize {
        self.all().iter().filter(|line| wanted(line)).count()
    }
}

/// What a carrier does at its end: a failure of one side resets both.
pub(crate) fn hand_on(carried: io::Result<(u64, u64)>, ends: [&TcpStream; 2]) -> io::Result<()> {
    if carried.is_err() {
        for end in ends {
            // Closing with a linger time of zero sends RST (RFC 9293, 3.9.1.5 ABORT).
            SockRef::from(end).set_linger(Some(Duration::ZERO))?;
        }
    }
    carried.map(drop)
}

fn listen(address: SocketAddr) -> io::Result<std::net::TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    only_its_family(&socket, address)?;
    socket.bind(&address.into())?;
    socket.listen(4096)?;
    Ok(socket.into())
}

fn datagrams(address: SocketAddr) -> io::Result<std::net::UdpSocket> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM.nonblocking(), Some(Protocol::UDP))?;
    only_its_family(&socket, address)?;
    socket.set_recv_buffer_size(4 << 20)?;
    socket.bind(&address.into())?;
    Ok(socket.into())
}

fn only_its_family(socket: &Socket, address: SocketAddr) -> io::Result<()> {
    if address.is_ipv6() { socket.set_only_v6(true) } else { Ok(()) }
}
