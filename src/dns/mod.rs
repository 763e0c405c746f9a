//! The DNS service: fake addresses for names, real answers for the rest, and look-ups of our own.
//!
//! ```text
//! query -> wire -> special names | fake_ip | cache      Dns::answer: in memory, on the packet path
//!                                  miss -> resolver     Dns::ask: nameservers over UDP and TCP, one flight a question
//! flow  -> Dns::name_of, Dns::hint                      an address back to its name
//! dial  -> net::Lookup                                  a name to its real addresses
//! ```

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use parking_lot::Mutex;
use tokio::runtime::Handle;

use crate::net::{BoxFuture, Lookup, LookupError, Name};
use crate::platform::Dialer;

mod counters;
mod fake_ip;
mod filter;
mod key;
mod lookup;
mod lru;
mod message;
mod reply;
mod resolver;
mod server;
mod special;
mod upstream;
mod wire;

pub use counters::{Counters, Counts};
pub use fake_ip::{Fake, Held, OpenError};
pub use filter::{Filter, FilterMode, InvalidPattern, Wildcards};
pub use server::{Server, serve, serve_stream};
pub use upstream::Upstream;

use counters::count;
use fake_ip::{Exhausted, FakeIp};
use key::{Dotted, Key};
use lru::Lru;
use reply::reason;
use resolver::{Answered, Outcome, Resolver};
use special::Special;
use wire::{Edns, Fault, Query, kind, rcode};

/// Addresses whose names are remembered.
const HINTS: usize = 16_384;
/// How long the name of a real address is remembered beyond its TTL: applications keep addresses longer than told.
const HINT_GRACE: Duration = Duration::from_secs(600);
/// Of answers about names that never change, in seconds (as mihomo gives its `hosts`).
const LOCAL_TTL: u32 = 10;

/// How names are answered (`enhanced-mode`).
#[derive(Debug)]
pub enum Mode {
    /// `fake-ip`: every name gets an address of our own, which a flow brings back to us.
    FakeIp {
        /// `fake-ip-range`.
        range: Ipv4Net,
        /// `fake-ip-range6`; without it AAAA of a fake name is empty.
        range6: Option<Ipv6Net>,
        /// `fake-ip-filter` and its mode.
        filter: Filter,
        /// `fake-ip-ttl`, in seconds.
        ttl: u32,
    },
    /// `redir-host` and `normal`: real answers, whose names are remembered.
    Mapping,
}

/// What [`Dns::open`] needs.
#[derive(Debug)]
pub struct Config {
    /// `dns.ipv6`; false answers every AAAA with nothing, and no look-up of ours yields IPv6.
    pub ipv6: bool,
    /// How names are answered.
    pub mode: Mode,
    /// `nameserver`, all asked at once; the first that does not fail wins.
    pub upstreams: Vec<Upstream>,
    /// Makes the sockets towards them.
    pub dialer: Dialer,
    /// The file that keeps fake addresses across restarts.
    pub log: Option<PathBuf>,
    /// The runtime on which questions travel; it outlives every worker.
    pub runtime: Handle,
}

/// How a query came, and so how large its answer may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// 512 bytes, or what EDNS allows, up to 1232.
    Udp,
    /// 65 535 bytes.
    Tcp,
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
}

impl Question {
    fn new(query: &Query<'_>, key: &Key) -> Self {
        Self {
            id: query.id,
            bits: query.bits,
            question: query.question.into(),
            edns: query.edns,
            transport: query.transport,
            key: key.as_bytes().into(),
        }
    }

    fn query(&self) -> Query<'_> {
        Query { id: self.id, bits: self.bits, question: &self.question, edns: self.edns, transport: self.transport }
    }
}

/// The DNS service of one run, shared by every worker.
pub struct Dns {
    ipv6: bool,
    fake: Option<Arc<FakeIp>>,
    resolver: Arc<Resolver>,
    hints: Mutex<Lru<IpAddr, (Name, Instant)>>,
    counters: Arc<Counters>,
    mark: Option<u32>,
}

impl std::fmt::Debug for Dns {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Dns").field("ipv6", &self.ipv6).field("counts", &self.counters.snapshot()).finish()
    }
}

impl Dns {
    /// Builds the service and reads the fake-IP log. A log that cannot be used is a warning, not an error.
    ///
    /// # Errors
    /// A fake range has no address to hand out.
    pub fn open(config: Config) -> Result<Self, OpenError> {
        let Config { ipv6, mode, upstreams, dialer, log, runtime } = config;
        let counters = Arc::new(Counters::default());
        let mut ranges = dialer.fake.clone();
        let fake = match mode {
            Mode::Mapping => None,
            Mode::FakeIp { range, range6, filter, ttl } => {
                let range6 = range6.filter(|_| ipv6);
                ranges.push(IpNet::V4(range));
                ranges.extend(range6.map(IpNet::V6));
                let fake = FakeIp::open((range, range6), filter, ttl, log.as_deref(), runtime.clone())?;
                Some(Arc::new(fake))
            }
        };
        let mark = dialer.mark.map(|mark| mark.0);
        let resolver = Resolver::new(dialer, upstreams, ranges, runtime, Arc::clone(&counters));
        Ok(Self { ipv6, fake, resolver: Arc::new(resolver), hints: Mutex::new(Lru::new(HINTS)), counters, mark })
    }

    /// Answers `query` from memory: no socket, no task, no wait. The reply replaces what `reply` held.
    pub fn answer(&self, query: &[u8], transport: Transport, now: Instant, reply: &mut Vec<u8>) -> Answer {
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
        let dotted = Dotted::new(query.name());
        if let Some(name) = &dotted
            && self.answer_ourselves(&query, name.as_str(), now, reply)
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
                Answer::Ask(Question::new(&query, &key))
            }
        }
    }

    /// Returns once every address that [`Dns::answer`] put into a reply before the call is in the log. Costs two
    /// loads when there is nothing new, and one write(2) for any number of new names.
    pub fn flush(&self) {
        if let Some(fake) = &self.fake {
            fake.flush();
        }
    }

    /// Asks the nameservers what [`Dns::answer`] could not say. There is always a reply: SERVFAIL at worst, after
    /// five seconds at the latest. It may be awaited on any runtime, and dropped at any time.
    pub async fn ask(&self, question: Question) -> Vec<u8> {
        let outcome = self.resolver.resolve(&question.key).await;
        let mut reply = Vec::new();
        self.write(&question.query(), &outcome, now(), &mut reply);
        reply
    }

    /// What `ip` stands for. Asking counts as a use: the address stays with its name for another minute at least.
    #[must_use]
    pub fn name_of(&self, ip: IpAddr, now: Instant) -> Fake {
        self.fake.as_ref().map_or(Fake::NotFake, |fake| fake.name_of(ip, now))
    }

    /// The name for which a real address was last given out: the asked one, not its aliases. For flows to addresses
    /// that are [`Fake::NotFake`], so that domain rules can match them.
    #[must_use]
    pub fn hint(&self, ip: IpAddr) -> Option<Name> {
        let now = now();
        self.hints.lock().get(&ip).filter(|(_, until)| now < *until).map(|(name, _)| name.clone())
    }

    /// Keeps the name of a fake address for as long as the result lives: one per flow.
    pub fn hold(&self, ip: IpAddr) -> Held {
        self.fake.as_ref().map(|fake| fake.hold(ip)).unwrap_or_default()
    }

    /// What happened so far.
    #[must_use]
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// How many fake addresses have a name, both families together.
    #[must_use]
    pub fn fake_names(&self) -> usize {
        self.fake.as_ref().map_or(0, |fake| fake.names())
    }

    /// Writes the reply if `name` is ours to answer.
    fn answer_ourselves(&self, query: &Query<'_>, name: &str, now: Instant, reply: &mut Vec<u8>) -> bool {
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
            Some(Special::Reverse(ip)) => match self.answer_reverse(query, ip, now, reply) {
                true => &self.counters.local,
                false => return false,
            },
            None => match self.fake.as_ref().filter(|fake| fake.fakes(name)) {
                Some(fake) => match self.answer_fake(fake, query, name, now, reply) {
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
    fn answer_reverse(&self, query: &Query<'_>, ip: IpAddr, now: Instant, reply: &mut Vec<u8>) -> bool {
        match self.name_of(ip, now) {
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
        now: Instant,
        reply: &mut Vec<u8>,
    ) -> bool {
        let v6 = query.kind() == kind::AAAA;
        match query.kind() {
            kind::AAAA if !fake.has_v6() => query.empty(rcode::NO_ERROR, reply),
            kind::A | kind::AAAA => match fake.address(name, v6, now) {
                Ok(ip) => query.address(ip, fake.ttl, reply),
                Err(Exhausted) => {
                    count(&self.counters.exhausted);
                    query.failure(reason::OTHER, "every fake address is in use; a larger fake-ip-range helps", reply);
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
                answered.message.fit(query, answered.age(now), reply);
            }
            Err(why) => query.failure(reason::NO_REACHABLE_AUTHORITY, &why.to_string(), reply),
        }
    }

    fn remember(&self, query: &Query<'_>, answered: &Answered, now: Instant) {
        if answered.message.addresses.is_empty() {
            return;
        }
        let Some(name) = Dotted::new(query.name()).and_then(|name| Name::new(name.as_str()).ok()) else { return };
        let until = answered.at + Duration::from_secs(answered.message.lifetime.into()) + HINT_GRACE;
        let until = until.max(now + HINT_GRACE);
        let mut hints = self.hints.lock();
        for ip in answered.message.addresses.iter() {
            hints.insert(*ip, (name.clone(), until));
        }
    }
}

/// The clock of this module: tokio's, so that tests can hold it.
fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
