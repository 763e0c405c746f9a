//! A socket for echo requests and the flows on it: each has an id on the wire, by which its replies are known.

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::io;
use std::net::IpAddr;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use foldhash::fast::RandomState;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::echo_ids::EchoId;
use super::echoes::Key;
use super::live::Account;
use super::{EchoBack, Ping, Quote};
use crate::dns::Held;
use crate::net::{BoxEchoSocket, DialError, Echo, EchoArrival, EchoError, EchoFailure, LONGER_HEADER};

/// Requests of one flow that an error may still be about: more than a traceroute has under way.
pub(super) const REMEMBERED: usize = 32;
/// Bytes that their heads may have: 64 for each, where a header without options has 48 at most.
pub(super) const REMEMBERED_BYTES: usize = 2 << 10;
/// A header that is longer is none that an error could quote with anything behind it.
const LONGEST_HEAD: usize = 128;
/// Messages taken from one socket before others get their turn.
const SHARE: usize = 64;
/// Flows that are over are looked for no more often than this.
const LOOK: Duration = Duration::from_secs(1);

/// An id on the wire.
pub(super) enum Wire {
    /// One of ours, given back with the flow.
    Taken(EchoId),
    /// The one that the kernel gave the socket.
    Given(u16),
}

impl Wire {
    pub(super) fn id(&self) -> u16 {
        match self {
            Self::Taken(id) => id.number(),
            Self::Given(id) => *id,
        }
    }
}

/// The echo requests of one client with one id to one host.
pub(super) struct Flow {
    pub(super) key: Key,
    /// The host itself, where the client wrote a fake address.
    pub(super) to: IpAddr,
    pub(super) back: Rc<dyn EchoBack>,
    wire: Wire,
    used: Cell<Instant>,
    sent: RefCell<VecDeque<Sent>>,
    account: RefCell<Option<Account>>,
    _held: Option<Held>,
}

/// What is needed to make a [`Flow`].
pub(super) struct Opened {
    pub(super) to: IpAddr,
    pub(super) wire: Wire,
    pub(super) back: Rc<dyn EchoBack>,
    pub(super) account: Account,
    pub(super) held: Option<Held>,
}

/// A request that has left, as the client wrote it.
struct Sent {
    sequence: u16,
    head: Box<[u8]>,
}

impl Flow {
    pub(super) fn new(key: Key, opened: Opened) -> Rc<Self> {
        let Opened { to, wire, back, mut account, held } = opened;
        account.opened();
        let (used, account) = (Cell::new(Instant::now()), RefCell::new(Some(account)));
        Rc::new(Self { key, to, back, wire, used, sent: RefCell::default(), account, _held: held })
    }

    pub(super) fn wire(&self) -> u16 {
        self.wire.id()
    }

    /// When its last request or reply passed.
    pub(super) fn used(&self) -> Instant {
        self.used.get()
    }

    /// Ends it, with its line in the log.
    pub(super) fn close(&self, reason: &dyn fmt::Display) {
        if let Some(account) = self.account.borrow_mut().take() {
            account.closed(reason);
        }
    }

    fn moved(&self, up: usize, down: usize) {
        self.used.set(Instant::now());
        if let Some(account) = self.account.borrow_mut().as_mut() {
            account.moved(up as u64, down as u64);
        }
    }

    fn remember(&self, sequence: u16, head: &[u8]) {
        if head.len() > LONGEST_HEAD {
            return;
        }
        let mut sent = self.sent.borrow_mut();
        let mut bytes = sent.iter().map(|sent| sent.head.len()).sum::<usize>() + head.len();
        while (sent.len() >= REMEMBERED || bytes > REMEMBERED_BYTES)
            && let Some(oldest) = sent.pop_front()
        {
            bytes -= oldest.head.len();
        }
        sent.push_back(Sent { sequence, head: head.into() });
    }

    fn reply(&self, reply: &Echo<'_>) {
        self.moved(0, reply.payload.len());
        self.back.reply(self.key.destination, self.key.source, reply);
    }

    /// Hands an error to the client in the client's own words. What quotes nothing that was sent lately is somebody's
    /// invention.
    fn error(&self, error: &EchoError, payload: &[u8]) {
        let sent = self.sent.borrow();
        let Some(about) = sent.iter().rev().find(|sent| sent.sequence == error.sequence) else { return };
        let ipv6 = self.key.source.is_ipv6();
        let Some(message) = translate(error.message, self.to.is_ipv6(), ipv6) else { return };
        // A router of the other family has no address that the client could know: then the host itself says it.
        let router = error.router.map(|router| if router.is_ipv6() == ipv6 { router } else { self.key.destination });
        let quote = Quote { head: &about.head, ttl: error.ttl, payload };
        self.back.error(router, self.key.source, message, &quote);
    }
}

/// One socket.
pub(super) struct Way {
    pub(super) ipv6: bool,
    own_id: Option<u16>,
    socket: RefCell<BoxEchoSocket>,
    /// By the id on the wire.
    flows: RefCell<HashMap<u16, Rc<Flow>, RandomState>>,
    emptied: Notify,
}

impl Way {
    pub(super) fn new(socket: BoxEchoSocket, ipv6: bool) -> Rc<Self> {
        let own_id = socket.own_id();
        let socket = RefCell::new(socket);
        Rc::new(Self { ipv6, own_id, socket, flows: RefCell::default(), emptied: Notify::new() })
    }

    /// The one id that it can send with, if it is bound to one.
    pub(super) fn own_id(&self) -> Option<u16> {
        self.own_id
    }

    /// Carries `flow` from now on.
    pub(super) fn carry(&self, flow: &Rc<Flow>) {
        self.flows.borrow_mut().insert(flow.wire(), Rc::clone(flow));
    }

    /// Carries `flow` no more.
    pub(super) fn forget(&self, flow: &Rc<Flow>) {
        let mut flows = self.flows.borrow_mut();
        if flows.get(&flow.wire()).is_some_and(|known| Rc::ptr_eq(known, flow)) {
            flows.remove(&flow.wire());
        }
        if flows.is_empty() {
            self.emptied.notify_one();
        }
    }

    /// Returns once the last flow is gone.
    pub(super) async fn emptied(&self) {
        self.emptied.notified().await;
    }

    /// Those of its flows that have been idle for so long.
    pub(super) fn over(&self, idle: Duration, now: Instant) -> Vec<Key> {
        let over = |flow: &&Rc<Flow>| flow.used() + idle <= now;
        self.flows.borrow().values().filter(over).map(|flow| flow.key).collect()
    }

    /// The keys of all its flows.
    pub(super) fn keys(&self) -> Vec<Key> {
        self.flows.borrow().values().map(|flow| flow.key).collect()
    }

    /// When to look for such flows next; None: there are no flows.
    pub(super) fn next_look(&self, idle: Duration, now: Instant) -> Option<Instant> {
        let first = self.flows.borrow().values().map(|flow| flow.used()).min()?;
        Some((first + idle).max(now + LOOK))
    }

    /// Sends a request of `flow` with one hop less to live.
    ///
    /// # Errors
    /// Those of the socket.
    pub(super) fn send(&self, flow: &Flow, ping: &Ping<'_>) -> Result<(), DialError> {
        let echo = Echo { id: flow.wire(), ttl: ping.echo.ttl.saturating_sub(1), ..ping.echo };
        self.socket.borrow_mut().send(flow.to, &echo)?;
        flow.moved(echo.payload.len(), 0);
        flow.remember(echo.sequence, ping.head);
        Ok(())
    }

    /// Whether its socket is of no more use: see [`EchoSocket::is_stranded`](crate::net::EchoSocket::is_stranded).
    pub(super) fn is_stranded(&self) -> bool {
        self.socket.borrow().is_stranded()
    }

    /// Hands over what has come, until the socket fails.
    pub(super) fn poll_arrivals(&self, cx: &mut Context<'_>, scratch: &RefCell<Box<[u8]>>) -> Poll<io::Error> {
        let mut scratch = scratch.borrow_mut();
        for _ in 0..SHARE {
            let received = self.socket.borrow_mut().poll_recv(cx, &mut scratch);
            match received {
                Poll::Ready(Ok(arrival)) => self.arrived(&arrival, &scratch),
                Poll::Ready(Err(error)) => return Poll::Ready(error),
                Poll::Pending => return Poll::Pending,
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// The flow that sent with `id` to this host.
    fn flow(&self, id: u16, to: IpAddr) -> Option<Rc<Flow>> {
        self.flows.borrow().get(&id).filter(|flow| flow.to == to).cloned()
    }

    fn arrived(&self, arrival: &EchoArrival, bytes: &[u8]) {
        let part = |range: &std::ops::Range<usize>| bytes.get(range.clone()).unwrap_or_default();
        match arrival {
            EchoArrival::Reply { from, id, sequence, ttl, tos, payload } => {
                let Some(flow) = self.flow(*id, *from) else { return };
                // One hop less here too, but what has come so far still arrives.
                let ttl = ttl.saturating_sub(1).max(1);
                let (id, payload) = (flow.key.id, part(payload));
                flow.reply(&Echo { id, sequence: *sequence, payload, ttl, tos: *tos, dont_fragment: false });
            }
            EchoArrival::Error(error) => {
                if let Some(flow) = self.flow(error.id, error.to) {
                    flow.error(error, part(&error.payload));
                }
            }
        }
    }
}

/// Hosts may pass over a smaller one (RFC 8201 section 4).
pub(super) const SMALLEST_V6_MTU: u32 = 1280;

/// An error in the numbers of the client's family (RFC 7915 sections 4.2 and 5.2). None: it has no word for that.
fn translate(message: EchoFailure, from_ipv6: bool, to_ipv6: bool) -> Option<EchoFailure> {
    let EchoFailure { kind, code, word } = message;
    let (kind, code, word) = match (from_ipv6, to_ipv6, kind, code) {
        (true, true, ..) | (false, false, ..) => return Some(message),
        (true, false, 1, 1) => (3, 13, 0),
        (true, false, 1, 4) => (3, 3, 0),
        (true, false, 1, _) => (3, 1, 0),
        (true, false, 2, _) => (3, 4, word.saturating_sub(LONGER_HEADER).min(0xffff)),
        (true, false, 3, code) => (11, code, 0),
        (false, true, 3, 3) => (1, 4, 0),
        (false, true, 3, 4) => (2, 0, (word & 0xffff).saturating_add(LONGER_HEADER).max(SMALLEST_V6_MTU)),
        (false, true, 3, 9 | 10 | 13) => (1, 1, 0),
        (false, true, 3, 0 | 1 | 5..=8 | 11 | 12) => (1, 0, 0),
        (false, true, 11, code) => (3, code, 0),
        _ => return None,
    };
    Some(EchoFailure { kind, code, word })
}
