//! Datagrams of one source, sent from this host: one socket per family, the same for all peers (RFC 4787 section 4.1).

use std::io;
use std::net::SocketAddr;
use std::num::NonZeroU16;
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};

use foldhash::{HashMap, HashMapExt};
use tokio::io::ReadBuf;

use crate::net::{Address, BoxFuture, Datagram, DialError, Host, Name, Received};
use crate::outbound::egress::Egress;
use crate::platform::{Arrival, DatagramSocket};

/// Peers that one socket remembers, and names that one association does.
const REMEMBERED: usize = 4096;

/// Sockets of one association. A second one of a family is opened only when two names of the client's are one real
/// address and port, because an answer must come from the name that was asked.
const SOCKETS: usize = 8;

/// An association that resolves each name once and keeps to what it found.
pub(super) struct DirectDatagram {
    egress: Arc<Egress>,
    ports: Vec<Port>,
    names: HashMap<Name, Found>,
    resolving: Option<(Name, Resolving)>,
    /// The port that is asked first, so that none starves.
    turn: usize,
    /// Who waits for datagrams: told when a socket is opened that it does not listen to yet.
    reader: Option<Waker>,
}

type Resolving = BoxFuture<'static, Result<Vec<std::net::IpAddr>, DialError>>;

/// One socket, and under which name the client knows its peers (None: by address).
struct Port {
    socket: DatagramSocket,
    ipv6: bool,
    peers: HashMap<SocketAddr, Option<Name>>,
}

/// The addresses of a name; the current one changes only while nothing could be sent there.
struct Found {
    addresses: Vec<std::net::IpAddr>,
    current: usize,
}

impl DirectDatagram {
    pub(super) fn new(egress: Arc<Egress>) -> Self {
        Self { egress, ports: Vec::new(), names: HashMap::new(), resolving: None, turn: 0, reader: None }
    }

    /// The real address of `to`, after a look-up if need be.
    fn poll_real(&mut self, cx: &mut Context<'_>, to: &Address) -> Poll<io::Result<SocketAddr>> {
        let name = match &to.host {
            Host::Ip(ip) => return Poll::Ready(Ok(SocketAddr::new(*ip, to.port))),
            Host::Name(name) => name,
        };
        if let Some(found) = self.names.get(name) {
            return Poll::Ready(Ok(SocketAddr::new(found.addresses[found.current], to.port)));
        }
        if self.names.len() >= REMEMBERED {
            return Poll::Ready(Err(io::Error::other("one association sends to too many names")));
        }
        let mut resolving = match self.resolving.take() {
            Some((asked, resolving)) if asked == *name => resolving,
            _ => {
                let (egress, name) = (Arc::clone(&self.egress), name.clone());
                Box::pin(async move { egress.addresses(&name).await })
            }
        };
        match resolving.as_mut().poll(cx) {
            Poll::Pending => {
                self.resolving = Some((name.clone(), resolving));
                Poll::Pending
            }
            Poll::Ready(Ok(addresses)) => {
                let real = SocketAddr::new(addresses[0], to.port);
                self.names.insert(name.clone(), Found { addresses, current: 0 });
                Poll::Ready(Ok(real))
            }
            Poll::Ready(Err(error)) => Poll::Ready(Err(io_error(error))),
        }
    }

    /// Sends to the current address of `to`, and to the next one as long as there is no route.
    fn poll_send<T>(
        &mut self,
        cx: &mut Context<'_>,
        to: &Address,
        mut send: impl FnMut(&mut Context<'_>, &mut DatagramSocket, SocketAddr) -> Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        loop {
            let real = ready!(self.poll_real(cx, to))?;
            let sent = match self.port_for(to, real) {
                Ok(port) => ready!(send(cx, &mut port.socket, real)),
                Err(error) => Err(error),
            };
            match sent {
                Err(error) if self.next_address(&to.host, &error) => {}
                sent => return Poll::Ready(sent),
            }
        }
    }

    /// Turns to the next address of `host` after `real` could not be sent to. False: there is none.
    fn next_address(&mut self, host: &Host, error: &io::Error) -> bool {
        let Host::Name(name) = host else { return false };
        let Some(found) = self.names.get_mut(name) else { return false };
        let no_route = matches!(
            error.raw_os_error(),
            Some(libc::ENETUNREACH | libc::EHOSTUNREACH | libc::EADDRNOTAVAIL | libc::EAFNOSUPPORT)
        );
        if !no_route || found.current + 1 >= found.addresses.len() {
            return false;
        }
        found.current += 1;
        true
    }

    /// The socket from which the client's `to` is reached at `real`.
    fn port_for(&mut self, to: &Address, real: SocketAddr) -> io::Result<&mut Port> {
        let asked = match &to.host {
            Host::Name(name) => Some(name),
            Host::Ip(_) => None,
        };
        let mut found = None;
        for (at, port) in self.ports.iter().enumerate().filter(|(_, port)| port.ipv6 == real.is_ipv6()) {
            match port.peers.get(&real) {
                Some(known) if known.as_ref() == asked => return Ok(&mut self.ports[at]),
                Some(_) => {}
                None => {
                    found = Some(at);
                    break;
                }
            }
        }
        if self.egress.is_fake(real.ip()) {
            return Err(io::Error::new(io::ErrorKind::HostUnreachable, "a fake address leads nowhere"));
        }
        let at = match found {
            Some(at) => at,
            None if self.ports.len() >= SOCKETS => {
                return Err(io::Error::other("too many names of one source share a real address"));
            }
            None => {
                let mut socket = self.egress.datagrams(real.ip()).map_err(io_error)?;
                socket.receive_trains();
                self.ports.push(Port { socket, ipv6: real.is_ipv6(), peers: HashMap::new() });
                if let Some(reader) = self.reader.take() {
                    reader.wake();
                }
                self.ports.len() - 1
            }
        };
        let port = &mut self.ports[at];
        // Beyond the limit, peers known by address still work; only a name must be remembered.
        if port.peers.len() < REMEMBERED {
            port.peers.insert(real, asked.cloned());
        } else if asked.is_some() {
            return Err(io::Error::other("one association has too many peers"));
        }
        Ok(port)
    }
}

impl Port {
    /// The peer as the client wrote it.
    fn as_asked(&self, real: SocketAddr) -> Address {
        // Interface and flow label of the answer are no part of the peer's identity.
        let real = SocketAddr::new(real.ip(), real.port());
        match self.peers.get(&real) {
            Some(Some(name)) => Address { host: Host::Name(name.clone()), port: real.port() },
            _ => real.into(),
        }
    }
}

impl Datagram for DirectDatagram {
    fn poll_send_to(
        &mut self,
        cx: &mut Context<'_>,
        payload: &[u8],
        to: &Address,
        dont_fragment: bool,
    ) -> Poll<io::Result<()>> {
        self.poll_send(cx, to, |cx, socket, real| socket.poll_send_to(cx, payload, real, dont_fragment))
    }

    fn poll_send_train(
        &mut self,
        cx: &mut Context<'_>,
        train: &[u8],
        size: NonZeroU16,
        to: &Address,
        dont_fragment: bool,
    ) -> Poll<io::Result<usize>> {
        self.poll_send(cx, to, |cx, socket, real| socket.poll_send_train(cx, train, size, real, dont_fragment))
    }

    fn poll_recv_from(&mut self, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<Received>> {
        let count = self.ports.len();
        for step in 0..count {
            let at = (self.turn + step) % count;
            let port = &mut self.ports[at];
            let Poll::Ready(arrival) = port.socket.poll_recv_from(cx, buffer) else { continue };
            self.turn = at + 1;
            return Poll::Ready(Ok(match arrival? {
                Arrival::Payload(from) => Received::Payload(port.as_asked(from)),
                Arrival::Train { from, size } => Received::Train { from: port.as_asked(from), size },
                Arrival::Failed { to, why } => Received::Failed { to: port.as_asked(to), why },
            }));
        }
        match &mut self.reader {
            Some(reader) => reader.clone_from(cx.waker()),
            None => self.reader = Some(cx.waker().clone()),
        }
        Poll::Pending
    }
}

fn io_error(error: DialError) -> io::Error {
    match error {
        DialError::Io(error) => error,
        DialError::TimedOut => io::ErrorKind::TimedOut.into(),
        DialError::Unreachable(_) => io::ErrorKind::HostUnreachable.into(),
        other => io::Error::other(other),
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use socket2::SockRef;
    use tokio::net::UdpSocket;

    use super::*;
    use crate::net::Reach;
    use crate::outbound::fixture::Names;
    use crate::platform::Dialer;

    fn association(names: &[(&str, &[&str])]) -> DirectDatagram {
        DirectDatagram::new(Arc::new(Egress::new(Dialer::default(), Names::shared(names))))
    }

    fn peer(host: &str, port: u16) -> Address {
        Address { host: Host::parse(host).unwrap(), port }
    }

    async fn send(association: &mut DirectDatagram, payload: &[u8], to: &Address) -> io::Result<()> {
        poll_fn(|cx| association.poll_send_to(cx, payload, to, true)).await
    }

    async fn receive(association: &mut DirectDatagram) -> (Received, Vec<u8>) {
        let mut space = vec![0; 2048];
        let mut buffer = ReadBuf::new(&mut space);
        let received = poll_fn(|cx| association.poll_recv_from(cx, &mut buffer)).await.unwrap();
        (received, buffer.filled().to_vec())
    }

    async fn heard(socket: &UdpSocket) -> (Vec<u8>, SocketAddr) {
        let mut space = [0; 2048];
        let (length, from) = socket.recv_from(&mut space).await.unwrap();
        (space[..length].to_vec(), from)
    }

    #[tokio::test]
    async fn all_peers_see_one_source_port_and_strangers_may_answer() {
        let (one, two) = (UdpSocket::bind("127.0.0.1:0").await.unwrap(), UdpSocket::bind("127.0.0.2:0").await.unwrap());
        let mut association = association(&[("one.test", &["127.0.0.1"])]);
        let named = peer("one.test", one.local_addr().unwrap().port());
        send(&mut association, b"1", &named).await.unwrap();
        send(&mut association, b"2", &two.local_addr().unwrap().into()).await.unwrap();
        let (_, seen_by_one) = heard(&one).await;
        let (_, seen_by_two) = heard(&two).await;
        assert_eq!(seen_by_one.port(), seen_by_two.port());

        one.send_to(b"from the name", seen_by_one).await.unwrap();
        assert_eq!(receive(&mut association).await, (Received::Payload(named), b"from the name".to_vec()));
        let stranger = UdpSocket::bind("127.0.0.3:0").await.unwrap();
        stranger.send_to(b"hello", seen_by_one).await.unwrap();
        let from = stranger.local_addr().unwrap().into();
        assert_eq!(receive(&mut association).await, (Received::Payload(from), b"hello".to_vec()));
    }

    #[tokio::test]
    async fn a_reader_that_waits_hears_from_sockets_that_are_opened_later() {
        let mut association = association(&[]);
        for local in ["127.0.0.1:0", "[::1]:0"] {
            let server = UdpSocket::bind(local).await.unwrap();
            let mut space = [0; 16];
            let mut buffer = ReadBuf::new(&mut space);
            let mut sent = false;
            let received = poll_fn(|cx| {
                let received = association.poll_recv_from(cx, &mut buffer);
                if !sent {
                    // From elsewhere, as it were: this send wakes nobody but the reader it has been told of.
                    let mut elsewhere = Context::from_waker(Waker::noop());
                    let to = server.local_addr().unwrap().into();
                    assert!(association.poll_send_to(&mut elsewhere, b"?", &to, false).is_ready());
                    let asked = SockRef::from(&server).recv_from(&mut [std::mem::MaybeUninit::uninit(); 8]).unwrap().1;
                    SockRef::from(&server).send_to(b"!", &asked).unwrap();
                    sent = true;
                }
                received
            });
            assert_eq!(received.await.unwrap(), Received::Payload(server.local_addr().unwrap().into()));
        }
    }

    #[tokio::test]
    async fn two_names_on_one_real_address_are_answered_each_from_its_own() {
        let server = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let real = server.local_addr().unwrap();
        let mut association = association(&[("a.test", &["127.0.0.1"]), ("b.test", &["127.0.0.1"])]);
        for asked in
            [peer("a.test", real.port()), peer("b.test", real.port()), real.into(), peer("a.test", real.port())]
        {
            send(&mut association, b"?", &asked).await.unwrap();
            let (_, from) = heard(&server).await;
            server.send_to(b"!", from).await.unwrap();
            assert_eq!(receive(&mut association).await.0, Received::Payload(asked));
        }
        assert_eq!(association.ports.len(), 3);
    }

    #[tokio::test]
    async fn a_closed_port_comes_back_under_the_name_that_was_asked() {
        let closed = UdpSocket::bind("[::1]:0").await.unwrap().local_addr().unwrap();
        let mut association = association(&[("six.test", &["::1"])]);
        let asked = peer("six.test", closed.port());
        send(&mut association, b"?", &asked).await.unwrap();
        assert_eq!(receive(&mut association).await.0, Received::Failed { to: asked, why: Reach::Port });
    }

    #[tokio::test]
    async fn a_train_goes_to_a_name_whole_and_comes_back_under_it() {
        let server = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let mut association = association(&[("one.test", &["127.0.0.1"])]);
        let (named, size) = (peer("one.test", server.local_addr().unwrap().port()), NonZeroU16::new(1000).unwrap());
        let train: Vec<u8> = (0..3500).map(|at| (at % 251) as u8).collect();
        let mut done = 0;
        while done < train.len() {
            done += poll_fn(|cx| association.poll_send_train(cx, &train[done..], size, &named, false)).await.unwrap();
        }
        let mut client = None;
        for part in train.chunks(1000) {
            let (payload, from) = heard(&server).await;
            assert_eq!(payload, part);
            client = Some(from);
        }
        let mut answering = DatagramSocket::new(server.into_std().unwrap()).unwrap();
        let mut done = 0;
        while done < train.len() {
            let to = client.unwrap();
            done += poll_fn(|cx| answering.poll_send_train(cx, &train[done..], size, to, false)).await.unwrap();
        }
        let mut answer = Vec::new();
        while answer.len() < train.len() {
            let mut space = vec![0; 65_536];
            let mut buffer = ReadBuf::new(&mut space);
            match poll_fn(|cx| association.poll_recv_from(cx, &mut buffer)).await.unwrap() {
                Received::Payload(from) => assert_eq!(from, named),
                Received::Train { from, size: told } => assert_eq!((from, told), (named.clone(), size)),
                failed @ Received::Failed { .. } => panic!("{failed:?}"),
            }
            answer.extend_from_slice(buffer.filled());
        }
        assert_eq!(answer, train);
    }

    #[tokio::test]
    async fn an_unknown_name_fails_and_the_association_lives_on() {
        let server = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let mut association = association(&[]);
        let error = send(&mut association, b"?", &peer("nowhere.test", 53)).await.unwrap_err();
        assert_eq!(error.to_string(), "nowhere.test: no such name");
        send(&mut association, b"still here", &server.local_addr().unwrap().into()).await.unwrap();
        assert_eq!(heard(&server).await.0, b"still here");
    }

    #[tokio::test]
    async fn fake_addresses_are_refused_even_when_a_socket_is_open() {
        let server = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let dialer = Dialer { fake: vec!["127.18.0.0/16".parse().unwrap()], ..Dialer::default() };
        let mut association = DirectDatagram::new(Arc::new(Egress::new(dialer, Names::shared(&[]))));
        send(&mut association, b"real", &server.local_addr().unwrap().into()).await.unwrap();
        assert!(send(&mut association, b"fake", &peer("127.18.0.9", 53)).await.is_err());
    }
}
