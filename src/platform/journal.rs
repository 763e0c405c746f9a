//! The journal: how to undo each change, on disk before the change is made.
//!
//! A text file, one record a line, each with a checksum and that of the line before it. The first line names the format,
//! the boot and the network namespace; what lived in a kernel that has since been rebooted needs no undoing.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::Flock;
use serde::{Deserialize, Serialize};

use super::undo::Undo;
pub use error::{JournalError, SUSPENDED, let_go_on};
pub use file::person_of;
use format::End;
pub use lock::lost_by;
pub use reading::Rehearsal;
pub(super) use reading::{Leftovers, Origin};

#[cfg(test)]
mod bad_input_tests;
mod error;
mod file;
mod format;
mod kept;
mod lock;
mod reading;

/// So many lines more than are needed are too many.
const LONG: usize = 1024;
/// The kernel and the network namespace that changes were made in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Place {
    boot: String,
    namespace: u64,
}

impl Place {
    fn here() -> Self {
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned();
        // Of the calling thread, as a netlink socket that it opens.
        let namespace = fs::metadata("/proc/thread-self/ns/net").map_or(0, |ns| ns.ino());
        Self { boot, namespace }
    }
}

/// One line of the journal.
#[derive(Debug, Serialize, Deserialize)]
enum Record {
    /// How to undo what is about to be done.
    Undo { id: u64, undo: Undo },
    /// The change of that number was never made, or is undone.
    Void { id: u64 },
}

/// The journal of one run. While it lives nobody else can have the same state directory.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: Option<File>,
    /// Where the file goes on.
    end: End,
    next: u64,
    /// Changes of this run are in it.
    recorded: bool,
    /// Lines in the file, as far as this run wrote them.
    lines: usize,
    /// The file has its name, but the directory is not known to be on the disk with it.
    renamed: bool,
    /// How a directory gets to the disk.
    sync: fn(&Path) -> io::Result<()>,
    pub(super) leftovers: Leftovers,
    /// The last is the one at its place: those before it are locks of a directory that somebody has taken away.
    locks: Vec<Flock<File>>,
}

impl Journal {
    /// Opens the journal in `state_dir`, which is made (mode 0700) if it is missing, and takes its lock.
    ///
    /// # Errors
    /// [`JournalError`]: another run has it, a newer version wrote it, or the file system refuses.
    pub fn open(state_dir: &Path) -> Result<Self, JournalError> {
        let io = |act, path: &Path| {
            let path = path.to_owned();
            move |source| JournalError::Io { act, path, source }
        };
        lock::await_return(state_dir)?;
        lock::make_directory(state_dir).map_err(io("create", state_dir))?;
        let locks = vec![lock::take(state_dir)?];
        let path = state_dir.join("journal");
        let bytes = file::load(&path)?;
        let leftovers = reading::read(&path, &bytes, &Place::here())?;
        let next = leftovers.undos.iter().map(|(id, _)| id + 1).max().unwrap_or(0);
        // What names no change is not gone on with: it may be of another boot.
        let end = if leftovers.undos.is_empty() { End::default() } else { leftovers.end.clone() };
        let sync = |directory: &Path| File::open(directory)?.sync_all();
        let (file, recorded, lines, renamed) = (None, false, 0, false);
        Ok(Self { path, file, end, next, recorded, lines, renamed, sync, leftovers, locks })
    }

    /// Why others can interfere with what is in `state_dir`, and what to do about it.
    #[must_use]
    pub fn open_to_others(state_dir: &Path) -> Option<(String, String)> {
        file::open_to_others(state_dir)
    }

    /// What is journalled in `state_dir`, read without the lock: of a run that goes on, too. Changes nothing.
    pub(super) fn peek(state_dir: &Path) -> Result<Leftovers, JournalError> {
        let path = state_dir.join("journal");
        reading::read(&path, &file::load(&path)?, &Place::here())
    }

    /// Where the journal is.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether nothing of an earlier run waits to be undone.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.leftovers.undos.is_empty()
    }

    /// Writes how to undo what comes next, and returns once it is on the disk.
    pub(super) fn record<'a>(&mut self, undos: impl IntoIterator<Item = &'a Undo>) -> Result<Vec<u64>, JournalError> {
        let first = self.next;
        // Set before, so that a failed write does not let a clean-up take the file for its own.
        self.recorded = true;
        let records: Vec<Record> =
            (first..).zip(undos).map(|(id, undo)| Record::Undo { id, undo: undo.clone() }).collect();
        self.next += records.len() as u64;
        self.append(&records)?;
        Ok((first..self.next).collect())
    }

    /// Takes back the records of changes that are undone, or that were never made.
    pub(super) fn void(&mut self, ids: &[u64]) -> Result<(), JournalError> {
        let records: Vec<Record> = ids.iter().map(|id| Record::Void { id: *id }).collect();
        self.append(&records)
    }

    /// Takes leftovers back that are undone, and the file where nothing else is in it.
    pub(super) fn forget(&mut self, ids: &[u64]) -> Result<(), JournalError> {
        if self.is_clean() && !self.recorded { self.clear() } else { self.void(ids) }
    }

    /// Writes the journal anew with nothing but `live` in it, whole or not at all, if it has grown far beyond that: a host
    /// that changes for months must not fill the disk.
    pub(super) fn compact<'a>(
        &mut self,
        live: impl Iterator<Item = (u64, &'a Undo)> + Clone,
    ) -> Result<(), JournalError> {
        // What an earlier run left is not among the live.
        if !self.is_clean() || self.lines < LONG + 4 * live.clone().count() {
            return Ok(());
        }
        // In the order in which they were recorded, which is that of their numbers.
        let live: BTreeMap<u64, &Undo> = live.collect();
        let records: Vec<Record> = live.into_iter().map(|(id, undo)| Record::Undo { id, undo: undo.clone() }).collect();
        let created = self.create(&records);
        if self.renamed || created.is_ok() {
            self.lines = records.len();
        }
        created.map_err(|source| self.failed("write", source))
    }

    /// Forgets everything: all of it is undone.
    pub(super) fn clear(&mut self) -> Result<(), JournalError> {
        self.file = None;
        self.lines = 0;
        self.leftovers = Leftovers::default();
        (self.recorded, self.renamed, self.end) = (false, false, End::default());
        // Of a directory that somebody has deleted nothing can come back.
        let unless_gone = |done: io::Result<()>| match done {
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(()),
            other => other,
        };
        let removed = unless_gone(fs::remove_file(&self.path));
        let synced = removed.and_then(|()| unless_gone(self.sync_directory()));
        synced.map_err(|source| self.failed("remove", source))
    }

    fn append(&mut self, records: &[Record]) -> Result<(), JournalError> {
        if records.is_empty() {
            return Ok(());
        }
        self.write(records).map_err(|source| self.failed("write", source))?;
        self.lines += records.len();
        Ok(())
    }

    /// Writes `records` behind the last whole line. What a failed write leaves there is cut off by the next.
    fn write(&mut self, records: &[Record]) -> io::Result<()> {
        // After a power loss another file would have the name, without these records.
        self.sync_name()?;
        if self.file.is_none() && self.end.whole == 0 {
            self.create(&[])?;
        }
        let mut file = match self.file.take() {
            Some(file) => file,
            None => {
                let mut file =
                    OpenOptions::new().read(true).write(true).custom_flags(libc::O_NOFOLLOW).open(&self.path)?;
                // A torn last line stands for nothing, and must not swallow what comes after it.
                file.set_len(self.end.whole)?;
                file.seek(SeekFrom::End(0))?;
                file
            }
        };
        let mut end = self.end.clone();
        file.write_all(end.add(records).as_bytes())?;
        file.sync_data()?;
        (self.file, self.end) = (Some(file), end);
        Ok(())
    }

    /// Makes the file with its first line and `records`, whole or not at all, and goes on with it. Once it has its name there
    /// is no other: where only the directory does not get to the disk, the next to write tries that again first.
    fn create(&mut self, records: &[Record]) -> io::Result<()> {
        let (mut text, mut end) = End::first(&Place::here())?;
        text.push_str(&end.add(records));
        self.put(text.as_bytes(), end)
    }

    /// Makes the file of `bytes`, which end there, as [`Journal::create`] does.
    fn put(&mut self, bytes: &[u8], end: End) -> io::Result<()> {
        let new = self.path.with_extension("new");
        let mut options = OpenOptions::new();
        // Never one that somebody has put there, who could go on writing to it.
        options.read(true).write(true).create_new(true).mode(0o600);
        match fs::remove_file(&new) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = options.open(&new)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&new, &self.path)?;
        (self.file, self.end, self.renamed) = (Some(file), end, true);
        self.sync_name()
    }

    /// Sees to it that the file has its name after a power loss, too.
    fn sync_name(&mut self) -> io::Result<()> {
        if self.renamed {
            self.sync_directory()?;
            self.renamed = false;
        }
        Ok(())
    }

    fn sync_directory(&self) -> io::Result<()> {
        self.path.parent().map_or(Ok(()), self.sync)
    }

    fn failed(&self, act: &'static str, source: io::Error) -> JournalError {
        JournalError::Io { act, path: self.path.clone(), source }
    }
}

#[cfg(test)]
mod tests;
