//! What happens to flows, counted, and told in one line each when they end.

use std::fmt;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::carried::{Asked, Pulse};
use super::queue::Queue;
use crate::platform::{PORT_RANGE, descriptors, read_parameter};
use crate::session::{Network, Session};
use crate::stack;

/// Between two lines in the log that say that descriptors or ports are short, or that a client was held back.
const SILENCE: Duration = Duration::from_secs(60);

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
    /// Flows and questions of our own sockets that came back by the TUN.
    pub returned: AtomicU64,
    /// TCP flows ended because no descriptor was left.
    pub evicted: AtomicU64,
    /// TCP dials ended because no descriptor was left.
    pub given_up: AtomicU64,
    /// Attempts to open a flow or an association for which no local port was left.
    pub no_port: AtomicU64,
    /// Payload bytes from clients.
    pub up: AtomicU64,
    /// Payload bytes to clients.
    pub down: AtomicU64,
    /// Packets lost on their way from one worker to another.
    pub hand_over_lost: AtomicU64,
    /// Datagrams dropped: a queue or a socket was full.
    pub datagrams_dropped: AtomicU64,
    /// Datagrams to new peers dropped: their client opened ways faster than a worker that was behind could take.
    pub held_back: AtomicU64,
    /// Datagrams that wait.
    pub queue: Queue,
    /// Mistakes of ours that cost a packet and not the worker.
    pub panics: AtomicU64,
    /// UDP associations that are open now.
    pub associations: AtomicU64,
    /// What each worker's stack counted when it last went to sleep.
    stacks: Mutex<Vec<stack::Counters>>,
    /// When somebody was last told that descriptors are short.
    short: Mutex<Option<Instant>>,
    /// When somebody was last told that local ports are short.
    portless: Mutex<Option<Instant>>,
    /// When somebody was last told that a client was held back.
    held: Mutex<Option<Instant>>,
    listener: OnceLock<Arc<dyn Listener>>,
}

/// Hears of every flow, on the worker that carries it: it must not block. Never called per packet.
pub trait Listener: fmt::Debug + Send + Sync {
    /// The router has decided; nothing is dialled yet. Each peer that a client sends datagrams to is a flow.
    fn decided(&self, flow: &Account);

    /// The flow is over, or was never carried.
    fn ended(&self, flow: &Account, outcome: Outcome, reason: &dyn fmt::Display);
}

/// How a flow ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// After an outbound carried it.
    Closed,
    /// No outbound could.
    Failed,
    /// A rule rejected it.
    Rejected,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Closed => "closed",
            Self::Failed => "failed",
            Self::Rejected => "rejected",
        })
    }
}

impl Counters {
    /// Notes what the stack of `worker` has counted so far.
    pub fn publish(&self, worker: usize, counted: stack::Counters) {
        let mut stacks = self.stacks.lock();
        if stacks.len() <= worker {
            stacks.resize(worker + 1, stack::Counters::default());
        }
        stacks[worker] = counted;
    }

    /// What all stacks together have counted.
    #[must_use]
    pub fn stacks(&self) -> stack::Counters {
        self.stacks.lock().iter().fold(stack::Counters::default(), |all, one| all.plus(one))
    }

    /// Tells `listener` of every flow from now on. There is one for the life of the program; a second is refused with
    /// false.
    pub fn listen(&self, listener: Arc<dyn Listener>) -> bool {
        self.listener.set(listener).is_ok()
    }

    /// No descriptor was left: TCP flows and dials were ended for others.
    pub(super) fn gave_way(&self, asked: Asked) {
        let evicted = self.evicted.fetch_add(asked.flows, Relaxed) + asked.flows;
        let given_up = self.given_up.fetch_add(asked.dials, Relaxed) + asked.dials;
        if is_due(&self.short, Instant::now()) {
            tracing::warn!(
                "no file descriptors are left: {} is the limit (raise it: LimitNOFILE=65536 in a systemd unit, or \
                 `ulimit -Hn 65536` as root); {evicted} TCP flows and {given_up} dials that nobody answered were ended so \
                 far to make room, idle ones first, of the client that had most",
                descriptors()
            );
        }
    }

    /// No local port was left for a flow or an association.
    pub(super) fn no_port(&self, network: Network) {
        self.no_port.fetch_add(1, Relaxed);
        if is_due(&self.portless, Instant::now()) {
            let (network, range) = (network.to_string().to_uppercase(), read_parameter(PORT_RANGE).unwrap_or_default());
            tracing::warn!(
                "no local {network} ports are left{}: sysctl net.ipv4.ip_local_port_range is {}; widen it, or look who \
                 has taken so many (`ss -anu`, `ss -ant`)",
                if network == "TCP" { " to one destination" } else { "" },
                range.split_whitespace().collect::<Vec<_>>().join(" to ")
            );
        }
    }

    /// A datagram of `client` to a new peer was dropped.
    pub(super) fn held_back(&self, client: IpAddr) {
        self.held_back.fetch_add(1, Relaxed);
        if is_due(&self.held, Instant::now()) {
            tracing::warn!(
                "{client} sends datagrams to new peers faster than they can be carried; some are dropped, so that others \
                 are served (counted as `held_back` in `tunproxy status`)"
            );
        }
    }

    /// The flows' numbers.
    #[must_use]
    pub fn snapshot(&self) -> serde_json::Value {
        serde_json::json!({
            "opened": self.opened.load(Relaxed),
            "closed": self.closed.load(Relaxed),
            "failed": self.failed.load(Relaxed),
            "rejected": self.rejected.load(Relaxed),
            "unknown_fake": self.unknown_fake.load(Relaxed),
            "returned": self.returned.load(Relaxed),
            "evicted": self.evicted.load(Relaxed),
            "given_up": self.given_up.load(Relaxed),
            "no_port": self.no_port.load(Relaxed),
            "up": self.up.load(Relaxed),
            "down": self.down.load(Relaxed),
            "hand_over_lost": self.hand_over_lost.load(Relaxed),
            "datagrams_dropped": self.datagrams_dropped.load(Relaxed),
            "held_back": self.held_back.load(Relaxed),
            "datagram_bytes_queued": self.queue.payload(),
            "memory_kept": self.queue.bytes(),
            "panics": self.panics.load(Relaxed),
            "associations": self.associations.load(Relaxed),
        })
    }
}

/// Whether a line may be written now, the last of which was written at `last`; then it is.
fn is_due(last: &Mutex<Option<Instant>>, now: Instant) -> bool {
    let mut last = last.lock();
    let due = last.is_none_or(|last| now >= last + SILENCE);
    if due {
        *last = Some(now);
    }
    due
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
    fake: Option<IpAddr>,
    verdict: Option<Verdict>,
    started: Instant,
    up: u64,
    down: u64,
    open: bool,
    told: bool,
    pulse: Option<Arc<Pulse>>,
}

impl Account {
    /// A flow that has just arrived; `fake` is the fake address that its client used.
    #[must_use]
    pub fn new(counters: Arc<Counters>, session: Session, fake: Option<IpAddr>) -> Self {
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
            pulse: None,
        }
    }

    /// The destination behind what the client wrote: its name, and the fake address that stood for it.
    pub fn found(&mut self, session: &Session, fake: Option<IpAddr>) {
        self.session.destination = session.destination.clone();
        self.session.remembered = session.remembered.clone();
        self.fake = fake;
    }

    /// The router has decided.
    pub fn decided(&mut self, verdict: Verdict) {
        self.verdict = Some(verdict);
        if let Some(listener) = self.counters.listener.get() {
            listener.decided(self);
        }
    }

    /// What is known of the flow; a name in place of the fake address that its client used.
    #[must_use]
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// The fake address that its client used, if it did.
    #[must_use]
    pub fn fake(&self) -> Option<IpAddr> {
        self.fake
    }

    /// Why it goes where it goes, once that is decided.
    #[must_use]
    pub fn verdict(&self) -> Option<&Verdict> {
        self.verdict.as_ref()
    }

    /// Payload bytes so far, from the client and to it.
    #[must_use]
    pub fn bytes(&self) -> (u64, u64) {
        (self.up, self.down)
    }

    /// An outbound took the flow.
    pub fn opened(&mut self) {
        self.open = true;
        self.counters.opened.fetch_add(1, Relaxed);
    }

    /// Tells `pulse` whenever bytes move.
    pub(super) fn watch(&mut self, pulse: Arc<Pulse>) {
        self.pulse = Some(pulse);
    }

    /// Bytes moved from the client (`up`) and to it (`down`).
    pub fn moved(&mut self, up: u64, down: u64) {
        if let Some(pulse) = &self.pulse {
            pulse.beat();
        }
        self.up += up;
        self.down += down;
        self.counters.up.fetch_add(up, Relaxed);
        self.counters.down.fetch_add(down, Relaxed);
    }

    /// The flow ended without being carried.
    pub fn failed(mut self, reason: &dyn fmt::Display, rejected: bool) {
        let counter = if rejected { &self.counters.rejected } else { &self.counters.failed };
        counter.fetch_add(1, Relaxed);
        self.tell(if rejected { Outcome::Rejected } else { Outcome::Failed }, reason);
    }

    /// The flow ended after it was carried.
    pub fn closed(mut self, reason: &dyn fmt::Display) {
        self.counters.closed.fetch_add(1, Relaxed);
        self.tell(Outcome::Closed, reason);
    }

    fn tell(&mut self, outcome: Outcome, reason: &dyn fmt::Display) {
        self.told = true;
        if let Some(listener) = self.counters.listener.get() {
            listener.ended(self, outcome, reason);
        }
        let (rule, chain) = match &self.verdict {
            Some(verdict) => (&*verdict.rule, &*verdict.chain),
            None => ("-", "-"),
        };
        let Session { network, inbound, source, destination, .. } = &self.session;
        // Echo requests have an id and no ports.
        let echo = *network == Network::Icmp;
        let (from, to) = match echo {
            true => (source.ip().to_string(), destination.host.to_string()),
            false => (source.to_string(), destination.to_string()),
        };
        tracing::info!(
            target: "flow",
            %network,
            %inbound,
            source = %from,
            destination = %to,
            id = echo.then_some(source.port()),
            fake = self.fake.map(tracing::field::display),
            name = self.session.remembered.as_ref().map(tracing::field::display),
            rule,
            outbound = chain,
            up = self.up,
            down = self.down,
            ms = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX),
            %outcome,
            %reason,
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
            self.tell(Outcome::Closed, &"we stopped");
        } else {
            self.counters.failed.fetch_add(1, Relaxed);
            self.tell(Outcome::Failed, &"given up before an outbound answered");
        }
    }
}

#[cfg(test)]
mod tests {
    use parking_lot::Mutex;

    use super::*;
    use crate::session::Inbound;

    /// What a listener heard, in order.
    #[derive(Debug, Default)]
    struct Heard(Mutex<Vec<String>>);

    impl Listener for Heard {
        fn decided(&self, flow: &Account) {
            self.0.lock().push(format!("{} {}", flow.session().destination, flow.verdict().unwrap()));
        }

        fn ended(&self, flow: &Account, outcome: Outcome, reason: &dyn fmt::Display) {
            self.0.lock().push(format!("{outcome} {:?} {reason}", flow.bytes()));
        }
    }

    fn account(counters: &Arc<Counters>) -> Account {
        let to: std::net::SocketAddr = "198.51.100.1:80".parse().unwrap();
        let session = Session::new(Network::Tcp, Inbound::Tun, "192.0.2.1:1000".parse().unwrap(), to.into());
        Account::new(Arc::clone(counters), session, None)
    }

    fn verdict() -> Verdict {
        Verdict { rule: "MATCH,DIRECT (line 7)".into(), chain: "DIRECT".into() }
    }

    #[test]
    fn a_listener_hears_the_decision_and_then_one_end() {
        let (counters, heard) = (Arc::new(Counters::default()), Arc::new(Heard::default()));
        assert!(counters.listen(heard.clone()));
        let mut flow = account(&counters);
        flow.decided(verdict());
        flow.opened();
        flow.moved(3, 5);
        flow.closed(&"finished");
        let decided = "198.51.100.1:80 DIRECT by MATCH,DIRECT (line 7)";
        assert_eq!(*heard.0.lock(), [decided, "closed (3, 5) finished"]);
    }

    #[test]
    fn a_flow_that_nobody_could_carry_ends_as_failed_or_rejected() {
        let (counters, heard) = (Arc::new(Counters::default()), Arc::new(Heard::default()));
        counters.listen(heard.clone());
        account(&counters).failed(&"timed out", false);
        account(&counters).failed(&"by a rule", true);
        assert_eq!(*heard.0.lock(), ["failed (0, 0) timed out", "rejected (0, 0) by a rule"]);
        assert_eq!((counters.failed.load(Relaxed), counters.rejected.load(Relaxed)), (1, 1));
    }

    #[test]
    fn an_open_flow_that_is_dropped_still_ends() {
        let (counters, heard) = (Arc::new(Counters::default()), Arc::new(Heard::default()));
        counters.listen(heard.clone());
        let mut flow = account(&counters);
        flow.opened();
        drop(flow);
        assert_eq!(*heard.0.lock(), ["closed (0, 0) we stopped"]);
        assert_eq!(counters.closed.load(Relaxed), 1);
    }

    #[test]
    fn what_may_happen_often_is_said_once_a_minute() {
        let (last, now) = (Mutex::default(), Instant::now());
        let said = [0, 1, 59, 60, 61, 119, 120].map(|after| is_due(&last, now + Duration::from_secs(after)));
        assert_eq!(said, [true, false, false, true, false, false, true]);
    }

    #[test]
    fn a_second_listener_is_refused() {
        let counters = Counters::default();
        assert!(counters.listen(Arc::new(Heard::default())));
        assert!(!counters.listen(Arc::new(Heard::default())));
    }
}
