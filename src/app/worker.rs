//! Workers: a thread, a single-threaded runtime, a device queue and a dispatcher each. They share the core alone.

use std::cell::RefCell;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Context as _;
use tokio::sync::mpsc;
use tokio::task::LocalSet;

use crate::dispatch::{Core, Dispatcher};
use crate::inbound::tun::{Crew, Hijack, Tunnel};
use crate::platform::TunQueue;
use crate::stack;

/// How long flows may finish by themselves at the end.
const DRAIN: Duration = Duration::from_secs(3);

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
    Drain,
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
    pub(super) fn drain(&self) {
        let _ = self.messages.send(Message::Drain);
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
        let result = tokio::select! {
            result = tunnel.run() => result,
            () = serve(inbox, &dispatcher, || tunnel.flows()) => Ok(()),
        };
        tunnel.abort();
        result
    }))
}

/// Does jobs until told to drain; then waits for the flows to end, but not for long.
async fn serve(mut inbox: mpsc::UnboundedReceiver<Message>, dispatcher: &Rc<Dispatcher>, flows: impl Fn() -> usize) {
    while let Some(Message::Job(job)) = inbox.recv().await {
        job(dispatcher);
    }
    let drained = async {
        let mut look = tokio::time::interval(Duration::from_millis(20));
        while flows() > 0 {
            look.tick().await;
        }
    };
    let _ = tokio::time::timeout(DRAIN, drained).await;
}
