//! What the tests of this module share: queries, answers, and nameservers on loopback that behave as they are told.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA, CNAME, SOA};
use hickory_proto::rr::{Name, RData, Record, RecordType};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, UdpSocket};

use super::{Answer, Config, Dns, Filter, FilterMode, Mode, Transport, Upstream, Wildcards};
use crate::platform::Dialer;

pub(super) fn name(text: &str) -> Name {
    Name::from_ascii(text).unwrap()
}

/// A query with recursion desired and EDNS of `size`, 0 for none.
pub(super) fn query(text: &str, kind: RecordType, size: u16) -> Vec<u8> {
    let mut message = Message::new(0x1234, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(name(text), kind));
    if size > 0 {
        let mut edns = Edns::new();
        edns.set_max_payload(size);
        message.set_edns(edns);
    }
    message.to_vec().unwrap()
}

pub(super) fn parsed(message: &[u8]) -> Message {
    Message::from_vec(message).unwrap()
}

/// An empty answer to `query`.
pub(super) fn answer(query: &[u8]) -> Message {
    let query = parsed(query);
    let mut answer = Message::response(query.metadata.id, OpCode::Query);
    answer.metadata.recursion_desired = true;
    answer.metadata.recursion_available = true;
    answer.add_queries(query.queries.clone());
    answer
}

pub(super) fn address(owner: &Name, ttl: u32, ip: IpAddr) -> Record {
    let data = match ip {
        IpAddr::V4(ip) => RData::A(A(ip)),
        IpAddr::V6(ip) => RData::AAAA(AAAA(ip)),
    };
    Record::from_rdata(owner.clone(), ttl, data)
}

/// An answer with these addresses, as far as they are of the family asked for.
pub(super) fn addresses(query: &[u8], ttl: u32, ips: &[&str]) -> Vec<u8> {
    let mut answer = answer(query);
    let question = answer.queries[0].clone();
    for ip in ips.iter().map(|ip| IpAddr::from_str(ip).unwrap()) {
        if ip.is_ipv4() == (question.query_type() == RecordType::A) {
            answer.add_answer(address(question.name(), ttl, ip));
        }
    }
    answer.to_vec().unwrap()
}

pub(super) fn code(query: &[u8], code: ResponseCode) -> Vec<u8> {
    let mut answer = answer(query);
    answer.metadata.response_code = code;
    answer.to_vec().unwrap()
}

pub(super) fn soa(ttl: u32, minimum: u32) -> Record {
    let data = RData::SOA(SOA::new(name("ns.example."), name("host.example."), 1, 2, 3, 4, minimum));
    Record::from_rdata(name("example."), ttl, data)
}

pub(super) fn alias(owner: &str, target: &str, ttl: u32) -> Record {
    Record::from_rdata(name(owner), ttl, RData::CNAME(CNAME(name(target))))
}

/// A nameserver on loopback. It stops with the runtime of the test.
pub(super) struct Nameserver {
    pub(super) address: SocketAddr,
    udp: Arc<AtomicUsize>,
    tcp: Arc<AtomicUsize>,
}

impl Nameserver {
    /// Answers each UDP query with whatever `udp` returns, and each TCP query with what `tcp` returns.
    pub(super) async fn start(
        udp: impl Fn(&[u8]) -> Vec<Vec<u8>> + Send + 'static,
        tcp: impl Fn(&[u8]) -> Vec<Vec<u8>> + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let socket = UdpSocket::bind(address).await.unwrap();
        let (udp_count, tcp_count) = (Arc::<AtomicUsize>::default(), Arc::<AtomicUsize>::default());
        let (udp_seen, tcp_seen) = (Arc::clone(&udp_count), Arc::clone(&tcp_count));
        tokio::spawn(async move {
            let mut buffer = [0; 2048];
            while let Ok((length, client)) = socket.recv_from(&mut buffer).await {
                udp_seen.fetch_add(1, Ordering::Relaxed);
                for answer in udp(&buffer[..length]) {
                    socket.send_to(&answer, client).await.unwrap();
                }
            }
        });
        let tcp = Arc::new(tcp);
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let (tcp, seen) = (Arc::clone(&tcp), Arc::clone(&tcp_seen));
                tokio::spawn(async move {
                    while let Ok(length) = stream.read_u16().await {
                        let mut query = vec![0; length.into()];
                        stream.read_exact(&mut query).await.unwrap();
                        seen.fetch_add(1, Ordering::Relaxed);
                        for answer in tcp(&query) {
                            stream.write_u16(answer.len() as u16).await.unwrap();
                            stream.write_all(&answer).await.unwrap();
                        }
                    }
                });
            }
        });
        Self { address, udp: udp_count, tcp: tcp_count }
    }

    /// Answers over UDP with one message.
    pub(super) async fn answering(udp: impl Fn(&[u8]) -> Vec<u8> + Send + 'static) -> Self {
        Self::start(move |query| vec![udp(query)], |_| Vec::new()).await
    }

    /// Takes queries and says nothing.
    pub(super) async fn silent() -> Self {
        Self::start(|_| Vec::new(), |_| Vec::new()).await
    }

    pub(super) fn upstream(&self) -> Upstream {
        Upstream { address: self.address, tcp_only: false }
    }

    pub(super) fn udp_queries(&self) -> usize {
        self.udp.load(Ordering::Relaxed)
    }

    pub(super) fn tcp_queries(&self) -> usize {
        self.tcp.load(Ordering::Relaxed)
    }
}

/// A configuration without fake addresses, on the runtime of the test.
pub(super) fn mapping(upstreams: &[&Nameserver]) -> Config {
    Config {
        ipv6: true,
        mode: Mode::Mapping,
        nameservers: upstreams.iter().map(|server| server.upstream().into()).collect(),
        tracers: Arc::default(),
        dialer: Dialer::default(),
        log: None,
        runtime: tokio::runtime::Handle::current(),
    }
}

/// The same with fake addresses; names under `real.example` are real.
pub(super) fn faking(upstreams: &[&Nameserver]) -> Config {
    let (range, range6) = ("198.18.0.1/16", "fdfe:dcba:9877::/64");
    let fake = [range, range6].map(|range| range.parse().unwrap()).to_vec();
    Config {
        mode: fake_mode(range, Some(range6), &["+.real.example"]),
        dialer: Dialer { fake, ..Dialer::default() },
        ..mapping(upstreams)
    }
}

pub(super) fn fake_mode(range: &str, range6: Option<&str>, real: &[&str]) -> Mode {
    let mut wildcards = Wildcards::default();
    real.iter().for_each(|pattern| wildcards.insert(pattern).unwrap());
    Mode::FakeIp {
        range: range.parse().unwrap(),
        range6: range6.map(|range| range.parse().unwrap()),
        filter: Filter::new(wildcards, FilterMode::Blacklist),
        ttl: 1,
    }
}

/// Who asks in the tests.
pub(super) const CLIENT: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1));

/// Asks `dns` as a UDP client would, and waits for the answer.
pub(super) async fn ask(dns: &Dns, query: &[u8]) -> Vec<u8> {
    ask_as(dns, CLIENT, query).await
}

/// The same for another client.
pub(super) async fn ask_as(dns: &Dns, client: IpAddr, query: &[u8]) -> Vec<u8> {
    let mut reply = Vec::new();
    match dns.answer(query, Transport::Udp, client, super::now(), &mut reply) {
        Answer::Ready => reply,
        Answer::Ask(question) => dns.ask(question).await,
        Answer::Drop => panic!("the query was dropped"),
    }
}

/// The addresses in the answer section.
pub(super) fn ips(reply: &[u8]) -> Vec<IpAddr> {
    parsed(reply).answers.iter().filter_map(|record| record.data.ip_addr()).collect()
}
