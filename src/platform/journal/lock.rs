//! Who has the state directory: one run at a time.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use super::JournalError;
use super::file::distrust_lock;
use crate::platform::imp::process::{Condition, condition, holder_of_deleted};

/// How long a run that was killed, or the last child of a dead one, may hold on to the state directory.
const LAST_BREATH: Duration = Duration::from_secs(2);
/// Who looks alive is looked at again after this.
const SECOND_LOOK: Duration = Duration::from_millis(10);
/// How often one looks whether a run has put back what it has lost.
const LOOK: Duration = Duration::from_millis(50);

/// Makes the state directory (mode 0700) and those above it, so that they are still there after a power loss.
pub(super) fn make_directory(state_dir: &Path) -> io::Result<()> {
    let missing: Vec<&Path> = state_dir.ancestors().take_while(|dir| !dir.exists()).collect();
    fs::DirBuilder::new().recursive(true).mode(0o700).create(state_dir)?;
    for parent in missing.into_iter().filter_map(Path::parent).filter(|parent| parent.is_dir()) {
        File::open(parent)?.sync_all()?;
    }
    Ok(())
}

/// Takes the state directory for this process, for as long as the file lives.
pub(super) fn take(state_dir: &Path) -> Result<Flock<File>, JournalError> {
    let path = state_dir.join("lock");
    let io = |act| {
        let path = path.clone();
        move |source| JournalError::Io { act, path, source }
    };
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600).custom_flags(libc::O_NOFOLLOW);
    let mut file = options.open(&path).map_err(io("open"))?;
    if let Some(distrusted) = distrust_lock(&path, &file).map_err(io("look at"))? {
        return Err(distrusted);
    }
    let end = Instant::now() + LAST_BREATH;
    loop {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => {
                // The kernel takes back lock, ports and TUN one after the other.
                while noted(&path).is_some_and(|pid| condition(pid) == Condition::Dying) && Instant::now() < end {
                    std::thread::sleep(Duration::from_millis(5));
                }
                let note = lock.set_len(0).and_then(|()| (&*lock).write_all(std::process::id().to_string().as_bytes()));
                match note {
                    // It is for people to read. A clean-up must go on where a crash has filled the disk.
                    Err(error) if is_full(&error) => {}
                    note => note.map_err(io("write"))?,
                }
                return Ok(lock);
            }
            Err((again, Errno::EWOULDBLOCK)) => {
                let pid = noted(&path);
                let holder = pid.map_or(Condition::Gone, looked_at_twice);
                if matches!(holder, Condition::Alive | Condition::Suspended) || Instant::now() >= end {
                    let pid = pid.map_or_else(String::new, |pid| pid.to_string());
                    return Err(JournalError::Locked { dir: state_dir.to_owned(), pid, holder });
                }
                file = again;
                std::thread::sleep(Duration::from_millis(5));
            }
            Err((_, errno)) => return Err(io("lock")(errno.into())),
        }
    }
}

/// The process that has noted itself in the lock. One that is gone may have left a child that it was just starting: that has the
/// lock as well, until it runs or dies.
fn noted(lock: &Path) -> Option<i32> {
    fs::read_to_string(lock).ok()?.trim().parse().ok()
}

/// Between the moment in which a process hears of its end and that in which it is seen to end it looks alive.
fn looked_at_twice(pid: i32) -> Condition {
    match condition(pid) {
        Condition::Alive => {
            std::thread::sleep(SECOND_LOOK);
            condition(pid)
        }
        other => other,
    }
}

/// Waits for a run whose state directory was deleted to put it back: two must not share one.
///
/// # Errors
/// [`JournalError::Lost`]: it does not.
pub(super) fn await_return(state_dir: &Path) -> Result<(), JournalError> {
    let end = Instant::now() + LAST_BREATH;
    while let Some(pid) = lost_by(state_dir) {
        if Instant::now() >= end {
            return Err(JournalError::Lost { dir: state_dir.to_owned(), pid });
        }
        std::thread::sleep(LOOK);
    }
    Ok(())
}

/// The other process that runs with `state_dir`, which somebody has deleted since.
pub fn lost_by(state_dir: &Path) -> Option<i32> {
    let path = std::path::absolute(state_dir).ok()?.join("lock");
    if path.exists() {
        return None;
    }
    // The kernel tells the way without links, as far as it still goes.
    let there = path.ancestors().find(|it| it.exists())?;
    let rest = path.strip_prefix(there).ok()?;
    holder_of_deleted(&fs::canonicalize(there).ok()?.join(rest))
}

/// Whether there is no room for what was to be written.
fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}
