//! Keeps the state directory of a run where it is: what somebody deletes of it comes back.

use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use anyhow::Context as _;
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::{Mutex as Turn, OwnedMutexGuard, oneshot};
use tokio::task::{JoinHandle, spawn_local};
use tokio::time::{sleep, timeout};

use super::control::{Control, Place};
use crate::dns::Dns;
use crate::platform::{DirectoryWatch, Journal};

/// Whoever deletes a directory deletes the files in it one by one: so long it takes.
const MOMENT: Duration = Duration::from_millis(200);
/// What failed is tried again when something has changed there, or after this; then after twice as long, and so on.
const FIRST_RETRY: Duration = Duration::from_secs(1);
/// The longest of these times.
const LAST_RETRY: Duration = Duration::from_secs(60);

/// How long a stop waits for a look that is under way: a disk may never answer.
const LAST_LOOK: Duration = Duration::from_secs(5);
/// The stack of the thread that looks, in bytes: memory may be short.
const STACK: usize = 256 << 10;

/// The files of a run in its state directory.
pub(super) struct Kept {
    pub(super) state: PathBuf,
    pub(super) journal: Arc<Mutex<Journal>>,
    pub(super) control: Rc<Control>,
    /// Has the log of fake addresses.
    pub(super) dns: Arc<Dns>,
}

/// The task that keeps them.
pub(super) struct Keeper {
    task: JoinHandle<()>,
    /// Who looks has it.
    turn: Arc<Turn<()>>,
}

impl Keeper {
    /// Begins to keep them. To be called within a `LocalSet`.
    pub(super) fn post(kept: Kept) -> Self {
        let turn = Arc::default();
        Self { task: spawn_local(keep(kept, Arc::clone(&turn))), turn }
    }

    /// From now on nothing is put back any more.
    pub(super) async fn dismiss(self) {
        self.task.abort();
        let _ = self.task.await;
        if timeout(LAST_LOOK, self.turn.lock()).await.is_err() {
            tracing::warn!("the disk with the state directory does not answer; the run ends without waiting for it");
        }
    }
}

/// What a look at the directory came to.
struct Looked {
    /// Hears of what happens there after the look.
    watch: io::Result<DirectoryWatch>,
    /// What was missing, if it could be put back.
    back: anyhow::Result<Back>,
}

struct Back {
    /// Lock, journal, or the log of fake addresses.
    files: bool,
    socket: Option<Place>,
}

/// Puts back what is missing of the files in `state`, whenever something is. Ends with the run.
async fn keep(kept: Kept, turn: Arc<Turn<()>>) {
    let shown = kept.state.display();
    let (mut lost, mut failed, mut retry, mut way) = (false, String::new(), FIRST_RETRY, Way::Here);
    loop {
        let looked = look(&kept, Arc::clone(&turn).lock_owned().await, way).await;
        let Some(Looked { watch, back }) = looked else { return };
        way = Way::Beside;
        let watch = match watch {
            Ok(watch) => watch,
            Err(error) => return tracing::warn!("that somebody deletes {shown} would go unnoticed: {error}"),
        };
        let changed = match back.and_then(|back| take_over(back, &kept.control)) {
            Ok(was_missing) => {
                if was_missing && !std::mem::replace(&mut lost, true) {
                    tracing::warn!(
                        "somebody has deleted the state directory {shown}, or files in it; they are back, and so is what undoes \
                         our changes after a crash. (Further times are told with log-level: debug)"
                    );
                } else if was_missing {
                    tracing::debug!("the state directory {shown} was deleted again; it is back");
                }
                (failed, retry) = (String::new(), FIRST_RETRY);
                watch.changed().await
            }
            Err(error) => {
                let words = format!("{error:#}");
                if failed != words {
                    tracing::error!(
                        "somebody has deleted the state directory {shown}, or files in it, and they cannot be put back: {words}. \
                         Until they are, nobody can ask this run, and after a crash `cleanup` does not know what to undo"
                    );
                    failed = words;
                }
                // What was tried has changed something itself, which is nothing to wake up for.
                drop(watch);
                let until = retry;
                retry = (retry * 2).min(LAST_RETRY);
                match watch_of(&kept.state, Arc::clone(&turn).lock_owned().await).await {
                    // No sooner, whatever changes there: the attempt itself may take its time.
                    Some(watch) => {
                        sleep(FIRST_RETRY.min(until)).await;
                        timeout(until, watch.changed()).await.unwrap_or(Ok(()))
                    }
                    None => {
                        sleep(until).await;
                        Ok(())
                    }
                }
            }
        };
        if changed.is_err() {
            return;
        }
        sleep(MOMENT).await;
    }
}

/// Looks what is missing and puts it back, beside this thread: a disk may take its time for all of it, and clients of the
/// control socket are not to wait for that. None: the runtime is going down.
async fn look(kept: &Kept, turn: OwnedMutexGuard<()>, way: Way) -> Option<Looked> {
    let (state, journal, dns) = (kept.state.clone(), Arc::clone(&kept.journal), Arc::clone(&kept.dns));
    let socket = kept.control.look();
    done(way, move || {
        let _turn = turn;
        // Opened before the look, so that nothing is missed between the two.
        let watch = DirectoryWatch::open(&state);
        let back = || {
            let files = journal.lock().put_back()?;
            let socket = socket().context("cannot listen there")?;
            // The least of them comes last.
            Ok(Back { files: dns.put_back() | files, socket })
        };
        Looked { watch, back: back() }
    })
    .await
}

async fn watch_of(state: &Path, turn: OwnedMutexGuard<()>) -> Option<DirectoryWatch> {
    let state = state.to_owned();
    let watch = done(Way::Beside, move || {
        let _turn = turn;
        DirectoryWatch::open(&state)
    });
    watch.await?.ok()
}

/// Where something is done.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    /// On this thread: the first look, since all of it has just been written, and memory may be short.
    Here,
    /// On a thread beside, and on this one where the system gives no other (the runtime's own pool would panic).
    Beside,
}

async fn done<T: Send + 'static>(way: Way, work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    if way == Way::Here {
        return Some(work());
    }
    let (tell, told) = oneshot::channel();
    // It waits for files with this runtime later.
    let runtime = Handle::current();
    let all = move || {
        let _entered = runtime.enter();
        drop(tell.send(work()));
    };
    let left = Arc::new(Mutex::new(Some(all)));
    let there = Arc::clone(&left);
    let thread = thread::Builder::new().name("keeper".to_owned()).stack_size(STACK);
    if thread.spawn(move || there.lock().take().map(|work| work())).is_err() {
        let work = left.lock().take();
        work.into_iter().for_each(|work| work());
    }
    told.await.ok()
}

/// Goes on with what was put back. True: something was missing.
fn take_over(back: Back, control: &Control) -> anyhow::Result<bool> {
    let Some(socket) = back.socket else { return Ok(back.files) };
    control.move_to(socket)?;
    Ok(true)
}
