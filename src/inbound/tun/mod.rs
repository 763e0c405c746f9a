//! The TUN inbound: one device queue, its stack, and the turn that drives both.
//!
//! A turn: read what waits (bounded), let the woken flow tasks move bytes, emit once per touched flow, then wait for
//! the device, a flow, a timer or a message. Nothing here crosses a thread or takes a lock.

mod back;
mod crew;
mod hijack;
mod writer;

use std::cell::RefCell;
use std::future::Future;
use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::task::{spawn_local, yield_now};
use tokio::time::Sleep;

use back::TunBack;
pub use crew::Crew;
use crew::Parcel;
pub use hijack::Hijack;
use writer::Writer;

use crate::dispatch::{Back, Dispatcher};
use crate::dns::{Answer, Dns, Question, Transport};
use crate::platform::TunQueue;
use crate::session::{Inbound, Network, Session};
use crate::stack::{self, Claim, Datagram, Event, Frame, Stack, Tuple, VirtioHeader};

/// Packets read before flows get their turn.
const BATCH: usize = 64;
/// As much of a packet as an ICMP error may quote.
const QUOTED: usize = 1280;
/// A super-packet and its headers.
const READ_BUFFER: usize = 65_536 + 64;

/// One queue with all that lives on it.
pub struct Tunnel {
    queue: Rc<AsyncFd<TunQueue>>,
    stack: Rc<RefCell<Stack>>,
    writer: Rc<RefCell<Writer>>,
    back: Rc<TunBack>,
    dispatcher: Rc<Dispatcher>,
    dns: Arc<Dns>,
    hijack: Hijack,
    crew: RefCell<Crew>,
}

/// An answer that leaves once its fake addresses are in the log.
struct Reply {
    from: SocketAddr,
    to: SocketAddr,
    message: Vec<u8>,
}

impl Tunnel {
    /// Puts a stack on `queue`. Must be called inside the runtime that will drive it.
    ///
    /// # Errors
    /// The descriptor cannot be watched.
    pub fn new(
        queue: TunQueue,
        config: stack::Config,
        hijack: Hijack,
        crew: Crew,
        dispatcher: Rc<Dispatcher>,
    ) -> io::Result<Self> {
        // SAFETY: the queue owns its one descriptor and never exchanges it.
        let queue = Rc::new(unsafe { AsyncFd::register(queue) }?);
        let stack = Rc::new(RefCell::new(Stack::new(config, Instant::now())));
        let writer = Rc::new(RefCell::new(Writer::new(Rc::clone(&queue))));
        let back = Rc::new(TunBack::new(Rc::clone(&stack), Rc::clone(&writer)));
        let dns = Arc::clone(&dispatcher.core().dns);
        let crew = RefCell::new(crew);
        Ok(Self { queue, stack, writer, back, dispatcher, dns, hijack, crew })
    }

    /// Carries packets until the device is gone.
    ///
    /// # Errors
    /// What the device reported last.
    pub async fn run(&self) -> io::Result<()> {
        let mut buffer = vec![0; READ_BUFFER].into_boxed_slice();
        let mut sleep = Box::pin(tokio::time::sleep(Duration::ZERO));
        loop {
            let more = poll_fn(|cx| Poll::Ready(self.read(cx, &mut buffer))).await?;
            yield_now().await;
            let left = self.emit();
            if more || left {
                continue;
            }
            self.dispatcher.core().counters.publish(self.crew.borrow().number(), self.stack.borrow().counters());
            poll_fn(|cx| self.poll_wake(cx, sleep.as_mut())).await?;
        }
    }

    /// Returns when the device is gone. The kernel then reports an error and nothing to read, which
    /// [`run`](Self::run) does not look for: it would cost every turn.
    pub fn gone(&self) -> impl Future<Output = io::Error> + 'static {
        let queue = Rc::clone(&self.queue);
        async move {
            match queue.ready(Interest::ERROR).await {
                Ok(_) => io::Error::new(io::ErrorKind::NotConnected, "the device is gone"),
                Err(error) => error,
            }
        }
    }

    /// Ends every flow with a reset, so that no client is left hanging when the device goes.
    pub fn abort(&self) {
        self.stack.borrow_mut().abort_all();
        self.emit();
    }

    /// Flows that are open or being opened.
    #[must_use]
    pub fn flows(&self) -> usize {
        self.stack.borrow().flows()
    }

    /// Reads and ingests up to a batch, and sends what came of it. True: more may wait.
    fn read(&self, cx: &mut Context<'_>, buffer: &mut [u8]) -> io::Result<bool> {
        let mut replies = Vec::new();
        let more = self.read_batch(cx, buffer, &mut replies);
        self.dispatcher.flush();
        self.answer(replies);
        more
    }

    fn read_batch(&self, cx: &mut Context<'_>, buffer: &mut [u8], replies: &mut Vec<Reply>) -> io::Result<bool> {
        let mut more = self.take_parcels(cx, replies);
        let Poll::Ready(guard) = self.queue.poll_read_ready(cx) else { return Ok(more) };
        let mut guard = guard?;
        for turn in 0..BATCH {
            match guard.try_io(|queue| queue.get_ref().read(buffer)) {
                Ok(Ok((layout, length))) => {
                    let header = layout
                        .header
                        .and_then(|at| buffer.get(at..at + VirtioHeader::LEN)?.try_into().ok())
                        .map_or(VirtioHeader::PLAIN, VirtioHeader::parse);
                    let frame = Frame { header, packet: &buffer[layout.packet..length] };
                    self.ingest(frame, replies);
                    more |= turn + 1 == BATCH;
                }
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(error)) => return Err(error),
                Err(_would_block) => break,
            }
        }
        Ok(more)
    }

    /// Ingests what other workers handed over, up to a batch. True: more may wait.
    fn take_parcels(&self, cx: &mut Context<'_>, replies: &mut Vec<Reply>) -> bool {
        for _ in 0..BATCH {
            let parcel = self.crew.borrow_mut().inbox.poll_recv(cx);
            let Poll::Ready(Some(Parcel { header, packet })) = parcel else { return false };
            self.digest(Frame { header, packet: &packet }, true, replies);
        }
        true
    }

    /// Ingests a packet of our own queue, unless another worker has to.
    fn ingest(&self, frame: Frame<'_>, replies: &mut Vec<Reply>) {
        let crew = self.crew.borrow();
        if crew.is_alone() {
            drop(crew);
            return self.digest(frame, false, replies);
        }
        let claim = stack::claim(frame.packet);
        let elsewhere = match claim {
            None => None,
            Some(Claim::Flow(tuple)) => Some(crew.claim(tuple)).filter(|owner| !crew.is(*owner)),
            Some(Claim::Piece(source, destination, id)) => crew.owner_of_fragments((source, destination, id)),
        };
        if let Some(owner) = elsewhere {
            self.hand(&crew, owner, frame);
            return;
        }
        drop(crew);
        self.digest(frame, false, replies);
        if let Some(Claim::Flow(tuple)) = claim
            && !self.stack.borrow().knows(&tuple)
        {
            self.crew.borrow().release(&tuple);
        }
    }

    fn hand(&self, crew: &Crew, owner: usize, frame: Frame<'_>) {
        if !crew.hand(owner, frame.header, frame.packet) {
            self.dispatcher.core().counters.hand_over_lost.fetch_add(1, Relaxed);
        }
    }

    /// Gives a packet to the stack and does what it asks for. `handed`: another worker has already looked for an owner.
    fn digest(&self, frame: Frame<'_>, handed: bool, replies: &mut Vec<Reply>) {
        let now = Instant::now();
        let mut stack = self.stack.borrow_mut();
        let mut writer = self.writer.borrow_mut();
        match stack.ingest(frame, now, &mut *writer) {
            None => {}
            Some(Event::Stray(tuple)) => {
                let crew = self.crew.borrow();
                match crew.owner(&tuple).filter(|_| !handed) {
                    Some(owner) => self.hand(&crew, owner, frame),
                    None => stack.reset(frame, now, &mut *writer),
                }
            }
            Some(Event::Incoming(tuple, stream)) => {
                if self.hijack.takes(tuple.server) {
                    spawn_local(Rc::clone(&self.dispatcher).names(stream));
                } else {
                    spawn_local(Rc::clone(&self.dispatcher).flow(tuple, stream));
                }
            }
            Some(Event::Datagram(datagram)) => self.datagram(&datagram, frame, now, replies),
        }
    }

    fn datagram(&self, datagram: &Datagram<'_>, frame: Frame<'_>, now: Instant, replies: &mut Vec<Reply>) {
        if self.hijack.takes(datagram.destination) {
            // A coalesced packet carries several datagrams of one size.
            let size = datagram.size.map_or(datagram.payload.len().max(1), |size| usize::from(size.get()));
            datagram.payload.chunks(size).for_each(|query| self.query(query, datagram, now, replies));
            return;
        }
        let crew = self.crew.borrow();
        if let Some(owner) = crew.owner_of_source(datagram.source) {
            // What was put together from pieces has no header of its own.
            let whole = std::ptr::eq(datagram.packet.as_ptr(), frame.packet.as_ptr());
            let header = if whole { frame.header } else { VirtioHeader::PLAIN };
            return self.hand(&crew, owner, Frame { header, packet: datagram.packet });
        }
        let quoted = &datagram.packet[..datagram.packet.len().min(QUOTED)];
        let back: Rc<dyn Back> = self.back.clone();
        let session = Session::new(Network::Udp, Inbound::Tun, datagram.source, datagram.destination.into());
        let Datagram { payload, size, dont_fragment, .. } = *datagram;
        self.dispatcher.packet(&session, payload, size, dont_fragment, quoted, &back);
    }

    fn query(&self, query: &[u8], datagram: &Datagram<'_>, now: Instant, replies: &mut Vec<Reply>) {
        let (from, to) = (datagram.destination, datagram.source);
        let mut message = Vec::with_capacity(512);
        match self.dns.answer(query, Transport::Udp, now, &mut message) {
            Answer::Ready => replies.push(Reply { from, to, message }),
            Answer::Ask(question) => {
                spawn_local(ask(Arc::clone(&self.dns), Rc::clone(&self.back), from, to, question));
            }
            Answer::Drop => {}
        }
    }

    /// Sends answers that were made in this batch; one write of the fake-IP log goes before all of them.
    fn answer(&self, replies: Vec<Reply>) {
        if replies.is_empty() {
            return;
        }
        self.dns.flush();
        let (mut stack, mut writer) = (self.stack.borrow_mut(), self.writer.borrow_mut());
        for reply in replies {
            stack.send(reply.from, reply.to, &reply.message, &mut *writer);
        }
    }

    /// Emits what flows and errors have to say. True: something is left, and the device takes it.
    fn emit(&self) -> bool {
        self.back.flush();
        let mut writer = self.writer.borrow_mut();
        let mut stack = self.stack.borrow_mut();
        let left = stack.poll(Instant::now(), &mut *writer);
        let ended: Vec<Tuple> = stack.ended().collect();
        for tuple in ended.iter().filter(|tuple| !stack.knows(tuple)) {
            self.crew.borrow().release(tuple);
        }
        left && !writer.is_blocked()
    }

    /// Ready when there is a reason for another turn.
    fn poll_wake(&self, cx: &mut Context<'_>, mut sleep: Pin<&mut Sleep>) -> Poll<io::Result<()>> {
        if let Poll::Ready(ready) = self.queue.poll_read_ready(cx) {
            return Poll::Ready(ready.map(drop));
        }
        if self.writer.borrow().is_blocked() {
            if let Poll::Ready(ready) = self.queue.poll_write_ready(cx) {
                // The attempt itself shows whether it is so; readiness is cleared lest a full device spins us.
                return Poll::Ready(ready.map(|mut guard| guard.clear_ready()));
            }
        } else if self.stack.borrow().register(cx.waker()) {
            return Poll::Ready(Ok(()));
        }
        if !self.crew.borrow().inbox.is_empty() {
            return Poll::Ready(Ok(()));
        }
        if self.back.register(cx.waker()) {
            return Poll::Ready(Ok(()));
        }
        let Some(deadline) = self.stack.borrow().deadline() else { return Poll::Pending };
        let deadline = tokio::time::Instant::from_std(deadline);
        if sleep.deadline() != deadline {
            sleep.as_mut().reset(deadline);
        }
        sleep.poll(cx).map(Ok)
    }
}

/// Asks the nameservers and answers the client.
async fn ask(dns: Arc<Dns>, back: Rc<TunBack>, from: SocketAddr, to: SocketAddr, question: Question) {
    let message = dns.ask(question).await;
    back.deliver(&from.into(), to, &message);
}
