//! Datagrams on their way: the association that carries them is found, or opened once for all that wait.

use std::future::poll_fn;
use std::net::IpAddr;
use std::num::NonZeroU16;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::OwnedSemaphorePermit;
use tokio::task::spawn_local;
use tokio::time::Instant;

use super::associations::{Limits, Origin, Peer, REFUSED_FOR, Ticket, Way};
use super::carried::IDLE;
use super::link::{Flow, Link, Opened};
use super::live::Account;
use super::queue::Waiting;
use super::slot::Slot;
use super::{Back, Choice, Dispatcher, MAKE_ROOM, Unfaked, attempt, reach};
use crate::dns::Held;
use crate::net::{Address, BoxDatagram, DialError, Host};
use crate::outbound::Outbound;
use crate::session::{Network, Session};

/// As much of a packet as an error has to quote: the IP header and eight bytes, with room for options.
const QUOTED: usize = 128;

/// How often an opening takes the port of another association, or of a hundredth of all, before it fails.
const MOST_FOR_A_PORT: u32 = 3;

/// How long an opening waits for those before it: as long as one of them may take.
const MOST_PATIENCE: Duration = Duration::from_secs(30);

impl Dispatcher {
    /// Carries datagrams of one client to one peer: one, or with `size` several of that size, the last of which may be
    /// shorter. They may wait for [`flush`](Self::flush). `quoted` is the beginning of their packet, for ICMP errors; empty
    /// where there is none.
    pub fn packet(
        self: &Rc<Self>,
        session: &Session,
        payload: &[u8],
        size: Option<NonZeroU16>,
        dont_fragment: bool,
        quoted: &[u8],
        back: &Rc<dyn Back>,
    ) {
        let origin = Origin::of(session.source, back);
        let mut associations = self.associations.borrow_mut();
        if let Some(Peer::Open { link, flow }) = associations.peer(origin, &session.destination) {
            return self.gathering.borrow_mut().add(link, payload, size, flow, dont_fragment);
        }
        drop(associations);
        // An empty datagram is one too.
        let each = size.map_or(payload.len().max(1), |size| usize::from(size.get()));
        let empty = payload.is_empty().then_some(payload);
        for payload in payload.chunks(each).chain(empty) {
            if let Some(waiting) = Waiting::new(payload, dont_fragment, &self.core.counters) {
                self.knock(session, waiting, quoted, back);
            }
        }
    }

    /// A new turn of the worker begins. Where it is `behind` with its work, a client opens only so many ways.
    pub fn begin_turn(&self, behind: bool) {
        self.associations.borrow_mut().turn(behind);
    }

    /// Sends what [`packet`](Self::packet) has gathered. Due at the end of every turn that called it.
    pub fn flush(&self) {
        self.gathering.borrow_mut().flush();
    }

    /// Carries one datagram to a peer to which the way is not open yet.
    fn knock(self: &Rc<Self>, session: &Session, waiting: Waiting, quoted: &[u8], back: &Rc<dyn Back>) {
        let (origin, client) = (Origin::of(session.source, back), &session.destination);
        let mut associations = self.associations.borrow_mut();
        match associations.peer(origin, client) {
            Some(Peer::Opening(_)) => {
                associations.wait(origin, client, waiting);
                return;
            }
            Some(Peer::Closed { why, until }) if Instant::now() < *until => {
                if let Some(why) = *why {
                    back.unreachable(client, session.source, quoted, why);
                }
                return;
            }
            Some(Peer::Open { link, flow }) => return link.send(&waiting.payload, None, flow, waiting.dont_fragment),
            Some(Peer::Closed { .. }) | None => {}
        }
        if !associations.may_begin(session.source.ip(), back) {
            return;
        }
        let ticket = associations.begin(origin, back, client, waiting);
        let quoted: Box<[u8]> = quoted[..quoted.len().min(QUOTED)].into();
        let task = spawn_local(Rc::clone(self).open(ticket.clone(), session.clone(), quoted, Rc::clone(back)));
        associations.attach(&ticket, task.abort_handle());
    }

    /// Opens the way to one peer and sends what waited.
    async fn open(self: Rc<Self>, ticket: Ticket, session: Session, quoted: Box<[u8]>, back: Rc<dyn Back>) {
        let knocking = Knocking { dispatcher: &self, ticket: &ticket };
        let mut account = Account::new(Arc::clone(&self.core.counters), session.clone(), None);
        match self.find(&ticket, session.clone(), &back, &mut account).await {
            Ok((link, to, held)) => {
                let sending = self.core.sends(&link, &to);
                self.core.map(&session, &link, &to);
                let opened = Opened { to, quoted, account, held, sending };
                let flow = Flow::new(ticket.client.clone(), opened, self.core.udp_timeout);
                let waited = self.associations.borrow_mut().enter(&ticket, &link, &flow);
                for waiting in waited.into_iter().flatten() {
                    link.send(&waiting.payload, None, &flow, waiting.dont_fragment);
                }
            }
            Err(error) => {
                account.failed(&error, matches!(error, DialError::Rejected(_)));
                let why = reach(&error);
                let news = self.associations.borrow_mut().refuse(&ticket, why);
                if let Some(why) = why.filter(|_| news) {
                    back.unreachable(&ticket.client, session.source, &quoted, why);
                }
                if news {
                    let (dispatcher, ticket) = (Rc::clone(&self), ticket.clone());
                    spawn_local(async move {
                        tokio::time::sleep(REFUSED_FOR).await;
                        dispatcher.associations.borrow_mut().reopen(ticket.origin, &ticket.client);
                    });
                }
            }
        }
        drop(knocking);
    }

    /// Decides, and finds or opens the association that carries the session; with it comes the peer as the outbound wants
    /// it written.
    async fn find(
        self: &Rc<Self>,
        ticket: &Ticket,
        session: Session,
        back: &Rc<dyn Back>,
        account: &mut Account,
    ) -> Result<(Rc<Link>, Address, Option<Held>), DialError> {
        let Unfaked { mut session, fake, held } = self.unfake(session)?;
        account.found(&session, fake);
        let Choice { outbound, verdict } = self.choose(&mut session).await?;
        let chain = Arc::clone(&verdict.chain);
        account.decided(verdict);
        let to = outbound.peer(&session).await?;
        session.destination = to.clone();
        let link = match to.host {
            Host::Name(_) => {
                let _turn = self.turn(ticket.origin, &chain).await?;
                self.link(&*outbound, &session, back, Some(ticket.client.clone())).await?
            }
            Host::Ip(_) => self.shared(ticket, chain, &*outbound, &session, back).await?,
        };
        Ok((link, to, held))
    }

    /// The association that serves all peers of the client through this outbound. The first who needs it opens it, the
    /// others wait. A peer that already stands for another of the client's addresses there gets one of its own.
    async fn shared(
        self: &Rc<Self>,
        ticket: &Ticket,
        chain: Arc<str>,
        outbound: &dyn Outbound,
        session: &Session,
        back: &Rc<dyn Back>,
    ) -> Result<Rc<Link>, DialError> {
        loop {
            let slot = match self.associations.borrow().way(ticket.origin, &chain) {
                Some(Way::Open(link)) if link.is_taken(&session.destination, &ticket.client) => break,
                Some(Way::Open(link)) => return Ok(Rc::clone(link)),
                Some(Way::Opening(slot)) => Some(Rc::clone(slot)),
                None => None,
            };
            if let Some(slot) = slot {
                slot.wait().await?;
                continue;
            }
            let turn = Turn::take(self, ticket.origin, chain);
            let link = self.link(outbound, session, back, None).await.inspect_err(|error| turn.slot.fail(error))?;
            self.associations.borrow_mut().set_way(ticket.origin, Arc::clone(&turn.chain), Way::Open(Rc::clone(&link)));
            return Ok(link);
        }
        self.link(outbound, session, back, None).await
    }

    /// Waits until the client may open one more association of its own through this outbound, but not for long.
    async fn turn(&self, origin: Origin, chain: &Arc<str>) -> Result<Option<OwnedSemaphorePermit>, DialError> {
        let Some(turns) = self.associations.borrow_mut().turns(origin, chain) else { return Ok(None) };
        let turn = tokio::time::timeout(MOST_PATIENCE, turns.acquire_owned());
        Ok(turn.await.map_err(|_| DialError::TimedOut)?.ok())
    }

    /// Opens an association. With `name`, all that it brings is from there.
    async fn link(
        self: &Rc<Self>,
        outbound: &dyn Outbound,
        session: &Session,
        back: &Rc<dyn Back>,
        name: Option<Address>,
    ) -> Result<Rc<Link>, DialError> {
        let datagram = self.associate(outbound, session).await?;
        let link = Link::new(session.source, Rc::clone(back), datagram, name, Arc::clone(&self.core.counters));
        link.among(&self.core.mappings);
        self.associations.borrow_mut().add(&link);
        spawn_local(Rc::clone(self).carry(Rc::clone(&link)));
        Ok(link)
    }

    pub(super) async fn associate(&self, outbound: &dyn Outbound, session: &Session) -> Result<BoxDatagram, DialError> {
        let (client, deadline) = (session.source.ip(), Instant::now() + MAKE_ROOM);
        let (mut waiter, mut attempts) = (None, 0);
        loop {
            match attempt(outbound.associate(session), &mut waiter).await {
                Err(DialError::Exhausted) if self.make_room(&mut waiter, client, deadline).await => {}
                Err(DialError::NoPort) => {
                    self.core.counters.no_port(Network::Udp);
                    attempts += 1;
                    // Others may have taken the ports, to whom nothing of ours would ever be enough.
                    if attempts > MOST_FOR_A_PORT || !self.spare_a_port(client) {
                        return Err(DialError::NoPort);
                    }
                }
                Err(DialError::NoControlPort) => {
                    self.core.counters.no_port(Network::Tcp);
                    return Err(DialError::NoControlPort);
                }
                other => return other,
            }
        }
    }

    /// Frees descriptors at the cost of associations that are idle, those first that have been so longest. False: there is
    /// none.
    pub(super) fn spare_a_descriptor(&self) -> bool {
        self.associations.borrow_mut().evict(IDLE, &"evicted: no descriptors are left")
    }

    /// The same for ports, of which there are perhaps fewer than before, because `client` found none.
    fn spare_a_port(&self, client: IpAddr) -> bool {
        self.associations.borrow_mut().spare_a_port(client, Limits::ports())
    }

    /// Carries answers for as long as the association has flows and its transport works.
    pub(super) async fn carry(self: Rc<Self>, link: Rc<Link>) {
        let mut carrying = Carrying { dispatcher: &self, link: &link, reason: "we stopped".to_owned() };
        while let Some(mut look) = link.next_look(Instant::now()) {
            loop {
                tokio::select! {
                    biased;
                    error = poll_fn(|cx| link.poll_answers(cx, &self.scratch)) => {
                        carrying.reason = error.to_string();
                        return;
                    }
                    () = tokio::time::sleep_until(look) => break,
                    // It may be over sooner. Never later than planned, or ever new flows would put it off for ever.
                    () = link.added() => look = link.next_look(Instant::now()).map_or(look, |next| next.min(look)),
                }
            }
            self.associations.borrow_mut().expire(&link, Instant::now());
        }
        carrying.reason = "idle".to_owned();
    }
}

/// The task that opens the way to a peer. However it ends, nobody waits for it afterwards.
struct Knocking<'a> {
    dispatcher: &'a Rc<Dispatcher>,
    ticket: &'a Ticket,
}

impl Drop for Knocking<'_> {
    fn drop(&mut self) {
        if let Ok(mut associations) = self.dispatcher.associations.try_borrow_mut() {
            associations.give_up(self.ticket);
        }
    }
}

/// The task that carries an association's answers. However it ends, the association ends with it.
struct Carrying<'a> {
    dispatcher: &'a Rc<Dispatcher>,
    link: &'a Rc<Link>,
    reason: String,
}

impl Drop for Carrying<'_> {
    fn drop(&mut self) {
        if let Ok(mut associations) = self.dispatcher.associations.try_borrow_mut() {
            associations.end(self.link, &self.reason);
        }
    }
}

/// The turn to open the association that others wait for.
struct Turn<'a> {
    dispatcher: &'a Rc<Dispatcher>,
    origin: Origin,
    chain: Arc<str>,
    slot: Rc<Slot>,
}

impl<'a> Turn<'a> {
    fn take(dispatcher: &'a Rc<Dispatcher>, origin: Origin, chain: Arc<str>) -> Self {
        let slot = Rc::new(Slot::default());
        let way = Way::Opening(Rc::clone(&slot));
        dispatcher.associations.borrow_mut().set_way(origin, Arc::clone(&chain), way);
        Self { dispatcher, origin, chain, slot }
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        if let Ok(mut associations) = self.dispatcher.associations.try_borrow_mut() {
            associations.end_slot(self.origin, &self.chain, &self.slot);
        }
        self.slot.end();
    }
}
