//! The journal: how to undo each change, on disk before the change is made.
//!
//! A text file, one record a line, each with a checksum. The first line names the format, the boot and the network
//! namespace; what lived in a kernel that has since been rebooted needs no undoing.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use super::undo::Undo;
pub use reading::Rehearsal;
pub(super) use reading::{Leftovers, Origin};

#[cfg(test)]
mod bad_input_tests;
mod file;
mod reading;

/// The version that this program writes, and the only one that it reads.
const VERSION: u32 = 1;
const MAGIC: &str = "tunproxy-journal";
/// What to do about a journal that cannot be used.
const REMEDY: &str = "Undo by hand what it stood for (`ip rule` and `ip -6 rule` show our rules as `proto kernel`, \
                      from priority 9000 on), or reboot; look at /etc/resolv.conf; then delete the file";

/// Why the journal cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// Somebody else has the state directory.
    #[error("another run (process {pid}) uses {}; stop it, or give this one its own --state-dir", dir.display())]
    Locked {
        /// The state directory.
        dir: PathBuf,
        /// The process that holds it, as far as it says.
        pid: String,
    },
    /// A newer program wrote it.
    #[error(
        "{} is of version {found}, this program knows version {VERSION}: run `cleanup` with the version that wrote it, \
         or reboot and delete the file", path.display()
    )]
    Version {
        /// The journal.
        path: PathBuf,
        /// Its version.
        found: String,
    },
    /// It does not begin as a journal does.
    #[error(
        "{} is no journal of tunproxy, or its first line is damaged; nothing was undone. Is this the right state \
         directory? {REMEDY}", path.display()
    )]
    Foreign {
        /// The journal.
        path: PathBuf,
    },
    /// A line was changed after it had been written. What it stood for is not known, so nothing is undone.
    #[error(
        "line {line} of {} {why}: somebody edited it, or the disk damaged it. Nothing was undone. {REMEDY}",
        path.display()
    )]
    Damaged {
        /// The journal.
        path: PathBuf,
        /// The line, counted from 1.
        line: usize,
        /// What is wrong with it.
        why: &'static str,
    },
    /// It is nothing that a run of ours writes, or others may have written it.
    #[error("{} {why}; nothing was undone. Put it aside, or name another --state-dir", path.display())]
    Untrusted {
        /// The journal.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The file system refuses.
    #[error("{act} {}: {source}{}", path.display(), file::advice(path, source))]
    Io {
        /// What was tried.
        act: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
}

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
    next: u64,
    pub(super) leftovers: Leftovers,
    _lock: Flock<File>,
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
        fs::DirBuilder::new().recursive(true).mode(0o700).create(state_dir).map_err(io("create", state_dir))?;
        let lock = lock(state_dir)?;
        let path = state_dir.join("journal");
        let bytes = file::load(&path)?;
        let leftovers = reading::read(&path, &bytes, &Place::here())?;
        let next = leftovers.undos.iter().map(|(id, _)| id + 1).max().unwrap_or(0);
        Ok(Self { path, file: None, next, leftovers, _lock: lock })
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
        let mut lines = String::new();
        for undo in undos {
            lines.push_str(&line(&Record::Undo { id: self.next, undo: undo.clone() }));
            self.next += 1;
        }
        self.append(&lines)?;
        Ok((first..self.next).collect())
    }

    /// Takes back the records of changes that are undone, or that were never made.
    pub(super) fn void(&mut self, ids: &[u64]) -> Result<(), JournalError> {
        let lines: String = ids.iter().map(|id| line(&Record::Void { id: *id })).collect();
        self.append(&lines)
    }

    /// Forgets everything: all of it is undone.
    pub(super) fn clear(&mut self) -> Result<(), JournalError> {
        self.file = None;
        self.leftovers = Leftovers::default();
        let removed = match fs::remove_file(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        };
        removed.and_then(|()| self.sync_directory()).map_err(|source| self.failed("remove", source))
    }

    fn append(&mut self, lines: &str) -> Result<(), JournalError> {
        if lines.is_empty() {
            return Ok(());
        }
        let file = match self.file.take() {
            Some(file) => Ok(file),
            None if self.is_clean() => self.create(),
            None => {
                OpenOptions::new().write(true).custom_flags(libc::O_NOFOLLOW).open(&self.path).and_then(|mut file| {
                    // A torn last line stands for nothing, and must not swallow what comes after it.
                    file.set_len(self.leftovers.whole)?;
                    file.seek(SeekFrom::End(0))?;
                    file.write_all(b"\n")?;
                    Ok(file)
                })
            }
        };
        let written = file.and_then(|mut file| {
            file.write_all(lines.as_bytes())?;
            file.sync_data()?;
            Ok(file)
        });
        self.file = Some(written.map_err(|source| self.failed("write", source))?);
        Ok(())
    }

    /// Makes the file with its first line, whole or not at all.
    fn create(&self) -> io::Result<File> {
        let new = self.path.with_extension("new");
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(true).mode(0o600).custom_flags(libc::O_NOFOLLOW);
        let mut file = options.open(&new)?;
        let place = serde_json::to_string(&Place::here()).map_err(io::Error::other)?;
        writeln!(file, "{MAGIC} {VERSION} {place}")?;
        file.sync_all()?;
        fs::rename(&new, &self.path)?;
        self.sync_directory()?;
        Ok(file)
    }

    fn sync_directory(&self) -> io::Result<()> {
        self.path.parent().map_or(Ok(()), |dir| File::open(dir)?.sync_all())
    }

    fn failed(&self, act: &'static str, source: io::Error) -> JournalError {
        JournalError::Io { act, path: self.path.clone(), source }
    }
}

/// Takes the state directory for this process, for as long as the file lives.
fn lock(state_dir: &Path) -> Result<Flock<File>, JournalError> {
    let path = state_dir.join("lock");
    let io = |act| {
        let path = path.clone();
        move |source| JournalError::Io { act, path, source }
    };
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600).custom_flags(libc::O_NOFOLLOW);
    let file = options.open(&path).map_err(io("open"))?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => {
            let note = lock.set_len(0).and_then(|()| (&*lock).write_all(std::process::id().to_string().as_bytes()));
            note.map_err(io("write"))?;
            Ok(lock)
        }
        Err((_, nix::errno::Errno::EWOULDBLOCK)) => {
            let pid = fs::read_to_string(&path).unwrap_or_default();
            Err(JournalError::Locked { dir: state_dir.to_owned(), pid })
        }
        Err((_, errno)) => Err(io("lock")(errno.into())),
    }
}

/// A record with its checksum in front and a line break behind.
fn line(record: &Record) -> String {
    // These types have nothing that JSON cannot say; a line without a record would be skipped as torn.
    let json = serde_json::to_string(record).unwrap_or_default();
    format!("{:016x} {json}\n", checksum(json.as_bytes()))
}

/// FNV-1a, 64 bits: enough to tell a torn line from a whole one.
fn checksum(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::routing::{Family, Rule, RuleAction};
    use proptest::prelude::*;

    fn undo(priority: u32) -> Undo {
        Undo::Rule(Rule::new(Family::V4, priority, RuleAction::Nop))
    }

    fn written(undos: u32) -> (tempfile::TempDir, Vec<u8>) {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = Journal::open(dir.path()).unwrap();
        journal.record(&(0..undos).map(undo).collect::<Vec<_>>()).unwrap();
        let bytes = fs::read(dir.path().join("journal")).unwrap();
        (dir, bytes)
    }

    #[test]
    fn what_is_recorded_is_there_after_a_crash() {
        let (dir, _) = written(3);
        let journal = Journal::open(dir.path()).unwrap();
        assert!(!journal.is_clean() && journal.leftovers.origin == Origin::Here);
        assert_eq!(journal.leftovers.undos, (0..3).map(|n| (u64::from(n), undo(n))).collect::<Vec<_>>());
    }

    #[test]
    fn a_voided_record_and_a_cleared_journal_leave_nothing() {
        let (dir, _) = written(3);
        let mut journal = Journal::open(dir.path()).unwrap();
        journal.void(&[0, 2]).unwrap();
        drop(journal);
        let mut journal = Journal::open(dir.path()).unwrap();
        assert_eq!(journal.leftovers.undos, [(1, undo(1))]);
        journal.clear().unwrap();
        drop(journal);
        assert!(Journal::open(dir.path()).unwrap().is_clean());
        assert!(!dir.path().join("journal").exists());
    }

    #[test]
    fn a_state_directory_serves_one_run_at_a_time() {
        let (dir, _) = written(1);
        let first = Journal::open(dir.path()).unwrap();
        let Err(JournalError::Locked { pid, .. }) = Journal::open(dir.path()) else { panic!("not locked") };
        assert_eq!(pid, std::process::id().to_string());
        drop(first);
        Journal::open(dir.path()).unwrap();
    }

    #[test]
    fn a_journal_of_an_unknown_version_is_refused_with_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("journal"), "tunproxy-journal 2 {}\n").unwrap();
        let error = Journal::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains("version 2") && error.contains("reboot"), "{error}");
    }

    #[test]
    fn what_another_boot_left_is_known_as_such() {
        let (dir, bytes) = written(1);
        let text = String::from_utf8(bytes).unwrap().replacen("\"boot\":\"", "\"boot\":\"x", 1);
        fs::write(dir.path().join("journal"), text).unwrap();
        assert_eq!(Journal::open(dir.path()).unwrap().leftovers.origin, Origin::Gone);
    }

    #[test]
    fn what_another_network_namespace_of_this_boot_holds_is_not_taken_for_dead() {
        let (dir, bytes) = written(1);
        let text = String::from_utf8(bytes).unwrap();
        let path = dir.path().join("journal");
        fs::write(&path, text.replacen("\"namespace\":", "\"namespace\":9", 1)).unwrap();
        let origin = Journal::open(dir.path()).unwrap().leftovers.origin;
        assert!(matches!(origin, Origin::Elsewhere(Some(_))), "{origin:?}");
        let (_, records) = text.split_once('\n').unwrap();
        fs::write(&path, format!("{MAGIC} {VERSION} garbled\n{records}")).unwrap();
        assert_eq!(Journal::open(dir.path()).unwrap().leftovers.origin, Origin::Elsewhere(None));
    }

    #[test]
    fn records_after_a_torn_line_are_read() {
        let (dir, bytes) = written(2);
        fs::write(dir.path().join("journal"), &bytes[..bytes.len() - 5]).unwrap();
        let mut journal = Journal::open(dir.path()).unwrap();
        journal.record([&undo(7)]).unwrap();
        drop(journal);
        let journal = Journal::open(dir.path()).unwrap();
        assert_eq!(journal.leftovers.undos, [(0, undo(0)), (1, undo(7))]);
        assert_eq!(journal.leftovers.unreadable, 0, "the torn line has made room");
    }

    proptest! {
        #[test]
        fn a_journal_torn_anywhere_gives_a_prefix_of_what_was_written(cut in 0usize..2000) {
            let (dir, bytes) = written(5);
            let header = bytes.iter().position(|byte| *byte == b'\n').unwrap();
            // The first line is written whole or not at all.
            let cut = cut.clamp(header + 1, bytes.len());
            fs::write(dir.path().join("journal"), &bytes[..cut]).unwrap();
            let leftovers = Journal::open(dir.path()).unwrap().leftovers;
            for (n, (id, found)) in (0u32..).zip(&leftovers.undos) {
                prop_assert_eq!((*id, found), (u64::from(n), &undo(n)));
            }
            prop_assert!(leftovers.unreadable <= 1);
        }
    }
}
