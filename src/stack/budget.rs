//! How much memory the flows of one stack may take, and what each client has of it.
//!
//! A flow pays for its place in the table as long as it lives, and for its rings only while data moves through them: idle
//! rings give their pages back. Where nothing is left, [`Table::relieve`](super::table::Table) makes room.
//!
//! A client is a source (of IPv6 a network: [`Config::client`](super::Config::client)) of which a handshake was completed;
//! others get what is left, and take no part from anybody. One that is alone may have everything; beside others, whoever
//! has more than an equal part leaves the last eighth to those who have less, so that these find room at once.

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::rc::Rc;

use foldhash::fast::RandomState;

/// What a flow costs beside its rings: its socket, its task, its upstream and its places in tables.
pub(super) const FLOW: usize = 4 << 10;
/// Flows that are being opened may take this part of the budget, lest a flood of them drives out those that are open.
const OPENING: usize = 8;
/// This part is kept from clients that have more than an equal part.
const KEPT: usize = 8;

/// The memory of one stack.
pub(super) struct Budget {
    limit: usize,
    used: Cell<usize>,
    /// What each client has. Everybody in it has paid for something, which bounds it.
    clients: RefCell<HashMap<IpAddr, Holding, RandomState>>,
    /// How many of them count as clients.
    counted: Cell<usize>,
    /// Somebody found no room since the last relief.
    short: Cell<bool>,
    /// Who that was.
    asked: RefCell<HashSet<IpAddr, RandomState>>,
    /// The most bytes that a client looked for in vain since the last relief although it has no more than an equal part.
    needed: Cell<usize>,
}

/// What one client has.
#[derive(Default)]
struct Holding {
    bytes: usize,
    flows: usize,
    /// Of these, flows whose client is known to be where it says.
    open: usize,
}

/// A part of the budget, given back when dropped.
pub(super) struct Share {
    budget: Rc<Budget>,
    client: IpAddr,
    bytes: usize,
    /// It is the place of a flow.
    place: bool,
    open: bool,
}

impl Budget {
    /// All flows together may take `limit` bytes.
    pub(super) fn new(limit: usize) -> Rc<Self> {
        let (used, counted, short, needed) = (Cell::default(), Cell::default(), Cell::default(), Cell::default());
        let (clients, asked) = (RefCell::default(), RefCell::default());
        Rc::new(Self { limit, used, clients, counted, short, asked, needed })
    }

    /// Takes a place for one more flow of `client`. None: there is no room, which is remembered.
    pub(super) fn open(self: &Rc<Self>, client: IpAddr) -> Option<Share> {
        self.take_as(client, FLOW, true)
    }

    /// Takes `bytes` for `client`. None: there is no room, which is remembered.
    pub(super) fn take(self: &Rc<Self>, client: IpAddr, bytes: usize) -> Option<Share> {
        self.take_as(client, bytes, false)
    }

    fn take_as(self: &Rc<Self>, client: IpAddr, bytes: usize, place: bool) -> Option<Share> {
        let mut clients = self.clients.borrow_mut();
        let (has, counts) = clients.get(&client).map_or((0, false), |holding| (holding.bytes, holding.open > 0));
        let others = self.counted.get() - usize::from(counts);
        let modest = has + bytes <= self.limit / (others + 1);
        let kept = if others == 0 || modest { 0 } else { self.limit / KEPT };
        if bytes.saturating_add(kept) > self.left() {
            self.short.set(true);
            if has > 0 {
                // Who has nothing can give nothing.
                self.asked.borrow_mut().insert(client);
            }
            if modest && others > 0 {
                self.needed.set(self.needed.get().max(bytes));
            }
            return None;
        }
        self.used.set(self.used.get() + bytes);
        let holding = clients.entry(client).or_default();
        holding.bytes += bytes;
        holding.flows += usize::from(place);
        Some(Share { budget: Rc::clone(self), client, bytes, place, open: false })
    }

    /// What there is in all.
    pub(super) fn limit(&self) -> usize {
        self.limit
    }

    /// Bytes that nobody has.
    pub(super) fn left(&self) -> usize {
        self.limit - self.used.get()
    }

    /// Bytes that somebody has.
    pub(super) fn used(&self) -> usize {
        self.used.get()
    }

    /// What each client would have if all had the same.
    pub(super) fn part(&self) -> usize {
        self.limit / self.counted.get().max(1)
    }

    /// How many flows `client` has.
    pub(super) fn flows_of(&self, client: IpAddr) -> usize {
        self.clients.borrow().get(&client).map_or(0, |holding| holding.flows)
    }

    /// Who has how many bytes.
    pub(super) fn holdings(&self) -> Vec<(IpAddr, usize)> {
        self.clients.borrow().iter().map(|(client, holding)| (*client, holding.bytes)).collect()
    }

    /// What the rings of one more flow may take, beside `live` others of which `own` are of the same client: so little that
    /// thousands which all move data at once fit, and so much that few are not held up, nor those of a client that has few.
    pub(super) fn fair(&self, live: usize, own: usize) -> usize {
        let of_client = self.counted.get().max(1).saturating_mul(own + 8);
        self.limit / 4 / of_client.min(live + 8)
    }

    /// How many flows may be opening at a time.
    pub(super) fn openings(&self) -> usize {
        self.limit / OPENING / FLOW
    }

    /// As much as is to be free after a relief: at the cost of flows in which nothing moves, and, where a client found no
    /// room that has no more than an equal part, of those in which something does.
    pub(super) fn wanted(&self) -> (usize, usize) {
        let reserve = self.limit / 32;
        let kept = if self.counted.get() > 1 { self.limit / KEPT } else { 0 };
        let needed = self.needed.get();
        (kept + reserve.max(needed), if needed > 0 { reserve.max(needed) } else { 0 })
    }

    /// Whether `client` found no room since the last relief.
    pub(super) fn has_asked(&self, client: IpAddr) -> bool {
        self.asked.borrow().contains(&client)
    }

    /// Whether a client found no room although it has no more than an equal part.
    pub(super) fn is_unfair(&self) -> bool {
        self.needed.get() > 0
    }

    pub(super) fn is_short(&self) -> bool {
        self.short.get()
    }

    pub(super) fn relieved(&self) {
        self.short.set(false);
        *self.asked.borrow_mut() = HashSet::default();
        self.needed.set(0);
    }
}

impl Share {
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// The client of this flow has completed the handshake, so that it is one.
    pub(super) fn complete(&mut self) {
        if !self.place || std::mem::replace(&mut self.open, true) {
            return;
        }
        let mut clients = self.budget.clients.borrow_mut();
        let Some(holding) = clients.get_mut(&self.client) else { return };
        holding.open += 1;
        if holding.open == 1 {
            self.budget.counted.set(self.budget.counted.get() + 1);
        }
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.budget.used.set(self.budget.used.get() - self.bytes);
        let mut clients = self.budget.clients.borrow_mut();
        let Some(holding) = clients.get_mut(&self.client) else { return };
        holding.bytes -= self.bytes;
        holding.flows -= usize::from(self.place);
        if self.open {
            holding.open -= 1;
            if holding.open == 0 {
                self.budget.counted.set(self.budget.counted.get() - 1);
            }
        }
        if holding.bytes == 0 && holding.flows == 0 {
            clients.remove(&self.client);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    fn client(last: u8) -> IpAddr {
        Ipv4Addr::new(192, 0, 2, last).into()
    }

    /// A client that is one, with a flow that costs nothing.
    fn known(budget: &Rc<Budget>, last: u8) -> Share {
        let mut place = budget.take_as(client(last), 0, true).unwrap();
        place.complete();
        place
    }

    #[test]
    fn sources_that_never_complete_a_handshake_take_no_part_from_anybody() {
        let budget = Budget::new(FLOW * 100);
        let mut first = budget.open(client(1)).unwrap();
        first.complete();
        let forged: Vec<Share> = (10..50).map(|last| budget.open(client(last)).unwrap()).collect();
        assert_eq!((budget.part(), budget.fair(41, 1)), (FLOW * 100, FLOW * 100 / 4 / 9));
        assert!(budget.take(client(1), FLOW * 59).is_some(), "nothing is kept for them");
        let mut second = budget.open(client(2)).unwrap();
        second.complete();
        second.complete();
        assert_eq!(budget.part(), FLOW * 50);
        drop((forged, second));
        assert_eq!(budget.part(), FLOW * 100);
    }

    #[test]
    fn nobody_gets_what_is_not_there_and_what_is_dropped_is_there_again() {
        let budget = Budget::new(100);
        let first = budget.take(client(1), 60).unwrap();
        assert!(budget.take(client(1), 41).is_none() && budget.is_short());
        budget.relieved();
        let second = budget.take(client(1), 40).unwrap();
        assert_eq!((budget.left(), budget.is_short()), (0, false), "one that is alone may have everything");
        drop((first, second));
        assert_eq!((budget.used(), budget.holdings().len()), (0, 0));
    }

    #[test]
    fn who_has_more_than_an_equal_part_leaves_the_last_eighth_to_those_who_have_less() {
        let budget = Budget::new(800);
        let [_first, second, third] = [1, 2, 3].map(|last| known(&budget, last));
        let modest = budget.take(client(2), 1).unwrap();
        let greedy: Vec<Share> = std::iter::from_fn(|| budget.take(client(1), 10)).collect();
        assert_eq!((greedy.len(), budget.left()), (69, 109), "an eighth is left");
        budget.relieved();
        assert!(budget.take(client(1), 10).is_none());
        assert_eq!(budget.wanted(), (125, 0), "room for who has much is nobody's business who moves data");
        let place = budget.take(client(3), 100).unwrap();
        assert!(budget.take(client(3), 50).is_none());
        assert_eq!(budget.wanted(), (150, 50));
        drop((modest, place, second, third));
        assert_eq!((budget.take(client(1), 110).is_some(), budget.part()), (true, 800), "it is alone again");
    }

    #[test]
    fn what_is_fair_adds_up_to_no_more_than_there_is() {
        let limit = 24 << 20;
        let budget = Budget::new(limit);
        let all: usize = (0..600).map(|live| FLOW + budget.fair(live, live)).sum();
        assert!(all <= limit * 5 / 4, "{all}");
        assert!(budget.fair(0, 0) >= limit / 32);
    }

    #[test]
    fn the_rings_of_who_has_few_flows_do_not_shrink_with_the_flows_of_others() {
        let budget = Budget::new(16 << 20);
        let _clients = [1, 2].map(|last| known(&budget, last));
        assert_eq!(budget.fair(2000, 2000), (4 << 20) / 2008);
        assert_eq!(budget.fair(2000, 0), (4 << 20) / 16);
    }
}
