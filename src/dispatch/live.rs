//! What happens to flows, counted, and told in one line each when they end.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Instant;

use crate::session::Session;

/// Counters over all flows since the start.
#[derive(Debug, Default)]
pub struct Counters {
    /// Flows that an outbound took.
    pub opened: AtomicU64,
    /// Flows that ended after an outbound took them.
    pub closed: AtomicU64,
    /// Flows that no outbound took.
    pub failed: AtomicU64,
    /// Flows that a rule rejected.
    pub rejected: AtomicU64,
    /// Flows to a fake address that we never handed out.
    pub unknown_fake: AtomicU64,
    /// Payload bytes from clients.
    pub up: AtomicU64,
    /// Payload bytes to clients.
    pub down: AtomicU64,
    /// Packets lost on their way from one worker to another.
    pub hand_over_lost: AtomicU64,
    /// Datagrams dropped: a queue or a socket was full.
    pub datagrams_dropped: AtomicU64,
}

impl Counters {
    /// One line of numbers for a person.
    #[must_use]
    pub fn snapshot(&self) -> serde_json::Value {
        serde_json::json!({
            "opened": self.opened.load(Relaxed),
            "closed": self.closed.load(Relaxed),
            "failed": self.failed.load(Relaxed),
            "rejected": self.rejected.load(Relaxed),
            "unknown_fake": self.unknown_fake.load(Relaxed),
            "up": self.up.load(Relaxed),
            "down": self.down.load(Relaxed),
            "hand_over_lost": self.hand_over_lost.load(Relaxed),
            "datagrams_dropped": self.datagrams_dropped.load(Relaxed),
        })
    }
}

/// Why a flow goes where it goes.
#[derive(Debug, Clone)]
pub struct Verdict {
    /// The rule's text with its line in the profile, or the mode that decided.
    pub rule: Arc<str>,
    /// The outbound's chain, outermost first, joined by arrows.
    pub chain: Arc<str>,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} by {}", self.chain, self.rule)
    }
}

/// One flow's account. Its log line is written when it ends.
#[derive(Debug)]
pub struct Account {
    counters: Arc<Counters>,
    session: Session,
    fake: Option<std::net::IpAddr>,
    verdict: Option<Verdict>,
    started: Instant,
    up: u64,
    down: u64,
    open: bool,
    told: bool,
}

impl Account {
    /// A flow that has just arrived; `fake` is the fake address that its client used.
    #[must_use]
    pub fn new(counters: Arc<Counters>, session: Session, fake: Option<std::net::IpAddr>) -> Self {
        Self {
            counters,
            session,
            fake,
            verdict: None,
            started: Instant::now(),
            up: 0,
            down: 0,
            open: false,
            told: false,
        }
    }

    /// The destination behind what the client wrote: its name, and the fake address that stood for it.
    pub fn found(&mut self, session: &Session, fake: Option<std::net::IpAddr>) {
        self.session.destination = session.destination.clone();
        self.fake = fake;
    }

    /// The router has decided.
    pub fn decided(&mut self, verdict: Verdict) {
        self.verdict = Some(verdict);
    }

    /// An outbound took the flow.
    pub fn opened(&mut self) {
        self.open = true;
        self.counters.opened.fetch_add(1, Relaxed);
    }

    /// Bytes moved from the client (`up`) and to it (`down`).
    pub fn moved(&mut self, up: u64, down: u64) {
        self.up += up;
        self.down += down;
        self.counters.up.fetch_add(up, Relaxed);
        self.counters.down.fetch_add(down, Relaxed);
    }

    /// The flow ended without being carried.
    pub fn failed(mut self, reason: &dyn fmt::Display, rejected: bool) {
        let counter = if rejected { &self.counters.rejected } else { &self.counters.failed };
        counter.fetch_add(1, Relaxed);
        self.tell(if rejected { "rejected" } else { "failed" }, reason);
    }

    /// The flow ended after it was carried.
    pub fn closed(mut self, reason: &dyn fmt::Display) {
        self.counters.closed.fetch_add(1, Relaxed);
        self.tell("closed", reason);
    }

    /// The flow's datagrams go into the account of an association that is open already.
    pub fn joined(mut self) {
        self.told = true;
    }

    fn tell(&mut self, outcome: &str, reason: &dyn fmt::Display) {
        self.told = true;
        let (rule, chain) = match &self.verdict {
            Some(verdict) => (&*verdict.rule, &*verdict.chain),
            None => ("-", "-"),
        };
        tracing::info!(
            target: "flow",
            network = %self.session.network,
            inbound = %self.session.inbound,
            source = %self.session.source,
            destination = %self.session.destination,
            fake = self.fake.map(tracing::field::display),
            rule,
            outbound = chain,
            up = self.up,
            down = self.down,
            ms = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX),
            outcome,
            reason = %reason,
        );
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        if self.told {
            return;
        }
        if self.open {
            self.counters.closed.fetch_add(1, Relaxed);
            self.tell("closed", &"we stopped");
        } else {
            self.counters.failed.fetch_add(1, Relaxed);
            self.tell("failed", &"given up before an outbound answered");
        }
    }
}
