//! Where nameservers are, and one question to one of them over plain UDP or TCP.

use std::fmt;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use ipnet::IpNet;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::{Instant, timeout_at};

use super::counters::{Counters, count};
use super::key::Parts;
use super::message::Message;
use super::special::is_private;
use super::stub::Tracers;
use super::wire::{EDNS_SIZE, HEADER, IN, bit, kind, question_end, rcode, u16_at};
use crate::net::{DialError, Lookup, Name};
use crate::platform::{Dialer, Sending, UdpSocket};

/// A nameserver.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Upstream {
    /// Where it listens.
    pub address: SocketAddr,
    /// `tcp://`: never ask over UDP.
    pub tcp_only: bool,
}

/// Where nameservers are found.
#[derive(Clone)]
pub enum Source {
    /// At an address.
    Fixed(Upstream),
    /// Where another source says. Those are stubs of which the system says so at that time.
    Checked(Box<Source>, Arc<dyn System>),
    /// At the addresses of a name, which is looked up when a question needs it: the look-up has its own cache and its own
    /// limits of time, and one that failed is tried again by a later question.
    Named {
        /// The name.
        name: Name,
        /// The port.
        port: u16,
        /// As in [`Upstream`].
        tcp_only: bool,
        /// Finds the addresses, without us.
        lookup: Arc<dyn Lookup>,
    },
    /// Those of the system, which may change while we run.
    System(Arc<dyn System>),
}

/// Knows the nameservers of the system.
pub trait System: Send + Sync {
    /// Their addresses as of now.
    ///
    /// # Errors
    /// In words: why there are none.
    fn nameservers(&self) -> Result<Vec<SocketAddr>, String>;

    /// Whether `server`, one of them or another, is now a program on this host whose own questions come to us.
    fn is_stub(&self, server: SocketAddr) -> bool;
}

/// Whom to ask, and how.
#[derive(Debug, Clone, Copy)]
pub(super) enum Whom {
    /// A nameserver.
    Server(Upstream),
    /// A program on this host whose own questions come to us.
    Stub(Upstream),
}

/// How many addresses of one name are asked.
const MOST_ADDRESSES: usize = 3;

impl Source {
    /// The nameservers that stand behind it now.
    pub(super) async fn find(&self) -> Result<Vec<Whom>, Arc<str>> {
        match self {
            Self::Fixed(upstream) => Ok(vec![Whom::Server(*upstream)]),
            Self::Named { name, port, tcp_only, lookup } => match lookup.lookup(name).await {
                Ok(found) => {
                    let at = |ip: &IpAddr| {
                        Whom::Server(Upstream { address: SocketAddr::new(*ip, *port), tcp_only: *tcp_only })
                    };
                    Ok(found.iter().take(MOST_ADDRESSES).map(at).collect())
                }
                Err(error) => Err(format!("the nameserver {name} cannot be found: {error}").into()),
            },
            Self::Checked(source, system) => {
                let found = Box::pin(source.find()).await?;
                Ok(found.into_iter().map(|whom| whom.checked(&**system)).collect())
            }
            Self::System(system) => {
                let found = system.nameservers().map_err(Arc::<str>::from)?;
                let whom = |address| Whom::Server(Upstream { address, tcp_only: false }).checked(&**system);
                Ok(found.into_iter().map(whom).collect())
            }
        }
    }

    /// Whether one of them stands in the local network, as far as that is known without looking anything up.
    pub(super) fn is_local(&self) -> bool {
        match self {
            Self::Fixed(upstream) => is_private(upstream.address.ip()),
            Self::Checked(source, _) => source.is_local(),
            Self::Named { .. } => false,
            Self::System(system) => {
                system.nameservers().is_ok_and(|found| found.into_iter().any(|server| is_private(server.ip())))
            }
        }
    }
}

impl Whom {
    /// The same, a stub if `system` says so.
    fn checked(self, system: &dyn System) -> Self {
        match self {
            Self::Server(server) if system.is_stub(server.address) => Self::Stub(server),
            whom => whom,
        }
    }
}

impl From<Upstream> for Source {
    fn from(upstream: Upstream) -> Self {
        Self::Fixed(upstream)
    }
}

impl fmt::Debug for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fixed(upstream) => upstream.address.fmt(f),
            Self::Checked(source, _) => source.fmt(f),
            Self::Named { name, port, .. } => write!(f, "{name}:{port}"),
            Self::System(_) => f.write_str("system"),
        }
    }
}

/// When a datagram that got no answer is sent again, counted from the first one.
const RESEND_AT: [Duration; 2] = [Duration::from_millis(800), Duration::from_millis(2400)];
/// And once more then, but only if this host has come to send from another address.
const LAST_LOOK: Duration = Duration::from_millis(4000);
/// A datagram of a server that ignores our EDNS size is read up to here.
const DATAGRAM: usize = 4096;

/// Why a nameserver gave no answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum ExchangeError {
    #[error("{0}")]
    Dial(#[from] DialError),
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("it closed the connection without an answer")]
    Closed,
    #[error("its answer is malformed")]
    Malformed,
    #[error("its answer cannot be read with or without EDNS")]
    NoEdns,
    #[error("it asks us")]
    AsksUs,
    #[error(
        "it names other nameservers and looks nothing up: the program on this host that asks it resolves names by itself, \
         so write nameservers under dns.nameserver"
    )]
    Refers,
}

/// Message ids that nobody can foresee (RFC 5452 section 4.3).
pub(super) struct Ids {
    /// SipHash under a key from the operating system is a pseudo-random function of the counter.
    key: RandomState,
    next: AtomicU64,
}

impl Ids {
    pub(super) fn new() -> Self {
        Self { key: RandomState::new(), next: AtomicU64::new(0) }
    }

    fn next(&self) -> u16 {
        (self.key.hash_one(self.next.fetch_add(1, Ordering::Relaxed)) >> 48) as u16
    }
}

/// What an exchange needs beside the question.
#[derive(Clone, Copy)]
pub(super) struct Exchange<'a> {
    pub(super) dialer: &'a Dialer,
    /// The fake addresses.
    pub(super) fake: &'a [IpNet],
    pub(super) ids: &'a Ids,
    pub(super) tracers: &'a Tracers,
    pub(super) counters: &'a Counters,
    pub(super) question: Parts<'a>,
}

/// What a message from the nameserver is to us.
enum Verdict {
    Answer(Message),
    /// The rest comes over TCP.
    Truncated,
    /// The server cannot read a query with EDNS (RFC 6891 section 7).
    NoEdns,
    /// Not for us, or malformed.
    Garbage,
}

impl Exchange<'_> {
    pub(super) fn is_fake(&self, ip: IpAddr) -> bool {
        self.fake.iter().any(|range| range.contains(&ip))
    }

    /// Such an answer would lead back to us, and there perhaps to another name.
    pub(super) fn has_fake(&self, message: &Message) -> bool {
        message.addresses.iter().any(|ip| self.is_fake(*ip))
    }

    /// Asks whom it says.
    pub(super) async fn ask_whom(&self, whom: Whom) -> (SocketAddr, Result<Message, ExchangeError>) {
        match whom {
            Whom::Server(server) => (server.address, self.ask(server).await),
            Whom::Stub(stub) => self.ask_behind(stub).await,
        }
    }

    /// Asks `upstream` and waits for as long as the caller does.
    pub(super) async fn ask(&self, upstream: Upstream) -> Result<Message, ExchangeError> {
        count(&self.counters.upstream_queries);
        let answer = match upstream.tcp_only {
            true => self.tcp(upstream.address).await,
            false => self.udp(upstream.address).await,
        };
        match &answer {
            Ok(message) if !message.is_failure() => {}
            _ => count(&self.counters.upstream_failures),
        }
        answer
    }

    /// A socket per question: its port, picked by the kernel, is half of what a forger would have to guess.
    async fn udp(&self, to: SocketAddr) -> Result<Message, ExchangeError> {
        let (mut socket, mut _sending) = self.socket(to).await?;
        let mut edns = true;
        let mut buffer = [0; DATAGRAM];
        'ask: loop {
            let id = self.ids.next();
            let query = self.query(id, edns);
            let begun = Instant::now();
            socket.send(&query).await?;
            let mut resends = RESEND_AT.iter().chain([&LAST_LOOK]);
            let mut resend = resends.next();
            loop {
                let length = match resend {
                    None => socket.recv(&mut buffer).await?,
                    Some(after) => match timeout_at(begun + *after, socket.recv(&mut buffer)).await {
                        Ok(received) => received?,
                        Err(_) => {
                            let stale = self.is_stale(&socket, to);
                            if stale {
                                (socket, _sending) = self.socket(to).await?;
                            }
                            if stale || *after != LAST_LOOK {
                                socket.send(&query).await?;
                            }
                            resend = resends.next();
                            continue;
                        }
                    },
                };
                match self.judge(&buffer[..length], id) {
                    Verdict::Answer(message) => return Ok(message),
                    Verdict::Truncated => return self.tcp(to).await,
                    Verdict::NoEdns if edns => {
                        edns = false;
                        continue 'ask;
                    }
                    Verdict::NoEdns => return Err(ExchangeError::NoEdns),
                    Verdict::Garbage => count(&self.counters.garbage),
                }
            }
        }
    }

    /// Connected, so that the kernel drops what others send and tells us of a closed port at once.
    async fn socket(&self, to: SocketAddr) -> Result<(UdpSocket, Option<Sending>), ExchangeError> {
        let socket = self.dialer.udp(to.ip())?;
        socket.connect(to).await?;
        let sending = self.dialer.own.as_ref().and_then(|own| Some(own.sends(socket.local_addr().ok()?.port(), to)));
        Ok((socket, sending))
    }

    /// Whether this host has come to send from another address than when the socket was connected.
    fn is_stale(&self, socket: &UdpSocket, to: SocketAddr) -> bool {
        let now = self.dialer.source_for(to);
        now.is_some() && socket.local_addr().is_ok_and(|bound| Some(bound.ip()) != now)
    }

    async fn tcp(&self, to: SocketAddr) -> Result<Message, ExchangeError> {
        let mut stream = self.dialer.tcp(to).await?;
        for edns in [true, false] {
            let id = self.ids.next();
            let query = self.query(id, edns);
            // RFC 7766 section 8: length and message in one write. A query has at most 282 bytes.
            let mut framed = (query.len() as u16).to_be_bytes().to_vec();
            framed.extend_from_slice(&query);
            stream.write_all(&framed).await?;
            let mut answer = Vec::new();
            loop {
                let length = stream.read_u16().await.map_err(closed)?;
                answer.resize(usize::from(length), 0);
                stream.read_exact(&mut answer).await.map_err(closed)?;
                match self.judge(&answer, id) {
                    Verdict::Answer(message) => return Ok(message),
                    // Over TCP there is no larger way to ask.
                    Verdict::Truncated => return Err(ExchangeError::Malformed),
                    Verdict::NoEdns => break,
                    Verdict::Garbage => count(&self.counters.garbage),
                }
            }
        }
        Err(ExchangeError::NoEdns)
    }

    /// The question as we send it: recursion wanted, AD understood, DO and CD as the client had them.
    fn query(&self, id: u16, edns: bool) -> Vec<u8> {
        let Parts { name, kind, dnssec_ok, checking_disabled } = self.question;
        let mut bits = bit::RD | bit::AD;
        if checking_disabled {
            bits |= bit::CD;
        }
        let mut query = Vec::with_capacity(HEADER + name.len() + 4 + 11);
        for word in [id, bits, 1, 0, 0, u16::from(edns)] {
            query.extend_from_slice(&word.to_be_bytes());
        }
        query.extend_from_slice(name);
        query.extend_from_slice(&kind.to_be_bytes());
        query.extend_from_slice(&IN.to_be_bytes());
        if edns {
            query.push(0);
            for word in [kind::OPT, EDNS_SIZE, 0, u16::from(dnssec_ok) << 15, 0] {
                query.extend_from_slice(&word.to_be_bytes());
            }
        }
        query
    }

    fn judge(&self, message: &[u8], id: u16) -> Verdict {
        let Some(bits) = u16_at(message, 2) else { return Verdict::Garbage };
        if u16_at(message, 0) != Some(id) || message.len() < HEADER || bits & (bit::QR | bit::OPCODE) != bit::QR {
            return Verdict::Garbage;
        }
        let code = bits & bit::RCODE;
        // A server that knows no EDNS may not even repeat the question.
        if code == rcode::FORM_ERR || code == rcode::NOT_IMP && u16_at(message, 4) == Some(0) {
            return Verdict::NoEdns;
        }
        if !self.repeats_question(message) {
            return Verdict::Garbage;
        }
        if bits & bit::TC != 0 {
            return Verdict::Truncated;
        }
        Message::parse(message).map_or(Verdict::Garbage, Verdict::Answer)
    }

    fn repeats_question(&self, message: &[u8]) -> bool {
        let Some(end) = question_end(message).filter(|_| u16_at(message, 4) == Some(1)) else { return false };
        let (name, rest) = message[HEADER..end].split_at(end - HEADER - 4);
        name.eq_ignore_ascii_case(self.question.name)
            && u16_at(rest, 0) == Some(self.question.kind)
            && u16_at(rest, 2) == Some(IN)
    }
}

fn closed(error: io::Error) -> ExchangeError {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => ExchangeError::Closed,
        _ => ExchangeError::Io(error),
    }
}
