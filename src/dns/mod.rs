//! The DNS service: fake addresses for names, real answers for the rest, and look-ups of our own.
//!
//! ```text
//! query -> wire -> special names | fake_ip | cache      Dns::answer: in memory, on the packet path
//!                                  miss -> resolver     Dns::ask: nameservers over UDP and TCP, one flight a question
//! flow  -> Dns::name_of, Dns::hint                      an address back to its name
//! dial  -> net::Lookup                                  a name to its real addresses
//! ```

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use ipnet::{Ipv4Net, Ipv6Net};
use parking_lot::Mutex;
use tokio::runtime::Handle;

use crate::net::Name;
use crate::platform::Dialer;

mod answer;
mod counters;
mod fake_ip;
mod filter;
mod flights;
mod key;
mod lookup;
mod lru;
mod message;
mod reply;
mod resolver;
mod server;
mod special;
mod stub;
#[cfg(test)]
mod testing;
mod upstream;
mod wire;

pub use answer::{Answer, Asker, Question, Transport};
pub use counters::{Counters, Counts};
pub use fake_ip::{Fake, Held, OpenError};
pub use filter::{Filter, FilterMode, InvalidPattern, Wildcards};
pub use server::{Server, serve, serve_stream};
pub use stub::Tracers;
pub use upstream::{Source, System, Upstream};

use fake_ip::FakeIp;
use lru::Lru;
use resolver::Resolver;

/// Addresses whose names are remembered.
const HINTS: usize = 16_384;
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
    /// `redir-host`: real answers, whose names are remembered.
    Mapping,
    /// `normal`: real answers, and nothing is remembered.
    Plain,
}

/// What [`Dns::open`] needs.
#[derive(Debug)]
pub struct Config {
    /// `dns.ipv6`; false answers every AAAA with nothing, and no look-up of ours yields IPv6.
    pub ipv6: bool,
    /// How names are answered.
    pub mode: Mode,
    /// `nameserver`, all asked at once; the first that does not fail wins.
    pub nameservers: Vec<Source>,
    /// What finds those behind a stub: one of a run, for whatever looks names up in it.
    pub tracers: Arc<Tracers>,
    /// Makes the sockets towards them.
    pub dialer: Dialer,
    /// The file that keeps fake addresses across restarts.
    pub log: Option<PathBuf>,
    /// The runtime on which questions travel; it outlives every worker.
    pub runtime: Handle,
}

/// The DNS service of one run, shared by every worker.
pub struct Dns {
    ipv6: bool,
    fake: Option<Arc<FakeIp>>,
    resolver: Arc<Resolver>,
    /// None where nothing is to be remembered.
    hints: Option<Mutex<Lru<IpAddr, (Name, Instant)>>>,
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
        let Config { ipv6, mode, nameservers, tracers, dialer, log, runtime } = config;
        let counters = Arc::new(Counters::default());
        let ranges = dialer.fake.clone();
        let hints = (!matches!(mode, Mode::Plain)).then(|| Mutex::new(Lru::new(HINTS)));
        let fake = match mode {
            Mode::Mapping | Mode::Plain => None,
            Mode::FakeIp { range, range6, filter, ttl } => {
                let range6 = range6.filter(|_| ipv6);
                let fake = FakeIp::open((range, range6), filter, ttl, log.as_deref(), runtime.clone())?;
                Some(Arc::new(fake))
            }
        };
        let mark = dialer.mark.map(|mark| mark.0);
        let resolver = Resolver::new(dialer, (nameservers, tracers), ranges, runtime, Arc::clone(&counters));
        Ok(Self { ipv6, fake, resolver: Arc::new(resolver), hints, counters, mark })
    }

    /// Returns once every address that [`Dns::answer`] put into a reply before the call is in the log. Costs two
    /// loads when there is nothing new, and one write(2) for any number of new names.
    pub fn flush(&self) {
        if let Some(fake) = &self.fake {
            fake.flush();
        }
    }

    /// Writes the log anew if its file is not at its place any more; may wait for a disk. True: it was missing.
    pub fn put_back(&self) -> bool {
        self.fake.as_ref().is_some_and(|fake| fake.put_back())
    }

    /// What `ip` stands for now. Asking is no use of it.
    #[must_use]
    pub fn name_of(&self, ip: IpAddr) -> Fake {
        self.fake.as_ref().map_or(Fake::NotFake, |fake| fake.name_of(ip))
    }

    /// The name for which a real address was last given out: the asked one, not its aliases. For flows to addresses
    /// that are [`Fake::NotFake`], so that domain rules can match them.
    #[must_use]
    pub fn hint(&self, ip: IpAddr) -> Option<Name> {
        let now = now();
        self.hints.as_ref()?.lock().get(&ip).filter(|(_, until)| now < *until).map(|(name, _)| name.clone())
    }

    /// What `ip` stands for, for a flow of `client`: the address keeps its name for as long as the other result lives, and
    /// for a minute more.
    pub fn hold(&self, ip: IpAddr, client: IpAddr, now: Instant) -> (Fake, Held) {
        self.fake.as_ref().map_or_else(|| (Fake::NotFake, Held::default()), |fake| fake.hold(ip, client, now))
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
}

/// The clock of this module: tokio's, so that tests can hold it.
fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
