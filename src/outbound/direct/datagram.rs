//! Datagrams of one source, sent from this host: one socket per family, the same for all peers (RFC 4787 section 4.1).

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU16;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use tokio::io::ReadBuf;

use crate::net::{Address, Datagram, DialError, Received};
use crate::outbound::egress::Egress;
use crate::platform::{Arrival, DatagramSocket};

/// An association between a source and addresses; names were looked up before.
pub(super) struct DirectDatagram {
    egress: Arc<Egress>,
    /// IPv4 and IPv6, each opened when it is needed first.
    sockets: [Option<DatagramSocket>; 2],
    /// The socket that is asked first, so that none starves.
    turn: usize,
    /// Where the last datagram came to.
    reached_at: Option<IpAddr>,
    /// Who waits for datagrams: told when a socket is opened that it does not listen to yet.
    reader: Option<Waker>,
}

impl DirectDatagram {
    pub(super) fn new(egress: Arc<Egress>) -> Self {
        Self { egress, sockets: [None, None], turn: 0, reached_at: None, reader: None }
    }

    /// The socket from which `ip` is reached.
    ///
    /// # Errors
    /// It is a fake address, or the kernel has no socket for it.
    pub(super) fn open(&mut self, ip: IpAddr) -> Result<&mut DatagramSocket, DialError> {
        match &mut self.sockets[usize::from(ip.is_ipv6())] {
            Some(socket) => Ok(socket),
            none => {
                let mut socket = self.egress.datagrams(ip)?;
                socket.receive_trains();
                socket.receive_destinations();
                if let Some(reader) = self.reader.take() {
                    reader.wake();
                }
                Ok(none.insert(socket))
            }
        }
    }

    /// The socket for `to`, and its address.
    fn socket(&mut self, to: &Address) -> io::Result<(&mut DatagramSocket, SocketAddr)> {
        let Some(real) = to.socket() else {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "a name is no address to send to"));
        };
        if self.egress.is_fake(real.ip()) {
            return Err(io::Error::new(io::ErrorKind::HostUnreachable, "a fake address leads nowhere"));
        }
        Ok((self.open(real.ip()).map_err(io_error)?, real))
    }
}

impl DirectDatagram {
    /// A device that is plugged in again is another one to a socket that was bound to it: the next datagram gets a new
    /// socket. One that is bound to none follows the routes by itself.
    fn mind<T>(&mut self, sent: &Poll<io::Result<T>>, real: SocketAddr) {
        let Poll::Ready(Err(error)) = sent else { return };
        let gone = [libc::ENODEV, libc::ENXIO, libc::ENETUNREACH, libc::EHOSTUNREACH];
        if self.egress.is_bound() && error.raw_os_error().is_some_and(|code| gone.contains(&code)) {
            self.sockets[usize::from(real.is_ipv6())] = None;
        }
    }
}

/// Interface and flow label of an answer are no part of the peer's identity.
fn peer(real: SocketAddr) -> Address {
    SocketAddr::new(real.ip(), real.port()).into()
}

impl Datagram for DirectDatagram {
    fn poll_send_to(
        &mut self,
        cx: &mut Context<'_>,
        payload: &[u8],
        to: &Address,
        dont_fragment: bool,
    ) -> Poll<io::Result<()>> {
        let (socket, real) = self.socket(to)?;
        let sent = socket.poll_send_to(cx, payload, real, dont_fragment);
        self.mind(&sent, real);
        sent
    }

    fn poll_send_train(
        &mut self,
        cx: &mut Context<'_>,
        train: &[u8],
        size: NonZeroU16,
        to: &Address,
        dont_fragment: bool,
    ) -> Poll<io::Result<usize>> {
        let (socket, real) = self.socket(to)?;
        let sent = socket.poll_send_train(cx, train, size, real, dont_fragment);
        self.mind(&sent, real);
        sent
    }

    fn port_towards(&mut self, to: &Address) -> Option<u16> {
        self.socket(to).ok()?.0.port()
    }

    fn reached_at(&self) -> Option<IpAddr> {
        self.reached_at
    }

    fn poll_recv_from(&mut self, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<Received>> {
        for step in 0..self.sockets.len() {
            let at = (self.turn + step) % self.sockets.len();
            let Some(socket) = &mut self.sockets[at] else { continue };
            let Poll::Ready(arrival) = socket.poll_recv_from(cx, buffer) else { continue };
            self.turn = at + 1;
            self.reached_at = socket.reached_at();
            return Poll::Ready(Ok(match arrival? {
                Arrival::Payload(from) => Received::Payload(peer(from)),
                Arrival::Train { from, size } => Received::Train { from: peer(from), size },
                Arrival::Failed { to, why } => Received::Failed { to: peer(to), why },
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
        DialError::Exhausted => io::Error::from_raw_os_error(libc::EMFILE),
        DialError::NoPort => io::Error::from_raw_os_error(libc::EADDRINUSE),
        other => io::Error::new(other.kind(), other),
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use socket2::SockRef;
    use tokio::net::UdpSocket;

    use super::*;
    use crate::net::{Host, Reach};
    use crate::outbound::fixture::Names;
    use crate::platform::Dialer;

    fn association() -> DirectDatagram {
        DirectDatagram::new(Arc::new(Egress::new(Dialer::default(), Names::shared(&[]))))
    }

    fn address(host: &str, port: u16) -> Address {
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
        let mut association = association();
        let first: Address = one.local_addr().unwrap().into();
        send(&mut association, b"1", &first).await.unwrap();
        send(&mut association, b"2", &two.local_addr().unwrap().into()).await.unwrap();
        let (_, seen_by_one) = heard(&one).await;
        let (_, seen_by_two) = heard(&two).await;
        assert_eq!(seen_by_one.port(), seen_by_two.port());

        one.send_to(b"from the first", seen_by_one).await.unwrap();
        assert_eq!(receive(&mut association).await, (Received::Payload(first), b"from the first".to_vec()));
        let stranger = UdpSocket::bind("127.0.0.3:0").await.unwrap();
        stranger.send_to(b"hello", seen_by_one).await.unwrap();
        let from = stranger.local_addr().unwrap().into();
        assert_eq!(receive(&mut association).await, (Received::Payload(from), b"hello".to_vec()));
    }

    #[tokio::test]
    async fn a_reader_that_waits_hears_from_sockets_that_are_opened_later() {
        let mut association = association();
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
    async fn a_closed_port_comes_back_as_what_it_is() {
        let closed = UdpSocket::bind("[::1]:0").await.unwrap().local_addr().unwrap();
        let mut association = association();
        let asked: Address = closed.into();
        send(&mut association, b"?", &asked).await.unwrap();
        assert_eq!(receive(&mut association).await.0, Received::Failed { to: asked, why: Reach::Port });
    }

    #[tokio::test]
    async fn a_train_goes_out_whole_and_comes_back() {
        let server = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let mut association = association();
        let (named, size) = (Address::from(server.local_addr().unwrap()), NonZeroU16::new(1000).unwrap());
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
    async fn what_was_not_looked_up_fails_and_the_association_lives_on() {
        let server = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let mut association = association();
        let error = send(&mut association, b"?", &address("nowhere.test", 53)).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        send(&mut association, b"still here", &server.local_addr().unwrap().into()).await.unwrap();
        assert_eq!(heard(&server).await.0, b"still here");
    }

    #[tokio::test]
    async fn fake_addresses_are_refused_even_when_a_socket_is_open() {
        let server = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let dialer = Dialer { fake: vec!["127.18.0.0/16".parse().unwrap()], ..Dialer::default() };
        let mut association = DirectDatagram::new(Arc::new(Egress::new(dialer, Names::shared(&[]))));
        send(&mut association, b"real", &server.local_addr().unwrap().into()).await.unwrap();
        assert!(send(&mut association, b"fake", &address("127.18.0.9", 53)).await.is_err());
    }
}
