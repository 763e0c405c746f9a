//! The control socket: a unix socket in the state directory, one JSON object a line each way.

use std::cell::RefCell;
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener as BlockingListener, UnixStream as BlockingStream};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use nix::errno::Errno;
use nix::fcntl::AT_FDCWD;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::stat::{FchmodatFlags, Mode, fchmodat};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Notify, Semaphore, mpsc};
use tokio::time::timeout;

use super::places::{STATE_OF_ROOT, option};
use crate::platform::{Condition, Journalled, SUSPENDED, condition, holder, let_go_on, lost_by};

/// A longer line, in bytes, is no command.
const LONGEST: u64 = 64 << 10;
/// Clients at once; the next ones wait.
const CLIENTS: usize = 16;
/// A client that says nothing, or takes no answer, for so long is let go.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long one waits for an answer.
const ANSWER: Duration = Duration::from_secs(10);
/// Who has not answered after this may be suspended.
const SLOW: Duration = Duration::from_millis(200);
/// What became of the question.
const CUT: &str = "it has ended without an answer";
/// How often one looks whether a run that answers no more has ended.
const LOOK: Duration = Duration::from_millis(50);
/// How long one waits for the end of a run that was told to stop: flows may take three seconds, a busy firewall ten.
const END: Duration = Duration::from_secs(45);
/// How long one waits for a run that does not answer, because it is about to start or to end: every program that a start waits
/// for is given up after ten seconds.
const SILENCE: Duration = Duration::from_secs(120);
/// After so long somebody who waits wants to know for what.
const WORD: Duration = Duration::from_secs(2);

/// What can be asked of a running program.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case")]
pub enum Command {
    /// Whether it is there.
    Ping,
    /// What it does: counters, mode, device.
    Status,
    /// What it has changed on the host: its `HostPlan`, or null.
    Plan,
    /// Puts the host back and ends.
    Stop,
}

/// An answer that takes a look at the host.
pub(super) type Looking = Pin<Box<dyn Future<Output = serde_json::Value>>>;

/// What a run answers with.
pub(super) struct Answers {
    /// To [`Command::Status`].
    pub(super) status: Box<dyn Fn() -> Looking>,
    /// To [`Command::Plan`].
    pub(super) plan: Box<dyn Fn() -> serde_json::Value>,
}

/// The socket's place below the state directory.
#[must_use]
pub(super) fn path(state: &Path) -> PathBuf {
    state.join("control.sock")
}

/// The listening socket; removed when dropped.
pub(super) struct Control {
    place: RefCell<Listening>,
    path: PathBuf,
    /// Told when another socket has taken the place of the one that was listened on.
    replaced: Notify,
}

struct Listening {
    listener: Rc<UnixListener>,
    /// Which file it is. Another run may have put its own in its place.
    inode: u64,
}

/// A socket that listens, and which file it is.
pub(super) struct Place {
    listener: BlockingListener,
    inode: u64,
}

impl Place {
    fn taken(self) -> anyhow::Result<Listening> {
        self.listener.set_nonblocking(true)?;
        Ok(Listening { listener: Rc::new(UnixListener::from_std(self.listener)?), inode: self.inode })
    }
}

impl Control {
    /// Listens below `state`. The caller holds the state directory's lock, so a socket that is there is a leftover.
    pub(super) fn bind(state: &Path) -> anyhow::Result<Self> {
        let path = path(state);
        let place = RefCell::new(listen(&path)?.taken()?);
        Ok(Self { place, path, replaced: Notify::new() })
    }

    /// What looks whether the socket's file is gone, and then listens anew: it may wait for a disk. The caller holds the state
    /// directory's lock.
    pub(super) fn look(&self) -> impl FnOnce() -> anyhow::Result<Option<Place>> + Send + use<> {
        let (path, inode) = (self.path.clone(), self.place.borrow().inode);
        move || if is_at(&path, inode) { Ok(None) } else { listen(&path).map(Some) }
    }

    /// Takes clients at `place` from now on.
    pub(super) fn move_to(&self, place: Place) -> anyhow::Result<()> {
        *self.place.borrow_mut() = place.taken()?;
        self.replaced.notify_one();
        Ok(())
    }

    /// Serves clients with `answers` until dropped; a stop is sent to `stop`.
    pub(super) async fn serve(&self, answers: Answers, stop: mpsc::Sender<()>) {
        let places = Arc::new(Semaphore::new(CLIENTS));
        let answers = Rc::new(answers);
        loop {
            let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
            let listener = Rc::clone(&self.place.borrow().listener);
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = self.replaced.notified() => continue,
            };
            match accepted {
                Ok((stream, _)) => {
                    let (answers, stop) = (Rc::clone(&answers), stop.clone());
                    tokio::task::spawn_local(async move {
                        // A client that goes away or talks nonsense is its own problem.
                        let _ = talk(stream, &answers, &stop).await;
                        drop(place);
                    });
                }
                // Out of descriptors: the next attempt must not spin.
                Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
            }
        }
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        if is_at(&self.path, self.place.borrow().inode) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn is_at(path: &Path, inode: u64) -> bool {
    std::fs::symlink_metadata(path).is_ok_and(|found| found.ino() == inode)
}

fn listen(path: &Path) -> anyhow::Result<Place> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("cannot replace {}", path.display()));
        }
        _ => {}
    }
    // Nobody else may connect in the moment between the two calls: the directory is ours alone.
    let listener = BlockingListener::bind(path).with_context(|| format!("cannot listen on {}", path.display()))?;
    // Where the directory is another's, a link may have come in its place.
    let closed = fchmodat(AT_FDCWD, path, Mode::S_IRUSR | Mode::S_IWUSR, FchmodatFlags::NoFollowSymlink);
    closed.with_context(|| format!("cannot close {} to others", path.display()))?;
    let inode = std::fs::symlink_metadata(path)?.ino();
    Ok(Place { listener, inode })
}

async fn talk(mut stream: UnixStream, answers: &Answers, stop: &mpsc::Sender<()>) -> io::Result<()> {
    let user = stream.peer_cred()?.uid();
    let (reader, mut writer) = stream.split();
    let mut reader = tokio::io::BufReader::new(reader);
    let mut line = Vec::new();
    loop {
        line.clear();
        let length = timeout(PATIENCE, (&mut reader).take(LONGEST).read_until(b'\n', &mut line)).await??;
        if length == 0 {
            return Ok(());
        }
        let whole = line.last() == Some(&b'\n') || (length as u64) < LONGEST;
        let answer = if user != 0 && user != nix::unistd::geteuid().as_raw() {
            serde_json::json!({"error": "only root and the user who runs this program may ask"})
        } else if !whole {
            serde_json::json!({"error": format!("not a command: longer than {LONGEST} bytes")})
        } else {
            match serde_json::from_slice(&line) {
                Ok(Command::Ping) => serde_json::json!({"ok": true, "version": env!("CARGO_PKG_VERSION")}),
                Ok(Command::Status) => (answers.status)().await,
                Ok(Command::Plan) => (answers.plan)(),
                Ok(Command::Stop) => {
                    // The connection stays open: that it closes tells the client of our end.
                    let _ = stop.try_send(());
                    serde_json::json!({"ok": true})
                }
                Err(error) => serde_json::json!({"error": format!("not a command: {error}")}),
            }
        };
        timeout(PATIENCE, writer.write_all(format!("{answer}\n").as_bytes())).await??;
        if !whole {
            return Ok(());
        }
    }
}

/// Asks the program that runs with the state directory `state`; blocks. A stop is over when this returns.
///
/// # Errors
/// Nobody listens there, the answer is not what was expected, or the program does not end.
pub fn ask(state: &Path, command: Command) -> anyhow::Result<serde_json::Value> {
    if command == Command::Stop {
        return stop(state);
    }
    let run = holder(state);
    let stream = connect(state)?;
    send(&stream, command)?;
    let (answer, _) = answer(&stream, run)?;
    Ok(answer)
}

/// Whether a process is there to answer.
///
/// # Errors
/// It is suspended, with how it goes on.
fn goes_on(run: Option<i32>) -> anyhow::Result<()> {
    match run.filter(|run| condition(*run) == Condition::Suspended) {
        Some(run) => bail!("process {run} runs with that state directory; {SUSPENDED}. {}", let_go_on(run)),
        None => Ok(()),
    }
}

fn connect(state: &Path) -> anyhow::Result<BlockingStream> {
    let path = path(state);
    BlockingStream::connect(&path).map_err(|error| {
        let said = nobody(&path, &error);
        anyhow::Error::new(error).context(said)
    })
}

fn send(mut stream: &BlockingStream, command: Command) -> anyhow::Result<()> {
    writeln!(stream, "{}", serde_json::to_string(&command)?).context(CUT)
}

/// The answer of `run`, and what else is to come.
fn answer(stream: &BlockingStream, run: Option<i32>) -> anyhow::Result<(serde_json::Value, impl BufRead)> {
    wait_for(stream, run, ANSWER)?;
    stream.set_read_timeout(Some(LOOK))?;
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    match reader.read_line(&mut line) {
        Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof)).context(CUT),
        Ok(_) => {}
        Err(error) if is_late(&error) => bail!("it does not answer within {} s", ANSWER.as_secs()),
        Err(error) => return Err(error).context(CUT),
    }
    Ok((serde_json::from_str(&line).context("the answer cannot be read")?, reader))
}

/// Waits until there is something to be read, or an end, or `limit` is over.
///
/// # Errors
/// `run` is suspended, so that nothing will come.
fn wait_for(stream: &BlockingStream, run: Option<i32>, limit: Duration) -> anyhow::Result<()> {
    let end = Instant::now() + limit;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        if is_ready(stream, left.min(SLOW))? || left.is_zero() {
            return Ok(());
        }
        goes_on(run)?;
    }
}

/// Whether there is something to be read, or an end, within `limit`.
fn is_ready(stream: &BlockingStream, limit: Duration) -> io::Result<bool> {
    let mut looked_at = [PollFd::new(stream.as_fd(), PollFlags::POLLIN)];
    match poll(&mut looked_at, PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX)) {
        Ok(ready) => Ok(ready > 0),
        Err(Errno::EINTR) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

fn is_late(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}

/// Whether nobody listens, or does no longer: a run that is about to start or to end, unless there is none.
fn is_closed(error: &anyhow::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionRefused, ConnectionReset, NotFound, UnexpectedEof};
    let kind = error.downcast_ref::<io::Error>().map(io::Error::kind);
    matches!(kind, Some(BrokenPipe | ConnectionRefused | ConnectionReset | NotFound | UnexpectedEof))
}

/// Tells the run to stop and waits for its end. Whoever comes when it is about to start, or is stopping already and lets in
/// nobody, waits for that end like the one who has asked for it.
fn stop(state: &Path) -> anyhow::Result<serde_json::Value> {
    let (run, mut waiting) = (holder(state), Waiting::new(holder(state)));
    loop {
        match connect(state).and_then(|stream| told_to_stop(&stream, &mut waiting)) {
            Ok(Some(refusal)) => return Ok(refusal),
            Ok(None) => break,
            Err(error) if run.is_none() || !is_closed(&error) => return Err(error),
            Err(_) if holder(state) != run => break,
            Err(_) => {
                waiting.go_on()?;
                std::thread::sleep(LOOK);
            }
        }
    }
    ended(state)
}

/// Somebody waits for the answer of a run.
struct Waiting {
    run: Option<i32>,
    begun: Instant,
    told: bool,
}

impl Waiting {
    fn new(run: Option<i32>) -> Self {
        Self { run, begun: Instant::now(), told: false }
    }

    /// Says once for what one waits.
    ///
    /// # Errors
    /// It has been too long, or the run is suspended.
    fn go_on(&mut self) -> anyhow::Result<()> {
        goes_on(self.run)?;
        let who = self.run.map_or_else(|| "it".to_owned(), |run| format!("process {run}"));
        let waited = self.begun.elapsed();
        if waited >= SILENCE {
            bail!(
                "{who} has neither answered nor ended within {} s: it hangs, or what it waits for does; its log may say why, \
                 and `tunproxy doctor` more",
                SILENCE.as_secs()
            );
        }
        if waited >= WORD && !std::mem::replace(&mut self.told, true) {
            // Whoever reads it may be gone.
            let _ =
                writeln!(io::stderr(), "{who} does not answer yet: it is about to start, or to end; waiting for that");
        }
        Ok(())
    }
}

/// What there is to say when a run that was told to stop has ended.
fn ended(state: &Path) -> anyhow::Result<serde_json::Value> {
    // What another run has changed that began meanwhile is none of its.
    let left = || Journalled::read(state).is_ok_and(|journal| !journal.commands().is_empty());
    if holder(state).is_none() && left() {
        bail!(
            "it has ended, and not all that it had changed could be undone: its log says what. `tunproxy cleanup{}` tries again",
            option(state)
        );
    }
    Ok(serde_json::json!({"ok": true}))
}

/// Returns when it has ended, or with its answer if it will not hear of it.
fn told_to_stop(stream: &BlockingStream, waiting: &mut Waiting) -> anyhow::Result<Option<serde_json::Value>> {
    // Nobody wants it to end whenever it may go on.
    goes_on(waiting.run)?;
    send(stream, Command::Stop)?;
    while !is_ready(stream, WORD)? {
        waiting.go_on()?;
    }
    let (answer, mut reader) = answer(stream, waiting.run)?;
    if answer.get("error").is_some() {
        return Ok(Some(answer));
    }
    wait_for(stream, waiting.run, END)?;
    match reader.read_line(&mut String::new()) {
        Err(error) if is_late(&error) => {
            bail!("it was told to stop, and has not ended after {} s; its log may say why", END.as_secs())
        }
        // Closed, or cut off by its end.
        _ => Ok(None),
    }
}

/// What to say when nobody answers on `path`, for `error`.
fn nobody(path: &Path, error: &io::Error) -> String {
    let own = nix::unistd::geteuid().is_root() || path.starts_with(STATE_OF_ROOT);
    let advice: &str = match (error.kind(), own) {
        (io::ErrorKind::ConnectionRefused, _) => &format!(
            "The run that made it was killed: `tunproxy cleanup{}` puts the host back, and so does the next start",
            path.parent().map(option).unwrap_or_default()
        ),
        (io::ErrorKind::PermissionDenied, _) => "Ask as the user who runs it, or with sudo",
        (io::ErrorKind::NotADirectory, _) => "Name a directory with --state-dir",
        (_, true) => "None runs with that state directory; is it another one (--state-dir)?",
        (_, false) => {
            "None of this user runs with that state directory: one that was started with sudo is asked with sudo, one with \
             --state-dir with the same"
        }
    };
    if let Some(pid) = path.parent().and_then(lost_by) {
        return format!(
            "process {pid} runs with the state directory of {}, which was deleted since. It puts it back if it can: ask again; else \
             its log says why not, and `kill {pid}` ends it and puts the host back",
            path.display()
        );
    }
    let holds = path.parent().and_then(holder).map_or_else(String::new, |pid| {
        format!(" (Process {pid} has it: it is about to start or to end, or it hangs; `tunproxy doctor` says more)")
    });
    format!("no tunproxy answers on {}: {error}. {advice}{holds}", path.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_finds_nobody_is_told_why_and_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let said = |state: &Path| format!("{:#}", ask(state, Command::Status).unwrap_err());
        assert!(said(dir.path()).contains("--state-dir"), "{}", said(dir.path()));
        drop(std::os::unix::net::UnixListener::bind(path(dir.path())).unwrap());
        assert!(said(dir.path()).contains("was killed: `tunproxy cleanup --state-dir"), "{}", said(dir.path()));
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        assert!(said(&file).contains("Name a directory"), "{}", said(&file));
    }
}
