//! One UDP association: a transport, and the flows of one client that it carries.
//!
//! A client accepts an answer only from the address it wrote to, which may be a fake one, so each flow remembers that
//! address; peers nobody wrote to answer from their own.

use std::cell::{Cell, OnceCell, RefCell};
use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU16;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use tokio::io::ReadBuf;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::answers::{Answers, Closed, ended};
use super::entry::Back;
use super::live::{Account, Counters};
use super::mappings::{Mapping, Mappings};
use super::queue::Waiting;
use super::train::Train;
use crate::dns::Held;
use crate::net::{Address, BoxDatagram, Host, LONGER_HEADER, Reach, Received};
use crate::platform::Sending;

/// Datagrams of one association that wait for its transport: as many as a turn brings at most.
const MOST_UNSENT: usize = 64;
/// Bytes for answers: those that have come, at most the size of the largest datagram, and as many for the next.
pub(super) const SCRATCH: usize = 2 * 65_536;
/// Datagrams taken from one socket before others get their turn.
const SHARE: usize = 64;
/// A question and its answer need no more (RFC 5452: resolvers give up earlier).
const DNS_IDLE: Duration = Duration::from_secs(10);
const DNS_PORT: u16 = 53;
/// An association looks for flows that are over no more often than this.
const LOOK: Duration = Duration::from_secs(1);

/// What passes between a client and one peer.
pub(super) struct Flow {
    /// The peer as the outbound wants it written.
    pub(super) to: Address,
    /// The peer as the client wrote it.
    pub(super) client: Address,
    /// The first packet, for ICMP errors to quote.
    quoted: Box<[u8]>,
    idle: Duration,
    used: Cell<Instant>,
    account: RefCell<Option<Account>>,
    _held: Option<Held>,
    sending: RefCell<Option<Sending>>,
}

/// What is needed to make a [`Flow`].
pub(super) struct Opened {
    pub(super) to: Address,
    pub(super) quoted: Box<[u8]>,
    pub(super) account: Account,
    pub(super) held: Option<Held>,
    pub(super) sending: Option<Sending>,
}

impl Flow {
    /// A flow to what the client calls `client`, which is over when it has been idle for `usual`.
    pub(super) fn new(client: Address, opened: Opened, usual: Duration) -> Rc<Self> {
        let Opened { to, quoted, mut account, held, sending } = opened;
        account.opened();
        let idle = if to.port == DNS_PORT { DNS_IDLE.min(usual) } else { usual };
        let (used, account) = (Cell::new(Instant::now()), RefCell::new(Some(account)));
        Rc::new(Self { to, client, quoted, idle, used, account, _held: held, sending: RefCell::new(sending) })
    }

    /// When its last datagram passed.
    pub(super) fn used(&self) -> Instant {
        self.used.get()
    }

    /// When it is over, where its client has sent something past it at the time `kept`.
    fn over_at(&self, kept: Option<Instant>) -> Instant {
        kept.map_or(self.used(), |kept| kept.max(self.used())) + self.idle
    }

    fn moved(&self, up: usize, down: usize, now: Instant) {
        self.used.set(now);
        if let Some(account) = self.account.borrow_mut().as_mut() {
            account.moved(up as u64, down as u64);
        }
    }

    /// Ends it, with its line in the log.
    pub(super) fn close(&self, reason: &dyn fmt::Display) {
        if let Some(account) = self.account.borrow_mut().take() {
            account.closed(reason);
        }
    }
}

/// One association.
pub(super) struct Link {
    pub(super) source: SocketAddr,
    pub(super) back: Rc<dyn Back>,
    datagram: RefCell<BoxDatagram>,
    /// What this turn has brought so far; see [`Gathering`](super::train::Gathering).
    pub(super) train: RefCell<Option<Train>>,
    /// What the transport could not take at once: a socket is ready only when its reactor has said so.
    outbox: RefCell<VecDeque<(Waiting, Rc<Flow>)>>,
    /// Of the task that carries answers; it empties the outbox too.
    waker: Cell<Option<Waker>>,
    /// By the peer as the transport names it.
    flows: RefCell<HashMap<Address, Rc<Flow>, foldhash::fast::RandomState>>,
    added: Notify,
    /// The client's address for whatever answers: the association was opened for one name.
    name: Option<Address>,
    /// The transport may have closed the socket by which it reached somebody; the next one has another port.
    moved: Cell<bool>,
    /// Where the client is known to the others.
    mapping: RefCell<Option<Mapping>>,
    neighbours: OnceCell<Arc<Mappings>>,
    used: Cell<Instant>,
    answered: Cell<bool>,
    ended: Cell<bool>,
    counters: Arc<Counters>,
}

impl Link {
    pub(super) fn new(
        source: SocketAddr,
        back: Rc<dyn Back>,
        datagram: BoxDatagram,
        name: Option<Address>,
        counters: Arc<Counters>,
    ) -> Rc<Self> {
        counters.associations.fetch_add(1, Relaxed);
        Rc::new(Self {
            source,
            back,
            datagram: RefCell::new(datagram),
            train: RefCell::default(),
            outbox: RefCell::default(),
            waker: Cell::default(),
            flows: RefCell::default(),
            added: Notify::new(),
            name,
            moved: Cell::new(false),
            mapping: RefCell::default(),
            neighbours: OnceCell::new(),
            used: Cell::new(Instant::now()),
            answered: Cell::new(false),
            ended: Cell::new(false),
            counters,
        })
    }

    /// When its last datagram passed.
    pub(super) fn used(&self) -> Instant {
        self.used.get()
    }

    /// Whether anybody has ever answered.
    pub(super) fn is_answered(&self) -> bool {
        self.answered.get()
    }

    /// Whether it carries nothing any more.
    #[cfg(test)]
    pub(super) fn has_ended(&self) -> bool {
        self.ended.get()
    }

    /// Ends it and its flows, which are returned. The transport is closed at once, so that its descriptors are free.
    pub(super) fn end(&self, reason: &dyn fmt::Display) -> Vec<Rc<Flow>> {
        if self.ended.replace(true) {
            return Vec::new();
        }
        self.counters.associations.fetch_sub(1, Relaxed);
        self.map(None);
        // Should the transport be at work just now, it goes with the task that carries the answers.
        if let Ok(mut datagram) = self.datagram.try_borrow_mut() {
            *datagram = Box::new(Closed);
        }
        if let Ok(mut outbox) = self.outbox.try_borrow_mut() {
            outbox.clear();
        }
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
        let flows: Vec<_> = self.flows.borrow_mut().drain().map(|(_, flow)| flow).collect();
        flows.iter().for_each(|flow| flow.close(reason));
        flows
    }

    /// The port of this host by which datagrams for `to` leave, where they go there themselves.
    pub(super) fn port_towards(&self, to: &Address) -> Option<u16> {
        self.datagram.try_borrow_mut().ok()?.port_towards(to)
    }

    /// It may get datagrams of these clients past the TUN.
    pub(super) fn among(&self, neighbours: &Arc<Mappings>) {
        let _ = self.neighbours.set(Arc::clone(neighbours));
    }

    /// Whether the others know it.
    pub(super) fn is_mapped(&self) -> bool {
        self.mapping.borrow().is_some()
    }

    /// From now on the others know it by this.
    pub(super) fn map(&self, mapping: Option<Mapping>) {
        *self.mapping.borrow_mut() = mapping;
    }

    /// Notes for all flows by which ports they leave now, before anything does.
    fn follow(&self) {
        self.moved.set(false);
        // One socket of a family serves all its peers.
        let mut ports = [None; 2];
        for flow in self.flows.borrow().values() {
            let (Some(real), Some(sending)) = (flow.to.socket(), &mut *flow.sending.borrow_mut()) else { continue };
            let port = ports[usize::from(real.is_ipv6())].get_or_insert_with(|| self.port_towards(&flow.to));
            match *port {
                Some(port) => sending.follow(port),
                None => self.moved.set(true),
            }
        }
        let port = ports[usize::from(self.source.is_ipv6())].flatten();
        if let (Some(port), Some(mapping)) = (port, &*self.mapping.borrow()) {
            mapping.follow(port);
        }
    }

    /// Whether `real` stands for another of the client's addresses here.
    pub(super) fn is_taken(&self, real: &Address, client: &Address) -> bool {
        self.flows.borrow().get(real).is_some_and(|flow| flow.client != *client)
    }

    /// Carries `flow` from now on.
    pub(super) fn carry(&self, flow: &Rc<Flow>) {
        self.flows.borrow_mut().insert(flow.to.clone(), Rc::clone(flow));
        // It may be over before those that are here.
        self.added.notify_one();
    }

    /// Returns once there is a flow more, or if there has been one since the last call.
    pub(super) async fn added(&self) {
        self.added.notified().await;
    }

    /// Carries `flow` no more. True: it was the last.
    pub(super) fn forget(&self, flow: &Rc<Flow>) -> bool {
        let mut flows = self.flows.borrow_mut();
        if flows.get(&flow.to).is_some_and(|known| Rc::ptr_eq(known, flow)) {
            flows.remove(&flow.to);
        }
        flows.is_empty()
    }

    /// The flows that have been idle for too long.
    pub(super) fn over(&self, now: Instant) -> Vec<Rc<Flow>> {
        let kept = self.kept();
        self.flows.borrow().values().filter(|flow| flow.over_at(kept) <= now).cloned().collect()
    }

    /// When the client last wrote to the outer address of another: that goes past its own flows, and keeps them.
    fn kept(&self) -> Option<Instant> {
        self.mapping.borrow().as_ref().map(Mapping::used)
    }

    /// When to look for such flows next; None: there are no flows.
    pub(super) fn next_look(&self, now: Instant) -> Option<Instant> {
        let kept = self.kept();
        let first = self.flows.borrow().values().map(|flow| flow.over_at(kept)).min()?;
        Some(first.max(now + LOOK))
    }

    /// Sends datagrams of the client: one, or with `size` several of that size, the last of which may be shorter. Where too
    /// many wait for the transport they are lost, as UDP may be.
    pub(super) fn send(&self, payload: &[u8], size: Option<NonZeroU16>, flow: &Rc<Flow>, dont_fragment: bool) {
        let now = Instant::now();
        self.used.set(now);
        if self.moved.get() {
            self.follow();
        }
        let mut outbox = self.outbox.borrow_mut();
        let each = size.map_or(payload.len().max(1), |size| usize::from(size.get()));
        let mut rest = Some(payload);
        while let Some(left) = rest.filter(|_| outbox.is_empty()) {
            let Poll::Ready(sent) = self.poll_send(left, size, &flow.to, dont_fragment) else { break };
            let done = match sent {
                Ok(done) => {
                    flow.moved(done, 0, now);
                    done
                }
                Err(error) => {
                    self.send_failed(&error, flow);
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
            if let Some(waiting) = Waiting::new(payload, dont_fragment, &self.counters) {
                outbox.push_back((waiting, Rc::clone(flow)));
            }
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
        if self.moved.get() && !outbox.is_empty() {
            self.follow();
        }
        while let Some((waiting, flow)) = outbox.front() {
            let outcome =
                self.datagram.borrow_mut().poll_send_to(cx, &waiting.payload, &flow.to, waiting.dont_fragment);
            match outcome {
                Poll::Ready(Ok(())) => flow.moved(waiting.payload.len(), 0, Instant::now()),
                Poll::Ready(Err(error)) => self.send_failed(&error, flow),
                Poll::Pending => return,
            }
            outbox.pop_front();
        }
    }

    fn send_failed(&self, error: &io::Error, flow: &Flow) {
        let gone = [libc::ENODEV, libc::ENXIO, libc::ENETUNREACH, libc::EHOSTUNREACH];
        if error.raw_os_error().is_some_and(|code| gone.contains(&code)) {
            self.moved.set(true);
        }
        let why = match error.raw_os_error() {
            // What does not fit is followed by the network's own word, which knows the MTU.
            Some(libc::EMSGSIZE) => return,
            Some(libc::ENETUNREACH | libc::ENETDOWN) => Reach::Network,
            Some(libc::EHOSTUNREACH) => Reach::Host,
            Some(libc::EPERM | libc::EACCES) => Reach::Prohibited,
            Some(libc::ECONNREFUSED) => Reach::Port,
            _ => {
                self.counters.datagrams_dropped.fetch_add(1, Relaxed);
                return;
            }
        };
        self.back.unreachable(&flow.client, self.source, &flow.quoted, why);
    }

    /// Hands answers to the client until the transport fails or the association is ended by others.
    pub(super) fn poll_answers(&self, cx: &mut Context<'_>, scratch: &RefCell<Box<[u8]>>) -> Poll<io::Error> {
        if self.ended.get() {
            return Poll::Ready(ended());
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
                    let at = self.datagram.borrow().reached_at();
                    if !answers.add(&from, at, end - start) {
                        self.hand_over(&mut answers, &scratch);
                        if start > 0 {
                            scratch.copy_within(start..end, 0);
                        }
                        answers = Answers { from: Some(from), at, size: end - start, length: end - start };
                    }
                }
                Poll::Ready(Ok(Received::Train { from, size })) => {
                    self.hand_over(&mut answers, &scratch);
                    share = share.saturating_sub((end - start) / usize::from(size.get()));
                    let at = self.datagram.borrow().reached_at();
                    self.deliver(&from, at, &scratch[start..end], Some(size));
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
        let Answers { from, at, size, length } = std::mem::take(answers);
        let Some(from) = from else { return };
        let several = u16::try_from(size).ok().and_then(NonZeroU16::new).filter(|_| length > size);
        self.deliver(&from, at, &scratch[..length], several);
    }

    /// Hands what a peer sent to this host's address `at` to the client: one payload, or with `size` several of that size.
    fn deliver(&self, from: &Address, at: Option<IpAddr>, payload: &[u8], size: Option<NonZeroU16>) {
        let now = Instant::now();
        self.used.set(now);
        self.answered.set(true);
        let hand = |from: &Address| match size {
            Some(size) => self.back.deliver_train(from, self.source, payload, size),
            None => self.back.deliver(from, self.source, payload),
        };
        let flows = self.flows.borrow();
        let outer = if flows.contains_key(from) { None } else { self.outer(from, at, now) };
        let from = outer.as_ref().unwrap_or(from);
        if let Some(flow) = flows.get(from) {
            flow.moved(0, payload.len(), now);
            return hand(&flow.client);
        }
        match (&self.name, &from.host) {
            // One name, and one flow: the relay writes the peer as an address, or another port of its host answers.
            (Some(name), _) => {
                if let Some(flow) = flows.values().next() {
                    flow.moved(0, payload.len(), now);
                }
                hand(&Address { host: name.host.clone(), port: from.port });
            }
            // No flow of the client's.
            (None, Host::Ip(_)) => {
                self.counters.down.fetch_add(payload.len() as u64, Relaxed);
                hand(from);
            }
            (None, Host::Name(_)) => {
                self.counters.datagrams_dropped.fetch_add(1, Relaxed);
            }
        }
    }

    /// The outer address of `from` where that is another client, who has written to this one's.
    fn outer(&self, from: &Address, at: Option<IpAddr>, now: Instant) -> Option<Address> {
        Some(self.neighbours.get()?.outer(from.socket()?, at?, now)?.into())
    }

    fn tell(&self, to: &Address, why: Reach) {
        let why = match (why, to.socket()) {
            // Our packet had the longer header.
            (Reach::TooBig(mtu), Some(to)) if self.source.is_ipv4() && to.is_ipv6() => {
                Reach::TooBig(mtu.saturating_sub(LONGER_HEADER))
            }
            _ => why,
        };
        if let Some(flow) = self.flows.borrow().get(to) {
            self.back.unreachable(&flow.client, self.source, &flow.quoted, why);
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.end(&"we stopped");
    }
}

#[cfg(test)]
#[path = "link_tests.rs"]
mod tests;
