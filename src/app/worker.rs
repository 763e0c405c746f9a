//! Workers: a thread, a single-threaded runtime, a device queue and a dispatcher each. They share the core alone.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::thread::JoinHandle;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::sync::{mpsc, oneshot};
use tokio::task::{LocalSet, spawn_local};
use tokio::time::Instant;

use super::refusal::explain_thread;
use crate::dispatch::{Core, Counters, Dispatcher};
use crate::inbound::tun::{Crew, Hijack, Tunnel};
use crate::inbound::{self, Accepted};
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
    /// A client of a proxy port.
    Client(Accepted),
    /// Let flows finish, reset the rest, say so, and wait for the end.
    Drain(Drain, oneshot::Sender<()>),
    /// Say that you are alive.
    Pulse(oneshot::Sender<()>),
    /// The drain is over now.
    Hurry,
    /// Let the device go and end.
    End,
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
            .map_err(|error| explain_thread("of a worker", &error))?;
        Ok(Self { messages, thread: RefCell::new(Some(thread)) })
    }

    /// Serves a client of a proxy port on the worker's own thread.
    pub(super) fn serve(&self, client: Accepted) {
        let _ = self.messages.send(Message::Client(client));
    }

    /// Its answer comes from between the packets, as that of a client would.
    pub(super) fn pulse(&self) -> oneshot::Receiver<()> {
        let (answer, answered) = oneshot::channel();
        let _ = self.messages.send(Message::Pulse(answer));
        answered
    }

    /// Lets flows finish for a while, then resets the rest; the device stays. What comes back hears when that is done,
    /// or that the worker has ended.
    fn drain(&self, drain: Drain) -> oneshot::Receiver<()> {
        let (done, drained) = oneshot::channel();
        let _ = self.messages.send(Message::Drain(drain, done));
        drained
    }

    /// Lets the device go and waits for the thread. To be called after [`drain`].
    ///
    /// # Errors
    /// What the device reported, if that ended the worker.
    pub(super) fn join(&self) -> io::Result<()> {
        let _ = self.messages.send(Message::End);
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(result)) => result,
            Some(Err(_)) => Err(io::Error::other("a worker panicked")),
            None => Ok(()),
        }
    }
}

/// Drains all `workers`; no longer than until `cut` is ready.
pub(super) async fn drain(workers: &[Worker], limits: Drain, cut: impl Future<Output = ()>) {
    let mut drained = std::pin::pin!(join_all(workers.iter().map(|worker| worker.drain(limits))));
    tokio::select! {
        _ = &mut drained => return,
        () = cut => tracing::info!("not waiting any longer: what is open is reset"),
    }
    for worker in workers {
        let _ = worker.messages.send(Message::Hurry);
    }
    drained.await;
}

/// Ends all `workers`, and with them the device. `told`: why the run ends is being said already.
pub(super) fn end(workers: &[Worker], told: bool) {
    for failure in workers.iter().filter_map(|worker| worker.join().err()) {
        match told {
            true => tracing::debug!("a worker failed: {failure}"),
            false => tracing::error!("a worker failed: {failure}"),
        }
    }
}

fn work(seed: Seed, mut inbox: mpsc::UnboundedReceiver<Message>) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let tasks = LocalSet::new();
    runtime.block_on(tasks.run_until(async move {
        let dispatcher = Dispatcher::new(seed.core);
        let Some(Tun { queue, stack, hijack, crew }) = seed.tun else {
            let drained = serve(&mut inbox, &dispatcher, || 0).await;
            wait_for_end(inbox, drained).await;
            return Ok(());
        };
        let tunnel = Tunnel::new(queue, stack, hijack, crew, Rc::clone(&dispatcher))?;
        let mut gone = spawn_local(tunnel.gone());
        let drained = tokio::select! {
            result = tunnel.run() => result.map(|()| None),
            Ok(error) = &mut gone => Err(error),
            drained = serve(&mut inbox, &dispatcher, || tunnel.flows()) => Ok(drained),
        };
        tunnel.abort();
        // The device goes when the host has been put back, and not before.
        wait_for_end(inbox, drained?).await;
        Ok(())
    }))
}

/// Says that the drain is over, and waits for the end.
async fn wait_for_end(mut inbox: mpsc::UnboundedReceiver<Message>, drained: Option<oneshot::Sender<()>>) {
    let Some(drained) = drained else { return };
    let _ = drained.send(());
    while !matches!(inbox.recv().await, Some(Message::End) | None) {}
}

/// Serves clients until told to drain; then waits for the flows to end, but not for long. `flows` counts those of the
/// device. Returns who wants to hear of it; nobody, if there is nobody left.
async fn serve(
    inbox: &mut mpsc::UnboundedReceiver<Message>,
    dispatcher: &Rc<Dispatcher>,
    flows: impl Fn() -> usize,
) -> Option<oneshot::Sender<()>> {
    let clients = Rc::new(Cell::new(0_usize));
    loop {
        match inbox.recv().await? {
            Message::Client(accepted) => {
                let (dispatcher, present) = (Rc::clone(dispatcher), Present::new(&clients));
                spawn_local(async move {
                    inbound::serve(accepted, dispatcher).await;
                    drop(present);
                });
            }
            Message::Drain(limits, done) => {
                let counters = &dispatcher.core().counters;
                tokio::select! {
                    () = drained(limits, counters, || flows() + clients.get()) => {}
                    () = hurry(inbox) => {}
                }
                return Some(done);
            }
            Message::Pulse(answer) => drop(answer.send(())),
            Message::Hurry => {}
            Message::End => return None,
        }
    }
}

/// Returns when the drain is to be cut short. Clients that come now find the door closed.
async fn hurry(inbox: &mut mpsc::UnboundedReceiver<Message>) {
    while let Some(Message::Client(_) | Message::Pulse(_)) = inbox.recv().await {}
}

/// One client of a proxy port, for as long as it is served.
struct Present(Rc<Cell<usize>>);

impl Present {
    fn new(clients: &Rc<Cell<usize>>) -> Self {
        clients.set(clients.get() + 1);
        Self(Rc::clone(clients))
    }
}

impl Drop for Present {
    fn drop(&mut self) {
        self.0.set(self.0.get().saturating_sub(1));
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
