//! A name server for the names a test gives it, over UDP and TCP, that counts what it is asked.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use hickory_proto::op::{Message, MessageType, OpCode, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA, HTTPS, PTR, TXT, svcb::SVCB};
use hickory_proto::rr::{Name, RData, Record as ResourceRecord, RecordType};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::{Peer, Peers, Record};

/// The names that exist. Others get NXDOMAIN; a known name without the asked type gets an empty answer.
#[derive(Clone, Default)]
pub(crate) struct Zone {
    records: HashMap<String, Vec<RData>>,
    behaviours: HashMap<String, Behaviour>,
}

/// How a name is answered when not in the ordinary way.
#[derive(Clone)]
pub(crate) enum Behaviour {
    /// With these bytes after the identifier of the query, whatever they mean.
    Garbage(Vec<u8>),
    /// Not at all.
    Silence,
    /// With SERVFAIL.
    Failure,
    /// With the next of these addresses each time, which nobody may remember.
    Turning(Arc<(Vec<IpAddr>, AtomicUsize)>),
}

/// A running name server.
pub(crate) struct NameServer {
    /// A line per query: `udp www.example.test A`.
    pub(crate) queries: Record,
    _peers: [Peer; 2],
}

impl Zone {
    /// Adds an address record, A or AAAA as the address is.
    #[must_use]
    pub(crate) fn address(self, name: &str, address: &str) -> Self {
        self.record(name, address_record(address.parse().expect("an address")))
    }

    /// Adds a text record.
    #[must_use]
    pub(crate) fn text(self, name: &str, text: &str) -> Self {
        self.record(name, RData::TXT(TXT::new(vec![text.to_owned()])))
    }

    /// Adds an HTTPS record in service mode without parameters (RFC 9460).
    #[must_use]
    pub(crate) fn https(self, name: &str) -> Self {
        self.record(name, RData::HTTPS(HTTPS(SVCB::new(1, Name::root(), Vec::new()))))
    }

    /// Adds the name of an address.
    #[must_use]
    pub(crate) fn pointer(self, address: &str, name: &str) -> Self {
        let address: IpAddr = address.parse().expect("an address");
        let target = Name::from_ascii(format!("{name}.")).expect("a name");
        self.record(&key(&Name::from(address)), RData::PTR(PTR(target)))
    }

    /// Adds any other record.
    #[must_use]
    pub(crate) fn record(mut self, name: &str, data: RData) -> Self {
        self.records.entry(name.to_owned()).or_default().push(data);
        self
    }

    /// Makes every query for `name` end like this.
    #[must_use]
    pub(crate) fn behaviour(mut self, name: &str, behaviour: Behaviour) -> Self {
        self.behaviours.insert(name.to_owned(), behaviour);
        self
    }

    /// Makes `name` mean another of these addresses each time that somebody asks.
    #[must_use]
    pub(crate) fn turning(self, name: &str, addresses: &[&str]) -> Self {
        let addresses = addresses.iter().map(|address| address.parse().expect("an address")).collect();
        self.behaviour(name, Behaviour::Turning(Arc::new((addresses, AtomicUsize::new(0)))))
    }

    /// What the server writes back to `query`, if anything.
    fn reply(&self, query: &Message) -> Option<Vec<u8>> {
        let mut reply = Message::response(query.metadata.id, OpCode::Query);
        reply.metadata.recursion_desired = query.metadata.recursion_desired;
        reply.metadata.recursion_available = true;
        reply.add_queries(query.queries.iter().cloned());
        let Some(question) = query.queries.first() else {
            reply.metadata.response_code = ResponseCode::FormErr;
            return reply.to_vec().ok();
        };
        let name = key(question.name());
        match self.behaviours.get(&name) {
            Some(Behaviour::Silence) => return None,
            Some(Behaviour::Garbage(bytes)) => return Some([&query.metadata.id.to_be_bytes()[..], bytes].concat()),
            Some(Behaviour::Turning(turn)) => {
                let (addresses, asked) = &**turn;
                let wanted = question.query_type();
                let matching: Vec<_> = addresses.iter().copied().map(address_record).collect();
                let matching: Vec<_> = matching.into_iter().filter(|it| it.record_type() == wanted).collect();
                if !matching.is_empty() {
                    let at = asked.fetch_add(1, Ordering::Relaxed) % matching.len();
                    reply.add_answer(ResourceRecord::from_rdata(question.name().clone(), 0, matching[at].clone()));
                }
            }
            Some(Behaviour::Failure) => reply.metadata.response_code = ResponseCode::ServFail,
            None => match self.records.get(&name) {
                None => reply.metadata.response_code = ResponseCode::NXDomain,
                Some(records) => {
                    let wanted = question.query_type();
                    let matching = records.iter().filter(|r| wanted == RecordType::ANY || r.record_type() == wanted);
                    reply.add_answers(
                        matching.map(|data| ResourceRecord::from_rdata(question.name().clone(), 60, data.clone())),
                    );
                }
            },
        }
        reply.to_vec().ok()
    }
}

fn address_record(address: IpAddr) -> RData {
    match address {
        IpAddr::V4(v4) => RData::A(A(v4)),
        IpAddr::V6(v6) => RData::AAAA(AAAA(v6)),
    }
}

impl Peers {
    /// Serves `zone` at `address` over UDP and TCP.
    pub(crate) fn dns(&self, address: SocketAddr, zone: Zone) -> NameServer {
        let (zone, queries) = (Arc::new(zone), Record::default());
        let (udp_zone, udp_queries) = (zone.clone(), queries.clone());
        let udp = self.udp(address, async move |socket| {
            let mut buffer = vec![0; 65_536];
            loop {
                let Ok((length, from)) = socket.recv_from(&mut buffer).await else { continue };
                if let Some(reply) = answer(&udp_zone, &udp_queries, "udp", &buffer[..length]) {
                    let _ = socket.send_to(&reply, from).await;
                }
            }
        });
        let tcp_queries = queries.clone();
        let tcp = self.tcp(udp.address, move |stream, _| serve_tcp(stream, zone.clone(), tcp_queries.clone()));
        NameServer { queries, _peers: [udp, tcp] }
    }
}

/// Messages with a length of two bytes before each (RFC 1035, 4.2.2; many on one connection: RFC 7766).
async fn serve_tcp(mut stream: TcpStream, zone: Arc<Zone>, queries: Record) -> io::Result<()> {
    loop {
        let mut query = vec![0; usize::from(stream.read_u16().await?)];
        stream.read_exact(&mut query).await?;
        if let Some(reply) = answer(&zone, &queries, "tcp", &query) {
            let length = u16::try_from(reply.len()).map_err(io::Error::other)?;
            stream.write_all(&[&length.to_be_bytes()[..], &reply].concat()).await?;
        }
    }
}

/// Notes and answers one query. Over UDP a reply longer than the client allows is cut to a truncated one.
fn answer(zone: &Zone, queries: &Record, transport: &str, query: &[u8]) -> Option<Vec<u8>> {
    let query = Message::from_vec(query).ok().filter(|m| m.metadata.message_type == MessageType::Query)?;
    for question in &query.queries {
        queries.note(format!("{transport} {} {}", key(question.name()), question.query_type()));
    }
    let reply = zone.reply(&query)?;
    // Without EDNS the limit is 512 bytes (RFC 1035, 4.2.1); max_payload says the same.
    if transport == "tcp" || reply.len() <= usize::from(query.max_payload()) {
        return Some(reply);
    }
    Message::from_vec(&reply).ok()?.truncate().to_vec().ok()
}

/// Lower case, no dot at the end.
fn key(name: &Name) -> String {
    name.to_ascii().trim_end_matches('.').to_ascii_lowercase()
}
