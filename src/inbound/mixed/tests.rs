use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;
use crate::inbound::fixture::{Goal, Recorder, local, open, shouting};

/// Sends `bytes` all at once, and returns all that comes back.
async fn exchange(port: SocketAddr, bytes: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect(port).await.unwrap();
    stream.write_all(bytes).await.unwrap();
    let _ = stream.shutdown().await;
    let mut back = Vec::new();
    // Whoever is shown out in the middle of a sentence sees a reset.
    let _ = stream.read_to_end(&mut back).await;
    back
}

#[tokio::test]
async fn one_port_speaks_socks4_socks4a_socks5_and_connect() {
    local(async {
        let entry = Recorder::new(Goal::Server(shouting().await));
        let (port, _) = open(Inbound::Mixed, Access::default(), &entry);
        let conversations: [(&[u8], &[u8]); 5] = [
            (b"\x04\x01\x00\x50\xc0\x00\x02\x01me\0hi", b"\0\x5a\0\0\0\0\0\0HI"),
            (b"\x04\x01\x00\x50\0\0\0\x01me\0four.test\0hi", b"\0\x5a\0\0\0\0\0\0HI"),
            (b"\x05\x01\0\x05\x01\0\x03\x09five.test\x00\x50hi", b"\x05\0\x05\0\0\x01\0\0\0\0\0\0HI"),
            (
                b"\x05\x01\0\x05\x01\0\x04\x20\x01\x0d\xb8\0\0\0\0\0\0\0\0\0\0\0\x01\x01\xbbhi",
                b"\x05\0\x05\0\0\x01\0\0\0\0\0\0HI",
            ),
            (b"CONNECT [2001:db8::2]:443 HTTP/1.1\r\nHost: x\r\n\r\nhi", b"HTTP/1.1 200 OK\r\n\r\nHI"),
        ];
        for (said, heard) in conversations {
            let back = exchange(port, said).await;
            assert_eq!(String::from_utf8_lossy(&back), String::from_utf8_lossy(heard));
        }
        let expected = ["192.0.2.1:80", "four.test:80", "five.test:80", "[2001:db8::1]:443", "[2001:db8::2]:443"];
        assert_eq!(entry.destinations(), expected);
        assert!(entry.sessions.borrow().iter().all(|session| session.inbound == Inbound::Mixed));
    })
    .await;
}

#[tokio::test]
async fn a_port_of_one_kind_does_not_speak_the_other() {
    local(async {
        let entry = Recorder::new(Goal::Server(shouting().await));
        let (http, _) = open(Inbound::Http, Access::default(), &entry);
        let (socks, _) = open(Inbound::Socks, Access::default(), &entry);
        assert!(!exchange(http, b"\x05\x01\0\x05\x01\0\x03\x09five.test\x00\x50").await.starts_with(&[5]));
        assert_eq!(exchange(socks, b"CONNECT a:1 HTTP/1.1\r\n\r\n").await, b"");
        assert!(entry.destinations().is_empty());
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_client_that_says_nothing_or_half_a_word_is_shown_out() {
    local(async {
        let entry = Recorder::new(Goal::Hangs);
        let (port, _) = open(Inbound::Mixed, Access::default(), &entry);
        for half in [&b""[..], b"\x05", b"\x05\x01\0\x05\x01", b"\x04\x01", b"CONNECT a.test:1 HTTP/1.1\r\n"] {
            let mut stream = TcpStream::connect(port).await.unwrap();
            stream.write_all(half).await.unwrap();
            // Ends because the server closes; a byte too many would show here.
            let mut back = Vec::new();
            let _ = stream.read_to_end(&mut back).await;
            assert!(back.is_empty() || back == [5, 0], "{half:?}: {back:?}");
        }
    })
    .await;
}

#[tokio::test]
async fn a_client_that_leaves_ends_the_dial() {
    local(async {
        for bytes in [
            &b"\x04\x01\x00\x50\xc0\x00\x02\x01me\0"[..],
            b"\x05\x01\0\x05\x01\0\x03\x09five.test\x00\x50",
            b"CONNECT a.test:443 HTTP/1.1\r\n\r\n",
            b"GET http://a.test/ HTTP/1.1\r\n\r\n",
        ] {
            let entry = Recorder::new(Goal::Hangs);
            let (port, _) = open(Inbound::Mixed, Access::default(), &entry);
            let mut stream = TcpStream::connect(port).await.unwrap();
            stream.write_all(bytes).await.unwrap();
            entry.begun.notified().await;
            drop(stream);
            entry.given_up.notified().await;
        }
    })
    .await;
}
