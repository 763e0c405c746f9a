//! From a query to its reply: what is ours to say, what the cache says, and what only the nameservers know.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::counters::count;
use super::fake_ip::{Exhausted, FakeIp};
use super::flights::Whose;
use super::key::{Dotted, Key};
use super::reply::reason;
use super::resolver::{Answered, Outcome};
use super::special::{self, Special};
use super::wire::{Edns, Fault, Query, kind, rcode};
use super::{Dns, Fake, now};
use crate::net::Name;

/// How long the name of a real address is remembered beyond its TTL: applications keep addresses longer than told.
const HINT_GRACE: Duration = Duration::from_secs(600);
/// Of answers about names that never change, in seconds (as mihomo gives its `hosts`).
const LOCAL_TTL: u32 = 10;

/// How a query came, and so how large its answer may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// 512 bytes, or what EDNS allows, up to 1232.
    Udp,
    /// 65 535 bytes.
    Tcp,
}

/// Who asks, and whom.
#[derive(Debug, Clone, Copy)]
pub struct Asker {
    /// Who asks.
    pub client: IpAddr,
    /// Who was to answer, if it was not us.
    pub server: Option<SocketAddr>,
    /// Whether that is a program on this host.
    pub is_host: bool,
}

impl From<IpAddr> for Asker {
    /// Somebody who asks us.
    fn from(client: IpAddr) -> Self {
        Self { client, server: None, is_host: client.to_canonical().is_loopback() }
    }
}

/// What [`Dns::answer`] made of a query.
#[derive(Debug)]
pub enum Answer {
    /// The reply is in the buffer. [`Dns::flush`] must return before it leaves.
    Ready,
    /// Only the nameservers know: [`Dns::ask`].
    Ask(Question),
    /// Not a query: say nothing.
    Drop,
}

/// A query that waits for the nameservers. It holds at most 600 bytes.
#[derive(Debug, Clone)]
pub struct Question {
    id: u16,
    bits: u16,
    question: Box<[u8]>,
    edns: Option<Edns>,
    transport: Transport,
    key: Box<[u8]>,
    whose: Whose,
}

impl Question {
    fn new(query: &Query<'_>, key: &Key, whose: Whose) -> Self {
        Self {
            id: query.id,
            bits: query.bits,
            question: query.question.into(),
            edns: query.edns,
            transport: query.transport,
            key: key.as_bytes().into(),
            whose,
        }
    }

    fn query(&self) -> Query<'_> {
        Query { id: self.id, bits: self.bits, question: &self.question, edns: self.edns, transport: self.transport }
    }
}

impl Dns {
    /// Answers `query` of `asker` from memory: no socket, no task, no wait. The reply replaces what `reply` held.
    pub fn answer(
        &self,
        query: &[u8],
        transport: Transport,
        asker: impl Into<Asker>,
        now: Instant,
        reply: &mut Vec<u8>,
    ) -> Answer {
        let Asker { client, server, is_host } = asker.into();
        count(&self.counters.queries);
        reply.clear();
        let query = match Query::parse(query, transport) {
            Ok(query) => query,
            Err(Fault::Silence) => {
                count(&self.counters.dropped);
                return Answer::Drop;
            }
            Err(Fault::Refused(query, code)) => {
                count(&self.counters.local);
                query.empty(code, reply);
                return Answer::Ready;
            }
        };
        if let Some(code) = self.resolver.tracers.catch(&query, server) {
            count(&self.counters.local);
            query.empty(code, reply);
            return Answer::Ready;
        }
        let dotted = Dotted::new(query.name());
        if let Some(name) = &dotted
            && self.answer_ourselves(&query, name.as_str(), client, now, reply)
        {
            return Answer::Ready;
        }
        if query.kind() == kind::AAAA && !self.ipv6 {
            count(&self.counters.local);
            query.empty(rcode::NO_ERROR, reply);
            return Answer::Ready;
        }
        let key = Key::of(&query);
        match self.resolver.cached(key.as_bytes(), now) {
            Some(outcome) => {
                count(&self.counters.cached);
                self.write(&query, &outcome, now, reply);
                Answer::Ready
            }
            None => {
                count(&self.counters.forwarded);
                Answer::Ask(Question::new(&query, &key, Whose::of(client, is_host)))
            }
        }
    }

    /// Asks the nameservers what [`Dns::answer`] could not say. There is always a reply: SERVFAIL at worst, after
    /// five seconds at the latest. It may be awaited on any runtime, and dropped at any time.
    pub async fn ask(&self, question: Question) -> Vec<u8> {
        let outcome = self.resolver.resolve(&question.key, question.whose).await;
        let mut reply = Vec::new();
        self.write(&question.query(), &outcome, now(), &mut reply);
        reply
    }

    /// SERVFAIL to a question for which there is no room to wait.
    pub(super) fn refuse(&self, question: &Question) -> Vec<u8> {
        self.counters.drop_question();
        let mut reply = Vec::new();
        question.query().failure(reason::OTHER, "too many questions of this client wait for nameservers", &mut reply);
        reply
    }

    /// Writes the reply if `name` is ours to answer.
    fn answer_ourselves(
        &self,
        query: &Query<'_>,
        name: &str,
        client: IpAddr,
        now: Instant,
        reply: &mut Vec<u8>,
    ) -> bool {
        let special = special::of(name);
        let counter = match special {
            Some(Special::Loopback) => {
                match query.kind() {
                    kind::A => query.address(Ipv4Addr::LOCALHOST.into(), LOCAL_TTL, reply),
                    kind::AAAA if self.ipv6 => query.address(Ipv6Addr::LOCALHOST.into(), LOCAL_TTL, reply),
                    _ => query.empty(rcode::NO_ERROR, reply),
                }
                &self.counters.local
            }
            Some(Special::NoSuchName) => {
                query.empty(rcode::NX_DOMAIN, reply);
                &self.counters.local
            }
            Some(Special::NoData) => {
                query.empty(rcode::NO_ERROR, reply);
                &self.counters.local
            }
            Some(Special::Reverse(ip)) => match self.answer_reverse(query, ip, reply) {
                true => &self.counters.local,
                false => return false,
            },
            None => match self.fake.as_ref().filter(|fake| !special::is_of_the_network(name) && fake.fakes(name)) {
                Some(fake) => match self.answer_fake(fake, query, name, (client, now), reply) {
                    true => &self.counters.faked,
                    false => return false,
                },
                // RFC 7686 section 2: such a question must not reach the public network.
                None if special::is_onion(name) => {
                    query.empty(rcode::NX_DOMAIN, reply);
                    &self.counters.local
                }
                None => return false,
            },
        };
        count(counter);
        true
    }

    /// The name of a fake or loopback address; NXDOMAIN where nobody we could ask knows it.
    fn answer_reverse(&self, query: &Query<'_>, ip: IpAddr, reply: &mut Vec<u8>) -> bool {
        match self.name_of(ip) {
            Fake::Name(name) if query.kind() == kind::PTR => {
                let ttl = self.fake.as_ref().map_or(LOCAL_TTL, |fake| fake.ttl);
                query.pointer(name.as_str(), ttl, reply);
            }
            Fake::Name(_) => query.empty(rcode::NO_ERROR, reply),
            Fake::Unknown => query.empty(rcode::NX_DOMAIN, reply),
            Fake::NotFake if ip.is_loopback() && query.kind() == kind::PTR => {
                query.pointer("localhost", LOCAL_TTL, reply);
            }
            // RFC 6303: a public nameserver knows nothing of private addresses, and need not learn which we use.
            Fake::NotFake if special::is_private(ip) && !self.resolver.is_local() => {
                query.empty(rcode::NX_DOMAIN, reply);
            }
            Fake::NotFake => return false,
        }
        true
    }

    /// Answers for a name that gets fake addresses; other types than those of addresses are forwarded.
    fn answer_fake(
        &self,
        fake: &Arc<FakeIp>,
        query: &Query<'_>,
        name: &str,
        (client, now): (IpAddr, Instant),
        reply: &mut Vec<u8>,
    ) -> bool {
        let v6 = query.kind() == kind::AAAA;
        match query.kind() {
            kind::AAAA if !fake.has_v6() => query.empty(rcode::NO_ERROR, reply),
            kind::A | kind::AAAA => match fake.address(name, v6, client, now) {
                Ok(ip) => query.address(ip, fake.ttl, reply),
                Err(Exhausted) => {
                    self.counters.exhausted(client, now);
                    let why =
                        "the fake addresses are in use, or this client's part of them; a larger fake-ip-range helps";
                    query.failure(reason::OTHER, why, reply);
                }
            },
            // Their hints carry real addresses, which would lead past the rules.
            kind::HTTPS | kind::SVCB => query.empty(rcode::NO_ERROR, reply),
            kind::ANY => query.any(fake.ttl, reply),
            _ => return false,
        }
        true
    }

    /// Writes what the nameservers said, and remembers whose the addresses are that leave with it.
    fn write(&self, query: &Query<'_>, outcome: &Outcome, now: Instant, reply: &mut Vec<u8>) {
        match outcome {
            Ok(answered) => {
                self.remember(query, answered, now);
                // The addresses of a mail exchanger or a service are real there, and would lead past the rules.
                answered.message.fit(query, answered.age(now), self.fake.is_none(), reply);
            }
            Err(why) => query.failure(reason::NO_REACHABLE_AUTHORITY, &why.to_string(), reply),
        }
    }

    fn remember(&self, query: &Query<'_>, answered: &Answered, now: Instant) {
        let Some(hints) = self.hints.as_ref().filter(|_| !answered.message.addresses.is_empty()) else { return };
        let Some(name) = Dotted::new(query.name()).and_then(|name| Name::new(name.as_str()).ok()) else { return };
        let until = answered.at + Duration::from_secs(answered.message.lifetime.into()) + HINT_GRACE;
        let until = until.max(now + HINT_GRACE);
        let mut hints = hints.lock();
        for ip in answered.message.addresses.iter() {
            hints.insert(*ip, (name.clone(), until));
        }
    }
}
