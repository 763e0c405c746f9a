//! Questions to the nameservers: a bounded cache in front, one flight per question behind it.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use ipnet::IpNet;
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::watch;

use super::counters::{Counters, count};
use super::flights::{Flight, Flights, Whose};
use super::key::Parts;
use super::lru::Lru;
use super::message::Message;
use super::stub::Tracers;
use super::upstream::{Exchange, Ids, Source};
use crate::platform::Dialer;

/// Answers kept, as many as mihomo keeps.
const CACHE: usize = 4096;
/// Longer answers, in bytes, are fetched each time: so the cache stays below 50 MB whatever is asked.
const MAX_KEPT: usize = 12 << 10;
/// How long a question may take in all.
pub(super) const TOTAL: Duration = Duration::from_secs(5);
/// How long silence is remembered (RFC 9520 section 3.2: at least a second).
const SILENCE: Duration = Duration::from_secs(1);

/// What came of a question.
pub(super) type Outcome = Result<Answered, Failure>;

/// An answer and when it came.
#[derive(Debug, Clone)]
pub(super) struct Answered {
    pub(super) message: Arc<Message>,
    pub(super) at: Instant,
}

impl Answered {
    /// Seconds since it came.
    pub(super) fn age(&self, now: Instant) -> u32 {
        u32::try_from(now.saturating_duration_since(self.at).as_secs()).unwrap_or(u32::MAX)
    }
}

/// Why there is no answer at all.
#[derive(Debug, Clone, thiserror::Error)]
pub(super) enum Failure {
    #[error("no nameserver answered in time")]
    TimedOut,
    #[error("{0}")]
    Failed(Arc<str>),
}

struct Kept {
    outcome: Outcome,
    until: Instant,
}

/// Asks the nameservers.
pub(super) struct Resolver {
    dialer: Dialer,
    sources: Vec<Source>,
    fake: Vec<IpNet>,
    /// Where questions travel: it outlives the worker that asked.
    runtime: Handle,
    ids: Ids,
    /// What finds those behind a stub.
    pub(super) tracers: Arc<Tracers>,
    counters: Arc<Counters>,
    cache: Mutex<Lru<Arc<[u8]>, Kept>>,
    flights: Mutex<Flights>,
}

impl Resolver {
    pub(super) fn new(
        dialer: Dialer,
        (sources, tracers): (Vec<Source>, Arc<Tracers>),
        fake: Vec<IpNet>,
        runtime: Handle,
        counters: Arc<Counters>,
    ) -> Self {
        Self {
            dialer,
            sources,
            fake,
            runtime,
            ids: Ids::new(),
            tracers,
            counters,
            cache: Mutex::new(Lru::new(CACHE)),
            flights: Mutex::default(),
        }
    }

    /// Whether a nameserver stands in the local network, and so may know its private names.
    pub(super) fn is_local(&self) -> bool {
        self.sources.iter().any(Source::is_local)
    }

    /// The outcome that is still fresh, if there is one.
    pub(super) fn cached(&self, key: &[u8], now: Instant) -> Option<Outcome> {
        self.cache.lock().get(key).filter(|kept| now < kept.until).map(|kept| kept.outcome.clone())
    }

    /// The outcome from the cache, from the flight under way, or from a new one, for `whose` sake. Dropping the future leaves
    /// the flight to whoever else waits, and its answer to the cache.
    pub(super) async fn resolve(self: &Arc<Self>, key: &[u8], whose: Whose) -> Outcome {
        let mut flight = match self.join(key, whose) {
            Ok(flight) => flight,
            Err(outcome) => return outcome,
        };
        // An error means that the runtime of the flight is gone, and with it the program's DNS.
        match flight.wait_for(Option::is_some).await.map(|outcome| outcome.clone()) {
            Ok(Some(outcome)) => outcome,
            _ => Err(Failure::Failed("the DNS service is stopping".into())),
        }
    }

    /// Joins the flight of `key`, or begins it where there is room for that.
    fn join(self: &Arc<Self>, key: &[u8], whose: Whose) -> Result<Flight, Outcome> {
        let mut flights = self.flights.lock();
        if let Some(flight) = flights.find(key) {
            return Ok(flight);
        }
        // Under the lock: a flight that lands files its answer before it leaves the table.
        if let Some(outcome) = self.cached(key, super::now()) {
            return Err(outcome);
        }
        if !flights.has_room_for(whose) {
            return Err(Err(Failure::Failed("too many questions are under way".into())));
        }
        let (landed, flight) = watch::channel(None);
        let key: Arc<[u8]> = key.into();
        flights.begin(Arc::clone(&key), flight.clone(), whose);
        drop(flights);
        let landing = Landing { resolver: Arc::clone(self), key };
        self.runtime.spawn(async move {
            let outcome = landing.resolver.race(&landing.key).await;
            landing.resolver.keep(&landing.key, &outcome);
            drop(landing);
            landed.send_replace(Some(outcome));
        });
        Ok(flight)
    }

    /// Asks all nameservers at once. The first that does not fail wins; else a failure that one of them reported.
    async fn race(&self, key: &[u8]) -> Outcome {
        let Self { dialer, fake, ids, tracers, counters, .. } = self;
        let exchange = &Exchange { dialer, fake, ids, tracers, counters, question: Parts::of(key) };
        let mut sought: FuturesUnordered<_> = self.sources.iter().map(Source::find).collect();
        let mut asked = FuturesUnordered::new();
        let mut reported = None;
        let mut failure = Failure::Failed("the profile names no nameserver".into());
        let landed = tokio::time::timeout(TOTAL, async {
            loop {
                // A nameserver whose name is still looked up keeps no other from being asked.
                let (address, answer) = tokio::select! {
                    Some(found) = sought.next() => {
                        match found {
                            Ok(upstreams) => asked.extend(upstreams.into_iter().map(|whom| exchange.ask_whom(whom))),
                            Err(why) => failure = Failure::Failed(why),
                        }
                        continue;
                    }
                    Some(answer) = asked.next() => answer,
                    else => return None,
                };
                match answer {
                    Ok(message) if exchange.has_fake(&message) => {
                        count(&self.counters.upstream_failures);
                        count(&self.counters.looped);
                        let text = format!("nameserver {} answers with addresses of our fake-ip-range", address);
                        failure = Failure::Failed(text.into());
                    }
                    Ok(message) if message.is_failure() => reported = Some(message),
                    Ok(message) => return Some(message),
                    Err(error) => failure = Failure::Failed(format!("nameserver {}: {error}", address).into()),
                }
            }
        });
        let message = match landed.await {
            Ok(message) => message,
            Err(_) => {
                // Those that are still silent at the end have failed too.
                self.counters.upstream_failures.fetch_add(asked.len() as u64, Ordering::Relaxed);
                failure = Failure::TimedOut;
                None
            }
        };
        let message = message.or(reported).ok_or(failure)?;
        Ok(Answered { message: Arc::new(message), at: super::now() })
    }

    fn keep(&self, key: &Arc<[u8]>, outcome: &Outcome) {
        let until = match outcome {
            Ok(answered) if answered.message.lifetime == 0 || answered.message.len() > MAX_KEPT => return,
            Ok(answered) => answered.at + Duration::from_secs(answered.message.lifetime.into()),
            Err(_) => super::now() + SILENCE,
        };
        self.cache.lock().insert(Arc::clone(key), Kept { outcome: outcome.clone(), until });
    }
}

/// Takes the flight off the table however it ends, even with the runtime.
struct Landing {
    resolver: Arc<Resolver>,
    key: Arc<[u8]>,
}

impl Drop for Landing {
    fn drop(&mut self) {
        self.resolver.flights.lock().end(&self.key);
    }
}

#[cfg(test)]
#[path = "resolver_tests.rs"]
mod tests;
