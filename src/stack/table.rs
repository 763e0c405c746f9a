//! The TCP flows of one stack: found by tuple, fed, polled, timed and forgotten.
//!
//! smoltcp walks a whole `SocketSet` for every packet, so each flow has a set of its own and shares one `Interface`.

use std::cell::RefCell;
use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, VecDeque};
use std::net::IpAddr;
use std::num::NonZeroU16;
use std::rc::Rc;
use std::task::Waker;
use std::time::{Duration, Instant};

use smoltcp::iface::{PollResult, SocketSet};
use smoltcp::socket::tcp::{self, CongestionControl, State};

use super::flow::{Flow, FlowStream, Progress, Refusal, Shared};
use super::frame::Transmit;
use super::ip::Packet;
use super::plane::Plane;
use super::port::{Cut, Port};
use super::ring::Pool;
use super::tcp::{Segment, acknowledge};
use super::tombstone::{Graveyard, Tombstone};
use super::{Config, Counters, Event, Handle, Tuple, Unreachable, since};

/// Flows whose SYN-ACK is held, in all and of one source.
const MOST_HELD: usize = 4096;
const MOST_HELD_OF_SOURCE: u32 = 256;
/// Packets that one flow may emit in a turn: a megabyte in super-packets.
const SHARE: usize = 16;
/// A client that has not acknowledged anything for so long is gone (Linux gives up after 13 to 30 minutes).
const DEAF: Duration = Duration::from_secs(600);
/// An orphan's last segments are repeated for so long.
const LINGER: smoltcp::time::Duration = smoltcp::time::Duration::from_secs(60);
/// A flow without data for so long gives its pages back.
const COLD: Duration = Duration::from_secs(5);

pub(super) struct Table {
    planes: [Plane; 2],
    mtu: usize,
    offload: bool,
    own: Vec<IpAddr>,
    epoch: Instant,
    pool: Rc<RefCell<Pool>>,
    flows: HashMap<Tuple, Handle, foldhash::fast::RandomState>,
    held: HashMap<IpAddr, u32, foldhash::fast::RandomState>,
    held_in_all: usize,
    graveyard: Graveyard,
    shared: Rc<Shared>,
    /// Flows being polled in this turn; kept for its capacity.
    turn: Vec<Handle>,
    /// Flows that have ended since somebody last asked; kept only where somebody asks.
    ended: Option<Vec<Tuple>>,
    timers: BinaryHeap<Reverse<Timer>>,
    /// By tuple, not by handle: an entry must not keep a flow's rings from their pool.
    warm: VecDeque<(Instant, Tuple)>,
}

struct Timer {
    due: Instant,
    tuple: Tuple,
}

impl Table {
    pub(super) fn new(config: &Config, now: Instant) -> Self {
        Self {
            planes: [Plane::new(config, false, now), Plane::new(config, true, now)],
            mtu: config.mtu,
            offload: config.offload,
            own: config.own.clone(),
            epoch: now,
            pool: Rc::default(),
            flows: HashMap::default(),
            held: HashMap::default(),
            held_in_all: 0,
            graveyard: Graveyard::default(),
            shared: Rc::default(),
            turn: Vec::new(),
            ended: config.tell_ended.then(Vec::new),
            timers: BinaryHeap::new(),
            warm: VecDeque::new(),
        }
    }

    pub(super) fn knows(&self, tuple: &Tuple) -> bool {
        self.flows.contains_key(tuple)
    }

    pub(super) fn len(&self) -> usize {
        self.flows.len()
    }

    /// Gives a segment to its flow, or opens one.
    pub(super) fn segment<'a>(
        &mut self,
        packet: &Packet<'a>,
        segment: &Segment,
        counters: &mut Counters,
        now: Instant,
        transmit: &mut dyn Transmit,
    ) -> Option<Event<'a>> {
        let stripped;
        let bytes = if packet.source.is_ipv6() && packet.start > 40 {
            stripped = strip_extensions(packet);
            &stripped[..]
        } else {
            packet.bytes
        };
        if let Some(flow) = self.flows.get(&segment.tuple).map(Rc::clone) {
            if !self.is_replaced(&flow, segment) {
                self.feed(&flow, bytes, segment, now, transmit);
                return None;
            }
            self.forget(&flow);
        }
        if !segment.opens() {
            return self.late(segment, now, transmit);
        }
        if self.graveyard.find(&segment.tuple, now) == Some(Tombstone::Silence { initial: segment.sequence }) {
            counters.ignored += 1;
            return None;
        }
        self.graveyard.remove(&segment.tuple);
        let Some(flow) = self.open(packet, segment, now) else {
            counters.flooded += 1;
            return None;
        };
        counters.flows += 1;
        self.feed(&flow, bytes, segment, now, transmit);
        Some(Event::Incoming(segment.tuple, FlowStream { flow, shared: Rc::clone(&self.shared) }))
    }

    /// A SYN with another sequence number while the first is still held: the client has started afresh.
    fn is_replaced(&self, flow: &Handle, segment: &Segment) -> bool {
        let flow = flow.borrow();
        segment.opens() && flow.held.is_some() && segment.sequence != flow.progress.initial
    }

    /// A segment of no flow: one that has just ended, one of another worker, or none at all.
    fn late<'a>(&self, segment: &Segment, now: Instant, transmit: &mut dyn Transmit) -> Option<Event<'a>> {
        match self.graveyard.find(&segment.tuple, now) {
            Some(Tombstone::TimeWait { sequence, acknowledgement }) => {
                if !segment.is_reset() && segment.end() != acknowledgement {
                    acknowledge(segment.tuple, sequence, acknowledgement, self.offload, transmit);
                }
                None
            }
            Some(Tombstone::Silence { .. }) => None,
            None => Some(Event::Stray(segment.tuple)),
        }
    }

    fn open(&mut self, packet: &Packet<'_>, segment: &Segment, now: Instant) -> Option<Handle> {
        let source = segment.tuple.client.ip();
        if self.held_in_all >= MOST_HELD || self.held.get(&source).is_some_and(|held| *held >= MOST_HELD_OF_SOURCE) {
            return None;
        }
        let mut rings = Pool::take(&self.pool, self.flows.len())?;
        // SAFETY: the slices live in the socket, which `Flow` drops before the rings.
        let (receive, send) = unsafe { rings.split() };
        let mut socket = tcp::Socket::new(tcp::SocketBuffer::new(receive), tcp::SocketBuffer::new(send));
        socket.set_ack_delay(None);
        socket.set_nagle_enabled(false);
        socket.pause_synack(true);
        // No packet is lost between this host's programs and us; a LAN or Wi-Fi client is another matter.
        let lossless = self.own.contains(&source);
        socket.set_congestion_control(if lossless { CongestionControl::None } else { CongestionControl::Cubic });
        socket.listen((segment.tuple.server.ip(), segment.tuple.server.port())).ok()?;
        let mut sockets = SocketSet::new(Vec::with_capacity(1));
        let handle = sockets.add(socket);
        let after_syn = segment.sequence.wrapping_add(1);
        let flow = Rc::new(RefCell::new(Flow {
            tuple: segment.tuple,
            cut: self.cut(segment),
            sockets,
            handle,
            rings,
            held: Some(packet.bytes[..packet.bytes.len().min(128)].into()),
            counted: true,
            dead: false,
            dirty: false,
            orphan: false,
            refusal: None,
            armed: None,
            progress: Progress {
                initial: segment.sequence,
                consumed: 0,
                highest: after_syn,
                sent: (0, 0),
                heard: now,
                moved: now,
                warm: false,
            },
        }));
        *self.held.entry(source).or_default() += 1;
        self.held_in_all += 1;
        self.flows.insert(segment.tuple, Rc::clone(&flow));
        Some(flow)
    }

    /// How the flow's segments are cut where smoltcp does not say so: IPv6 on a device with offloads.
    fn cut(&self, segment: &Segment) -> Option<Cut> {
        if !self.offload || segment.tuple.client.is_ipv4() {
            return None;
        }
        // An IPv6 device has an MTU of at least 1280, and no MTU exceeds 65 535.
        let announced = u16::try_from(self.mtu.saturating_sub(60)).unwrap_or(u16::MAX);
        // smoltcp clamps in the same way, against clients that ask for ten segments a byte.
        let segment = NonZeroU16::new(segment.mss().max(48).min(announced))?;
        Some(Cut { segment, announced })
    }

    fn feed(&mut self, handle: &Handle, bytes: &[u8], segment: &Segment, now: Instant, transmit: &mut dyn Transmit) {
        let mut guard = handle.borrow_mut();
        let flow = &mut *guard;
        let plane = &mut self.planes[usize::from(flow.tuple.client.is_ipv6())];
        let mut port =
            Port { incoming: Some(bytes), transmit, capabilities: &plane.capabilities, cut: flow.cut, last: None };
        plane.interface.poll_ingress_single(since(self.epoch, now), &mut port, &mut flow.sockets);
        flow.progress.sent = port.last.unwrap_or(flow.progress.sent);
        flow.progress.heard = now;
        // The comparison of RFC 1982: what is ahead by less than half the space is newer.
        if segment.payload > 0 && segment.end().wrapping_sub(flow.progress.highest) < 1 << 31 {
            flow.progress.highest = segment.end();
            flow.rings.touch(segment.payload);
            self.warm_up(flow, now);
        }
        if !flow.dirty {
            flow.dirty = true;
            self.shared.dirty.borrow_mut().push(Rc::clone(handle));
        }
    }

    fn warm_up(&mut self, flow: &mut Flow, now: Instant) {
        flow.progress.moved = now;
        if !flow.progress.warm {
            flow.progress.warm = true;
            self.warm.push_back((now + COLD, flow.tuple));
        }
    }

    pub(super) fn reset(&mut self, bytes: &[u8], now: Instant, transmit: &mut dyn Transmit) {
        let mut nobody = SocketSet::new(Vec::new());
        let plane = &mut self.planes[usize::from(bytes.first().is_some_and(|byte| byte >> 4 == 6))];
        let mut port =
            Port { incoming: Some(bytes), transmit, capabilities: &plane.capabilities, cut: None, last: None };
        plane.interface.poll_ingress_single(since(self.epoch, now), &mut port, &mut nobody);
    }

    pub(super) fn poll(&mut self, now: Instant, transmit: &mut dyn Transmit) -> bool {
        self.fire_timers(now);
        self.cool_down(now);
        let mut turn = std::mem::take(&mut self.turn);
        std::mem::swap(&mut turn, &mut *self.shared.dirty.borrow_mut());
        for flow in turn.drain(..) {
            self.serve(&flow, now, transmit);
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
        } else {
            self.uncount(flow);
        }
        if flow.orphan && flow.socket().timeout().is_none() {
            flow.socket().set_timeout(Some(LINGER));
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
            _ => self.arm(flow, now),
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
            Refusal::Prohibited => Some(Unreachable::Prohibited),
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
        for _ in 0..SHARE {
            if !transmit.ready() {
                return false;
            }
            let plane = &mut self.planes[usize::from(flow.tuple.client.is_ipv6())];
            let mut port =
                Port { incoming: None, transmit, capabilities: &plane.capabilities, cut: flow.cut, last: None };
            let result = plane.interface.poll_egress(time, &mut port, &mut flow.sockets);
            if let Some(sent) = port.last {
                flow.progress.sent = sent;
                if flow.socket().send_queue() > 0 {
                    self.warm_up(flow, now);
                }
            }
            if result == PollResult::None {
                return true;
            }
        }
        false
    }

    /// Makes sure that the timer queue wakes the flow in time. An entry that is too early is harmless.
    fn arm(&mut self, flow: &mut Flow, now: Instant) {
        if flow.held.is_some() {
            return; // `poll_at` of a held socket is always "now".
        }
        if flow.socket().send_queue() > 0 && now.saturating_duration_since(flow.progress.heard) > DEAF {
            flow.socket().abort();
        }
        let plane = &mut self.planes[usize::from(flow.tuple.client.is_ipv6())];
        let Some(at) = plane.interface.poll_at(since(self.epoch, now), &flow.sockets) else { return };
        let micros = u64::try_from(at.total_micros()).unwrap_or(0);
        // Whatever is due now was just served; a millisecond keeps a mistake from spinning.
        let due = (self.epoch + Duration::from_micros(micros)).max(now + Duration::from_millis(1));
        if flow.armed.is_none_or(|armed| due < armed) {
            flow.armed = Some(due);
            self.timers.push(Reverse(Timer { due, tuple: flow.tuple }));
        }
    }

    fn fire_timers(&mut self, now: Instant) {
        while self.timers.peek().is_some_and(|Reverse(timer)| timer.due <= now) {
            let Some(Reverse(timer)) = self.timers.pop() else { return };
            let Some(handle) = self.flows.get(&timer.tuple) else { continue };
            let mut flow = handle.borrow_mut();
            if flow.armed != Some(timer.due) {
                continue;
            }
            flow.armed = None;
            if !flow.dirty {
                flow.dirty = true;
                self.shared.dirty.borrow_mut().push(Rc::clone(handle));
            }
        }
    }

    /// Gives back the pages of flows that have fallen idle. Runs only while there are warm flows.
    fn cool_down(&mut self, now: Instant) {
        while self.warm.front().is_some_and(|(due, _)| *due <= now) {
            let Some((_, tuple)) = self.warm.pop_front() else { return };
            let Some(handle) = self.flows.get(&tuple) else { continue };
            let mut flow = handle.borrow_mut();
            let idle = now.saturating_duration_since(flow.progress.moved) >= COLD;
            if idle && flow.release_if_empty() {
                flow.progress.warm = false;
                continue;
            }
            self.warm.push_back((now + COLD, tuple));
        }
    }

    pub(super) fn deadline(&self) -> Option<Instant> {
        let timer = self.timers.peek().map(|Reverse(timer)| timer.due);
        // A second later than the first is due, so that one wake-up serves many.
        let warm = self.warm.front().map(|(due, _)| *due + Duration::from_secs(1));
        timer.into_iter().chain(warm).min()
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
            }
            if !flow.dirty {
                flow.dirty = true;
                self.shared.dirty.borrow_mut().push(Rc::clone(handle));
            }
        }
    }

    fn forget(&mut self, handle: &Handle) {
        let mut flow = handle.borrow_mut();
        self.uncount(&mut flow);
        flow.dead = true;
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

    fn uncount(&mut self, flow: &mut Flow) {
        if !std::mem::take(&mut flow.counted) {
            return;
        }
        self.held_in_all -= 1;
        let source = flow.tuple.client.ip();
        if let Some(held) = self.held.get_mut(&source) {
            *held -= 1;
            if *held == 0 {
                self.held.remove(&source);
            }
        }
    }
}

/// The packet without its IPv6 extension headers, which have done their work.
fn strip_extensions(packet: &Packet<'_>) -> Vec<u8> {
    let mut bytes = packet.bytes[..40].to_vec();
    bytes.extend_from_slice(packet.payload());
    let length = (bytes.len() - 40) as u16;
    bytes[4..6].copy_from_slice(&length.to_be_bytes());
    bytes[6] = packet.protocol;
    bytes
}

impl PartialEq for Timer {
    fn eq(&self, other: &Self) -> bool {
        self.due == other.due
    }
}

impl Eq for Timer {}

impl PartialOrd for Timer {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Timer {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.due.cmp(&other.due)
    }
}
