//! The echo requests of one worker: who has which flow open, and who goes when there are too many.

use std::collections::HashMap;
use std::fmt;
use std::net::IpAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use foldhash::fast::RandomState;
use tokio::task::AbortHandle;
use tokio::time::Instant;

use super::Ping;
use super::echo_way::{Flow, REMEMBERED, REMEMBERED_BYTES, Way};
use super::live::Counters;
use super::queue::Place;
use super::tally::Tally;
use crate::net::{Echo, Reach, client_of};

/// Flows of one worker.
pub(super) const MOST: usize = 4096;
/// Flows of one client.
pub(super) const MOST_OF_ONE: usize = 1024;
/// The same where each flow takes a descriptor.
const FEW: (usize, usize) = (512, 256);
/// Requests of one flow that wait while it is being opened.
const MOST_WAITING: usize = 8;
/// Bytes of all requests that wait.
const MOST_WAITING_BYTES: usize = 1 << 20;
/// What a flow costs in any state, in bytes: what it remembers of its requests ([`REMEMBERED`] places of 24 bytes, as many
/// allocations of 16 beside their [`REMEMBERED_BYTES`]: 3.3 KB), and its task, session and places in tables (1.6 KB).
pub(super) const COST: usize = 5 << 10;
/// Echo requests find room as long as this part of what may wait in memory is not used up: they are the first to go without.
pub(super) const PART: usize = 4;
const _: () = assert!(REMEMBERED * (24 + 16) + REMEMBERED_BYTES + 1600 <= COST);

/// What makes a flow: the requests of one program of a client to one host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) source: IpAddr,
    /// As the client wrote it.
    pub(super) destination: IpAddr,
    pub(super) id: u16,
}

/// One attempt to open a flow.
#[derive(Clone, Copy)]
pub(super) struct Ticket {
    pub(super) key: Key,
    number: u64,
}

/// A flow as its client's requests find it.
pub(super) enum Entry {
    /// The router, the resolver or the outbound is at work.
    Opening(Opening),
    /// Requests go this way.
    Open { way: Rc<Way>, flow: Rc<Flow> },
    /// No outbound takes it; `why` is what the client is told each time.
    Closed { why: Option<Reach>, until: Instant },
}

/// What waits for a flow to be open.
pub(super) struct Opening {
    number: u64,
    since: Instant,
    waiting: Vec<Waiting>,
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

/// A request that waits.
pub(super) struct Waiting {
    pub(super) packet: Box<[u8]>,
    head: usize,
    sequence: u16,
    ttl: u8,
    tos: u8,
    dont_fragment: bool,
    _place: Place,
}

impl Waiting {
    /// None: there is no room for it.
    fn of(ping: &Ping<'_>, counters: &Arc<Counters>) -> Option<Self> {
        let Echo { sequence, ttl, tos, dont_fragment, .. } = ping.echo;
        let _place = Place::take(ping.packet.len(), PART, counters)?;
        Some(Self { packet: ping.packet.into(), head: ping.head.len(), sequence, ttl, tos, dont_fragment, _place })
    }

    /// The request as it came.
    pub(super) fn ping(&self, key: &Key) -> Ping<'_> {
        let (head, payload) = self.packet.split_at(self.head.min(self.packet.len()));
        let Self { sequence, ttl, tos, dont_fragment, .. } = *self;
        let echo = Echo { id: key.id, sequence, payload, ttl, tos, dont_fragment };
        Ping { source: key.source, destination: key.destination, echo, head, packet: &self.packet }
    }
}

/// A flow, and the memory that it is paid for with as long as it is known.
struct Known {
    entry: Entry,
    _place: Place,
}

/// The flows and sockets of one worker. All workers together take no more than [`PART`] of what may wait in memory.
pub(super) struct Echoes {
    entries: HashMap<Key, Known, RandomState>,
    /// How many of them each client has.
    of: Tally,
    /// Sockets that serve many flows, by outbound and family.
    ways: HashMap<(String, bool), Rc<Way>, RandomState>,
    waiting_bytes: usize,
    tickets: u64,
    /// Each flow has a socket of its own.
    each_its_own: bool,
    /// Somebody forgets the refusals that are over.
    sweeping: bool,
    counters: Arc<Counters>,
}

impl Echoes {
    /// No flows yet; what they cost is counted in the queue of `counters`.
    pub(super) fn new(counters: Arc<Counters>) -> Self {
        let (entries, of, ways) = (HashMap::default(), Tally::default(), HashMap::default());
        Self { entries, of, ways, waiting_bytes: 0, tickets: 0, each_its_own: false, sweeping: false, counters }
    }

    pub(super) fn find(&self, key: &Key) -> Option<&Entry> {
        self.entries.get(key).map(|known| &known.entry)
    }

    /// Lets a request wait for its flow. False: there is no room, and it is lost.
    pub(super) fn wait(&mut self, key: &Key, ping: &Ping<'_>) -> bool {
        let Some(Known { entry: Entry::Opening(opening), .. }) = self.entries.get_mut(key) else { return false };
        let bytes = self.waiting_bytes + ping.packet.len();
        if opening.waiting.len() >= MOST_WAITING || bytes > MOST_WAITING_BYTES {
            return false;
        }
        let Some(waiting) = Waiting::of(ping, &self.counters) else { return false };
        self.waiting_bytes = bytes;
        opening.waiting.push(waiting);
        true
    }

    /// Notes that a flow is being opened, with its first request. None: there is no memory for it, and the request is lost.
    pub(super) fn begin(&mut self, key: Key, first: &Ping<'_>) -> Option<Ticket> {
        self.forget(&key, &"asked for again");
        self.make_room(key.source);
        let Some(place) = self.place() else {
            self.counters.datagrams_dropped.fetch_add(1, Relaxed);
            return None;
        };
        self.tickets += 1;
        let (number, since) = (self.tickets, Instant::now());
        let opening = Opening { number, since, waiting: Vec::new(), task: None };
        self.entries.insert(key, Known { entry: Entry::Opening(opening), _place: place });
        self.of.add(key.source);
        self.wait(&key, first);
        Some(Ticket { key, number })
    }

    /// Memory for one more flow, if need be that of flows of the client that has the most.
    fn place(&mut self) -> Option<Place> {
        Place::take(COST, PART, &self.counters).or_else(|| {
            self.shed_of_biggest();
            Place::take(COST, PART, &self.counters)
        })
    }

    /// The task that opens the flow ends when the flow is forgotten.
    pub(super) fn attach(&mut self, ticket: &Ticket, task: AbortHandle) {
        match self.opening(ticket) {
            Some(opening) => opening.task = Some(Task(task)),
            None => task.abort(),
        }
    }

    fn opening(&mut self, ticket: &Ticket) -> Option<&mut Opening> {
        match self.entries.get_mut(&ticket.key).map(|known| &mut known.entry) {
            Some(Entry::Opening(opening)) if opening.number == ticket.number => Some(opening),
            _ => None,
        }
    }

    /// Puts `entry` in the place of what was being opened, and returns what waited. None: nobody waits any more. The task
    /// that calls this is aborted by it, and does not wait for anything afterwards.
    fn settle(&mut self, ticket: &Ticket, entry: Entry) -> Option<Vec<Waiting>> {
        let waiting = std::mem::take(&mut self.opening(ticket)?.waiting);
        self.waiting_bytes -= waiting.iter().map(|waiting| waiting.packet.len()).sum::<usize>();
        self.entries.get_mut(&ticket.key)?.entry = entry;
        Some(waiting)
    }

    /// The flow is open: returns what waited for it.
    pub(super) fn enter(&mut self, ticket: &Ticket, way: &Rc<Way>, flow: &Rc<Flow>) -> Option<Vec<Waiting>> {
        let waiting = self.settle(ticket, Entry::Open { way: Rc::clone(way), flow: Rc::clone(flow) })?;
        way.carry(flow);
        Some(waiting)
    }

    /// Nobody carries it: returns what waited.
    pub(super) fn refuse(&mut self, ticket: &Ticket, why: Option<Reach>, until: Instant) -> Option<Vec<Waiting>> {
        self.settle(ticket, Entry::Closed { why, until })
    }

    /// Whether somebody is to [`sweep`](Self::sweep) from now on, since nobody does.
    pub(super) fn starts_sweeping(&mut self) -> bool {
        !std::mem::replace(&mut self.sweeping, true)
    }

    /// Forgets the refusals that are over at `now`. False: there are no others, and nobody needs to come again.
    pub(super) fn sweep(&mut self, now: Instant) -> bool {
        let (mut over, mut others) = (Vec::new(), false);
        for (key, known) in &self.entries {
            match known.entry {
                Entry::Closed { until, .. } if until <= now => over.push(*key),
                Entry::Closed { .. } => others = true,
                Entry::Opening(_) | Entry::Open { .. } => {}
            }
        }
        over.iter().for_each(|key| self.forget(key, &"refused"));
        self.sweeping = others;
        others
    }

    /// The socket that serves all flows through the outbound `name` to one family.
    pub(super) fn way(&self, name: &str, ipv6: bool) -> Option<Rc<Way>> {
        self.ways.get(&(name.to_owned(), ipv6)).cloned()
    }

    /// From now on `way` is that socket.
    pub(super) fn share(&mut self, name: String, way: &Rc<Way>) {
        self.ways.insert((name, way.ipv6), Rc::clone(way));
    }

    /// From now on there are fewer flows: each has a socket of its own.
    pub(super) fn mind_descriptors(&mut self) {
        self.each_its_own = true;
    }

    /// A socket is over, and the flows on it.
    pub(super) fn end(&mut self, way: &Rc<Way>, reason: &dyn fmt::Display) {
        self.ways.retain(|_, known| !Rc::ptr_eq(known, way));
        way.keys().iter().for_each(|key| self.forget(key, reason));
    }

    /// Forgets a flow.
    pub(super) fn forget(&mut self, key: &Key, reason: &dyn fmt::Display) {
        let Some(Known { entry, .. }) = self.entries.remove(key) else { return };
        self.of.remove(key.source, 1);
        match entry {
            Entry::Open { way, flow } => {
                flow.close(reason);
                way.forget(&flow);
            }
            Entry::Opening(opening) => {
                self.waiting_bytes -= opening.waiting.iter().map(|waiting| waiting.packet.len()).sum::<usize>();
            }
            Entry::Closed { .. } => {}
        }
    }

    /// Makes room for another flow of `source`: among its own if it has too many, else among those of the client that has
    /// the most.
    fn make_room(&mut self, source: IpAddr) {
        let (most, most_of_one) = if self.each_its_own { FEW } else { (MOST, MOST_OF_ONE) };
        let own = self.of.of(source);
        if own >= most_of_one {
            return self.shed(client_of(source), own / 16);
        }
        if self.entries.len() >= most {
            self.shed_of_biggest();
        }
    }

    /// Makes room among the flows of the client that has the most.
    fn shed_of_biggest(&mut self) {
        if let Some((biggest, many)) = self.of.biggest() {
            self.shed(biggest, many / 16);
        }
    }

    /// Forgets `many` flows of a client, one at least: the refused ones first, then those idle longest.
    fn shed(&mut self, client: IpAddr, many: usize) {
        let mut known: Vec<_> = self
            .entries
            .iter()
            .filter(|(key, _)| client_of(key.source) == client)
            .map(|(key, known)| (known.entry.age(), *key))
            .collect();
        let many = many.max(1).min(known.len());
        if many == 0 {
            return;
        }
        known.select_nth_unstable_by_key(many - 1, |(age, _)| *age);
        for (_, key) in &known[..many] {
            self.forget(key, &"evicted: too many echo flows");
        }
    }

    /// Flows of all states.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }
}

impl Entry {
    /// What goes first: the smallest.
    fn age(&self) -> (bool, Instant) {
        match self {
            Self::Closed { until, .. } => (false, *until),
            Self::Opening(opening) => (true, opening.since),
            Self::Open { flow, .. } => (true, flow.used()),
        }
    }
}
