//! The TUN inbound: one device queue, its stack, and the turn that drives both.
//!
//! A turn: read what waits (bounded), let the woken flow tasks move bytes, emit once per touched flow, then wait for
//! the device, a flow, a timer or a message. Nothing here crosses a thread or takes a lock.

mod back;
mod contained;
mod crew;
mod hijack;
mod intake;
mod load;
mod places;
mod shortage;
mod streams;
#[cfg(test)]
mod tests;
mod writer;

use std::cell::RefCell;
use std::future::Future;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::task::yield_now;
use tokio::time::Sleep;

use back::TunBack;
use contained::contained;
pub use crew::Crew;
pub use hijack::Hijack;
use load::Load;
use places::Places;
use shortage::Shortage;
use writer::Writer;

use crate::dispatch::Dispatcher;
use crate::dns::Dns;
use crate::platform::TunQueue;
use crate::stack::{self, Stack, Transmit, Tuple};

/// As much of a packet as an ICMP error may quote.
const QUOTED: usize = 1280;
/// Questions that may wait for nameservers on one worker, and of them those of one source other than this host. One more is
/// dropped, as a full socket would; over TCP it is refused.
const MOST_QUESTIONS: usize = 2048;
const MOST_QUESTIONS_OF_SOURCE: usize = 256;
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
    streams: Rc<Places>,
    /// Those of both transports that wait for nameservers.
    questions: Rc<Places>,
    crew: RefCell<Crew>,
    shortage: Shortage,
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
        let own = config.own.clone();
        let streams = streams::places(own.clone());
        let questions = Places::new(own.clone(), MOST_QUESTIONS, MOST_QUESTIONS_OF_SOURCE);
        let stack = Rc::new(RefCell::new(Stack::new(config, Instant::now())));
        let writer = Rc::new(RefCell::new(Writer::new(Rc::clone(&queue))));
        let back = Rc::new(TunBack::new(Rc::clone(&stack), Rc::clone(&writer), own));
        let dns = Arc::clone(&dispatcher.core().dns);
        let crew = RefCell::new(crew);
        let shortage = Shortage::default();
        Ok(Self { queue, stack, writer, back, dispatcher, dns, hijack, streams, questions, crew, shortage })
    }

    /// Carries packets until the device is gone.
    ///
    /// # Errors
    /// What the device reported last.
    pub async fn run(&self) -> io::Result<()> {
        let mut buffer = vec![0; READ_BUFFER].into_boxed_slice();
        let mut sleep = Box::pin(tokio::time::sleep(Duration::ZERO));
        let (mut load, mut more) = (Load::new(Instant::now()), false);
        loop {
            self.dispatcher.begin_turn(load.is_behind(more, Instant::now()));
            more = poll_fn(|cx| Poll::Ready(self.read(cx, &mut buffer))).await?;
            yield_now().await;
            let left = contained(&self.dispatcher.core().counters, || self.emit()).unwrap_or(false);
            if more || left {
                continue;
            }
            let counted = self.stack.borrow().counters();
            self.dispatcher.core().counters.publish(self.crew.borrow().number(), counted);
            self.shortage.tell(&counted, Instant::now());
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

    /// Emits what flows and errors have to say. True: something is left, and the device takes it.
    fn emit(&self) -> bool {
        // What the device did not take goes first, also if nothing else is to be said: its readiness was cleared.
        self.writer.borrow_mut().ready();
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
