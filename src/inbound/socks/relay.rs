//! UDP ASSOCIATE for clients: a socket of its own for each association, which lives as long as the control connection.

use std::cell::{Cell, RefCell};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::atomic::Ordering::Relaxed;

use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};

use super::super::mixed::Facts;
use crate::dispatch::{Back, Entry};
use crate::net::{Address, Host, Reach};
use crate::outbound::socks5::wire::{self, WireError, reply};
use crate::platform::is_spare;
use crate::session::Network;

/// The largest datagram, header included.
const LARGEST: usize = 65_535;

/// Relays datagrams until the client closes `control`. `announced` is where it said that it will send from.
///
/// # Errors
/// The control connection broke.
pub(super) async fn serve<E: Entry>(
    mut control: TcpStream,
    facts: &Facts,
    entry: E,
    announced: &Address,
) -> io::Result<()> {
    // Where the client reached us, it can send to; the port is not the listener's, so that clients do not mix.
    let own = control.local_addr()?.ip();
    let socket = UdpSocket::bind((own, 0)).await.ok().filter(|socket| !is_spare(socket)).map(Rc::new);
    let (code, bound) = match &socket {
        Some(socket) => (reply::SUCCEEDED, socket.local_addr()?),
        None => (reply::FAILURE, SocketAddr::new(own, 0)),
    };
    let mut bytes = Vec::new();
    wire::put_reply(code, bound, &mut bytes);
    control.write_all(&bytes).await?;
    let Some(socket) = socket else { return Ok(()) };

    let relay = Rc::new(Relay { socket: RefCell::new(Some(Rc::clone(&socket))), buffer: RefCell::default() });
    let back: Rc<dyn Back> = Rc::clone(&relay) as Rc<dyn Back>;
    let client = Cell::new(expected(facts.peer.ip(), announced));
    let association = Association { facts, entry: &entry, client, back };
    let forward = async {
        let mut space = vec![0; LARGEST];
        while let Ok((length, source)) = socket.recv_from(&mut space).await {
            association.take(&space[..length], source);
        }
    };
    let ended = async {
        let mut space = [0; 64];
        while control.read(&mut space).await? > 0 {}
        Ok(())
    };
    let outcome = tokio::select! {
        outcome = ended => outcome,
        () = forward => Ok(()),
    };
    // The dispatcher may hold the other end a little longer: the socket is not kept with it.
    relay.socket.take();
    outcome
}

/// The one source whose datagrams are taken: the host of the control connection (RFC 1928 section 7), and its port if
/// it announced one. Port 0: the first datagram shows it.
fn expected(peer: IpAddr, announced: &Address) -> SocketAddr {
    let port = match announced.host {
        Host::Ip(ip) if ip == peer => announced.port,
        _ => 0,
    };
    SocketAddr::new(peer, port)
}

/// One client's association. What it has going ends with it.
struct Association<'a, E: Entry> {
    facts: &'a Facts,
    entry: &'a E,
    client: Cell<SocketAddr>,
    back: Rc<dyn Back>,
}

impl<E: Entry> Association<'_, E> {
    fn take(&self, bytes: &[u8], source: SocketAddr) {
        let drops = &self.facts.drops;
        let allowed = self.client.get();
        if source.ip() != allowed.ip() || (allowed.port() != 0 && source.port() != allowed.port()) {
            drops.foreign.fetch_add(1, Relaxed);
            return;
        }
        match wire::take_datagram(bytes) {
            Ok((to, payload)) => {
                self.client.set(source);
                // The client's own DF bit ended at our socket; its datagrams may be fragmented like those of any proxy.
                let session = self.facts.session(Network::Udp, source, to);
                self.entry.datagram(session, payload, false, &self.back);
            }
            Err(WireError::Fragment) => {
                drops.fragments.fetch_add(1, Relaxed);
            }
            Err(_) => {
                drops.malformed.fetch_add(1, Relaxed);
            }
        }
    }
}

impl<E: Entry> Drop for Association<'_, E> {
    fn drop(&mut self) {
        self.entry.leave(self.client.get(), &self.back);
    }
}

/// The way back to the client.
struct Relay {
    socket: RefCell<Option<Rc<UdpSocket>>>,
    buffer: RefCell<Vec<u8>>,
}

impl Back for Relay {
    fn deliver(&self, from: &Address, to: SocketAddr, payload: &[u8]) {
        let socket = self.socket.borrow();
        let Some(socket) = socket.as_deref() else { return };
        let mut buffer = self.buffer.borrow_mut();
        buffer.clear();
        wire::put_datagram_header(from, &mut buffer);
        buffer.extend_from_slice(payload);
        // Not through the reactor: a datagram that finds no room now is lost, as on any network.
        let _ = SockRef::from(socket).send_to(&buffer, &to.into());
    }

    /// SOCKS has no words for it; the client waits as it would behind any proxy.
    fn unreachable(&self, _: &Address, _: SocketAddr, _: &[u8], _: Reach) {}
}
