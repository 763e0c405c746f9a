//! The UDP associations of one worker: which of them carries the datagrams of which client, and who goes when there are
//! too many.
//!
//! An association is (client, outbound): one socket of ours for all peers of a client, so that its mapping does not
//! depend on the peer (RFC 4787 REQ-1).

mod sparing;

use std::collections::{HashMap, HashSet, VecDeque};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use foldhash::fast::RandomState;
use tokio::sync::Semaphore;
use tokio::task::AbortHandle;
use tokio::time::Instant;

use sparing::Sparing;

use super::entry::Back;
use super::link::{Flow, Link};
use super::live::Counters;
use super::pace::Pace;
use super::queue::Waiting;
use super::slot::Slot;
use super::tally::Tally;
use crate::net::{Address, Reach, client_of};
use crate::platform::{descriptors_for_flows, local_ports};

/// Datagrams that wait while their association is being opened.
const MOST_WAITING: usize = 32;
/// Associations that a client may be opening at a time through one outbound, where each name has its own.
pub(super) const MOST_OPENING: usize = 16;
/// A peer that was refused stays so for this long, without asking again.
pub(super) const REFUSED_FOR: Duration = Duration::from_secs(1);

/// Who has so many gives way to others, however long theirs have been idle; where there can be few, who has an eighth of
/// these.
const MANY: usize = 64;
/// The part of the local ports that is left to our own questions and to this host's programs.
const PORTS_LEFT: usize = 2;

/// Memory of an association and of a peer, in bytes: generously.
const LINK: usize = 4 << 10;
const PEER: usize = 1 << 10;

/// How much there may be of everything. Beyond, what has been idle longest goes.
pub(super) struct Limits {
    /// Associations of all workers.
    pub(super) links: usize,
    /// The same for want of local ports.
    pub(super) ports: usize,
    /// Peers of all clients of one worker.
    pub(super) peers: usize,
    /// Peers of one client; of one port of this host, whose address stands for all its programs, and of who comes by a proxy
    /// port.
    pub(super) peers_of_one: usize,
}

impl Limits {
    /// Half of the descriptors are for TCP, whatever UDP does. An association may hold two: a socket for each family, or
    /// one and the connection that a SOCKS proxy keeps it by.
    /// `memory` is what all of it may take, in bytes.
    pub(super) fn of_this_process(memory: usize) -> Self {
        let links = usize::try_from(descriptors_for_flows() / 4).unwrap_or(usize::MAX);
        let (links, peers) = (links.min(memory / 2 / LINK), memory / 2 / PEER);
        let peers = peers.clamp(64, 65_536);
        Self { links: links.clamp(1, 16_384), ports: Self::ports(), peers, peers_of_one: peers.min(4096) }
    }

    /// So many associations as the local ports are enough for.
    pub(super) fn ports() -> usize {
        (local_ports() / PORTS_LEFT).max(1)
    }

    /// So many associations there may be.
    fn links(&self) -> usize {
        self.links.min(self.ports)
    }
}

/// A client: the address it sends from, and the way back to it. One address behind two ways is two clients; the way is
/// kept by [`Source`], so that no other comes to stand at the same place in memory.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) struct Origin {
    source: SocketAddr,
    back: *const (),
}

impl Origin {
    pub(super) fn of(source: SocketAddr, back: &Rc<dyn Back>) -> Self {
        Self { source, back: Rc::as_ptr(back).cast() }
    }
}

/// One attempt to open the way to a peer.
#[derive(Clone)]
pub(super) struct Ticket {
    pub(super) origin: Origin,
    pub(super) client: Address,
    number: u64,
}

/// A peer as one client sees it.
pub(super) enum Peer {
    /// The router, the resolver or the outbound is at work.
    Opening(Opening),
    /// Datagrams go this way.
    Open { link: Rc<Link>, flow: Rc<Flow> },
    /// No outbound takes it; `why` is what the client is told each time.
    Closed { why: Option<Reach>, until: Instant },
}

/// What waits for the way to be open.
pub(super) struct Opening {
    number: u64,
    since: Instant,
    waiting: VecDeque<Waiting>,
    /// Ends with this.
    task: Option<Task>,
}

/// A task that ends when nobody waits for it any more.
struct Task(AbortHandle);

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// How an outbound is reached for all the peers of one client.
pub(super) enum Way {
    /// Somebody is opening the association: the others wait.
    Opening(Rc<Slot>),
    /// There it is.
    Open(Rc<Link>),
}

/// All that one client has going.
struct Source {
    _back: Rc<dyn Back>,
    peers: HashMap<Address, Peer, RandomState>,
    /// Associations that serve many peers, by the outbound's chain.
    ways: HashMap<Arc<str>, Way, RandomState>,
    /// Turns to open associations that serve one name each, by the outbound's chain.
    turns: HashMap<Arc<str>, Arc<Semaphore>, RandomState>,
}

/// The associations of one worker.
pub(super) struct Associations {
    sources: HashMap<Origin, Source, RandomState>,
    links: HashMap<*const Link, Rc<Link>, RandomState>,
    /// Peers by client, whatever the ports.
    peers: Tally,
    tickets: u64,
    limits: Limits,
    pace: Pace,
    sparing: Sparing,
    counters: Arc<Counters>,
}

impl Associations {
    pub(super) fn new(limits: Limits, counters: Arc<Counters>) -> Self {
        let (sources, links, pace) = (HashMap::default(), HashMap::default(), Pace::new(Instant::now()));
        let sparing = Sparing::new(Instant::now());
        Self { sources, links, peers: Tally::default(), tickets: 0, limits, pace, sparing, counters }
    }

    /// A new turn of the worker begins, which may be behind with its work.
    pub(super) fn turn(&mut self, behind: bool) {
        self.pace.turn(behind);
    }

    /// Whether the way to another peer may be opened for this client now; else its datagram is counted.
    pub(super) fn may_begin(&mut self, client: IpAddr, back: &Rc<dyn Back>) -> bool {
        let admitted = !back.is_paced(client) || self.pace.admits(client, Instant::now());
        if !admitted {
            self.counters.held_back(client);
        }
        admitted
    }

    pub(super) fn peer(&mut self, origin: Origin, client: &Address) -> Option<&mut Peer> {
        self.sources.get_mut(&origin)?.peers.get_mut(client)
    }

    /// Lets a datagram wait for a peer that is being opened. False: it is not.
    pub(super) fn wait(&mut self, origin: Origin, client: &Address, waiting: Waiting) -> bool {
        let Some(Peer::Opening(opening)) = self.peer(origin, client) else { return false };
        if opening.waiting.len() < MOST_WAITING {
            opening.waiting.push_back(waiting);
        } else {
            self.counters.datagrams_dropped.fetch_add(1, Relaxed);
        }
        true
    }

    /// Notes that the way to a peer is being opened, with its first datagram.
    pub(super) fn begin(&mut self, origin: Origin, back: &Rc<dyn Back>, client: &Address, first: Waiting) -> Ticket {
        self.forget(origin, client, &"asked for again");
        self.make_room(origin, back.is_paced(origin.source.ip()));
        self.tickets += 1;
        let opening =
            Opening { number: self.tickets, since: Instant::now(), waiting: VecDeque::from([first]), task: None };
        let source = self.sources.entry(origin).or_insert_with(|| Source {
            _back: Rc::clone(back),
            peers: HashMap::default(),
            ways: HashMap::default(),
            turns: HashMap::default(),
        });
        source.peers.insert(client.clone(), Peer::Opening(opening));
        self.peers.add(origin.source.ip());
        Ticket { origin, client: client.clone(), number: self.tickets }
    }

    /// The task that opens the way ends when the peer is forgotten.
    pub(super) fn attach(&mut self, ticket: &Ticket, task: AbortHandle) {
        match self.opening(ticket) {
            Some(opening) => opening.task = Some(Task(task)),
            None => task.abort(),
        }
    }

    fn opening(&mut self, ticket: &Ticket) -> Option<&mut Opening> {
        match self.peer(ticket.origin, &ticket.client) {
            Some(Peer::Opening(opening)) if opening.number == ticket.number => Some(opening),
            _ => None,
        }
    }

    /// The way is open: returns what waited for it. None: nobody waits any more.
    pub(super) fn enter(&mut self, ticket: &Ticket, link: &Rc<Link>, flow: &Rc<Flow>) -> Option<VecDeque<Waiting>> {
        let waiting = std::mem::take(&mut self.opening(ticket)?.waiting);
        link.carry(flow);
        self.replace(ticket, Peer::Open { link: Rc::clone(link), flow: Rc::clone(flow) });
        Some(waiting)
    }

    /// No way leads there. True: that is news, and to be forgotten after [`REFUSED_FOR`].
    pub(super) fn refuse(&mut self, ticket: &Ticket, why: Option<Reach>) -> bool {
        let waits = self.opening(ticket).is_some();
        if waits {
            self.replace(ticket, Peer::Closed { why, until: Instant::now() + REFUSED_FOR });
        }
        waits
    }

    /// The peer's task is the one that calls this, and does not wait for anything afterwards: that it is aborted along
    /// with what it replaces has no effect.
    fn replace(&mut self, ticket: &Ticket, peer: Peer) {
        if let Some(known) = self.peer(ticket.origin, &ticket.client) {
            *known = peer;
        }
    }

    /// Forgets a peer whose opening came to nothing.
    pub(super) fn give_up(&mut self, ticket: &Ticket) {
        if self.opening(ticket).is_some() {
            self.forget(ticket.origin, &ticket.client, &"given up");
        }
    }

    /// Forgets a peer whose refusal is over.
    pub(super) fn reopen(&mut self, origin: Origin, client: &Address) {
        if matches!(self.peer(origin, client), Some(Peer::Closed { until, .. }) if *until <= Instant::now()) {
            self.forget(origin, client, &"refused");
        }
    }

    /// The way of `origin` through the outbound `chain` for all its peers.
    pub(super) fn way(&self, origin: Origin, chain: &str) -> Option<&Way> {
        self.sources.get(&origin)?.ways.get(chain)
    }

    /// Sets that way, as long as the client is there.
    pub(super) fn set_way(&mut self, origin: Origin, chain: Arc<str>, way: Way) {
        if let Some(source) = self.sources.get_mut(&origin) {
            source.ways.insert(chain, way);
        }
    }

    /// The turns of `origin` to open associations for names through the outbound `chain`. None: the client is gone.
    pub(super) fn turns(&mut self, origin: Origin, chain: &Arc<str>) -> Option<Arc<Semaphore>> {
        let turns = &mut self.sources.get_mut(&origin)?.turns;
        let new = || Arc::new(Semaphore::new(MOST_OPENING));
        Some(Arc::clone(turns.entry(Arc::clone(chain)).or_insert_with(new)))
    }

    /// The opening of a way is over, whatever came of it.
    pub(super) fn end_slot(&mut self, origin: Origin, chain: &str, slot: &Rc<Slot>) {
        if matches!(self.way(origin, chain), Some(Way::Opening(known)) if Rc::ptr_eq(known, slot)) {
            if let Some(source) = self.sources.get_mut(&origin) {
                source.ways.remove(chain);
            }
            self.sweep(origin);
        }
    }

    /// Adds an association, in the place of others if there are too many.
    pub(super) fn add(&mut self, link: &Rc<Link>) {
        if self.counters.associations.load(Relaxed) > self.limits.links() as u64 {
            self.evict(Duration::ZERO, &"evicted: too many associations");
        }
        self.links.insert(Rc::as_ptr(link), Rc::clone(link));
    }

    /// Ends an association, and forgets the peers that it served.
    pub(super) fn end(&mut self, link: &Rc<Link>, reason: &dyn fmt::Display) {
        let origin = Origin::of(link.source, &link.back);
        self.links.remove(&Rc::as_ptr(link));
        let flows = link.end(reason);
        let Some(source) = self.sources.get_mut(&origin) else { return };
        source.ways.retain(|_, way| !matches!(way, Way::Open(other) if Rc::ptr_eq(other, link)));
        for flow in flows {
            let same = |peer: &Peer| matches!(peer, Peer::Open { flow: other, .. } if Rc::ptr_eq(other, &flow));
            if source.peers.get(&flow.client).is_some_and(same) {
                source.peers.remove(&flow.client);
                self.peers.remove(origin.source.ip(), 1);
            }
        }
        self.sweep(origin);
    }

    /// Ends the flows of an association that have been idle for too long.
    pub(super) fn expire(&mut self, link: &Rc<Link>, now: Instant) {
        let origin = Origin::of(link.source, &link.back);
        for flow in link.over(now) {
            self.forget(origin, &flow.client, &"idle");
        }
    }

    /// Ends all that a client has going.
    pub(super) fn leave(&mut self, origin: Origin) {
        let Some(source) = self.sources.remove(&origin) else { return };
        self.peers.remove(origin.source.ip(), source.peers.len());
        let waiting = |peer: &Peer| if let Peer::Opening(opening) = peer { opening.waiting.len() as u64 } else { 0 };
        self.counters.datagrams_dropped.fetch_add(source.peers.values().map(waiting).sum(), Relaxed);
        let mut ended = HashSet::new();
        let by_peer = source.peers.values().filter_map(|peer| match peer {
            Peer::Open { link, .. } => Some(link),
            _ => None,
        });
        let by_way = source.ways.values().filter_map(|way| match way {
            Way::Open(link) => Some(link),
            Way::Opening(_) => None,
        });
        for link in by_peer.chain(by_way) {
            if ended.insert(Rc::as_ptr(link)) {
                self.links.remove(&Rc::as_ptr(link));
                link.end(&"the client ended its association");
            }
        }
    }

    /// Forgets one peer, and ends its association if that served no other.
    fn forget(&mut self, origin: Origin, client: &Address, reason: &dyn fmt::Display) {
        let Some(source) = self.sources.get_mut(&origin) else { return };
        let Some(peer) = source.peers.remove(client) else { return };
        self.peers.remove(origin.source.ip(), 1);
        match peer {
            Peer::Open { link, flow } => {
                flow.close(reason);
                if link.forget(&flow) {
                    self.end(&link, reason);
                }
            }
            Peer::Opening(opening) => {
                self.counters.datagrams_dropped.fetch_add(opening.waiting.len() as u64, Relaxed);
            }
            Peer::Closed { .. } => {}
        }
        self.sweep(origin);
    }

    /// Forgets a source with which nothing is going on.
    fn sweep(&mut self, origin: Origin) {
        if self.sources.get(&origin).is_some_and(|known| known.peers.is_empty() && known.ways.is_empty()) {
            self.sources.remove(&origin);
        }
    }

    /// Makes room for another peer of `origin`: among its own if it has too many, else among those of the client that
    /// has the most, whatever the port. `is_one` says that all ports of the address are one client's. Who has many peers can
    /// so never shut out those with few.
    fn make_room(&mut self, origin: Origin, is_one: bool) {
        let source = origin.source.ip();
        let of_port = |known: &Source| known.peers.len();
        let own = if is_one { self.peers.of(source) } else { self.sources.get(&origin).map_or(0, of_port) };
        if own >= self.limits.peers_of_one {
            let origins = if is_one { self.origins(Some(client_of(source))) } else { vec![origin] };
            self.shed(origins, own / 16);
        }
        if self.peers.all() < self.limits.peers {
            return;
        }
        // Where nobody has many, age alone decides. Several go at a time, so that the search pays.
        match self.peers.biggest() {
            Some((client, most)) if most >= MANY => self.shed(self.origins(Some(client)), most / 8),
            _ => self.shed(self.origins(None), self.peers.all() / 64),
        }
    }

    /// The origins of one client, or all.
    fn origins(&self, client: Option<IpAddr>) -> Vec<Origin> {
        let of_client = |origin: &&Origin| client.is_none_or(|client| client_of(origin.source.ip()) == client);
        self.sources.keys().filter(of_client).copied().collect()
    }

    /// Forgets `many` peers of these clients, one at least: the refused ones first, then those idle longest.
    fn shed(&mut self, origins: impl IntoIterator<Item = Origin>, many: usize) {
        let mut known = Vec::new();
        for origin in origins {
            let Some(source) = self.sources.get(&origin) else { continue };
            known.extend(source.peers.iter().map(|(client, peer)| (peer.age(), origin, client)));
        }
        let many = many.max(1).min(known.len());
        if many == 0 {
            return;
        }
        known.select_nth_unstable_by_key(many - 1, |(age, ..)| *age);
        let old: Vec<_> = known[..many].iter().map(|(_, origin, client)| (*origin, (*client).clone())).collect();
        for (origin, client) in old {
            self.forget(origin, &client, &"evicted: too many peers");
        }
    }
}

impl Peer {
    /// What goes first: the smallest.
    fn age(&self) -> (bool, Instant) {
        match self {
            Self::Closed { until, .. } => (false, *until),
            Self::Opening(opening) => (true, opening.since),
            Self::Open { flow, .. } => (true, flow.used()),
        }
    }
}

#[cfg(test)]
#[path = "associations_tests.rs"]
mod tests;
