use proptest::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use super::*;
use crate::net::DialError;
use crate::outbound::fixture::{Tested, build, closed_port, session, table, tls_server};
use crate::session::Network;

/// Whether an error is the one to expect.
type Expected = fn(&DialError) -> bool;

async fn proxy(more: &str) -> (TcpListener, Tested) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    (listener, build(&format!("{{name: up, type: http, server: localhost.test, port: {port}, {more}}}")))
}

/// Reads one request's head and answers it with `bytes`.
async fn answer(stream: &mut (impl tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin), bytes: &[u8]) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.unwrap());
    }
    stream.write_all(bytes).await.unwrap();
    String::from_utf8(head).unwrap()
}

async fn outcome(bytes: &[u8]) -> Result<BoxStream, DialError> {
    let (listener, up) = proxy("").await;
    let server = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        answer(&mut stream, bytes).await;
        let _ = stream.shutdown().await;
        let _ = stream.read_to_end(&mut Vec::new()).await;
    };
    let destination = session(Network::Tcp, "::1", 443);
    tokio::select! {
        outcome = up.connect(&destination) => outcome,
        () = async { server.await; std::future::pending().await } => unreachable!(),
    }
}

#[tokio::test]
async fn the_request_names_the_destination_and_carries_credentials_and_headers() {
    let (listener, up) = proxy("username: me, password: 'p:w', headers: {X-Token: abc}").await;
    let server = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        let head =
            answer(&mut stream, b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nVia: x\r\n\r\n220 early").await;
        assert_eq!(
            head,
            "CONNECT example.org:25 HTTP/1.1\r\nHost: example.org:25\r\nX-Token: abc\r\n\
             Proxy-Authorization: Basic bWU6cDp3\r\n\r\n"
        );
        let mut sent = String::new();
        stream.read_to_string(&mut sent).await.unwrap();
        stream.write_all(sent.to_uppercase().as_bytes()).await.unwrap();
    };
    let client = async {
        let mut stream = up.connect(&session(Network::Tcp, "example.org", 25)).await.unwrap();
        stream.write_all(b"helo").await.unwrap();
        stream.shutdown().await.unwrap();
        let mut said = String::new();
        stream.read_to_string(&mut said).await.unwrap();
        assert_eq!(said, "220 earlyHELO");
    };
    tokio::join!(server, client);
}

#[tokio::test]
async fn each_status_becomes_what_a_client_of_the_real_thing_would_see() {
    let statuses: [(u16, Expected); 7] = [
        (502, |error| matches!(error, DialError::Refused)),
        (503, |error| matches!(error, DialError::Refused)),
        (504, |error| matches!(error, DialError::TimedOut)),
        (407, |error| matches!(error, DialError::Denied(words) if words.contains("password"))),
        (403, |error| matches!(error, DialError::Denied(words) if words.contains("does not allow [::1]:443"))),
        (302, |error| matches!(error, DialError::Denied(_))),
        (500, |error| matches!(error, DialError::Denied(words) if words.contains("answered 500"))),
    ];
    for (status, expected) in statuses {
        let error = outcome(format!("HTTP/1.1 {status} Said So\r\n\r\n").as_bytes()).await.err().unwrap();
        assert!(expected(&error), "{status}: {error:?}");
    }
}

#[tokio::test]
async fn an_answer_with_a_folded_line_is_an_answer() {
    assert!(outcome(b"HTTP/1.1 200 OK\r\nVia: 1.1 one,\r\n 1.1 another\r\n\t1.0 old\r\nAge: 0\r\n\r\n").await.is_ok());
    let error = outcome(b"HTTP/1.1 504 Gateway Timeout\r\nVia: 1.1 one,\r\n 1.1 another\r\n\r\n").await.err().unwrap();
    assert!(matches!(error, DialError::TimedOut), "{error:?}");
}

#[tokio::test]
async fn nonsense_endless_headers_and_a_hang_up_are_refusals_in_words() {
    let endless = format!("HTTP/1.1 200 OK\r\nX: {}", "x".repeat(2 * MAX_HEAD));
    for (bytes, words) in [
        (&b"SSH-2.0-OpenSSH\r\n"[..], "does not speak HTTP"),
        (endless.as_bytes(), "too long"),
        (b"HTTP/1.1 200", "closed the connection"),
    ] {
        let error = outcome(bytes).await.err().unwrap();
        assert!(matches!(&error, DialError::Denied(said) if said.contains(words)), "{error:?}");
    }
}

#[tokio::test]
async fn a_dead_proxy_is_told_from_a_refused_destination() {
    let closed = closed_port();
    let up = build(&format!("{{name: up, type: http, server: 127.0.0.1, port: {}}}", closed.address.port()));
    let error = up.connect(&session(Network::Tcp, "::1", 443)).await.err().unwrap();
    assert_eq!(error.to_string(), format!("upstream proxy up ({}) refused the connection", closed.address));
}

#[tokio::test]
async fn a_connection_through_tls_works() {
    let (listener, acceptor, pin) = tls_server("proxy.test");
    let port = listener.local_addr().unwrap().port();
    let listener = TcpListener::from_std(listener).unwrap();
    let yaml = format!("{{name: up, type: http, server: 127.0.0.1, port: {port}, tls: true, fingerprint: '{pin}'}}");
    let up = build(&yaml);
    let server = async {
        let mut stream = acceptor.accept(listener.accept().await.unwrap().0).await.unwrap();
        answer(&mut stream, b"HTTP/1.1 200 OK\r\n\r\nhi").await;
        stream.shutdown().await.unwrap();
    };
    let client = async {
        let mut stream = up.connect(&session(Network::Tcp, "example.org", 443)).await.unwrap();
        let mut said = String::new();
        stream.read_to_string(&mut said).await.unwrap();
        assert_eq!(said, "hi");
    };
    tokio::join!(server, client);
}

#[test]
fn a_header_that_would_smuggle_another_line_is_an_error() {
    for headers in ["{X: \"a\\r\\nHost: evil\"}", "{'X: a': b}", "{X: [a]}", "plain"] {
        let yaml = format!("proxies: [{{name: up, type: http, server: a.test, port: 1, headers: {headers}}}]");
        assert!(table(&yaml).1.has_errors(), "{headers}");
    }
}

#[test]
fn base64_is_that_of_rfc_4648() {
    for (plain, coded) in
        [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foob", "Zm9vYg=="), ("foobar", "Zm9vYmFy")]
    {
        assert_eq!(base64(plain.as_bytes()), coded);
    }
}

proptest! {
    #[test]
    fn no_answer_makes_the_parser_panic(bytes in any::<Vec<u8>>()) {
        let _ = parse(&bytes);
        let _ = parse(&[b"HTTP/1.1 ", &bytes[..]].concat());
    }
}
