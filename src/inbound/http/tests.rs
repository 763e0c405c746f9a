use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::task::spawn_local;

use super::*;
use crate::inbound::Access;
use crate::inbound::fixture::{Goal, Recorder, guarded, head, local, open, shouting};
use crate::net::{Reach, Reject};
use crate::session::Inbound;

/// Makes an error.
type Failure = fn() -> DialError;

async fn said(port: std::net::SocketAddr, bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect(port).await.unwrap();
    stream.write_all(bytes).await.unwrap();
    let mut back = Vec::new();
    let _ = stream.read_to_end(&mut back).await;
    String::from_utf8(back).unwrap()
}

/// A port in front of a server that a test plays itself.
async fn stage() -> (std::net::SocketAddr, TcpListener, Recorder) {
    let server = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let entry = Recorder::new(Goal::Server(server.local_addr().unwrap()));
    let (port, _) = open(Inbound::Http, Access::default(), &entry);
    (port, server, entry)
}

#[tokio::test]
async fn each_failure_is_a_status_and_a_line_that_says_why() {
    let failures: [(Failure, &str); 6] = [
        (|| DialError::Refused, "502 Bad Gateway"),
        (|| DialError::Denied("upstream proxy up (a:1) refused the connection".into()), "502 Bad Gateway"),
        (|| DialError::Unreachable(Reach::Host), "502 Bad Gateway"),
        (|| DialError::TimedOut, "504 Gateway Timeout"),
        (|| DialError::Rejected(Reject::Answer), "403 Forbidden"),
        (|| DialError::Unsupported("`v`: the proxy kind `vmess` is not built yet".into()), "502 Bad Gateway"),
    ];
    local(async {
        for (failure, status) in failures {
            let (port, _) = open(Inbound::Http, Access::default(), &Recorder::new(Goal::Fails(failure)));
            for request in ["CONNECT a.test:443 HTTP/1.1\r\n", "GET http://a.test:443/ HTTP/1.1\r\n"] {
                let answer = said(port, format!("{request}Connection: close\r\n\r\n").as_bytes()).await;
                assert!(answer.starts_with(&format!("HTTP/1.1 {status}\r\n")), "{answer}");
                assert!(answer.ends_with(&format!("\r\n\r\ntunproxy: a.test:443: {}\n", failure())), "{answer}");
            }
        }
    })
    .await;
}

#[tokio::test]
async fn a_password_is_asked_for_and_checked() {
    local(async {
        let entry = Recorder::new(Goal::Server(shouting().await));
        let (port, _) = open(Inbound::Http, guarded(), &entry);
        for wrong in ["", "Proxy-Authorization: Basic bWU6d3Jvbmc=\r\n", "Proxy-Authorization: Bearer bWU6c2VjcmV0\r\n"]
        {
            let request = format!("GET http://a.test/ HTTP/1.1\r\nConnection: close\r\n{wrong}\r\n");
            let answer = said(port, request.as_bytes()).await;
            assert!(answer.starts_with("HTTP/1.1 407 "), "{answer}");
            assert!(answer.to_lowercase().contains("\r\nproxy-authenticate: basic realm="), "{answer}");
        }
        assert!(entry.destinations().is_empty());
        let mut stream = TcpStream::connect(port).await.unwrap();
        let request = "CONNECT a.test:25 HTTP/1.1\r\nProxy-Authorization: basic bWU6c2VjcmV0\r\n\r\nhello";
        stream.write_all(request.as_bytes()).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut back = String::new();
        stream.read_to_string(&mut back).await.unwrap();
        assert_eq!(back, "HTTP/1.1 200 OK\r\n\r\nHELLO");
    })
    .await;
}

#[tokio::test]
async fn requests_are_passed_on_in_origin_form_over_one_upstream_per_server() {
    local(async {
        let (port, server, entry) = stage().await;
        let serve = async {
            let (mut stream, _) = server.accept().await.unwrap();
            let first = head(&mut stream).await;
            assert!(first.starts_with("GET /path?q=1 HTTP/1.1\r\n"), "{first}");
            assert!(
                first.contains("\r\nX-Kept: 1\r\n") && !first.contains("Secret") && !first.contains("Proxy"),
                "{first}"
            );
            assert!(first.to_lowercase().contains("host: a.test\r\n") && !first.contains("other.test"), "{first}");
            stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nKeep-Alive: 5\r\n\r\none").await.unwrap();
            // A body of unknown length keeps being one, even in a GET.
            let second = head(&mut stream).await;
            assert!(second.starts_with("GET / HTTP/1.1\r\n"), "{second}");
            let mut body = [0; 12];
            stream.read_exact(&mut body).await.unwrap();
            assert_eq!(&body, b"2\r\nhi\r\n0\r\n\r\n");
            stream
                .write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\ntwo\r\n0\r\n\r\n")
                .await
                .unwrap();
            let (mut other, _) = server.accept().await.unwrap();
            head(&mut other).await;
            other.write_all(b"HTTP/1.1 204 No Content\r\n\r\n").await.unwrap();
            // The connection to the first server is not kept beside the second.
            assert_eq!(stream.read(&mut [0]).await.unwrap(), 0);
        };
        let client = async {
            let mut stream = TcpStream::connect(port).await.unwrap();
            let first = "GET http://a.test/path?q=1 HTTP/1.1\r\nHost: other.test\r\nX-Kept: 1\r\n\
                         Connection: Secret\r\nSecret: 1\r\nProxy-Connection: keep-alive\r\n\r\n";
            stream.write_all(first.as_bytes()).await.unwrap();
            let answer = head(&mut stream).await;
            assert!(answer.contains("Content-Length: 3") && !answer.contains("Keep-Alive"), "{answer}");
            let mut body = [0; 3];
            stream.read_exact(&mut body).await.unwrap();
            assert_eq!(&body, b"one");
            let second = "GET http://a.test HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\n\r\n\
                          2\r\nhi\r\n0\r\n\r\n";
            stream.write_all(second.as_bytes()).await.unwrap();
            head(&mut stream).await;
            let mut body = [0; 13];
            stream.read_exact(&mut body).await.unwrap();
            assert_eq!(&body, b"3\r\ntwo\r\n0\r\n\r\n");
            stream.write_all(b"GET http://b.test:8080/ HTTP/1.1\r\nHost: b.test\r\n\r\n").await.unwrap();
            assert!(head(&mut stream).await.starts_with("HTTP/1.1 204 "));
        };
        tokio::join!(serve, client);
        assert_eq!(entry.destinations(), ["a.test:80", "b.test:8080"]);
    })
    .await;
}

#[tokio::test]
async fn an_upstream_that_closed_while_idle_is_dialled_again() {
    local(async {
        let (port, server, entry) = stage().await;
        spawn_local(async move {
            while let Ok((mut stream, _)) = server.accept().await {
                head(&mut stream).await;
                stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await.unwrap();
            }
        });
        let mut stream = TcpStream::connect(port).await.unwrap();
        for _ in 0..3 {
            stream.write_all(b"GET http://a.test/ HTTP/1.1\r\nHost: a.test\r\n\r\n").await.unwrap();
            assert!(head(&mut stream).await.starts_with("HTTP/1.1 200 "));
            stream.read_exact(&mut [0; 2]).await.unwrap();
            // The flow's end is known to all before the next request.
            entry.relayed.notified().await;
        }
        assert_eq!(entry.destinations().len(), 3);
    })
    .await;
}

#[tokio::test]
async fn a_body_that_the_server_breaks_off_does_not_look_whole() {
    local(async {
        let (port, server, _entry) = stage().await;
        spawn_local(async move {
            let (mut stream, _) = server.accept().await.unwrap();
            head(&mut stream).await;
            stream.write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n").await.unwrap();
            stream.flush().await.unwrap();
            crate::net::Stream::reset(&mut stream);
        });
        let answer = said(port, b"GET http://a.test/ HTTP/1.1\r\nHost: a.test\r\n\r\n").await;
        assert!(!answer.ends_with("0\r\n\r\n"), "{answer}");
    })
    .await;
}

#[tokio::test]
async fn a_protocol_that_the_server_switches_to_is_carried() {
    local(async {
        let (port, server, _entry) = stage().await;
        let serve = async {
            let (mut stream, _) = server.accept().await.unwrap();
            let request = head(&mut stream).await.to_lowercase();
            assert!(request.contains("upgrade: echo\r\n") && request.contains("connection: upgrade\r\n"), "{request}");
            let answer = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\nearly";
            stream.write_all(answer).await.unwrap();
            let mut heard = [0; 5];
            stream.read_exact(&mut heard).await.unwrap();
            stream.write_all(&heard).await.unwrap();
        };
        let client = async {
            let mut stream = TcpStream::connect(port).await.unwrap();
            let request =
                b"GET http://a.test/ HTTP/1.1\r\nHost: a.test\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n";
            stream.write_all(request).await.unwrap();
            assert!(head(&mut stream).await.starts_with("HTTP/1.1 101 "));
            stream.write_all(b"hello").await.unwrap();
            let mut back = [0; 10];
            stream.read_exact(&mut back).await.unwrap();
            assert_eq!(&back, b"earlyhello");
        };
        tokio::join!(serve, client);
    })
    .await;
}

#[tokio::test]
async fn what_is_no_request_to_a_proxy_is_answered_in_words() {
    local(async {
        let entry = Recorder::new(Goal::Hangs);
        let (port, _) = open(Inbound::Http, Access::default(), &entry);
        for (request, status) in [
            ("GET / HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n\r\n", 400),
            ("GET https://a.test/ HTTP/1.1\r\nConnection: close\r\n\r\n", 400),
            ("GET ftp://a.test/ HTTP/1.1\r\nConnection: close\r\n\r\n", 400),
            ("CONNECT a.test HTTP/1.1\r\nConnection: close\r\n\r\n", 400),
            ("CONNECT a.test:99999 HTTP/1.1\r\nConnection: close\r\n\r\n", 400),
            ("\x16\x03\x01\x02\x00nonsense\r\n\r\n", 400),
        ] {
            let answer = said(port, request.as_bytes()).await;
            assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{request}: {answer}");
        }
        let endless = format!("GET http://a.test/ HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(2 * MAX_HEAD));
        let answer = said(port, endless.as_bytes()).await;
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 431 "), "{answer}");
        assert!(entry.destinations().is_empty());
    })
    .await;
}
