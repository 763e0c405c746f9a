//! One run at a time changes a network namespace: two that do so at the same moment would pick the same numbers, and take
//! each other's rules for their own.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};

use super::bounded::Hurry;
use crate::platform::journalled::holder_in;

/// Somebody else may hold up whoever waits, any user of this host among them; not for long.
const PATIENCE: Duration = Duration::from_secs(5);
/// Between two attempts.
const LOOK: Duration = Duration::from_millis(5);

/// The turn of this process to change the network namespace. It ends with this value, and with the process.
#[derive(Debug)]
pub struct Turn(Option<Flock<File>>);

impl Turn {
    /// Waits for other runs that make changes in the network namespace of the calling thread just now. Where one takes very
    /// long, or nobody can tell, it goes on without; at once where there is a [`Hurry`].
    #[must_use]
    pub fn wait() -> Self {
        Self::within(PATIENCE)
    }

    /// Has it if nobody else does just now.
    #[must_use]
    pub fn at_once() -> Self {
        Self::within(Duration::ZERO)
    }

    fn within(patience: Duration) -> Self {
        // The lock is on the namespace itself: it needs no place in the file system, and whoever is not in it cannot have it.
        let Ok(mut file) = File::open("/proc/thread-self/ns/net") else { return Self(None) };
        let end = Instant::now() + patience;
        let mut told = false;
        loop {
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(lock) => return Self(Some(lock)),
                Err((again, nix::errno::Errno::EWOULDBLOCK)) if Instant::now() < end && !Hurry::is_there() => {
                    if !std::mem::replace(&mut told, true) {
                        tracing::info!("another run changes this host just now: waiting for it");
                    }
                    file = again;
                    std::thread::sleep(LOOK);
                }
                Err((file, nix::errno::Errno::EWOULDBLOCK)) => {
                    if !patience.is_zero() && !Hurry::is_there() {
                        tracing::warn!(
                            "{} has the lock for changes of this host and does not come to its end: nobody waits for it \
                             any longer. Two runs that change the host at the same moment may take each other's numbers",
                            who_holds(&file)
                        );
                    }
                    return Self(None);
                }
                Err((_, error)) => {
                    tracing::warn!("nobody can tell whether another run changes this host at the same time: {error}");
                    return Self(None);
                }
            }
        }
    }

    /// Whether nobody else has it.
    #[must_use]
    pub fn is_ours(&self) -> bool {
        self.0.is_some()
    }
}

/// Who has the lock on `file`, as far as it is to be seen from here: "process 4711 (flock)".
fn who_holds(file: &File) -> String {
    let holder = || {
        let seen = file.metadata().ok()?;
        let pid = holder_in(&fs::read_to_string("/proc/locks").ok()?, (seen.dev(), seen.ino()), None)?;
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
        Some(format!("process {pid} ({})", name.trim_end()))
    };
    holder().unwrap_or_else(|| "another process".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_comes_second_waits_for_the_end_of_the_first() {
        let (told, heard) = std::sync::mpsc::channel();
        let first = Turn::wait();
        assert!(first.is_ours());
        let second = std::thread::spawn(move || {
            let turn = Turn::wait();
            told.send(turn.is_ours()).unwrap();
        });
        assert!(heard.recv_timeout(Duration::from_millis(50)).is_err(), "it waits");
        drop(first);
        assert!(heard.recv().unwrap());
        second.join().unwrap();
    }
}
