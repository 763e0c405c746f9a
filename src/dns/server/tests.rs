use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use futures_util::poll;
use hickory_proto::rr::RecordType;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

use super::*;
use crate::dns::testing::{CLIENT, Nameserver, addresses, faking, ips, parsed, query};

fn framed(message: &[u8]) -> Vec<u8> {
    [&(message.len() as u16).to_be_bytes()[..], message].concat()
}

async fn next(stream: &mut (impl AsyncRead + Unpin)) -> Vec<u8> {
    let mut message = vec![0; stream.read_u16().await.unwrap().into()];
    stream.read_exact(&mut message).await.unwrap();
    message
}

/// Serves names as fake, and those under `real.example` from `server`.
async fn serving(listen: SocketAddr, server: &Nameserver) -> SocketAddr {
    let dns = Arc::new(Dns::open(faking(&[server])).unwrap());
    let bound = Server::bind(&dns, listen).unwrap();
    let address = bound.local_addr().unwrap();
    tokio::spawn(bound.run(dns));
    address
}

async fn real() -> Nameserver {
    Nameserver::answering(|query| addresses(query, 60, &["203.0.113.9"])).await
}

/// The answer to a datagram, from `to` and nobody else.
async fn over_udp(to: SocketAddr, query: &[u8]) -> Vec<u8> {
    let any: IpAddr = if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0)).await.unwrap();
    // Connected: an answer from another address would not arrive.
    socket.connect(to).await.unwrap();
    socket.send(query).await.unwrap();
    let mut buffer = [0; 2048];
    let length = socket.recv(&mut buffer).await.unwrap();
    buffer[..length].to_vec()
}

#[tokio::test]
async fn datagrams_are_answered_from_the_address_that_was_asked() {
    let server = real().await;
    let fake = query("www.example.com.", RecordType::A, 0);
    let forwarded = query("a.real.example.", RecordType::A, 0);
    for listen in ["127.0.0.1:0", "0.0.0.0:0", "[::]:0", "[::1]:0"] {
        let port = serving(listen.parse().unwrap(), &server).await.port();
        let asked: &[&str] = match listen {
            "0.0.0.0:0" => &["127.0.0.1", "127.0.0.2", "127.9.8.7"],
            "[::]:0" => &["127.0.0.2", "::1"],
            "[::1]:0" => &["::1"],
            _ => &["127.0.0.1"],
        };
        for ip in asked {
            let to = SocketAddr::new(ip.parse().unwrap(), port);
            assert_eq!(ips(&over_udp(to, &fake).await).len(), 1, "{listen} at {ip}");
            assert_eq!(ips(&over_udp(to, &forwarded).await), [IpAddr::from([203, 0, 113, 9])]);
        }
    }
}

#[tokio::test]
async fn a_burst_of_datagrams_is_answered_whole() {
    let address = serving("127.0.0.1:0".parse().unwrap(), &real().await).await;
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    socket.connect(address).await.unwrap();
    let mut seen = std::collections::HashSet::new();
    for batch in 0..10 {
        for number in 0..20 {
            socket.send(&query(&format!("host{batch}-{number}.example."), RecordType::A, 0)).await.unwrap();
        }
        socket.send(b"noise").await.unwrap();
        for _ in 0..20 {
            let mut buffer = [0; 512];
            let length = socket.recv(&mut buffer).await.unwrap();
            seen.extend(ips(&buffer[..length]));
        }
    }
    assert_eq!(seen.len(), 200);
}

/// Serves as [`serving`] does, and takes nobody for this host but who has the address that is asked.
async fn serving_neighbours(server: &Nameserver) -> (Arc<Dns>, SocketAddr) {
    let dns = Arc::new(Dns::open(faking(&[server])).unwrap());
    let mut bound = Server::bind(&dns, "127.0.0.1:0".parse().unwrap()).unwrap();
    bound.is_own = |client, asked| client == asked;
    let address = bound.local_addr().unwrap();
    tokio::spawn(bound.run(Arc::clone(&dns)));
    (dns, address)
}

#[tokio::test]
async fn one_client_may_have_64_streams_and_others_are_not_touched_by_it() {
    let (_dns, address) = serving_neighbours(&real().await).await;
    let connect = |last: u8| async move {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind((Ipv4Addr::new(127, 0, 0, last), 0).into()).unwrap();
        socket.connect(address).await.unwrap()
    };
    let mut greedy = Vec::new();
    for _ in 0..64 {
        greedy.push(connect(2).await);
    }
    let mut surplus = connect(2).await;
    // One that has a place is closed after ten idle seconds.
    let closed = tokio::time::timeout(std::time::Duration::from_secs(5), surplus.read(&mut [0])).await;
    assert_eq!(closed.expect("closed at once").unwrap(), 0);
    for last in [3, 1] {
        let mut other = connect(last).await;
        other.write_all(&framed(&query("www.example.com.", RecordType::A, 0))).await.unwrap();
        assert_eq!(ips(&next(&mut other).await).len(), 1);
    }
    let many: Vec<_> = (0..70).map(|_| connect(1)).collect();
    for own in many {
        greedy.push(own.await);
    }
    let last = greedy.last_mut().unwrap();
    last.write_all(&framed(&query("www.example.com.", RecordType::A, 0))).await.unwrap();
    assert_eq!(ips(&next(last).await).len(), 1, "this host has as many as it wants");
}

#[tokio::test]
async fn one_client_may_have_256_datagrams_waiting_and_others_are_not_touched_by_it() {
    let silent = Nameserver::silent().await;
    let (dns, address) = serving_neighbours(&silent).await;
    let slow = query("a.real.example.", RecordType::A, 0);
    let ask = |last: u8, many: usize| {
        let slow = &slow;
        async move {
            let socket = UdpSocket::bind((Ipv4Addr::new(127, 0, 0, last), 0)).await.unwrap();
            for number in 0..many {
                socket.send_to(slow, address).await.unwrap();
                if number % 50 == 49 {
                    // What is known is answered at once, and behind what came before it.
                    socket.send_to(&query("www.example.com.", RecordType::A, 0), address).await.unwrap();
                    socket.recv(&mut [0; 512]).await.unwrap();
                }
            }
        }
    };
    ask(2, 300).await;
    assert_eq!(dns.counters().snapshot().dropped, 300 - 256);
    ask(3, 250).await;
    ask(1, 300).await;
    assert_eq!(dns.counters().snapshot().dropped, 300 - 256, "nobody else's, and none of this host");
}

#[tokio::test]
async fn a_port_in_use_is_told_before_anything_is_served() {
    let server = real().await;
    let address = serving("127.0.0.1:0".parse().unwrap(), &server).await;
    let dns = Dns::open(faking(&[&server])).unwrap();
    assert_eq!(Server::bind(&dns, address).unwrap_err().kind(), io::ErrorKind::AddrInUse);
}

#[tokio::test]
async fn queries_that_come_in_pieces_are_answered() {
    let address = serving("127.0.0.1:0".parse().unwrap(), &real().await).await;
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.set_nodelay(true).unwrap();
    for byte in framed(&query("www.example.com.", RecordType::A, 0)) {
        stream.write_all(&[byte]).await.unwrap();
        tokio::task::yield_now().await;
    }
    assert_eq!(ips(&next(&mut stream).await).len(), 1);
}

#[tokio::test]
async fn pipelined_queries_are_all_answered_even_behind_a_half_close() {
    let address = serving("127.0.0.1:0".parse().unwrap(), &real().await).await;
    let mut stream = TcpStream::connect(address).await.unwrap();
    let mut all = Vec::new();
    for number in 0..300_u16 {
        let zone = if number % 2 == 0 { "real" } else { "other" };
        let mut query = query(&format!("host{number}.{zone}.example."), RecordType::A, 0);
        query[..2].copy_from_slice(&number.to_be_bytes());
        all.extend(framed(&query));
    }
    stream.write_all(&all).await.unwrap();
    stream.shutdown().await.unwrap();
    let mut answered = std::collections::HashSet::new();
    for _ in 0..300 {
        let reply = next(&mut stream).await;
        assert_eq!(ips(&reply).len(), 1);
        answered.insert(parsed(&reply).metadata.id);
    }
    assert_eq!(answered.len(), 300);
    assert_eq!(stream.read(&mut [0]).await.unwrap(), 0, "then the stream is closed");
}

#[tokio::test]
async fn an_answer_that_is_known_does_not_wait_for_one_that_is_not() {
    let silent = Nameserver::silent().await;
    let address = serving("127.0.0.1:0".parse().unwrap(), &silent).await;
    let mut stream = TcpStream::connect(address).await.unwrap();
    let slow = framed(&query("a.real.example.", RecordType::A, 0));
    let quick = framed(&query("www.example.com.", RecordType::A, 0));
    stream.write_all(&[slow, quick].concat()).await.unwrap();
    assert_eq!(ips(&next(&mut stream).await).len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_says_nothing_or_not_enough_is_closed() {
    let dns = Arc::new(Dns::open(faking(&[])).unwrap());
    for sent in [&b""[..], &[0], &[0, 30, 1, 2, 3]] {
        let (mut client, served) = tokio::io::duplex(4096);
        let served = tokio::spawn(serve_stream(Arc::clone(&dns), CLIENT.into(), served, || Some(())));
        client.write_all(sent).await.unwrap();
        let begun = tokio::time::Instant::now();
        assert_eq!(client.read(&mut [0]).await.unwrap(), 0);
        served.await.unwrap();
        assert_eq!(begun.elapsed().as_secs(), 10);
    }
}

#[tokio::test(start_paused = true)]
async fn a_client_that_takes_no_answers_is_given_up() {
    let dns = Arc::new(Dns::open(faking(&[])).unwrap());
    let (mut client, served) = tokio::io::duplex(64);
    let served = tokio::spawn(serve_stream(dns, CLIENT.into(), served, || Some(())));
    let query = framed(&query("www.example.com.", RecordType::A, 0));
    // Until the other side has gone, which it does although this side never reads.
    while client.write_all(&query).await.is_ok() {}
    served.await.unwrap();
}

#[tokio::test]
async fn a_stream_lives_as_long_as_it_is_used() {
    let dns = Arc::new(Dns::open(faking(&[])).unwrap());
    let (mut client, served) = tokio::io::duplex(4096);
    let mut served = Box::pin(serve_stream(dns, CLIENT.into(), served, || Some(())));
    for number in 0..5 {
        client.write_all(&framed(&query(&format!("{number}.example."), RecordType::A, 0))).await.unwrap();
        assert!(poll!(&mut served).is_pending());
        assert_eq!(ips(&next(&mut client).await).len(), 1);
    }
    drop(client);
    served.await;
}
