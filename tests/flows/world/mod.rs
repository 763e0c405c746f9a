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
mod drive;
mod executor;
mod flow;
mod kernel;
mod link;
mod net;
pub(crate) mod packet;
mod pattern;
mod peer;
mod rough;

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::task::{Poll, Wake, Waker};
use std::time::{Duration, Instant};

use tunproxy::stack::{Event, Frame, Stack, Transmit, Tuple, VirtioHeader};

pub(crate) use client::{Conn, Ended};
pub(crate) use flow::Flow;
pub(crate) use link::{Random, Weather};
pub(crate) use net::{MTU, Net};
pub(crate) use packet::Seen;
pub(crate) use pattern::pattern;
pub(crate) use peer::Peer;
pub(crate) use rough::Rough;

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
    /// For what the client lacks.
    random: RefCell<Random>,
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
            random: RefCell::new(Random::new(net.seed ^ 0x0c11_e217)),
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
}
