//! The TCP flows of one stack: found by tuple, fed, polled, timed and forgotten.
//!
//! smoltcp walks a whole `SocketSet` for every packet, so each flow has a set of its own and shares one `Interface`.

mod choice;
mod clock;
mod receive;
mod relief;
mod repair;
mod tell;

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::net::IpAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::task::Waker;
use std::time::Instant;

use smoltcp::iface::{Interface, PollResult, SocketSet};
use smoltcp::phy::DeviceCapabilities;
use smoltcp::socket::tcp::State;
use smoltcp::wire::HardwareAddress;

use super::budget::Budget;
use super::flow::{Flow, Refusal, Shared};
use super::frame::Transmit;
use super::held::Held;
use super::icmp::TooBig;
use super::path::Paths;
use super::port::{Cut, Port, Sent, capabilities};
use super::ring::Pool;
use super::timers::Timers;
use super::tombstone::{Graveyard, Tombstone};
use super::{Config, Handle, Tuple, Unreachable, since};

/// Packets that one flow may emit in a turn: a megabyte in super-packets.
const SHARE: usize = 16;

pub(super) struct Table {
    /// For IPv4 and for IPv6.
    sides: [Side; 2],
    mtu: usize,
    offload: bool,
    own: Vec<IpAddr>,
    /// Who stands for an address that is not our own.
    client: fn(IpAddr) -> IpAddr,
    epoch: Instant,
    budget: Rc<Budget>,
    pool: Rc<RefCell<Pool>>,
    flows: HashMap<Tuple, Handle, foldhash::fast::RandomState>,
    held: Held,
    paths: Paths,
    graveyard: Graveyard,
    shared: Rc<Shared>,
    /// Flows being polled in this turn; kept for its capacity.
    turn: Vec<Handle>,
    /// Flows that have ended since somebody last asked; kept only where somebody asks.
    ended: Option<Vec<Tuple>>,
    timers: Timers,
    /// By tuple, not by handle: an entry must not keep a flow's rings from their pool.
    warm: VecDeque<(Instant, Tuple)>,
    /// No relief before this: see [`relief`].
    relief: Instant,
    /// Flows that were ended to make room for others.
    evicted: u64,
    /// When to look for flows whose clients have been silent for long.
    look: Instant,
}

/// What smoltcp needs for one IP version.
struct Side {
    interface: Interface,
    capabilities: DeviceCapabilities,
}

impl Side {
    fn new(config: &Config, v6: bool, now: Instant) -> Self {
        let capabilities = capabilities(config.mtu, config.offload, v6);
        let mut settings = smoltcp::iface::Config::new(HardwareAddress::Ip);
        // The two must not run through the same numbers.
        settings.random_seed = if v6 { !config.seed } else { config.seed };
        let mut port = Port {
            incoming: None,
            transmit: &mut Nowhere,
            capabilities: &capabilities,
            cut: None,
            end: None,
            known: None,
            keep: false,
            last: None,
        };
        let mut interface = Interface::new(settings, &mut port, since(now, now));
        interface.set_any_ip(true);
        Self { interface, capabilities }
    }

    /// Lets `sockets` take `bytes`. Returns what was said to that at once.
    fn ingest(
        &mut self,
        bytes: &[u8],
        Measure { cut, end, keep }: Measure,
        sockets: &mut SocketSet<'static>,
        time: smoltcp::time::Instant,
        transmit: &mut dyn Transmit,
    ) -> Option<Sent> {
        let capabilities = &self.capabilities;
        let mut port = Port { incoming: Some(bytes), transmit, capabilities, cut, end, known: None, keep, last: None };
        self.interface.poll_ingress_single(time, &mut port, sockets);
        port.last
    }
}

/// What becomes of smoltcp's answers: see [`Port`].
#[derive(Clone, Copy, Default)]
struct Measure {
    cut: Option<Cut>,
    end: Option<u32>,
    keep: bool,
}

/// Runs what belongs to one flow. A mistake in there, ours or smoltcp's, panics; it must not end the other flows.
fn contained<T>(act: impl FnOnce() -> T) -> Option<T> {
    catch_unwind(AssertUnwindSafe(act)).ok()
}

impl Table {
    pub(super) fn new(config: &Config, now: Instant) -> Self {
        let budget = Budget::new(config.memory);
        Self {
            sides: [false, true].map(|v6| Side::new(config, v6, now)),
            mtu: config.mtu,
            offload: config.offload,
            own: config.own.clone(),
            client: config.client,
            epoch: now,
            pool: Pool::new(Rc::clone(&budget)),
            flows: HashMap::default(),
            held: Held::new(budget.openings(), config.handshakes),
            budget,
            relief: now,
            evicted: 0,
            paths: Paths::default(),
            graveyard: Graveyard::default(),
            shared: Rc::default(),
            turn: Vec::new(),
            ended: config.tell_ended.then(Vec::new),
            timers: Timers::default(),
            warm: VecDeque::new(),
            look: now,
        }
    }

    /// Who counts as the client of a flow. This host is no part of the network that it shares with others.
    fn client_of(&self, tuple: &Tuple) -> IpAddr {
        let source = tuple.client.ip();
        if self.own.contains(&source) { source } else { (self.client)(source) }
    }

    pub(super) fn knows(&self, tuple: &Tuple) -> bool {
        self.flows.contains_key(tuple)
    }

    pub(super) fn len(&self) -> usize {
        self.flows.len()
    }

    /// Bytes of address space that rings have taken so far, and of it the most that may be resident for live flows.
    pub(super) fn ring_memory(&self) -> (usize, usize) {
        let touched = self.flows.values().map(|flow| flow.borrow().rings.touched()).sum();
        (self.pool.borrow().mapped(), touched)
    }

    /// Bytes of the budget that are in use, and flows that were ended to make room.
    pub(super) fn memory(&self) -> (usize, u64) {
        (self.budget.used(), self.evicted)
    }

    /// A router says that a segment of ours was too large for its next link. Smaller ones follow when that segment is
    /// sent again. False: there is no such flow here.
    pub(super) fn too_big(&mut self, message: &TooBig, now: Instant) -> bool {
        let Some(handle) = self.flows.get(&message.tuple) else { return false };
        let mut flow = handle.borrow_mut();
        if flow.progress.is_in_flight(message.sequence) {
            let mtu = self.paths.learn(message.tuple.client.ip(), message.mtu, self.mtu, now);
            flow.cut = Cut::for_path(flow.cut, message.tuple.client.is_ipv6(), mtu);
            if let Some(cut) = flow.cut {
                flow.progress.recovery.shrink(cut.segment.get().into());
            }
            self.shared.queue(handle, &mut flow);
        }
        true
    }

    pub(super) fn reset(&mut self, bytes: &[u8], now: Instant, transmit: &mut dyn Transmit) {
        let mut nobody = SocketSet::new(Vec::new());
        let side = &mut self.sides[usize::from(bytes.first().is_some_and(|byte| byte >> 4 == 6))];
        side.ingest(bytes, Measure::default(), &mut nobody, since(self.epoch, now), transmit);
    }

    pub(super) fn poll(&mut self, now: Instant, transmit: &mut dyn Transmit) -> bool {
        self.fire_timers(now);
        self.cool_down(now);
        self.look_for_silent(now);
        self.relieve(now);
        let mut turn = std::mem::take(&mut self.turn);
        std::mem::swap(&mut turn, &mut *self.shared.dirty.borrow_mut());
        // Whom the full device kept waiting comes before those who filled it.
        let mut waiting = Vec::new();
        for flow in turn.drain(..) {
            if transmit.ready() {
                if contained(|| self.serve(&flow, now, transmit)).is_none() {
                    // That costs this flow; the others have their turn.
                    flow.borrow_mut().give_up();
                    self.forget(&flow);
                }
            } else {
                waiting.push(flow);
            }
        }
        if !waiting.is_empty() {
            let mut dirty = self.shared.dirty.borrow_mut();
            waiting.append(&mut dirty);
            *dirty = waiting;
        }
        self.turn = turn;
        !self.shared.dirty.borrow().is_empty()
    }

    /// Emits what one flow has to say, and looks at what became of it.
    fn serve(&mut self, handle: &Handle, now: Instant, transmit: &mut dyn Transmit) {
        let mut guard = handle.borrow_mut();
        let flow = &mut *guard;
        flow.dirty = false;
        if flow.dead {
            return;
        }
        if flow.held.is_some() {
            if flow.socket().state() == State::SynReceived && !flow.orphan {
                return;
            }
            if !self.turn_away(flow, now, transmit) {
                drop(guard);
                self.forget(handle);
                return;
            }
        } else if flow.socket().state() != State::SynReceived {
            let first = self.uncount(flow);
            if flow.socket().is_active() {
                flow.place.complete();
                if first {
                    self.held.complete(self.client_of(&flow.tuple));
                }
            }
        }
        let done = self.emit(flow, now, transmit);
        if !done {
            flow.dirty = true;
            self.shared.dirty.borrow_mut().push(Rc::clone(handle));
            return;
        }
        match flow.socket().state() {
            State::TimeWait => {
                let (sequence, acknowledgement) = flow.progress.sent;
                self.graveyard.bury(flow.tuple, Tombstone::TimeWait { sequence, acknowledgement }, now);
                drop(guard);
                self.forget(handle);
            }
            State::Closed | State::Listen => {
                drop(guard);
                self.forget(handle);
            }
            _ => {
                if flow.rings.touched() > 0 {
                    self.keep_warm(flow, now);
                }
                self.arm(flow, now);
            }
        }
    }

    /// Ends a flow that was never accepted. True: a reset is left for smoltcp to emit.
    fn turn_away(&mut self, flow: &mut Flow, now: Instant, transmit: &mut dyn Transmit) -> bool {
        if flow.socket().state() != State::SynReceived {
            return false; // The client gave up first.
        }
        let quoted = flow.held.take().unwrap_or_default();
        self.uncount(flow);
        let why = match flow.refusal.unwrap_or(Refusal::Reset) {
            Refusal::Reset => {
                flow.socket().abort();
                return true;
            }
            Refusal::Silent => None,
            Refusal::Network => Some(Unreachable::Network),
            Refusal::Host => Some(Unreachable::Host),
            Refusal::Protocol => Some(Unreachable::Protocol),
            Refusal::Prohibited => Some(Unreachable::Prohibited),
            Refusal::Coded(code) => Some(Unreachable::Coded(code)),
        };
        if let Some(why) = why {
            super::icmp::unreachable(&quoted, why, transmit);
        } else {
            self.graveyard.bury(flow.tuple, Tombstone::Silence { initial: flow.progress.initial }, now);
        }
        false
    }

    /// Lets smoltcp emit until it has nothing more. False: the flow's share is used up or the device is full.
    fn emit(&mut self, flow: &mut Flow, now: Instant, transmit: &mut dyn Transmit) -> bool {
        let time = since(self.epoch, now);
        if !self.repair(flow, now, transmit) {
            return false;
        }
        if flow.progress.reception.owes() {
            self.tell(flow, transmit);
        }
        for _ in 0..SHARE {
            if !transmit.ready() {
                return false;
            }
            self.restrain(flow, now, transmit);
            let end = flow.place_of_bare();
            let side = &mut self.sides[usize::from(flow.tuple.server.is_ipv6())];
            let mut port = Port {
                incoming: None,
                transmit,
                capabilities: &side.capabilities,
                cut: flow.cut,
                end,
                known: flow.progress.known(now),
                keep: flow.progress.reception.has_news(),
                last: None,
            };
            let sockets = &mut flow.sockets;
            let Some(result) = contained(|| side.interface.poll_egress(time, &mut port, sockets)) else {
                flow.give_up();
                return true;
            };
            if let Some(sent) = port.last {
                flow.progress.note_sent(sent, now);
                if sent.kept {
                    self.tell(flow, transmit);
                }
                if flow.socket().send_queue() > 0 {
                    self.warm_up(flow, now);
                }
            }
            if result == PollResult::None && !flow.close_late() {
                return true;
            }
        }
        false
    }

    pub(super) fn register(&self, waker: &Waker) -> bool {
        self.shared.waker.set(Some(waker.clone()));
        !self.shared.dirty.borrow().is_empty()
    }

    pub(super) fn abort_all(&mut self) {
        for handle in self.flows.values() {
            let mut flow = handle.borrow_mut();
            if flow.held.is_some() {
                flow.orphan = true;
            } else {
                flow.socket().abort();
                flow.aborted = true;
            }
            self.shared.queue(handle, &mut flow);
        }
    }

    fn forget(&mut self, handle: &Handle) {
        let mut flow = handle.borrow_mut();
        self.uncount(&mut flow);
        flow.bury();
        // Wakes the task of a flow that was replaced; everywhere else the socket has come to an end by itself.
        if flow.held.is_some() {
            flow.socket().abort();
        }
        self.flows.remove(&flow.tuple);
        if let Some(ended) = &mut self.ended {
            ended.push(flow.tuple);
        }
    }

    pub(super) fn ended(&mut self) -> impl Iterator<Item = Tuple> + '_ {
        self.ended.as_mut().into_iter().flat_map(|ended| ended.drain(..))
    }

    /// Counts a flow no longer among those that are being opened. False: it was not.
    fn uncount(&mut self, flow: &mut Flow) -> bool {
        let counted = std::mem::take(&mut flow.counted);
        if counted {
            self.held.leave(self.client_of(&flow.tuple));
        }
        counted
    }
}

/// A device for the moment before there is one.
struct Nowhere;

impl Transmit for Nowhere {
    fn ready(&mut self) -> bool {
        false
    }

    fn transmit(&mut self, _: usize, _: Option<std::num::NonZeroU16>, _: &mut dyn FnMut(&mut [u8])) {}
}
