//! UDP associations: which socket carries the datagrams of which client, and under which address answers come back.
//!
//! An association is (source, outbound): one socket of ours for all peers of a client, so that its mapping does not
//! depend on the peer (RFC 4787 REQ-1). A client accepts an answer only from the address it wrote to, which may be a
//! fake one, so the association remembers that address per peer; peers nobody wrote to answer from their own.

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, VecDeque};
use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::num::NonZeroU16;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use tokio::io::ReadBuf;

use super::entry::Back;
use super::live::{Account, Counters};
use super::train::{LONGEST, Train};
use crate::dns::Held;
use crate::net::{Address, BoxDatagram, Host, Reach, Received};

/// Datagrams that wait while their association is being opened.
pub(super) const MOST_WAITING: usize = 32;
/// Datagrams of one association that wait for its transport: as many as a turn brings at most.
const MOST_UNSENT: usize = 64;
/// Associations of one worker; the one idle longest goes.
const MOST_LINKS: usize = 16_384;
/// Peers of all clients of one worker; beyond, new ones wait until some are gone.
const MOST_PEERS_IN_ALL: usize = 65_536;
/// Peers of one client; when there are more, those idle longest go.
const MOST_PEERS: usize = 4096;
/// Bytes for answers: those that have come, at most the size of the largest datagram, and as many for the next.
pub(super) const SCRATCH: usize = 2 * 65_536;
/// Datagrams taken from one socket before others get their turn.
const SHARE: usize = 64;
/// A peer that was refused stays so for this long, without asking again.
const REFUSED_FOR: Duration = Duration::from_secs(2);
/// A question and its answer need no more (RFC 5452: resolvers give up earlier).
const DNS_IDLE: Duration = Duration::from_secs(10);
const DNS_PORT: u16 = 53;

/// A peer as one client sees it.
pub(super) enum Peer {
    /// The router, the resolver or the outbound is at work.
    Opening(VecDeque<Waiting>),
    /// Datagrams go this way.
    Open { link: Rc<Link>, to: Address },
    /// No outbound takes it; `why` is what the client is told each time.
    Closed { why: Option<Reach>, until: Instant },
}

/// A datagram that waits.
pub(super) struct Waiting {
    pub(super) payload: Vec<u8>,
    pub(super) dont_fragment: bool,
}

/// Answers of one peer that came one by one and stand together at the scratch's beginning, all of one size but for the
/// last: the client gets them at once.
#[derive(Default)]
struct Answers {
    from: Option<Address>,
    size: usize,
    length: usize,
}

impl Answers {
    /// Adds `length` bytes that stand behind the others. False: they have to begin another train.
    fn add(&mut self, from: &Address, length: usize) -> bool {
        let alike = self.from.as_ref() == Some(from) && (1..=self.size).contains(&length);
        // A shorter one is the last.
        let fits = alike && self.length.is_multiple_of(self.size) && self.length + length <= LONGEST;
        if fits {
            self.length += length;
        }
        fits
    }
}

/// All that one client has going.
#[derive(Default)]
struct Source {
    peers: HashMap<Address, Peer, foldhash::fast::RandomState>,
    /// Associations that serve many peers, by the outbound's chain.
    shared: HashMap<Arc<str>, Rc<Link>>,
}

/// A real peer as the client knows it.
struct Known {
    client: Address,
    /// The first packet to it, for ICMP errors to quote.
    quoted: Box<[u8]>,
}

/// One association.
pub(super) struct Link {
    pub(super) source: SocketAddr,
    datagram: RefCell<BoxDatagram>,
    /// What this turn has brought so far; see [`Gathering`](super::train::Gathering).
    pub(super) train: RefCell<Option<Train>>,
    /// What the transport could not take at once: a socket is ready only when its reactor has said so.
    outbox: RefCell<VecDeque<(Waiting, Address)>>,
    /// Of the task that carries answers; it empties the outbox too.
    waker: Cell<Option<Waker>>,
    back: Rc<dyn Back>,
    /// The real peers that the client has written to.
    known: RefCell<HashMap<Address, Known, foldhash::fast::RandomState>>,
    /// The client's address for whatever answers: the association was opened for one name.
    name: Option<Address>,
    used: Cell<Instant>,
    idle: Duration,
    ended: Cell<bool>,
    account: RefCell<Option<Account>>,
    counters: Arc<Counters>,
    held: RefCell<Vec<Held>>,
}

/// The associations of one worker.
#[derive(Default)]
pub(super) struct Associations {
    sources: HashMap<SocketAddr, Source, foldhash::fast::RandomState>,
    links: HashMap<*const Link, Rc<Link>, foldhash::fast::RandomState>,
    /// Peers of all sources together.
    peers: usize,
}

impl Associations {
    pub(super) fn peer(&mut self, source: SocketAddr, client: &Address) -> Option<&mut Peer> {
        self.sources.get_mut(&source)?.peers.get_mut(client)
    }

    /// Whether another peer would be too many.
    pub(super) fn is_full(&self) -> bool {
        self.peers >= MOST_PEERS_IN_ALL
    }

    /// Sets what is known of a peer; returns what was known before.
    pub(super) fn set(&mut self, source: SocketAddr, client: Address, peer: Peer) -> Option<Peer> {
        let peers = &mut self.sources.entry(source).or_default().peers;
        let before = peers.len();
        if before >= MOST_PEERS && !peers.contains_key(&client) {
            shed(peers);
        }
        let known = peers.insert(client, peer);
        self.peers = self.peers + peers.len() - before;
        known
    }

    /// Marks a peer as refused for a while.
    pub(super) fn close(&mut self, source: SocketAddr, client: &Address, why: Option<Reach>, now: Instant) {
        self.set(source, client.clone(), Peer::Closed { why, until: now + REFUSED_FOR });
    }

    /// Forgets a peer whose refusal is over.
    pub(super) fn reopen(&mut self, source: SocketAddr, client: &Address, now: Instant) {
        let Some(known) = self.sources.get_mut(&source) else { return };
        if matches!(known.peers.get(client), Some(Peer::Closed { until, .. }) if *until <= now) {
            known.peers.remove(client);
            self.peers -= 1;
        }
        self.sweep(source);
    }

    /// Forgets a source with which nothing is going on.
    fn sweep(&mut self, source: SocketAddr) {
        if self.sources.get(&source).is_some_and(|known| known.peers.is_empty() && known.shared.is_empty()) {
            self.sources.remove(&source);
        }
    }

    /// The association of `source` through the outbound `chain` that serves many peers, unless `real` already stands for
    /// another of the client's addresses there.
    pub(super) fn shared(&self, source: SocketAddr, chain: &str, real: &Address, client: &Address) -> Option<Rc<Link>> {
        let link = self.sources.get(&source)?.shared.get(chain)?;
        let taken = link.known.borrow().get(real).is_some_and(|known| known.client != *client);
        if taken || link.ended.get() { None } else { Some(Rc::clone(link)) }
    }

    /// Adds an association. With `chain` it serves later peers too, if there is none for them yet.
    pub(super) fn add(&mut self, link: &Rc<Link>, chain: Option<Arc<str>>) {
        if self.links.len() >= MOST_LINKS {
            self.evict();
        }
        self.links.insert(Rc::as_ptr(link), Rc::clone(link));
        if let Some(chain) = chain {
            let shared = &mut self.sources.entry(link.source).or_default().shared;
            shared.entry(chain).or_insert_with(|| Rc::clone(link));
        }
    }

    /// Forgets an association and the peers that it served.
    pub(super) fn remove(&mut self, link: &Rc<Link>) {
        self.links.remove(&Rc::as_ptr(link));
        let Some(source) = self.sources.get_mut(&link.source) else { return };
        source.shared.retain(|_, other| !Rc::ptr_eq(other, link));
        let before = source.peers.len();
        source.peers.retain(|_, peer| !matches!(peer, Peer::Open { link: other, .. } if Rc::ptr_eq(other, link)));
        self.peers -= before - source.peers.len();
        self.sweep(link.source);
    }

    /// Ends the associations that have been idle longest, a hundredth of all, so that the search pays.
    fn evict(&mut self) {
        let mut ages: Vec<Instant> = self.links.values().map(|link| link.used.get()).collect();
        ages.sort_unstable();
        let Some(limit) = ages.get(ages.len() / 100).copied() else { return };
        let old: Vec<_> = self.links.values().filter(|link| link.used.get() <= limit).cloned().collect();
        for link in old {
            link.end();
            self.remove(&link);
        }
    }
}

/// Makes room among the peers of one client.
fn shed(peers: &mut HashMap<Address, Peer, foldhash::fast::RandomState>) {
    let mut kept = 0;
    peers.retain(|_, peer| {
        if matches!(peer, Peer::Closed { .. }) {
            return false;
        }
        kept += 1;
        kept < MOST_PEERS / 2
    });
}

impl Link {
    pub(super) fn new(
        source: SocketAddr,
        datagram: BoxDatagram,
        back: Rc<dyn Back>,
        name: Option<Address>,
        idle: Duration,
        account: Account,
        counters: Arc<Counters>,
    ) -> Rc<Self> {
        Rc::new(Self {
            source,
            datagram: RefCell::new(datagram),
            train: RefCell::default(),
            outbox: RefCell::default(),
            waker: Cell::default(),
            back,
            known: RefCell::default(),
            name,
            used: Cell::new(Instant::now()),
            idle,
            ended: Cell::new(false),
            account: RefCell::new(Some(account)),
            counters,
            held: RefCell::default(),
        })
    }

    /// Makes its task end.
    fn end(&self) {
        self.ended.set(true);
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }

    /// How long an association may be idle whose first peer has this port.
    pub(super) fn idle_for(port: u16, usual: Duration) -> Duration {
        if port == DNS_PORT { DNS_IDLE.min(usual) } else { usual }
    }

    /// Notes that the client calls `real` by `client`. `quoted` is the first packet it sent there.
    pub(super) fn introduce(&self, real: Address, client: Address, quoted: &[u8], held: Option<Held>) {
        self.known.borrow_mut().insert(real, Known { client, quoted: quoted.into() });
        self.held.borrow_mut().extend(held);
    }

    /// Sends datagrams of the client: one, or with `size` several of that size, the last of which may be shorter. Where too
    /// many wait for the transport they are lost, as UDP may be.
    pub(super) fn send(&self, payload: &[u8], size: Option<NonZeroU16>, to: &Address, dont_fragment: bool) {
        self.used.set(Instant::now());
        let mut outbox = self.outbox.borrow_mut();
        let each = size.map_or(payload.len().max(1), |size| usize::from(size.get()));
        let mut rest = Some(payload);
        while let Some(left) = rest.filter(|_| outbox.is_empty()) {
            let Poll::Ready(sent) = self.poll_send(left, size, to, dont_fragment) else { break };
            let done = match sent {
                Ok(done) => {
                    self.moved(done as u64, 0);
                    done
                }
                Err(error) => {
                    self.send_failed(&error, to);
                    each
                }
            };
            rest = left.get(done..).filter(|left| !left.is_empty());
        }
        let Some(rest) = rest else { return };
        let empty = rest.is_empty().then_some(rest);
        for payload in rest.chunks(each).chain(empty) {
            if outbox.len() >= MOST_UNSENT {
                self.counters.datagrams_dropped.fetch_add(1, Relaxed);
                continue;
            }
            outbox.push_back((Waiting { payload: payload.into(), dont_fragment }, to.clone()));
        }
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }

    /// Sends without waiting. Returns the bytes that are done with.
    fn poll_send(
        &self,
        payload: &[u8],
        size: Option<NonZeroU16>,
        to: &Address,
        dont_fragment: bool,
    ) -> Poll<io::Result<usize>> {
        let mut cx = Context::from_waker(Waker::noop());
        let mut datagram = self.datagram.borrow_mut();
        match size {
            Some(size) => datagram.poll_send_train(&mut cx, payload, size, to, dont_fragment),
            None => datagram.poll_send_to(&mut cx, payload, to, dont_fragment).map_ok(|()| payload.len()),
        }
    }

    /// Sends what had to wait, as far as the transport takes it.
    fn poll_outbox(&self, cx: &mut Context<'_>) {
        let mut outbox = self.outbox.borrow_mut();
        while let Some((waiting, to)) = outbox.front() {
            let outcome = self.datagram.borrow_mut().poll_send_to(cx, &waiting.payload, to, waiting.dont_fragment);
            match outcome {
                Poll::Ready(Ok(())) => self.moved(waiting.payload.len() as u64, 0),
                Poll::Ready(Err(error)) => self.send_failed(&error, to),
                Poll::Pending => return,
            }
            outbox.pop_front();
        }
    }

    fn send_failed(&self, error: &io::Error, to: &Address) {
        let why = match error.raw_os_error() {
            Some(libc::EMSGSIZE) => Reach::TooBig(0),
            Some(libc::ENETUNREACH | libc::ENETDOWN) => Reach::Network,
            Some(libc::EHOSTUNREACH) => Reach::Host,
            Some(libc::EPERM | libc::EACCES) => Reach::Prohibited,
            Some(libc::ECONNREFUSED) => Reach::Port,
            _ => {
                self.counters.datagrams_dropped.fetch_add(1, Relaxed);
                return;
            }
        };
        // A datagram that does not fit is followed by the network's own word, which knows the MTU.
        if why != Reach::TooBig(0) {
            self.tell(to, why);
        }
    }

    fn moved(&self, up: u64, down: u64) {
        if let Some(account) = self.account.borrow_mut().as_mut() {
            account.moved(up, down);
        }
    }

    /// Carries answers to the client until the association falls idle, fails or is evicted.
    pub(super) async fn run(&self, scratch: &RefCell<Box<[u8]>>) {
        let reason = loop {
            let quiet = tokio::time::Instant::from_std(self.used.get() + self.idle);
            tokio::select! {
                biased;
                error = poll_fn(|cx| self.poll_answers(cx, scratch)) => break error.to_string(),
                () = tokio::time::sleep_until(quiet) => {}
            }
            if self.used.get().elapsed() >= self.idle {
                break "idle".to_owned();
            }
        };
        self.ended.set(true);
        if let Some(account) = self.account.borrow_mut().take() {
            account.closed(&reason);
        }
    }

    fn poll_answers(&self, cx: &mut Context<'_>, scratch: &RefCell<Box<[u8]>>) -> Poll<io::Error> {
        if self.ended.get() {
            return Poll::Ready(io::Error::other("evicted: too many associations"));
        }
        self.waker.set(Some(cx.waker().clone()));
        self.poll_outbox(cx);
        let mut scratch = scratch.borrow_mut();
        let (mut share, mut answers) = (SHARE, Answers::default());
        let outcome = loop {
            if share == 0 {
                cx.waker().wake_by_ref();
                break Poll::Pending;
            }
            share -= 1;
            let start = answers.length;
            let mut buffer = ReadBuf::new(&mut scratch[start..]);
            let received = self.datagram.borrow_mut().poll_recv_from(cx, &mut buffer);
            let end = start + buffer.filled().len();
            match received {
                Poll::Ready(Ok(Received::Payload(from))) => {
                    if !answers.add(&from, end - start) {
                        self.hand_over(&mut answers, &scratch);
                        scratch.copy_within(start..end, 0);
                        answers = Answers { from: Some(from), size: end - start, length: end - start };
                    }
                }
                Poll::Ready(Ok(Received::Train { from, size })) => {
                    self.hand_over(&mut answers, &scratch);
                    share = share.saturating_sub((end - start) / usize::from(size.get()));
                    self.deliver(&from, &scratch[start..end], Some(size));
                }
                Poll::Ready(Ok(Received::Failed { to, why })) => self.tell(&to, why),
                Poll::Ready(Err(error)) => break Poll::Ready(error),
                Poll::Pending => break Poll::Pending,
            }
        };
        self.hand_over(&mut answers, &scratch);
        outcome
    }

    /// Delivers what has come so far.
    fn hand_over(&self, answers: &mut Answers, scratch: &[u8]) {
        let Answers { from, size, length } = std::mem::take(answers);
        let Some(from) = from else { return };
        let several = u16::try_from(size).ok().and_then(NonZeroU16::new).filter(|_| length > size);
        self.deliver(&from, &scratch[..length], several);
    }

    /// Hands what a peer sent to the client: one payload, or with `size` several of that size.
    fn deliver(&self, from: &Address, payload: &[u8], size: Option<NonZeroU16>) {
        self.used.set(Instant::now());
        self.moved(0, payload.len() as u64);
        let hand = |from: &Address| match size {
            Some(size) => self.back.deliver_train(from, self.source, payload, size),
            None => self.back.deliver(from, self.source, payload),
        };
        let known = self.known.borrow();
        match (known.get(from), &self.name, &from.host) {
            (Some(peer), ..) => hand(&peer.client),
            // One name, another port of its host.
            (None, Some(name), _) => hand(&Address { host: name.host.clone(), port: from.port }),
            (None, None, Host::Ip(_)) => hand(from),
            (None, None, Host::Name(_)) => {
                self.counters.datagrams_dropped.fetch_add(1, Relaxed);
            }
        }
    }

    fn tell(&self, to: &Address, why: Reach) {
        if let Some(peer) = self.known.borrow().get(to) {
            self.back.unreachable(&peer.client, self.source, &peer.quoted, why);
        }
    }
}
