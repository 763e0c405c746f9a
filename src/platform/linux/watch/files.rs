//! The files that say whom programs ask for names.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor};

use crate::platform::linux::resolv_conf;

/// systemd-resolved writes it whenever it comes to run.
const STUB: &str = "/run/systemd/resolve/stub-resolv.conf";
/// Links to links end somewhere.
const MOST_LINKS: usize = 8;

/// /etc/resolv.conf, what it leads to, and the file of systemd-resolved's stub.
pub(super) struct Files {
    inotify: Inotify,
    /// Names by watched directory. A watched file has none: whatever happens to it matters.
    names: BTreeMap<WatchDescriptor, Vec<OsString>>,
}

impl Files {
    /// Begins to listen; to `behind` too, from the start.
    ///
    /// # Errors
    /// Those of inotify(7): the user's limit, for instance.
    pub(super) fn watch(behind: Option<&Path>) -> io::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
        let mut files = Self { inotify, names: BTreeMap::new() };
        files.follow()?;
        behind.map_or(Ok(()), |path| files.over(&way(path)))?;
        Ok(files)
    }

    /// Whether anything has happened to the files since the last call.
    ///
    /// # Errors
    /// Those of read(2), and of [`Files::watch`].
    pub(super) fn changed(&mut self) -> io::Result<bool> {
        let mut changed = false;
        loop {
            let events = match self.inotify.read_events() {
                Ok(events) => events,
                Err(nix::errno::Errno::EAGAIN) => break,
                Err(nix::errno::Errno::EINTR) => continue,
                Err(error) => return Err(error.into()),
            };
            for event in events {
                let lost = event.mask.intersects(AddWatchFlags::IN_Q_OVERFLOW | AddWatchFlags::IN_IGNORED);
                let known = self.names.get(&event.wd);
                let meant = |names: &Vec<OsString>| event.name.as_ref().is_none_or(|name| names.contains(name));
                changed |= lost || known.is_some_and(meant);
            }
        }
        if changed {
            self.follow()?;
        }
        Ok(changed)
    }

    /// Listens to all that the path leads over now. What it led over before is listened to still: it may again.
    fn follow(&mut self) -> io::Result<()> {
        let mut paths = way(Path::new(resolv_conf::PATH));
        paths.push(STUB.into());
        self.over(&paths)?;
        // A file that is a mount of its own lies, for its directory's listeners, elsewhere.
        self.add(Path::new(resolv_conf::PATH), AddWatchFlags::IN_CLOSE_WRITE, None)
    }

    fn over(&mut self, paths: &[PathBuf]) -> io::Result<()> {
        let directory = AddWatchFlags::IN_CLOSE_WRITE
            | AddWatchFlags::IN_CREATE
            | AddWatchFlags::IN_DELETE
            | AddWatchFlags::IN_MOVED_FROM
            | AddWatchFlags::IN_MOVED_TO
            | AddWatchFlags::IN_ONLYDIR;
        for path in paths {
            let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { continue };
            self.add(parent, directory, Some(name))?;
        }
        Ok(())
    }

    /// What is not there cannot be listened to.
    fn add(&mut self, path: &Path, what: AddWatchFlags, name: Option<&OsStr>) -> io::Result<()> {
        use nix::errno::Errno;
        match self.inotify.add_watch(path, what) {
            Ok(descriptor) => {
                let names = self.names.entry(descriptor).or_default();
                names.extend(name.filter(|name| !names.iter().any(|known| known == name)).map(OsStr::to_owned));
                Ok(())
            }
            Err(Errno::ENOENT | Errno::ENOTDIR | Errno::EACCES | Errno::ELOOP) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

impl AsFd for Files {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inotify.as_fd()
    }
}

/// A path and, where it is a link, all that it leads over.
fn way(path: &Path) -> Vec<PathBuf> {
    let mut way = vec![path.to_owned()];
    while let Some(last) = way.last()
        && way.len() < MOST_LINKS
        && let Ok(target) = fs::read_link(last)
    {
        let next = last.parent().unwrap_or(Path::new("/")).join(target);
        way.push(next);
    }
    way
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn a_way_over_links_names_each_station_and_ends() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        symlink("two", at("one")).unwrap();
        symlink(at("three"), at("two")).unwrap();
        assert_eq!(way(&at("one")), [at("one"), at("two"), at("three")]);
        symlink("loop", at("loop")).unwrap();
        assert_eq!(way(&at("loop")).len(), MOST_LINKS);
    }
}
