use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpListener, TcpStream, UdpSocket};

use super::wire::{command, method};
use super::*;
use crate::net::Received;
use crate::outbound::egress::Egress;
use crate::outbound::fixture::{Names, Tested, black_hole, build, closed_port, session, tls_server};
use crate::outbound::kind::Context;
use crate::platform::Dialer;
use crate::session::Network;

/// Whether an error is the one to expect.
type Expected = fn(&DialError) -> bool;

/// The server's half of the method negotiation; returns the user and password, if it asked.
async fn greet(stream: &mut (impl AsyncRead + AsyncWrite + Unpin), choose: u8) -> Option<(String, String)> {
    let mut head = [0; 2];
    stream.read_exact(&mut head).await.unwrap();
    let mut offered = vec![0; usize::from(head[1])];
    stream.read_exact(&mut offered).await.unwrap();
    stream.write_all(&[5, choose]).await.unwrap();
    if choose != method::PASSWORD {
        return None;
    }
    assert!(offered.contains(&choose), "{offered:?}");
    assert_eq!(stream.read_u8().await.unwrap(), 1);
    let mut parts = Vec::new();
    for _ in 0..2 {
        let mut part = vec![0; usize::from(stream.read_u8().await.unwrap())];
        stream.read_exact(&mut part).await.unwrap();
        parts.push(String::from_utf8(part).unwrap());
    }
    let password = parts.pop().unwrap();
    stream.write_all(&[1, u8::from(password != "secret")]).await.unwrap();
    Some((parts.pop().unwrap(), password))
}

/// Reads the request, answers `code`, and returns the command and the destination.
async fn answer(stream: &mut (impl AsyncRead + AsyncWrite + Unpin), code: u8, bound: SocketAddr) -> (u8, Address) {
    let mut head = [0; 3];
    stream.read_exact(&mut head).await.unwrap();
    let to = wire::read_address(stream).await.unwrap();
    let mut bytes = Vec::new();
    wire::put_reply(code, bound, &mut bytes);
    stream.write_all(&bytes).await.unwrap();
    (head[1], to)
}

fn unspecified(port: u16) -> SocketAddr {
    SocketAddr::from(([0, 0, 0, 0], port))
}

async fn proxy(more: &str) -> (TcpListener, Tested) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let yaml = entry(listener.local_addr().unwrap(), more);
    (listener, build(&yaml))
}

fn entry(server: SocketAddr, more: &str) -> String {
    format!("{{name: up, type: socks5, server: {}, port: {}, {more}}}", server.ip(), server.port())
}

#[tokio::test]
async fn a_name_travels_to_the_proxy_as_a_name_and_bytes_flow_both_ways() {
    let (listener, up) = proxy("username: me, password: secret").await;
    let server = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        assert_eq!(greet(&mut stream, method::PASSWORD).await, Some(("me".into(), "secret".into())));
        let (asked, to) = answer(&mut stream, reply::SUCCEEDED, unspecified(0)).await;
        assert_eq!((asked, to.to_string().as_str()), (command::CONNECT, "example.org:443"));
        // Half-close in both directions.
        let mut sent = String::new();
        stream.read_to_string(&mut sent).await.unwrap();
        stream.write_all(sent.to_uppercase().as_bytes()).await.unwrap();
    };
    let client = async {
        let mut stream = up.connect(&session(Network::Tcp, "example.org", 443)).await.unwrap();
        stream.write_all(b"hello").await.unwrap();
        stream.shutdown().await.unwrap();
        let mut back = String::new();
        stream.read_to_string(&mut back).await.unwrap();
        assert_eq!(back, "HELLO");
    };
    tokio::join!(server, client);
}

#[tokio::test]
async fn each_reply_code_becomes_what_a_client_of_the_real_thing_would_see() {
    let (listener, up) = proxy("").await;
    let unknown: Expected = |error| matches!(error, DialError::Denied(words) if words.contains("its reply has a code"));
    let codes: [(u8, Expected); 12] = [
        (1, |error| matches!(error, DialError::Denied(words) if words.contains("up (127.0.0.1:"))),
        (2, |error| matches!(error, DialError::Denied(words) if words.contains("does not allow [::1]:80"))),
        (3, |error| matches!(error, DialError::Unreachable(Reach::Network))),
        (4, |error| matches!(error, DialError::Unreachable(Reach::Host))),
        (5, |error| matches!(error, DialError::Refused)),
        (6, |error| matches!(error, DialError::TimedOut)),
        (7, |error| matches!(error, DialError::Denied(_))),
        (8, |error| matches!(error, DialError::Denied(_))),
        (9, unknown),
        (10, unknown),
        (99, unknown),
        (255, unknown),
    ];
    for (code, expected) in codes {
        let server = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            greet(&mut stream, method::NONE).await;
            answer(&mut stream, code, unspecified(0)).await;
        };
        let destination = session(Network::Tcp, "::1", 80);
        let (outcome, ()) = tokio::join!(up.connect(&destination), server);
        let error = outcome.err().unwrap();
        assert!(expected(&error), "{code}: {error}");
    }
}

#[tokio::test]
async fn a_proxy_that_refuses_us_is_told_from_a_destination_that_does() {
    let closed = closed_port();
    let error = build(&entry(closed.address, "")).connect(&session(Network::Tcp, "10.0.0.1", 80)).await.err().unwrap();
    assert_eq!(error.to_string(), format!("upstream proxy up ({}) refused the connection", closed.address));
    assert!(matches!(error, DialError::Denied(_)));

    for (choose, more, words) in [
        (method::UNACCEPTABLE, "", "wants another kind of authentication"),
        (method::PASSWORD, "username: me, password: wrong", "refused the user name and password"),
    ] {
        for udp in [false, true] {
            let (listener, up) = proxy(&format!("{more}{} udp: true", if more.is_empty() { "" } else { "," })).await;
            let server = async {
                let (mut stream, _) = listener.accept().await.unwrap();
                greet(&mut stream, choose).await;
            };
            let destination = session(Network::Tcp, "10.0.0.1", 80);
            let client = async {
                if udp { up.associate(&destination).await.err() } else { up.connect(&destination).await.err() }
            };
            let (error, ()) = tokio::join!(client, server);
            assert!(error.as_ref().unwrap().to_string().contains(words), "{error:?}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_proxy_that_says_nothing_is_a_timeout_in_words() {
    let hole = black_hole();
    let error = build(&entry(hole.address, "")).connect(&session(Network::Tcp, "10.0.0.1", 80)).await.err().unwrap();
    assert!(matches!(&error, DialError::Io(io) if io.kind() == io::ErrorKind::TimedOut), "{error:?}");
    assert!(error.to_string().contains("up (127.0.0.1:"), "{error}");

    let (_listener, mute) = proxy("").await;
    let error = mute.connect(&session(Network::Tcp, "10.0.0.1", 80)).await.err().unwrap();
    assert!(error.to_string().contains("did not answer the request in time"), "{error}");
}

#[tokio::test]
async fn a_proxy_that_hangs_up_or_talks_nonsense_is_said_to() {
    for bytes in [&b""[..], b"\x05", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x05\x00\x05\x00\x00\x09"] {
        let (listener, up) = proxy("").await;
        let server = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.write_all(bytes).await.unwrap();
            stream.shutdown().await.unwrap();
            let _ = stream.read_to_end(&mut Vec::new()).await;
        };
        let destination = session(Network::Tcp, "10.0.0.1", 80);
        let (outcome, ()) = tokio::join!(up.connect(&destination), server);
        let error = outcome.err().unwrap();
        assert!(matches!(&error, DialError::Denied(words) if words.contains("upstream proxy up")), "{error:?}");
    }
}

#[tokio::test]
async fn tls_checks_the_certificate_unless_it_is_told_otherwise() {
    let (listener, acceptor, pin) = tls_server("proxy.test");
    let server = listener.local_addr().unwrap();
    let listener = TcpListener::from_std(listener).unwrap();
    for (more, accepted) in [
        ("tls: true".to_owned(), false),
        ("tls: true, skip-cert-verify: true".to_owned(), true),
        (format!("tls: true, sni: other.test, fingerprint: {pin}"), true),
        (format!("tls: true, skip-cert-verify: true, fingerprint: {}", "00".repeat(32)), false),
    ] {
        let up = build(&entry(server, &more));
        let serve = async {
            let (stream, _) = listener.accept().await.unwrap();
            let Ok(mut stream) = acceptor.accept(stream).await else { return };
            greet(&mut stream, method::NONE).await;
            answer(&mut stream, reply::SUCCEEDED, unspecified(0)).await;
            stream.write_all(b"welcome").await.unwrap();
            stream.shutdown().await.unwrap();
        };
        let client = async {
            let mut stream = up.connect(&session(Network::Tcp, "example.org", 443)).await?;
            let mut said = String::new();
            stream.read_to_string(&mut said).await?;
            Ok::<_, DialError>(said)
        };
        match (tokio::join!(client, serve).0, accepted) {
            (Ok(said), true) => assert_eq!(said, "welcome"),
            (Err(error), false) => assert!(error.to_string().contains("TLS handshake"), "{error}"),
            (outcome, _) => panic!("{more}: {outcome:?}"),
        }
    }
}

/// A proxy that accepts one association; returns its control connection and its relay.
async fn relay(listener: &TcpListener, relay: UdpSocket, bound: SocketAddr) -> (TcpStream, UdpSocket) {
    let (mut control, _) = listener.accept().await.unwrap();
    greet(&mut control, method::NONE).await;
    let (asked, _) = answer(&mut control, reply::SUCCEEDED, bound).await;
    assert_eq!(asked, command::UDP_ASSOCIATE);
    (control, relay)
}

async fn associated() -> (BoxDatagram, TcpStream, UdpSocket, Arc<Socks5>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let up = Arc::new(plain(listener.local_addr().unwrap()));
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    // An unspecified relay address means the server's own.
    let bound = unspecified(socket.local_addr().unwrap().port());
    let destination = session(Network::Udp, "dns.test", 53);
    let (association, (control, socket)) = tokio::join!(up.associate(&destination), relay(&listener, socket, bound));
    (association.unwrap(), control, socket, up)
}

fn plain(server: SocketAddr) -> Socks5 {
    let context = Context { egress: Egress::new(Dialer::default(), Names::shared(&[])), roots: Default::default() };
    let upstream = Upstream { name: "up".into(), server: server.into(), egress: Arc::new(context.egress), tls: None };
    Socks5 { upstream: Arc::new(upstream), credentials: None, udp: true, drops: Arc::default() }
}

async fn receive(association: &mut BoxDatagram) -> io::Result<(Received, Vec<u8>)> {
    let mut space = vec![0; 65_535];
    let mut buffer = ReadBuf::new(&mut space);
    let received = poll_fn(|cx| association.poll_recv_from(cx, &mut buffer)).await?;
    Ok((received, buffer.filled().to_vec()))
}

#[tokio::test]
async fn datagrams_travel_through_the_relay_and_rubbish_is_dropped_and_counted() {
    let (mut association, _control, relay, up) = associated().await;
    let to = Address { host: Host::parse("dns.test").unwrap(), port: 53 };
    poll_fn(|cx| association.poll_send_to(cx, b"question", &to, true)).await.unwrap();
    let mut space = [0; 2048];
    let (length, from) = relay.recv_from(&mut space).await.unwrap();
    assert_eq!(wire::take_datagram(&space[..length]), Ok((to, &b"question"[..])));

    let peer: Address = SocketAddr::from(([192, 0, 2, 7], 53)).into();
    relay.send_to(&[0, 0, 1, 1, 192, 0, 2, 7, 0, 53, 1], from).await.unwrap();
    relay.send_to(b"no", from).await.unwrap();
    let stranger = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    stranger.send_to(&[0, 0, 0, 1, 192, 0, 2, 7, 0, 53, 1], from).await.unwrap();
    let mut good = Vec::new();
    wire::put_datagram_header(&peer, &mut good);
    good.extend_from_slice(b"answer");
    relay.send_to(&good, from).await.unwrap();
    assert_eq!(receive(&mut association).await.unwrap(), (Received::Payload(peer), b"answer".to_vec()));
    let drops = up.drops();
    let counted = [&drops.fragments, &drops.malformed, &drops.strangers];
    assert_eq!(counted.map(|counter| counter.load(std::sync::atomic::Ordering::Relaxed)), [1, 1, 1]);
}

#[tokio::test]
async fn the_association_ends_with_its_control_connection_or_its_relay() {
    let (mut association, control, _relay, _up) = associated().await;
    drop(control);
    assert_eq!(receive(&mut association).await.unwrap_err().kind(), io::ErrorKind::BrokenPipe);

    let (mut association, _control, relay, _up) = associated().await;
    drop(relay);
    let to = Address { host: Host::parse("dns.test").unwrap(), port: 53 };
    poll_fn(|cx| association.poll_send_to(cx, b"question", &to, true)).await.unwrap();
    assert_eq!(receive(&mut association).await.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
}

#[tokio::test]
async fn what_does_not_fit_the_way_to_the_relay_names_the_peer_and_the_room_left() {
    let (mut association, _control, _relay, _up) = associated().await;
    let to = Address { host: Host::parse("dns.test").unwrap(), port: 53 };
    let error = poll_fn(|cx| association.poll_send_to(cx, &[0; 65_500], &to, true)).await.unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EMSGSIZE));
    match receive(&mut association).await.unwrap().0 {
        Received::Failed { to: told, why: Reach::TooBig(mtu) } => assert_eq!((told, mtu > 0), (to, true)),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn udp_is_off_unless_the_profile_turns_it_on() {
    let up = build("{name: up, type: socks5, server: 127.0.0.1, port: 1080}");
    assert!(!up.networks().udp);
    let error = up.associate(&session(Network::Udp, "dns.test", 53)).await.err().unwrap();
    assert!(matches!(error, DialError::Unsupported(_)));
}
