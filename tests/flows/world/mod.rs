//! A client, a link and a stack in one thread, and the clock they share.
//!
//! ```text
//! Conn ── smoltcp as the client ── kernel (offloads) ── Link (loss, delay) ── Stack ── Flow, a task's side of a flow
//! Peer ── hand-made segments ─────────────────────────────────────────────────┘
//! ```
//!
//! [`World::run`] drives everything as the worker does: packets in, tasks, one emission per turn; when nothing is left
//! to do at this instant the clock jumps to the next deadline.

mod client;
mod executor;
mod flow;
mod kernel;
mod link;
pub(crate) mod packet;
mod peer;

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::task::{Poll, Wake, Waker};
use std::time::{Duration, Instant};

use tunproxy::stack::{Config, Event, Frame, Stack, Transmit, Tuple, VirtioHeader};

pub(crate) use client::{Conn, Ended};
pub(crate) use flow::Flow;
pub(crate) use link::Weather;
pub(crate) use packet::Seen;
pub(crate) use peer::Peer;

/// The device's MTU everywhere here.
pub(crate) const MTU: usize = 1500;
/// A test that needs more virtual time than this waits for something that never comes.
const LIMIT: Duration = Duration::from_secs(4 * 3600);

/// One of the networks that each case is tried on.
#[derive(Debug, Clone)]
pub(crate) struct Net {
    pub(crate) offload: bool,
    pub(crate) v6: bool,
    /// The clients are this host itself: no congestion control.
    pub(crate) own: bool,
    pub(crate) ipv6: bool,
    pub(crate) carry_echo: bool,
    pub(crate) weather: Weather,
    pub(crate) seed: u64,
    /// Receive and send buffer of each client socket.
    pub(crate) buffer: usize,
    /// Packets that the device takes in one turn.
    pub(crate) room: usize,
    /// Bytes that the stack's flows may take.
    pub(crate) memory: usize,
    /// A router between client and device whose link to the client carries no more than this.
    pub(crate) hop: Option<u16>,
}

impl Net {
    pub(crate) fn new(offload: bool, v6: bool) -> Self {
        let weather = Weather::CALM;
        Self {
            offload,
            v6,
            own: true,
            ipv6: true,
            carry_echo: true,
            weather,
            seed: 1,
            buffer: 256 << 10,
            room: usize::MAX,
            memory: usize::MAX,
            hop: None,
        }
    }

    /// With and without offloads, IPv4 and IPv6.
    pub(crate) fn all() -> [Self; 4] {
        [Self::new(false, false), Self::new(false, true), Self::new(true, false), Self::new(true, true)]
    }

    pub(crate) fn client(&self) -> IpAddr {
        address(self.v6, "192.0.2.10", "2001:db8:1::10")
    }

    pub(crate) fn server(&self) -> IpAddr {
        address(self.v6, "198.51.100.7", "2001:db8:2::7")
    }

    /// An address that hand-made segments come from; the smoltcp client never sees what is sent there.
    pub(crate) fn peer(&self) -> IpAddr {
        address(self.v6, "192.0.2.77", "2001:db8:1::77")
    }

    fn config(&self) -> Config {
        let own = if self.own { vec![self.client(), self.peer()] } else { Vec::new() };
        Config {
            mtu: MTU,
            offload: self.offload,
            own,
            echo: vec![address(self.v6, "198.18.0.2", "fdfe:dcba:9876::2")],
            carry_echo: self.carry_echo,
            reserved: vec!["198.18.0.0/15".parse().unwrap(), "fdfe:dcba:9876::/48".parse().unwrap()],
            ipv6: self.ipv6,
            seed: self.seed,
            memory: self.memory,
            tell_ended: false,
        }
    }
}

fn address(v6: bool, four: &str, six: &str) -> IpAddr {
    if v6 { six } else { four }.parse().unwrap()
}

/// Runs `test` on every network, and says on which one it failed.
pub(crate) fn on_every_net<F: Future<Output = ()> + 'static>(test: impl Fn(World) -> F) {
    for net in Net::all() {
        on(net, &test);
    }
}

/// Runs `test` on one network.
pub(crate) fn on<F: Future<Output = ()> + 'static>(net: Net, test: impl Fn(World) -> F) {
    struct Tell(Net);
    impl Drop for Tell {
        fn drop(&mut self) {
            if std::thread::panicking() {
                eprintln!("on {:?}", self.0);
            }
        }
    }
    let _tell = Tell(net.clone());
    let world = World::new(net);
    world.run(test(world.clone()));
}

/// Everything; cheap to clone.
#[derive(Clone)]
pub(crate) struct World(Rc<Inner>);

struct Inner {
    net: Net,
    now: Cell<Instant>,
    start: Instant,
    stack: RefCell<Stack>,
    client: RefCell<client::Client>,
    link: RefCell<link::Link>,
    device: RefCell<kernel::Device>,
    executor: executor::Executor,
    sleepers: RefCell<Vec<(Instant, Waker)>>,
    settling: RefCell<Vec<Waker>>,
    arrivals: RefCell<VecDeque<(Tuple, Flow)>>,
    awaiting: RefCell<Option<Waker>>,
    datagrams: RefCell<Vec<Datagram>>,
    echoes: RefCell<Vec<Ping>>,
    seen: RefCell<Option<Vec<Seen>>>,
    peers: RefCell<VecDeque<Seen>>,
    strays: Cell<u64>,
    /// Set by flows that have something to emit.
    stir: Arc<Stir>,
    ingested: Cell<bool>,
    turns: Cell<u64>,
}

/// A datagram that the stack reported.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Datagram {
    pub(crate) source: SocketAddr,
    pub(crate) destination: SocketAddr,
    pub(crate) payload: Vec<u8>,
    pub(crate) size: Option<u16>,
    pub(crate) dont_fragment: bool,
    /// The packet that brought it.
    pub(crate) packet: Vec<u8>,
}

/// An echo request that the stack reported.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Ping {
    pub(crate) source: IpAddr,
    pub(crate) destination: IpAddr,
    pub(crate) number: (u16, u16),
    pub(crate) payload: Vec<u8>,
    pub(crate) ttl: u8,
    pub(crate) tos: u8,
    pub(crate) dont_fragment: bool,
    /// The packet that brought it, up to where the payload begins.
    pub(crate) head: Vec<u8>,
}

/// Counts how often the stack was woken.
#[derive(Default)]
struct Stir(AtomicU64);

impl Wake for Stir {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, SeqCst);
    }
}

impl World {
    pub(crate) fn new(net: Net) -> Self {
        let start = Instant::now();
        Self(Rc::new(Inner {
            now: Cell::new(start),
            start,
            stack: RefCell::new(Stack::new(net.config(), start)),
            client: RefCell::new(client::Client::new(&net)),
            link: RefCell::new(link::Link::new(net.weather, net.seed)),
            device: RefCell::new(kernel::Device::new(net.offload)),
            executor: executor::Executor::default(),
            sleepers: RefCell::default(),
            settling: RefCell::default(),
            arrivals: RefCell::default(),
            awaiting: RefCell::default(),
            datagrams: RefCell::default(),
            echoes: RefCell::default(),
            seen: RefCell::default(),
            peers: RefCell::default(),
            strays: Cell::default(),
            stir: Arc::default(),
            ingested: Cell::default(),
            turns: Cell::default(),
            net,
        }))
    }

    pub(crate) fn net(&self) -> &Net {
        &self.0.net
    }

    pub(crate) fn now(&self) -> Instant {
        self.0.now.get()
    }

    /// Virtual time since the beginning.
    pub(crate) fn elapsed(&self) -> Duration {
        self.now() - self.0.start
    }

    pub(crate) fn stack(&self) -> std::cell::RefMut<'_, Stack> {
        self.0.stack.borrow_mut()
    }

    /// Flows that the stack has.
    pub(crate) fn flows(&self) -> usize {
        self.stack().flows()
    }

    /// When the stack wants its next turn.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.stack().deadline()
    }

    /// Whether nothing is due within the hour: what is left is the look for clients that vanished.
    pub(crate) fn rests(&self) -> bool {
        self.deadline().is_none_or(|deadline| deadline >= self.now() + Duration::from_secs(3600))
    }

    /// Turns of the loop in which there was something to do.
    pub(crate) fn turns(&self) -> u64 {
        self.0.turns.get()
    }

    /// Segments that belonged to no flow.
    pub(crate) fn strays(&self) -> u64 {
        self.0.strays.get()
    }

    pub(crate) fn set_weather(&self, weather: Weather) {
        self.0.link.borrow_mut().weather = weather;
    }

    /// From now on every packet on the link is noted.
    pub(crate) fn watch(&self) {
        *self.0.seen.borrow_mut() = Some(Vec::new());
    }

    /// What was noted since the last call.
    pub(crate) fn seen(&self) -> Vec<Seen> {
        self.0.seen.borrow_mut().as_mut().map(std::mem::take).expect("World::watch was called")
    }

    pub(crate) fn datagrams(&self) -> Vec<Datagram> {
        std::mem::take(&mut self.0.datagrams.borrow_mut())
    }

    pub(crate) fn echoes(&self) -> Vec<Ping> {
        std::mem::take(&mut self.0.echoes.borrow_mut())
    }

    /// The next segment or message sent to an address that is not the smoltcp client's.
    pub(crate) fn inbox(&self) -> Option<Seen> {
        self.0.peers.borrow_mut().pop_front()
    }

    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        self.0.executor.spawn(Box::pin(task));
    }

    /// The next flow that the stack reports.
    pub(crate) async fn arrival(&self) -> Flow {
        poll_fn(|cx| match self.0.arrivals.borrow_mut().pop_front() {
            Some((_, flow)) => Poll::Ready(flow),
            None => {
                *self.0.awaiting.borrow_mut() = Some(cx.waker().clone());
                Poll::Pending
            }
        })
        .await
    }

    /// Flows reported that no one has taken.
    pub(crate) fn waiting(&self) -> usize {
        self.0.arrivals.borrow().len()
    }

    /// Gives every flow from now on to `serve`.
    pub(crate) fn serve<F: Future<Output = ()> + 'static>(&self, serve: impl Fn(Flow) -> F + 'static) {
        let world = self.clone();
        self.spawn(async move {
            loop {
                let flow = world.arrival().await;
                world.spawn(serve(flow));
            }
        });
    }

    pub(crate) async fn sleep(&self, time: Duration) {
        let until = self.now() + time;
        poll_fn(|cx| {
            if self.now() >= until {
                return Poll::Ready(());
            }
            self.0.sleepers.borrow_mut().push((until, cx.waker().clone()));
            Poll::Pending
        })
        .await;
    }

    /// Until nothing is left to do at this instant.
    pub(crate) async fn settle(&self) {
        let mut asked = false;
        poll_fn(|cx| {
            if std::mem::replace(&mut asked, true) {
                return Poll::Ready(());
            }
            self.0.settling.borrow_mut().push(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }

    /// Puts a packet before the stack at once, as a device without offloads would.
    pub(crate) fn inject(&self, packet: &[u8]) {
        self.ingest(VirtioHeader::PLAIN, packet);
    }

    /// Puts a packet before the stack at once. True: it brought an event.
    pub(crate) fn ingest(&self, header: VirtioHeader, packet: &[u8]) -> bool {
        self.0.ingested.set(true);
        let mut stack = self.0.stack.borrow_mut();
        let mut device = self.0.device.borrow_mut();
        let frame = Frame { header, packet };
        let event = stack.ingest(frame, self.now(), &mut *device);
        let brought = event.is_some();
        match event {
            None => {}
            Some(Event::Whole(packet)) => {
                drop((stack, device));
                return self.ingest(VirtioHeader::PLAIN, &packet);
            }
            Some(Event::Stray(_)) => {
                self.0.strays.set(self.0.strays.get() + 1);
                stack.reset(frame, self.now(), &mut *device);
            }
            Some(Event::Incoming(tuple, stream)) => {
                self.0.arrivals.borrow_mut().push_back((tuple, Flow::new(tuple, stream)));
                if let Some(waker) = self.0.awaiting.borrow_mut().take() {
                    waker.wake();
                }
            }
            Some(Event::Echo(echo)) => self.0.echoes.borrow_mut().push(Ping {
                source: echo.source,
                destination: echo.destination,
                number: (echo.id, echo.sequence),
                payload: echo.payload.to_vec(),
                ttl: echo.ttl,
                tos: echo.tos,
                dont_fragment: echo.dont_fragment,
                head: echo.head.to_vec(),
            }),
            Some(Event::Datagram(datagram)) => self.0.datagrams.borrow_mut().push(Datagram {
                source: datagram.source,
                destination: datagram.destination,
                payload: datagram.payload.to_vec(),
                size: datagram.size.map(Into::into),
                dont_fragment: datagram.dont_fragment,
                packet: datagram.packet.to_vec(),
            }),
        }
        brought
    }

    /// Writes a datagram to a client, as the dispatcher does.
    pub(crate) fn send(&self, from: SocketAddr, to: SocketAddr, payload: &[u8]) -> bool {
        self.stack().send(from, to, payload, &mut *self.0.device.borrow_mut())
    }

    /// Lends the device that the stack writes to.
    pub(crate) fn with_device<T>(&self, act: impl FnOnce(&mut Stack, &mut dyn Transmit) -> T) -> T {
        act(&mut self.stack(), &mut *self.0.device.borrow_mut())
    }

    /// What the stack has emitted and nobody delivered yet.
    pub(crate) fn emitted(&self) -> usize {
        self.0.device.borrow().written()
    }

    /// Packets that the device was asked to cut.
    pub(crate) fn super_packets(&self) -> usize {
        self.0.device.borrow().super_packets
    }

    /// Drives everything until `test` is done.
    pub(crate) fn run(&self, test: impl Future<Output = ()> + 'static) {
        let inner = &*self.0;
        let done = inner.executor.spawn_first(Box::pin(test));
        let mut left = false;
        loop {
            let ran = inner.executor.run();
            if done.get() {
                inner.executor.clear();
                return;
            }
            let moved = self.carry();
            let worked = self.turn(&mut left);
            if ran || moved || worked || left || inner.executor.is_awake() {
                inner.turns.set(inner.turns.get() + 1);
                continue;
            }
            let settling = std::mem::take(&mut *inner.settling.borrow_mut());
            if settling.is_empty() {
                self.jump();
            }
            settling.into_iter().for_each(Waker::wake);
        }
    }

    /// Moves packets that are due, in both directions.
    fn carry(&self) -> bool {
        let inner = &*self.0;
        let now = self.now();
        let mut moved = false;
        let written = inner.device.borrow_mut().take();
        for packet in written {
            moved = true;
            self.note(&packet, true);
            if let Some(mtu) = inner.net.hop.filter(|mtu| packet.len() > usize::from(*mtu)) {
                self.inject(&packet::too_big(&packet, mtu));
            } else if packet::destination(&packet) == inner.net.client() {
                inner.link.borrow_mut().enter(link::Way::ToClient, packet, VirtioHeader::PLAIN, now);
            } else {
                inner.peers.borrow_mut().push_back(Seen::read(&packet, true));
            }
        }
        let sent = inner.client.borrow_mut().poll(now);
        for (header, packet) in sent {
            moved = true;
            self.note(&packet, false);
            inner.link.borrow_mut().enter(link::Way::ToStack, packet, header, now);
        }
        // As many as the worker reads before flows get their turn.
        for _ in 0..64 {
            let Some(parcel) = inner.link.borrow_mut().leave(now) else { break };
            moved = true;
            match parcel.way {
                link::Way::ToClient => inner.client.borrow_mut().receive(parcel.packet),
                link::Way::ToStack => drop(self.ingest(parcel.header, &parcel.packet)),
            }
        }
        moved
    }

    fn note(&self, packet: &[u8], to_client: bool) {
        if let Some(seen) = self.0.seen.borrow_mut().as_mut() {
            seen.push(Seen::read(packet, to_client));
        }
    }

    /// Polls the stack if it asked for that, as the worker does: after packets, when a flow stirred, when a timer is
    /// due, and when something was left.
    fn turn(&self, left: &mut bool) -> bool {
        let inner = &*self.0;
        let mut stack = inner.stack.borrow_mut();
        let stirred = inner.stir.0.swap(0, SeqCst) > 0;
        let due = stack.deadline().is_some_and(|deadline| deadline <= self.now());
        let ingested = inner.ingested.replace(false);
        if !(stirred || due || ingested || *left || stack.register(&Waker::from(Arc::clone(&inner.stir)))) {
            return false;
        }
        let mut device = inner.device.borrow_mut();
        device.room = inner.net.room;
        *left = stack.poll(self.now(), &mut *device);
        true
    }

    /// Lets time pass until something is due.
    fn jump(&self) {
        let inner = &*self.0;
        let sleepers = inner.sleepers.borrow().iter().map(|(due, _)| *due).min();
        let deadline = inner.stack.borrow().deadline();
        let client = inner.client.borrow_mut().deadline(self.now());
        let link = inner.link.borrow().deadline();
        let next = [sleepers, deadline, client, link].into_iter().flatten().min();
        let next = next.expect("the test waits, and nothing will ever happen");
        assert!(next - inner.start < LIMIT, "the test waits for more than {LIMIT:?}");
        inner.now.set(next.max(self.now()));
        let mut sleepers = inner.sleepers.borrow_mut();
        let (due, rest): (Vec<_>, Vec<_>) = sleepers.drain(..).partition(|(due, _)| *due <= self.now());
        *sleepers = rest;
        due.into_iter().for_each(|(_, waker)| waker.wake());
    }
}

/// Bytes whose place in a stream can be told from them: no two places less than 65 521 apart begin the same eight.
pub(crate) fn pattern(from: usize, length: usize) -> Vec<u8> {
    thread_local!(static TABLE: Vec<u8> = {
        let mut random = link::Random::new(0x7e57);
        (0..65_521).map(|_| (random.next() & 0xff) as u8).collect()
    });
    TABLE.with(|table| {
        let mut bytes = Vec::with_capacity(length);
        let mut at = from % table.len();
        while bytes.len() < length {
            let take = (table.len() - at).min(length - bytes.len());
            bytes.extend_from_slice(&table[at..at + take]);
            at = 0;
        }
        bytes
    })
}

pub(crate) use link::Random;
