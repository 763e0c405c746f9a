//! What becomes of a directory that must not go.

use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::path::Path;

use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Hears when something comes to or goes from a directory, or that itself goes.
pub struct DirectoryWatch(AsyncFd<Ears>);

struct Ears(Inotify);

impl AsRawFd for Ears {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

impl DirectoryWatch {
    /// Begins to listen to `directory`, or where that is not there, or closed to us, to the nearest above it that is.
    ///
    /// # Errors
    /// Those of inotify(7): the user's limit, for instance.
    pub fn open(directory: &Path) -> io::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
        let what = AddWatchFlags::IN_DELETE
            | AddWatchFlags::IN_MOVE
            | AddWatchFlags::IN_CREATE
            | AddWatchFlags::IN_ATTRIB
            | AddWatchFlags::IN_DELETE_SELF
            | AddWatchFlags::IN_MOVE_SELF
            | AddWatchFlags::IN_ONLYDIR;
        for directory in directory.ancestors() {
            match inotify.add_watch(directory, what) {
                Ok(_) => break,
                Err(Errno::ENOENT | Errno::ENOTDIR | Errno::EACCES) => {}
                Err(error) => return Err(error.into()),
            }
        }
        // SAFETY: the descriptor is the inotify's, which moves into the AsyncFd and never leaves it, so it stays open and
        // the same for as long as that lives.
        let ears = unsafe { AsyncFd::register_with_interest(Ears(inotify), Interest::READABLE) }?;
        Ok(Self(ears))
    }

    /// Returns when something has happened.
    ///
    /// # Errors
    /// The runtime is going down.
    pub async fn changed(&self) -> io::Result<()> {
        self.0.readable().await.map(drop)
    }
}
