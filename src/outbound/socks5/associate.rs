//! UDP ASSOCIATE: a control connection that lives as long as the association, and a socket towards the relay.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::task::{Context, Poll, Waker, ready};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt, ReadBuf};
use tokio::time::{Duration, Instant};

use super::wire::{self, WireError, command, method, reply};
use super::{Credentials, refusal};
use crate::net::{Address, BoxStream, Datagram, DialError, Host, LONGER_HEADER, Reach, Received};
use crate::outbound::egress::Egress;
use crate::outbound::upstream::Upstream;
use crate::platform::{Arrival, DatagramSocket, Sending};

pub(super) const NO_METHOD: &str = "wants another kind of authentication";
pub(super) const WRONG_PASSWORD: &str = "refused the user name and password";

/// Datagrams from relays that were dropped.
#[derive(Debug, Default)]
pub struct Drops {
    /// Parts of larger datagrams (FRAG not 0).
    pub fragments: AtomicU64,
    /// No SOCKS datagrams at all.
    pub malformed: AtomicU64,
    /// From another address than the relay's.
    pub strangers: AtomicU64,
}

impl Drops {
    fn count(&self, error: WireError) {
        let counter = if error == WireError::Fragment { &self.fragments } else { &self.malformed };
        counter.fetch_add(1, Relaxed);
    }
}

/// Negotiates an association with the proxy.
///
/// # Errors
/// The proxy's, in words that name it.
pub(super) async fn open(
    upstream: &Upstream,
    credentials: Option<&Credentials>,
    drops: Arc<Drops>,
) -> Result<Association, DialError> {
    let opened = upstream.open().await.map_err(of_control)?;
    let mut control = opened.stream;
    authenticate(&mut control, upstream, credentials).await?;
    let bound = request(&mut control, upstream).await?;
    let relay = match bound.host {
        // RFC 1928 leaves it open; servers behind NAT and many others mean "where you reached me".
        Host::Ip(ip) if ip.is_unspecified() => SocketAddr::new(opened.peer.ip(), bound.port),
        Host::Ip(ip) => SocketAddr::new(ip, bound.port),
        Host::Name(name) => SocketAddr::new(upstream.egress.addresses(&name).await?[0], bound.port),
    };
    let socket = upstream.egress.datagrams(relay.ip())?;
    let way = Way::to(relay, Arc::clone(&upstream.egress));
    let sending = upstream.egress.notes(&socket, relay);
    let (reader, buffer, too_big) = (None, Vec::new(), None);
    Ok(Association { control, socket, _sending: sending, relay, way, reader, drops, buffer, too_big })
}

/// An error of the control connection as one of the association.
fn of_control(error: DialError) -> DialError {
    if matches!(error, DialError::NoPort) { DialError::NoControlPort } else { error }
}

async fn authenticate(
    control: &mut BoxStream,
    upstream: &Upstream,
    credentials: Option<&Credentials>,
) -> Result<(), DialError> {
    let broken = |error: io::Error| upstream.broken(&error);
    let offer: &[u8] = match credentials {
        None => &[wire::VERSION, 1, method::NONE],
        Some(_) => &[wire::VERSION, 2, method::NONE, method::PASSWORD],
    };
    control.write_all(offer).await.map_err(broken)?;
    control.flush().await.map_err(broken)?;
    let mut answer = [0; 2];
    control.read_exact(&mut answer).await.map_err(broken)?;
    match (answer, credentials) {
        ([wire::VERSION, method::NONE], _) => Ok(()),
        ([wire::VERSION, method::PASSWORD], Some(Credentials { username, password })) => {
            let mut bytes = vec![wire::PASSWORD_VERSION];
            for part in [username, password] {
                // The decoder let no longer ones pass.
                bytes.push(u8::try_from(part.len()).unwrap_or(u8::MAX));
                bytes.extend_from_slice(part.as_bytes());
            }
            control.write_all(&bytes).await.map_err(broken)?;
            control.flush().await.map_err(broken)?;
            control.read_exact(&mut answer).await.map_err(broken)?;
            if answer[1] == 0 { Ok(()) } else { Err(upstream.denied(WRONG_PASSWORD)) }
        }
        ([wire::VERSION, _], _) => Err(upstream.denied(NO_METHOD)),
        _ => Err(upstream.denied("does not speak SOCKS5")),
    }
}

/// Asks for the association; the answer is where the relay listens.
async fn request(control: &mut BoxStream, upstream: &Upstream) -> Result<Address, DialError> {
    let broken = |error: io::Error| upstream.broken(&error);
    // Zeros: we do not know yet from which address the datagrams will come (RFC 1928 section 6).
    let mut bytes = vec![wire::VERSION, command::UDP_ASSOCIATE, 0];
    wire::put_address(&SocketAddr::from(([0, 0, 0, 0], 0)).into(), &mut bytes);
    control.write_all(&bytes).await.map_err(broken)?;
    control.flush().await.map_err(broken)?;
    let mut head = [0; 3];
    control.read_exact(&mut head).await.map_err(broken)?;
    match head {
        [wire::VERSION, reply::SUCCEEDED, _] => wire::read_address(control).await.map_err(broken),
        [wire::VERSION, reply::COMMAND_UNSUPPORTED, _] => Err(upstream.denied("does not carry UDP")),
        [wire::VERSION, code, _] => Err(refusal(upstream, code, &upstream.server)),
        _ => Err(upstream.denied("does not speak SOCKS5")),
    }
}

/// How often the way to the relay is looked at.
const LOOK: Duration = Duration::from_secs(1);

/// Where our datagrams to a relay come from. It takes them from the address that asked for the association alone, so that
/// when this host has come to send from another one they are lost without a word, and the association with them.
struct Way {
    egress: Arc<Egress>,
    relay: SocketAddr,
    /// The address of this host.
    source: Option<IpAddr>,
    looked: Instant,
    moved: bool,
}

impl Way {
    fn to(relay: SocketAddr, egress: Arc<Egress>) -> Self {
        Self { source: egress.source_for(relay), egress, relay, looked: Instant::now(), moved: false }
    }

    /// Whether it leads from another address now. Where there is no way at all, the old one may come back.
    fn is_another(&mut self, now: Instant) -> bool {
        if !self.moved && now >= self.looked + LOOK {
            self.looked = now;
            let source = self.egress.source_for(self.relay);
            self.moved = source.is_some() && self.source.is_some() && source != self.source;
        }
        self.moved
    }
}

fn moved() -> io::Error {
    io::Error::new(io::ErrorKind::BrokenPipe, "this host reaches the proxy from another address now")
}

/// One association with a relay. It ends when the proxy closes the control connection (RFC 1928 section 6).
pub(super) struct Association {
    control: BoxStream,
    socket: DatagramSocket,
    /// Should its datagrams come back by the TUN, they are known.
    _sending: Option<Sending>,
    relay: SocketAddr,
    way: Way,
    /// Who waits for datagrams, and so hears of the end.
    reader: Option<Waker>,
    drops: Arc<Drops>,
    /// Where header and payload are put together; nothing is kept in it.
    buffer: Vec<u8>,
    /// The last peer whose datagram did not fit, and the bytes of its header.
    too_big: Option<(Address, u32)>,
}

impl Association {
    /// Ends it: whoever waits for datagrams hears so.
    fn leave(&mut self) {
        self.way.moved = true;
        if let Some(reader) = self.reader.take() {
            reader.wake();
        }
    }

    /// Whether the proxy has ended the association. What else it says on the control connection means nothing.
    fn poll_closed(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        let mut space = [0; 64];
        loop {
            let mut buffer = ReadBuf::new(&mut space);
            return Poll::Ready(match ready!(std::pin::Pin::new(&mut self.control).poll_read(cx, &mut buffer)) {
                Ok(()) if !buffer.filled().is_empty() => continue,
                Ok(()) => io::Error::new(io::ErrorKind::BrokenPipe, "the proxy ended the association"),
                Err(error) => io::Error::new(io::ErrorKind::BrokenPipe, error),
            });
        }
    }

    /// An error on the way to the relay, as far as it speaks of a peer.
    fn failed(&mut self, why: Reach) -> Option<io::Result<Received>> {
        match why {
            Reach::TooBig(mtu) => {
                let (to, header) = self.too_big.take()?;
                // The client's packet may have the shorter of the two IP headers in place of ours.
                let header = header + if self.relay.is_ipv6() { LONGER_HEADER } else { 0 };
                let why = Reach::TooBig(mtu.saturating_sub(header));
                Some(Ok(Received::Failed { to, why }))
            }
            // Nobody behind the relay's port: the proxy is gone, even if the control connection has not noticed.
            Reach::Port => Some(Err(io::Error::new(io::ErrorKind::BrokenPipe, "the proxy's relay is gone"))),
            // A route may come back, and the control connection tells if it does not.
            Reach::Network | Reach::Host | Reach::Protocol | Reach::Prohibited | Reach::Coded(_) => None,
        }
    }
}

impl Datagram for Association {
    fn poll_send_to(
        &mut self,
        cx: &mut Context<'_>,
        payload: &[u8],
        to: &Address,
        dont_fragment: bool,
    ) -> Poll<io::Result<()>> {
        if self.way.is_another(Instant::now()) {
            self.leave();
            return Poll::Ready(Err(moved()));
        }
        self.buffer.clear();
        wire::put_datagram_header(to, &mut self.buffer);
        let header = self.buffer.len();
        self.buffer.extend_from_slice(payload);
        let sent = ready!(self.socket.poll_send_to(cx, &self.buffer, self.relay, dont_fragment));
        if sent.as_ref().is_err_and(|error| error.raw_os_error() == Some(libc::ENODEV)) {
            // The device that the socket was bound to. Should it come back, it is another one to the socket.
            self.leave();
        }
        if sent.as_ref().is_err_and(|error| error.raw_os_error() == Some(libc::EMSGSIZE)) {
            self.too_big = Some((to.clone(), u32::try_from(header).unwrap_or(u32::MAX)));
        }
        Poll::Ready(sent)
    }

    fn poll_recv_from(&mut self, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<Received>> {
        if self.way.moved {
            return Poll::Ready(Err(moved()));
        }
        match &mut self.reader {
            Some(reader) => reader.clone_from(cx.waker()),
            None => self.reader = Some(cx.waker().clone()),
        }
        if let Poll::Ready(error) = self.poll_closed(cx) {
            return Poll::Ready(Err(error));
        }
        let start = buffer.filled().len();
        loop {
            match ready!(self.socket.poll_recv_from(cx, buffer))? {
                Arrival::Failed { why, .. } => {
                    if let Some(told) = self.failed(why) {
                        return Poll::Ready(told);
                    }
                    continue;
                }
                Arrival::Payload(from) | Arrival::Train { from, .. }
                    if (from.ip(), from.port()) != (self.relay.ip(), self.relay.port()) =>
                {
                    self.drops.strangers.fetch_add(1, Relaxed);
                }
                // Each datagram has a header of its own: this socket was never told to bring trains.
                Arrival::Payload(_) | Arrival::Train { .. } => match wire::take_datagram(&buffer.filled()[start..]) {
                    Ok((from, payload)) => {
                        let (length, end) = (payload.len(), buffer.filled().len());
                        buffer.filled_mut().copy_within(end - length..end, start);
                        buffer.set_filled(start + length);
                        return Poll::Ready(Ok(Received::Payload(from)));
                    }
                    Err(error) => self.drops.count(error),
                },
            }
            buffer.set_filled(start);
        }
    }
}
