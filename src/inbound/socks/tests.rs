use proptest::prelude::*;
use tokio::net::UdpSocket;

use super::*;
use crate::inbound::Access;
use crate::inbound::fixture::{Goal, Recorder, guarded, local, open, shouting};
use crate::net::{DialError, Reach, Reject};
use crate::session::Inbound;

async fn said(port: SocketAddr, bytes: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect(port).await.unwrap();
    stream.write_all(bytes).await.unwrap();
    let mut back = Vec::new();
    // Whoever is shown out in the middle of a sentence may see a reset behind the answer.
    let _ = stream.read_to_end(&mut back).await;
    back
}

const CONNECT: &[u8] = b"\x05\x01\0\x05\x01\0\x03\x09five.test\x00\x50";

#[tokio::test]
async fn each_failure_is_told_in_the_protocols_own_words() {
    let failures: [(fn() -> DialError, u8); 10] = [
        (|| DialError::Refused, 5),
        (|| DialError::Denied("up is dead".into()), 5),
        (|| DialError::Unreachable(Reach::Network), 3),
        (|| DialError::Unreachable(Reach::Host), 4),
        (|| DialError::Unreachable(Reach::Prohibited), 2),
        (|| DialError::TimedOut, 6),
        (|| DialError::Rejected(Reject::Answer), 2),
        (|| DialError::Unsupported("not built".into()), 1),
        (|| DialError::Io(io::Error::new(io::ErrorKind::TimedOut, "up is silent")), 6),
        (|| DialError::Io(io::Error::new(io::ErrorKind::HostUnreachable, "no such name")), 4),
    ];
    local(async {
        for (failure, code) in failures {
            let (port, _) = open(Inbound::Socks, Access::default(), &Recorder::new(Goal::Fails(failure)));
            assert_eq!(said(port, CONNECT).await, [5, 0, 5, code, 0, 1, 0, 0, 0, 0, 0, 0], "{:?}", failure());
            let four = said(port, b"\x04\x01\x00\x50\xc0\x00\x02\x01me\0").await;
            assert_eq!(four, [0, REJECTED, 0, 0, 0, 0, 0, 0]);
        }
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn reject_drop_says_nothing_until_the_connection_ends() {
    local(async {
        let entry = Recorder::new(Goal::Fails(|| DialError::Rejected(Reject::Drop)));
        let (port, _) = open(Inbound::Socks, Access::default(), &entry);
        let started = tokio::time::Instant::now();
        assert_eq!(said(port, CONNECT).await, [5, 0]);
        assert!(started.elapsed() >= SILENCE);
    })
    .await;
}

#[tokio::test]
async fn a_password_is_asked_for_and_checked() {
    local(async {
        let entry = Recorder::new(Goal::Server(shouting().await));
        let (port, _) = open(Inbound::Socks, guarded(), &entry);
        // No method offered that would do; SOCKS4 has none.
        assert_eq!(said(port, b"\x05\x01\0").await, [5, 0xff]);
        assert_eq!(said(port, b"\x04\x01\x00\x50\xc0\x00\x02\x01me\0").await[1], REJECTED);
        assert_eq!(said(port, b"\x05\x02\0\x02\x01\x02me\x05wrong").await, [5, 2, 1, 1]);
        assert!(entry.destinations().is_empty());

        let mut stream = TcpStream::connect(port).await.unwrap();
        stream.write_all(b"\x05\x01\x02\x01\x02me\x06secret\x05\x01\0\x01\xc0\0\x02\x01\0\x50hi").await.unwrap();
        stream.shutdown().await.unwrap();
        let mut back = Vec::new();
        stream.read_to_end(&mut back).await.unwrap();
        assert_eq!(back, b"\x05\x02\x01\0\x05\0\0\x01\0\0\0\0\0\0HI");

        // Whoever is excused may still offer a password only.
        let excused = Access { skip_auth: vec!["127.0.0.0/8".parse().unwrap()], ..guarded() };
        let (port, _) = open(Inbound::Socks, excused, &entry);
        assert_eq!(said(port, b"\x05\x01\x02\x01\x01x\x01y\x05\x02\0\x01\0\0\0\0\0\0").await[..4], [5, 2, 1, 0]);
    })
    .await;
}

#[tokio::test]
async fn other_commands_and_addresses_are_refused_by_name() {
    local(async {
        let (port, _) = open(Inbound::Socks, Access::default(), &Recorder::new(Goal::Hangs));
        assert_eq!(said(port, b"\x05\x01\0\x05\x02\0\x01\0\0\0\0\0\0").await[3], reply::COMMAND_UNSUPPORTED);
        assert_eq!(said(port, b"\x05\x01\0\x05\x01\0\x07\0\0\0\0\0\0").await[3], reply::ADDRESS_UNSUPPORTED);
        assert_eq!(said(port, b"\x05\x01\0\x05\x01\0\x03\x02a \0\x50").await[3], reply::ADDRESS_UNSUPPORTED);
    })
    .await;
}

/// Opens an association that announces `from`; returns its control connection and the relay's address.
async fn associate(port: SocketAddr, from: SocketAddr) -> (TcpStream, SocketAddr) {
    let mut control = TcpStream::connect(port).await.unwrap();
    let mut bytes = vec![5, 1, 0, 5, command::UDP_ASSOCIATE, 0];
    wire::put_address(&from.into(), &mut bytes);
    control.write_all(&bytes).await.unwrap();
    let mut head = [0; 5];
    control.read_exact(&mut head).await.unwrap();
    assert_eq!(head, [5, 0, 5, 0, 0]);
    let relay = wire::read_address(&mut control).await.unwrap().socket().unwrap();
    (control, relay)
}

fn datagram(peer: &str, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    wire::put_datagram_header(&Address { host: Host::parse(peer).unwrap(), port: 53 }, &mut bytes);
    bytes.extend_from_slice(payload);
    bytes
}

#[tokio::test]
async fn datagrams_go_out_and_come_back_with_the_peer_they_were_sent_to() {
    local(async {
        let entry = Recorder::new(Goal::Hangs);
        let (port, drops) = open(Inbound::Mixed, Access::default(), &entry);
        let (control, relay) = associate(port, SocketAddr::from(([0, 0, 0, 0], 0))).await;
        let (client, other) =
            (UdpSocket::bind("127.0.0.1:0").await.unwrap(), UdpSocket::bind("127.0.0.1:0").await.unwrap());
        client.connect(relay).await.unwrap();
        for peer in ["dns.test", "192.0.2.7", "2001:db8::7"] {
            // What is to be dropped comes first; the good datagram behind it shows that it was.
            client.send(&[0, 0, 1, 1, 192, 0, 2, 7, 0, 53, 1]).await.unwrap();
            client.send(b"x").await.unwrap();
            client.send(&datagram(peer, b"question")).await.unwrap();
            let mut space = [0; 256];
            let length = client.recv(&mut space).await.unwrap();
            assert_eq!(space[..length], datagram(peer, b"question"));
            other.send_to(&datagram(peer, b"not mine"), relay).await.unwrap();
        }
        client.send(&datagram("dns.test", b"last")).await.unwrap();
        client.recv(&mut [0; 256]).await.unwrap();
        assert_eq!(entry.destinations(), ["dns.test:53", "192.0.2.7:53", "[2001:db8::7]:53", "dns.test:53"]);
        let source = client.local_addr().unwrap();
        assert!(entry.sessions.borrow().iter().all(|session| session.source == source));
        let counted = [&drops.fragments, &drops.malformed, &drops.foreign];
        assert_eq!(counted.map(|counter| counter.load(std::sync::atomic::Ordering::Relaxed)), [3, 3, 3]);

        // The end of the control connection ends the relay, even while the dispatcher holds its other end.
        drop(control);
        while client.send(&datagram("dns.test", b"more")).await.is_ok() {
            tokio::task::yield_now().await;
        }
        assert_eq!(*entry.left.borrow(), [source]);
        entry.backs.borrow()[0].deliver(&entry.sessions.borrow()[0].destination, source, b"late");
    })
    .await;
}

proptest! {
    #[test]
    fn no_bytes_make_the_handshake_panic(bytes in any::<Vec<u8>>(), version in 4_u8..6, guard in any::<bool>()) {
        let access = if guard { guarded() } else { Access::default() };
        let facts = Facts {
            peer: SocketAddr::from(([192, 0, 2, 1], 9)),
            inbound: Inbound::Socks,
            access: access.into(),
            drops: Default::default(),
        };
        let said = [&[version], &bytes[..]].concat();
        let mut stream = tokio::io::join(&said[..], tokio::io::sink());
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let outcome = runtime.block_on(handshake(&mut stream, &facts));
        prop_assert!(!(guard && version == 4 && matches!(outcome, Ok(Some(_)))));
    }
}
