//! Workers: a thread, a single-threaded runtime, a device queue and a dispatcher each. They share the core alone.

use std::cell::RefCell;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Context as _;
use tokio::sync::mpsc;
use tokio::task::{LocalSet, spawn_local};
use tokio::time::Instant;

use crate::dispatch::{Core, Counters, Dispatcher};
use crate::inbound::tun::{Crew, Hijack, Tunnel};
use crate::platform::TunQueue;
use crate::stack;

/// How long flows may finish by themselves at the end.
#[derive(Debug, Clone, Copy)]
pub(super) struct Drain {
    /// Those that are left when no byte has moved for so long wait for something else than us.
    pub(super) quiet: Duration,
    /// The longest it may take.
    pub(super) most: Duration,
}

/// How often the end of the last flow is looked for.
const LOOK: Duration = Duration::from_millis(10);

/// Something to do on a worker.
pub(super) type Job = Box<dyn FnOnce(&Rc<Dispatcher>) + Send>;

/// A queue of the device, and what its stack must know.
pub(super) struct Tun {
    pub(super) queue: TunQueue,
    pub(super) stack: stack::Config,
    pub(super) hijack: Hijack,
    pub(super) crew: Crew,
}

/// What a worker is made of.
pub(super) struct Seed {
    /// A queue of the device, if there is one.
    pub(super) tun: Option<Tun>,
    /// What all workers share.
    pub(super) core: Arc<Core>,
    /// Hears of the worker's end, which before [`Worker::drain`] means that it failed.
    pub(super) ended: mpsc::UnboundedSender<()>,
}

enum Message {
    Job(Job),
    Drain(Drain),
}

/// A running worker.
pub(super) struct Worker {
    messages: mpsc::UnboundedSender<Message>,
    thread: RefCell<Option<JoinHandle<io::Result<()>>>>,
}

impl Worker {
    /// Starts the worker `number`.
    pub(super) fn start(number: usize, seed: Seed) -> anyhow::Result<Self> {
        let (messages, inbox) = mpsc::unbounded_channel();
        let thread = std::thread::Builder::new()
            .name(format!("worker-{number}"))
            .spawn(move || {
                let ended = seed.ended.clone();
                let result = work(seed, inbox);
                // Nobody may be left to hear it.
                let _ = ended.send(());
                result
            })
            .context("cannot start a worker thread")?;
        Ok(Self { messages, thread: RefCell::new(Some(thread)) })
    }

    /// Runs `job` on the worker's own thread.
    pub(super) fn run(&self, job: Job) {
        let _ = self.messages.send(Message::Job(job));
    }

    /// Lets flows finish for a while, then resets the rest and ends.
    pub(super) fn drain(&self, drain: Drain) {
        let _ = self.messages.send(Message::Drain(drain));
    }

    /// Waits for the thread after [`drain`](Self::drain).
    ///
    /// # Errors
    /// What the device reported, if that ended the worker.
    pub(super) fn join(&self) -> io::Result<()> {
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(result)) => result,
            Some(Err(_)) => Err(io::Error::other("a worker panicked")),
            None => Ok(()),
        }
    }
}

fn work(seed: Seed, inbox: mpsc::UnboundedReceiver<Message>) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let tasks = LocalSet::new();
    runtime.block_on(tasks.run_until(async move {
        let dispatcher = Dispatcher::new(seed.core);
        let Some(Tun { queue, stack, hijack, crew }) = seed.tun else {
            serve(inbox, &dispatcher, || 0).await;
            return Ok(());
        };
        let tunnel = Tunnel::new(queue, stack, hijack, crew, Rc::clone(&dispatcher))?;
        let mut gone = spawn_local(tunnel.gone());
        let result = tokio::select! {
            result = tunnel.run() => result,
            Ok(error) = &mut gone => Err(error),
            () = serve(inbox, &dispatcher, || tunnel.flows()) => Ok(()),
        };
        tunnel.abort();
        result
    }))
}

/// Does jobs until told to drain; then waits for the flows to end, but not for long.
async fn serve(mut inbox: mpsc::UnboundedReceiver<Message>, dispatcher: &Rc<Dispatcher>, flows: impl Fn() -> usize) {
    loop {
        match inbox.recv().await {
            Some(Message::Job(job)) => job(dispatcher),
            Some(Message::Drain(limits)) => return drained(limits, &dispatcher.core().counters, flows).await,
            None => return,
        }
    }
}

async fn drained(limits: Drain, counters: &Counters, flows: impl Fn() -> usize) {
    let moved = || counters.up.load(Relaxed).wrapping_add(counters.down.load(Relaxed));
    let start = Instant::now();
    let (mut seen, mut since) = (moved(), start);
    let mut look = tokio::time::interval(LOOK);
    while flows() > 0 && start.elapsed() < limits.most {
        look.tick().await;
        if moved() != seen {
            (seen, since) = (moved(), Instant::now());
        } else if since.elapsed() >= limits.quiet {
            return;
        }
    }
}
