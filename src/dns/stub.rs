//! A nameserver on this host whose own questions come to us (a forwarder): those whom it asks are asked in its place,
//! without us.
//!
//! It can find no real address of a name that gets fake ones, since we are asked for that; and a real one that it found it
//! would remember, and give to programs. But it can be made to show whom it asks. A tracer is a question for a name below
//! the one that is sought, by a label that nobody can guess: it comes to us, addressed to the server that the stub has
//! chosen for that name just now, and goes no further.

use std::collections::HashMap;
use std::fmt;
use std::hash::{BuildHasher, RandomState};
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};

use super::Transport;
use super::counters::count;
use super::key::Parts;
use super::lru::Lru;
use super::message::Message;
use super::special::is_of_home;
use super::upstream::{Exchange, ExchangeError, Upstream};
use super::wire::{MAX_NAME, Query, kind, rcode};

/// Hexadecimal digits of a label: a number, and what proves that it is ours.
const LABEL: usize = 32;
/// Servers that one question may find.
const MOST_FOUND: usize = 8;
/// Tracers of one question. A further one is sent when those that were found say nothing.
const MOST_TRACERS: usize = 3;
/// How long a server may be silent until the stub is made to choose another.
const PATIENCE: Duration = Duration::from_millis(1500);
/// How long the stub may take to say what it knows of a name by itself until those whom it would ask are asked: of one that
/// home networks keep to themselves, and of others where it hears of us at once what we answer to programs.
const OF_HOME: Duration = Duration::from_millis(200);
const OF_FAKED: Duration = Duration::from_millis(50);
/// For so long the stub hears that a server that failed us has failed.
const UNFIT: Duration = Duration::from_secs(30);
/// Servers of which is known how they stand.
const MOST_KNOWN: usize = 64;

/// Whom a stub asks: a nameserver, or None, us.
type Found = Option<Upstream>;

/// The tracers under way. Services whose questions come to each other share them.
pub struct Tracers {
    /// SipHash under keys from the operating system: nobody else can make a label.
    number: RandomState,
    proof: RandomState,
    next: AtomicU64,
    sent: Mutex<HashMap<u64, mpsc::Sender<Found>>>,
    standing: Mutex<Lru<SocketAddr, Standing>>,
}

/// What came last of asking a server.
#[derive(Clone, Copy)]
enum Standing {
    AnsweredAt(Instant),
    UnfitUntil(Instant),
}

/// A tracer, until it is dropped.
struct Tracer<'a> {
    tracers: &'a Tracers,
    number: u64,
    /// On the wire.
    name: Vec<u8>,
}

impl fmt::Debug for Tracers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tracers").finish_non_exhaustive()
    }
}

impl Default for Tracers {
    fn default() -> Self {
        Self {
            number: RandomState::new(),
            proof: RandomState::new(),
            next: AtomicU64::new(0),
            sent: Mutex::default(),
            standing: Mutex::new(Lru::new(MOST_KNOWN)),
        }
    }
}

impl Tracers {
    /// A tracer below `name`, or below what is left of it where there is no room. Who is found is told to `found`.
    fn send(&self, name: &[u8], found: mpsc::Sender<Found>) -> Tracer<'_> {
        let number = self.number.hash_one(self.next.fetch_add(1, Ordering::Relaxed));
        let label = format!("{number:016x}{:016x}", self.proof.hash_one(number));
        let mut below = name;
        while 1 + LABEL + below.len() > MAX_NAME {
            below = below.get(1 + usize::from(below[0])..).unwrap_or(&[0]);
        }
        let name = [&[LABEL as u8], label.as_bytes(), below].concat();
        self.sent.lock().insert(number, found);
        Tracer { tracers: self, number, name }
    }

    /// If `query` is a tracer, which is addressed to `server` (None: to us): the code to answer it with. It is known by its
    /// label for as long as we run, so that one that comes late is not taken for a name.
    pub(super) fn catch(&self, query: &Query<'_>, server: Option<SocketAddr>) -> Option<u16> {
        let number = self.number_of(query.name())?;
        if let Some(found) = self.sent.lock().get(&number) {
            let tcp_only = query.transport == Transport::Tcp;
            // One that asks more servers than there is room for has shown enough of them.
            let _ = found.try_send(server.map(|address| Upstream { address, tcp_only }));
        }
        let unfit = server.is_some_and(|server| self.is_unfit(server));
        Some(if unfit { rcode::SERV_FAIL } else { rcode::NX_DOMAIN })
    }

    fn number_of(&self, name: &[u8]) -> Option<u64> {
        let label = name.split_first().filter(|(length, _)| usize::from(**length) == LABEL)?.1.get(..LABEL)?;
        let text = std::str::from_utf8(label).ok()?;
        let half = |range| u64::from_str_radix(text.get(range)?, 16).ok();
        let (number, proof) = (half(0..LABEL / 2)?, half(LABEL / 2..LABEL)?);
        (proof == self.proof.hash_one(number)).then_some(number)
    }

    fn is_unfit(&self, server: SocketAddr) -> bool {
        matches!(self.standing.lock().get(&server), Some(Standing::UnfitUntil(until)) if Instant::now() < *until)
    }

    fn has_answered_since(&self, server: SocketAddr, since: Instant) -> bool {
        matches!(self.standing.lock().get(&server), Some(Standing::AnsweredAt(at)) if since <= *at)
    }

    fn judge(&self, server: SocketAddr, fit: bool) {
        let now = Instant::now();
        let standing = if fit { Standing::AnsweredAt(now) } else { Standing::UnfitUntil(now + UNFIT) };
        self.standing.lock().insert(server, standing);
    }
}

impl Drop for Tracer<'_> {
    fn drop(&mut self) {
        self.tracers.sent.lock().remove(&self.number);
    }
}

/// Those that the tracers of one question have found.
#[derive(Default)]
struct Search {
    /// Asked, with since when they owe an answer, if they still do.
    asked: Vec<(SocketAddr, Option<Instant>)>,
    /// Failed lately, and so asked only where nobody else answers.
    spare: Vec<Upstream>,
    /// The stub is told to ask us.
    asks_us: bool,
}

impl Search {
    /// Takes who was found; returned if it is to be asked now.
    fn take(&mut self, exchange: &Exchange<'_>, found: Found) -> Option<Upstream> {
        let Some(server) = found.filter(|server| !exchange.is_fake(server.address.ip())) else {
            self.asks_us = true;
            return None;
        };
        if self.asked.iter().any(|(asked, _)| *asked == server.address) {
            return None;
        }
        if exchange.tracers.is_unfit(server.address) {
            self.spare.push(server);
            return None;
        }
        self.asked.push((server.address, Some(Instant::now())));
        Some(server)
    }

    fn has_found_nobody(&self) -> bool {
        self.asked.is_empty() && self.spare.is_empty() && !self.asks_us
    }

    /// One of those that are left.
    fn fall_back(&mut self) -> Option<Upstream> {
        let server = self.spare.pop()?;
        self.spare.retain(|other| other.address != server.address);
        self.asked.push((server.address, Some(Instant::now())));
        Some(server)
    }

    /// Notes what came of asking `server`; true if that is an answer.
    fn hear(&mut self, tracers: &Tracers, server: SocketAddr, outcome: &Result<Message, ExchangeError>) -> bool {
        self.asked.iter_mut().filter(|(asked, _)| *asked == server).for_each(|(_, owes)| *owes = None);
        // One that refuses may refuse everybody, while SERVFAIL may be of this name alone.
        let fit = outcome.as_ref().is_ok_and(|message| message.code != rcode::REFUSED);
        tracers.judge(server, fit);
        fit
    }

    /// Those that have said nothing have failed, unless they answer other questions meanwhile: then it is this name that is slow.
    fn lose_patience(&self, tracers: &Tracers) {
        let owing = self.asked.iter().filter_map(|(server, owes)| Some((*server, (*owes)?)));
        owing
            .filter(|(server, since)| !tracers.has_answered_since(*server, *since))
            .for_each(|(server, _)| tracers.judge(server, false));
    }
}

impl Exchange<'_> {
    /// Asks `stub` for what it knows by itself, and those whom it asks for the rest. Where its questions do not come to us
    /// (it encrypts them, or its user is left out) its own answer counts. Waits for as long as the caller does.
    ///
    /// What is returned begins with who answered, or failed.
    pub(super) async fn ask_behind(&self, stub: Upstream) -> (SocketAddr, Result<Message, ExchangeError>) {
        let (noted, mut found) = mpsc::channel(MOST_FOUND);
        let ask = |server: Upstream| async move { (server.address, self.ask_server(server).await) };
        let mut tracers = (0..MOST_TRACERS).map(|_| self.trace(stub, noted.clone()));
        let mut tracing: FuturesUnordered<_> = tracers.next().into_iter().collect();
        let (mut search, mut asked, mut failed) = (Search::default(), FuturesUnordered::new(), None);
        let (mut own, mut said) = (pin!(self.ask(stub)), None);
        let (mut held, its_turn) = (Vec::new(), Instant::now() + self.head_start());
        // Each that is asked has it anew.
        let mut patience = Instant::now() + PATIENCE;
        loop {
            if said.is_some() || Instant::now() >= its_turn {
                for server in held.drain(..).filter_map(|found| search.take(self, found)) {
                    asked.push(ask(server));
                    patience = Instant::now() + PATIENCE;
                }
            }
            if asked.is_empty() && tracing.is_empty() && held.is_empty() {
                let Some(server) = search.fall_back() else { break };
                asked.push(ask(server));
                patience = Instant::now() + PATIENCE;
            }
            let has_spoken = said.as_ref().is_some_and(|said| !matches!(said, Ok(message) if self.has_fake(message)));
            tokio::select! {
                // Who was found is known before the stub has its answer to the tracer; what it knows by itself, before that.
                biased;
                outcome = &mut own, if said.is_none() => match outcome {
                    Ok(message) if self.is_own(&message, &search) => return (stub.address, Ok(message)),
                    outcome => said = Some(outcome),
                },
                Some(server) = found.recv() => held.push(server),
                () = sleep_until(its_turn), if !held.is_empty() => {}
                Some((server, outcome)) = asked.next() => {
                    if search.hear(self.tracers, server, &outcome) {
                        let exists = said.filter(|said| self.is_overruled(said, &outcome));
                        return exists.map_or((server, outcome), |said| (stub.address, said));
                    }
                    failed = Some((server, outcome));
                    tracing.extend(tracers.next());
                    patience = Instant::now() + PATIENCE;
                }
                Some(()) = tracing.next() => {}
                // It drops tracers, or asks where we do not see it, slowly: nobody is found, and what it said counts.
                () = sleep_until(patience), if asked.is_empty() && has_spoken => tracing.clear(),
                () = sleep_until(patience), if !search.spare.is_empty() || !asked.is_empty() && tracers.len() > 0 => {
                    search.lose_patience(self.tracers);
                    asked.extend(search.fall_back().map(&ask));
                    tracing.extend(tracers.next());
                    patience = Instant::now() + PATIENCE;
                }
            }
        }
        match (failed, said) {
            (Some(failed), _) => failed,
            (None, _) if search.asks_us => {
                count(&self.counters.looped);
                (stub.address, Err(ExchangeError::AsksUs))
            }
            (None, Some(said)) => (stub.address, said),
            (None, None) => (stub.address, own.await),
        }
    }

    /// By how much the answer of the stub may be later than its tracer. A name of the home is for those at home to hear.
    fn head_start(&self) -> Duration {
        match self.question.kind {
            _ if is_of_home(self.question.name) => OF_HOME,
            kind::A | kind::AAAA if !self.fake.is_empty() => OF_FAKED,
            _ => Duration::ZERO,
        }
    }

    /// Whether the stub knows what it says by itself: it bears data, or it says no before anybody was asked.
    fn is_own(&self, message: &Message, search: &Search) -> bool {
        let says_no = message.code == rcode::NX_DOMAIN && search.has_found_nobody();
        says_no || message.has_data() && !self.has_fake(message)
    }

    /// Whether a server's `outcome` denies a name of which the stub has `said` that it exists, without data of this type.
    fn is_overruled(&self, said: &Result<Message, ExchangeError>, outcome: &Result<Message, ExchangeError>) -> bool {
        let exists = |said: &Message| said.code == rcode::NO_ERROR && !said.is_referral && !self.has_fake(said);
        said.as_ref().is_ok_and(exists) && outcome.as_ref().is_ok_and(|message| message.code == rcode::NX_DOMAIN)
    }

    /// What `server` says, if it is one who looks names up.
    async fn ask_server(&self, server: Upstream) -> Result<Message, ExchangeError> {
        match self.ask(server).await? {
            message if message.is_referral => Err(ExchangeError::Refers),
            message => Ok(message),
        }
    }

    /// Sends a tracer to `stub` and waits until it has its answer, which says nothing.
    async fn trace(&self, stub: Upstream, found: mpsc::Sender<Found>) {
        let tracer = self.tracers.send(self.question.name, found);
        // Without validation by the stub: our answer is signed by nobody.
        let question = Parts { name: &tracer.name, kind: kind::A, dnssec_ok: false, checking_disabled: true };
        let _ = Exchange { question, ..*self }.ask(stub).await;
    }
}

#[cfg(test)]
#[path = "stub_tests.rs"]
mod tests;
