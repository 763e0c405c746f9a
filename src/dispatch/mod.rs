//! From flows to outbounds: un-fake the destination, let the router decide, fetch what it lacks, dial, relay.
//!
//! One [`Dispatcher`] belongs to one worker; all share a [`Core`]. A fake address becomes its name once, in here.

mod answers;
mod associate;
mod associations;
mod carried;
mod echo;
mod echo_ids;
mod echo_way;
mod echoes;
mod entry;
mod lines;
mod link;
mod live;
mod mappings;
mod pace;
mod queue;
mod relay;
mod returned;
mod router;
mod slot;
mod tally;
mod train;

use std::cell::RefCell;
use std::future::poll_fn;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use tokio::time::Instant as Deadline;

pub use echo_ids::EchoIds;
pub use entry::{Back, EchoBack, Entry, Ping, Quote};
pub use live::{Account, Counters, Listener, Outcome, Verdict};
pub use mappings::Mappings;
pub use queue::Queue;
pub use router::{Decision, Router, UnknownTarget};

use crate::dns::{Asker, Dns, Fake, Held};
use crate::net::{BoxStream, DialError, Host, Lookup, Reach, Reject};
use crate::outbound::{Index, Outbound, Outbounds};
use crate::platform::OwnSockets;
use crate::session::{Fact, FactKind, Inbound, Network, Session};
use crate::stack::{FlowStream, Refusal, Tuple};
use associations::{Associations, Limits, Origin};
pub use carried::Carried;
use carried::{Asked, IDLE};
use echoes::Echoes;
use lines::{Lines, Waiter};
use queue::Place;
use relay::{Buffered, Client, End, FlowIo, relay};
use train::Gathering;

/// A held SYN is given up after this: longer than any group's members need, shorter than a client waits.
const HOLD: Duration = Duration::from_secs(30);
/// A dial that finds no descriptor tries for this long: until flows that are open have become idle, or have not.
const MAKE_ROOM: Duration = IDLE.saturating_add(Duration::from_secs(2));

/// What all workers share.
pub struct Core {
    /// Replaced whole when the profile changes.
    pub router: ArcSwap<Router>,
    /// Where flows can go.
    pub outbounds: Arc<Outbounds>,
    /// Names and fake addresses.
    pub dns: Arc<Dns>,
    /// What happened so far.
    pub counters: Arc<Counters>,
    /// How long a UDP association may be idle.
    pub udp_timeout: Duration,
    /// How long the echo requests of one id to one host may be idle.
    pub icmp_timeout: Duration,
    /// The ids of our own echo requests.
    pub echo_ids: Arc<EchoIds>,
    /// Our own sockets, where what they send could come back to us.
    pub own: Option<Arc<OwnSockets>>,
    /// By which ports clients send.
    pub mappings: Arc<Mappings>,
    /// Bytes that datagrams and their associations may take, on all workers together.
    pub memory: usize,
    /// The TCP flows of all workers.
    pub carried: Arc<Carried>,
}

/// The dispatcher of one worker.
pub struct Dispatcher {
    core: Arc<Core>,
    associations: RefCell<Associations>,
    gathering: RefCell<Gathering>,
    echoes: RefCell<Echoes>,
    /// Who waits for a descriptor.
    lines: Rc<Lines>,
    /// Receives every datagram of this worker before it goes on: [`link::SCRATCH`] bytes.
    scratch: RefCell<Box<[u8]>>,
}

/// Where a flow goes, and why.
struct Choice {
    outbound: Arc<dyn Outbound>,
    verdict: Verdict,
}

/// A destination as the client wrote it, made real.
struct Unfaked {
    session: Session,
    fake: Option<IpAddr>,
    held: Option<Held>,
}

/// A dialled flow on its way to be relayed.
pub struct Upstream {
    stream: BoxStream,
    account: Account,
    /// Keeps the fake address for this name while the flow lives.
    _held: Option<Held>,
}

impl Dispatcher {
    /// A dispatcher without flows.
    #[must_use]
    pub fn new(core: Arc<Core>) -> Rc<Self> {
        core.counters.queue.limit(core.memory / 2);
        let associations = Associations::new(Limits::of_this_process(core.memory / 2), Arc::clone(&core.counters));
        let echoes = Echoes::new(Arc::clone(&core.counters));
        Rc::new(Self {
            core,
            associations: RefCell::new(associations),
            gathering: RefCell::default(),
            echoes: RefCell::new(echoes),
            lines: Rc::default(),
            scratch: RefCell::new(vec![0; link::SCRATCH].into_boxed_slice()),
        })
    }

    /// What all workers share.
    #[must_use]
    pub fn core(&self) -> &Arc<Core> {
        &self.core
    }

    /// Carries one TCP flow of the TUN to its end. The SYN-ACK is held until the outbound answered, so that the client
    /// sees what it would see without us: refused, unreachable, or no answer.
    pub async fn flow(self: Rc<Self>, tuple: Tuple, mut stream: FlowStream) {
        let session = Session::new(Network::Tcp, Inbound::Tun, tuple.client, tuple.server.into());
        let mut account = Account::new(Arc::clone(&self.core.counters), session.clone(), None);
        let dialled = tokio::select! {
            biased;
            () = poll_fn(|cx| stream.poll_gone(cx)) => {
                account.failed(&"the client gave up", false);
                return;
            }
            dialled = tokio::time::timeout(HOLD, self.find_way(session, &mut account)) => {
                dialled.unwrap_or(Err(DialError::TimedOut))
            }
        };
        match dialled {
            Ok((upstream, _held)) => {
                stream.accept();
                account.opened();
                self.carry_stream(stream, upstream, account).await;
            }
            Err(error) => {
                stream.refuse(refusal(&error));
                account.failed(&error, matches!(error, DialError::Rejected(_)));
            }
        }
    }

    /// Accepts a flow of `asker` to port 53 and answers DNS on it (RFC 7766). A question that waits keeps what `enter` gives it.
    pub async fn names<P>(self: Rc<Self>, mut stream: FlowStream, asker: Asker, enter: impl Fn() -> Option<P>) {
        stream.accept();
        crate::dns::serve_stream(Arc::clone(&self.core.dns), asker, FlowIo(stream), enter).await;
    }

    /// Un-fakes, decides and dials; the account learns each of it.
    async fn find_way(&self, session: Session, account: &mut Account) -> Result<(BoxStream, Option<Held>), DialError> {
        let Unfaked { mut session, fake, held } = self.unfake(session)?;
        account.found(&session, fake);
        let choice = self.choose(&mut session).await?;
        account.decided(choice.verdict);
        let stream = self.connect(&*choice.outbound, &session).await?;
        Ok((stream, held))
    }

    /// Where no descriptor is left, others give up theirs, and the dial is tried again.
    async fn connect(&self, outbound: &dyn Outbound, session: &Session) -> Result<BoxStream, DialError> {
        let (client, deadline) = (session.source.ip(), Deadline::now() + MAKE_ROOM);
        let mut waiter = None;
        loop {
            let seat = self.core.carried.dial(client);
            let dialled = tokio::select! {
                biased;
                dialled = attempt(outbound.connect(session), &mut waiter) => dialled,
                // It is not tried again: it would take its place back.
                () = seat.asked() => return Err(DialError::Exhausted),
            };
            drop(seat);
            match dialled {
                Err(DialError::Exhausted) if self.make_room(&mut waiter, client, deadline).await => {}
                Err(DialError::NoPort) => {
                    self.core.counters.no_port(Network::Tcp);
                    return Err(DialError::NoPort);
                }
                dialled => return dialled,
            }
        }
    }

    /// Frees descriptors for a new flow of `client`: those of UDP associations that are idle, else of TCP flows and dials,
    /// and where there are none of UDP associations in use. Who has more than an equal part of the TCP flows gets none of
    /// the associations while those can give way, and none in use at all. One of a client looks at a time, and the next tries again first. False:
    /// nobody can, or `deadline` is over.
    async fn make_room(&self, waiter: &mut Option<Waiter>, client: IpAddr, deadline: Deadline) -> bool {
        let waiter = waiter.get_or_insert_with(|| self.lines.enter(client));
        let room = if waiter.is_first() {
            self.look_for_room(waiter, client, deadline).await
        } else {
            tokio::time::timeout_at(deadline, waiter.turn()).await.is_ok()
        };
        if !room {
            self.core.counters.gave_way(Asked::default());
        }
        room
    }

    async fn look_for_room(&self, waiter: &mut Waiter, client: IpAddr, deadline: Deadline) -> bool {
        let (core, none_left) = (&self.core, "evicted: no descriptors are left");
        let spare = |idle| self.associations.borrow_mut().evict(idle, &none_left);
        // Once: it looks at all of them.
        let greedy = *waiter.greedy.get_or_insert_with(|| core.carried.has_more_than_a_part(client));
        if Deadline::now() < deadline && !greedy && spare(IDLE) {
            return true;
        }
        core.carried.make_room(client, deadline, |asked| core.counters.gave_way(asked)).await
            || Deadline::now() < deadline && spare(if greedy { IDLE } else { Duration::ZERO })
    }

    /// Carries a flow that is open to its end, or until it has to give way to others.
    async fn carry_stream(&self, mut client: impl Client, mut upstream: BoxStream, mut account: Account) {
        let seat = self.core.carried.enter(account.session().source.ip());
        account.watch(seat.pulse());
        client.watch(seat.heartbeat());
        let end = {
            // Dropped before its end it resets both sides.
            let mut relaying = pin!(relay(&mut client, &mut upstream, &mut account));
            tokio::select! {
                biased;
                end = &mut relaying => end,
                () = seat.asked() => End::GaveWay,
            }
        };
        account.closed(&end);
        // Who waits for its descriptors is told when the seat is free.
        drop((client, upstream));
        drop(seat);
    }

    /// A fake address becomes its name; an unknown one is refused, never guessed. A real address that we gave out for a
    /// name brings the name along for the rules, and is dialled itself, as in mihomo: the client chose it, and what the
    /// name leads to may be somebody else's by now.
    fn unfake(&self, mut session: Session) -> Result<Unfaked, DialError> {
        let Host::Ip(ip) = session.destination.host else {
            return Ok(Unfaked { session, fake: None, held: None });
        };
        if self.core.has_come_back(&session) {
            return Err(returned::refusal());
        }
        match self.core.dns.hold(ip, session.source.ip(), Instant::now()) {
            (Fake::Name(name), held) => {
                session.destination.host = Host::Name(name);
                Ok(Unfaked { session, fake: Some(ip), held: Some(held) })
            }
            (Fake::Unknown, _) => {
                self.core.counters.unknown_fake.fetch_add(1, Relaxed);
                Err(DialError::Denied(format!("{ip} is a fake address that stands for no name (any more)")))
            }
            (Fake::NotFake, _) => {
                session.remembered = self.core.dns.hint(ip);
                Ok(Unfaked { session, fake: None, held: None })
            }
        }
    }

    /// Asks the router, fetching the facts it lacks. As in mihomo a matched rule is passed over when its target is PASS
    /// or carries no UDP while the flow is UDP; when nothing matches, the flow goes DIRECT. An echo request passes over no
    /// rule whose target cannot carry it: no proxy does, and each would end on DIRECT, seen by everybody on the way.
    async fn choose(&self, session: &mut Session) -> Result<Choice, DialError> {
        let router = self.core.router.load_full();
        let outbounds = &self.core.outbounds;
        let mut from = 0;
        loop {
            let (target, rule, next): (Index, Arc<str>, usize) = match router.decide(session, from) {
                Decision::Send { target, rule } => (target, self.rule_text(&router, rule), rule + 1),
                Decision::Forced { mode, target } => (target, Arc::from(format!("mode: {mode}")), usize::MAX),
                Decision::Needs(FactKind::Ip) => {
                    self.resolve(session).await;
                    continue;
                }
                Decision::Default => (Outbounds::DIRECT, Arc::from("no rule matched"), usize::MAX),
            };
            let carried = session.network == Network::Icmp || outbounds.networks(target).carries(session.network);
            let passed = outbounds.passes(target) || !carried;
            if passed && next != usize::MAX {
                from = next;
                continue;
            }
            let outbound = Arc::clone(outbounds.outbound(target));
            let chain = outbound.chain().join(" -> ").into();
            return Ok(Choice { outbound, verdict: Verdict { rule, chain } });
        }
    }

    fn rule_text(&self, router: &Router, rule: usize) -> Arc<str> {
        router.rule(rule).map_or_else(|| Arc::from("-"), |rule| format!("{} (line {})", rule.text, rule.line).into())
    }

    /// Looks the destination's name up, once per flow.
    async fn resolve(&self, session: &mut Session) {
        let Host::Name(name) = &session.destination.host else { return };
        session.resolved = match self.core.dns.lookup(name).await {
            Ok(addresses) => addresses.first().map_or(Fact::Failed, |ip| Fact::Known(*ip)),
            Err(_) => Fact::Failed,
        };
    }
}

/// Dials once more. Its turn is over as soon as it waits: it has its descriptor then, or looks a name up.
async fn attempt<T>(dial: impl Future<Output = T>, waiter: &mut Option<Waiter>) -> T {
    let mut dial = pin!(dial);
    poll_fn(|cx| {
        let polled = dial.as_mut().poll(cx);
        if polled.is_pending() {
            *waiter = None;
        }
        polled
    })
    .await
}

impl Entry for Rc<Dispatcher> {
    type Upstream = Upstream;

    async fn dial(&self, session: Session) -> Result<Upstream, DialError> {
        let mut account = Account::new(Arc::clone(&self.core.counters), session.clone(), None);
        let dialled = tokio::time::timeout(HOLD, self.find_way(session, &mut account)).await;
        match dialled.unwrap_or(Err(DialError::TimedOut)) {
            Ok((stream, held)) => {
                account.opened();
                Ok(Upstream { stream, account, _held: held })
            }
            Err(error) => {
                account.failed(&error, matches!(error, DialError::Rejected(_)));
                Err(error)
            }
        }
    }

    async fn relay(&self, upstream: Upstream, client: BoxStream) {
        let Upstream { mut stream, account, _held } = upstream;
        let Some((_place, size)) = Place::for_buffers(&self.core.counters) else {
            account.closed(&"no memory is left");
            stream.reset();
            return;
        };
        self.carry_stream(Buffered::new(client, size), stream, account).await;
    }

    fn datagram(&self, session: Session, payload: &[u8], dont_fragment: bool, back: &Rc<dyn Back>) {
        self.packet(&session, payload, None, dont_fragment, &[], back);
        self.flush();
    }

    fn leave(&self, source: SocketAddr, back: &Rc<dyn Back>) {
        self.associations.borrow_mut().leave(Origin::of(source, back));
    }
}

/// What a client must see when its flow could not be dialled.
fn refusal(error: &DialError) -> Refusal {
    match (error, error.kind()) {
        (DialError::Rejected(Reject::Drop), _) | (_, io::ErrorKind::TimedOut) => Refusal::Silent,
        (DialError::Unreachable(Reach::Protocol), _) => Refusal::Protocol,
        (DialError::Unreachable(Reach::Prohibited), _) => Refusal::Prohibited,
        (DialError::Unreachable(Reach::Coded(code)), _) => Refusal::Coded(*code),
        // Nobody was asked: a reset would say that the destination does not want the client.
        (DialError::Exhausted | DialError::NoPort | DialError::NoControlPort, _) => Refusal::Host,
        (_, io::ErrorKind::NetworkUnreachable) => Refusal::Network,
        (_, io::ErrorKind::HostUnreachable) => Refusal::Host,
        _ => Refusal::Reset,
    }
}

/// What the sender of a datagram is told; None is silence.
fn reach(error: &DialError) -> Option<Reach> {
    match error {
        // Lost, as UDP may be where there is no room; the next one may get through.
        DialError::Rejected(Reject::Drop) | DialError::Exhausted | DialError::NoPort | DialError::NoControlPort => None,
        DialError::Unreachable(why) => Some(*why),
        // Programs fall back to TCP or to another server at once on this one.
        _ => Some(Reach::Port),
    }
}

#[cfg(test)]
mod fixture;
#[cfg(test)]
mod scarce_tests;
#[cfg(test)]
mod tests;
