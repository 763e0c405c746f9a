//! The journal: how to undo each change, on disk before the change is made.
//!
//! A text file, one record a line, each with a checksum. The first line names the format, the boot and the network
//! namespace; what lived in a kernel that has since been rebooted needs no undoing.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use super::undo::Undo;

/// The version that this program writes, and the only one that it reads.
const VERSION: u32 = 1;
const MAGIC: &str = "tunproxy-journal";

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
    /// The file system refuses.
    #[error("{act} {}: {source}", path.display())]
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

/// Where the changes of an earlier run were made, as seen from here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Origin {
    /// In this kernel and this network namespace.
    #[default]
    Here,
    /// In this kernel, but in another network namespace, which may still be there. Its inode, if it can be read.
    Elsewhere(Option<u64>),
    /// In a kernel that has been rebooted since, or in a namespace that somebody says is gone.
    Gone,
}

impl Origin {
    fn of(place: Option<&Place>) -> Self {
        let here = Place::here();
        match place {
            Some(place) if *place == here => Self::Here,
            Some(place) if place.boot != here.boot => Self::Gone,
            Some(place) => Self::Elsewhere(Some(place.namespace)),
            // Nobody knows: the careful answer.
            None => Self::Elsewhere(None),
        }
    }
}

/// Changes of a run that has ended without undoing them.
#[derive(Debug, Default)]
pub(super) struct Leftovers {
    /// In the order in which they were recorded.
    pub(super) undos: Vec<(u64, Undo)>,
    /// Where they were made.
    pub(super) origin: Origin,
    /// Lines that could not be read.
    pub(super) unreadable: usize,
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
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(io("read", &path)(error)),
        };
        let leftovers = read(&path, &bytes)?;
        let next = leftovers.undos.iter().map(|(id, _)| id + 1).max().unwrap_or(0);
        Ok(Self { path, file: None, next, leftovers, _lock: lock })
    }

    /// What is journalled in `state_dir`, read without the lock: of a run that goes on, too. Changes nothing.
    pub(super) fn peek(state_dir: &Path) -> Result<Leftovers, JournalError> {
        let path = state_dir.join("journal");
        match fs::read(&path) {
            Ok(bytes) => read(&path, &bytes),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Leftovers::default()),
            Err(source) => Err(JournalError::Io { act: "read", path, source }),
        }
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
            None => OpenOptions::new().append(true).open(&self.path).and_then(|mut file| {
                // A torn last line must not swallow what comes after it.
                file.write_all(b"\n")?;
                Ok(file)
            }),
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
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
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
    let options = || OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(&path);
    let file = options().map_err(io("open"))?;
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

/// Reads a journal. A line that was torn, or whose bytes rotted, is counted and left out.
fn read(path: &Path, bytes: &[u8]) -> Result<Leftovers, JournalError> {
    let text = String::from_utf8_lossy(bytes);
    let mut lines = text.lines();
    let Some(header) = lines.next() else {
        return Ok(Leftovers::default());
    };
    let mut words = header.splitn(3, ' ');
    let (magic, version) = (words.next(), words.next().unwrap_or_default());
    if magic != Some(MAGIC) || version != VERSION.to_string() {
        return Err(JournalError::Version { path: path.to_owned(), found: version.to_owned() });
    }
    let place: Option<Place> = words.next().and_then(|place| serde_json::from_str(place).ok());
    let mut leftovers = Leftovers { origin: Origin::of(place.as_ref()), ..Leftovers::default() };
    for line in lines.filter(|line| !line.is_empty()) {
        match parse(line) {
            Some(Record::Undo { id, undo }) => leftovers.undos.push((id, undo)),
            Some(Record::Void { id }) => leftovers.undos.retain(|(other, _)| *other != id),
            None => leftovers.unreadable += 1,
        }
    }
    Ok(leftovers)
}

/// A record with its checksum in front and a line break behind.
fn line(record: &Record) -> String {
    // These types have nothing that JSON cannot say; a line without a record would be skipped as torn.
    let json = serde_json::to_string(record).unwrap_or_default();
    format!("{:016x} {json}\n", checksum(json.as_bytes()))
}

fn parse(line: &str) -> Option<Record> {
    let (sum, json) = line.split_once(' ')?;
    let sum = u64::from_str_radix(sum, 16).ok()?;
    (sum == checksum(json.as_bytes())).then(|| serde_json::from_str(json).ok()).flatten()
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
        assert_eq!(journal.leftovers.unreadable, 1);
    }

    proptest! {
        #[test]
        fn a_journal_torn_anywhere_gives_a_prefix_of_what_was_written(cut in 0usize..2000) {
            let (dir, bytes) = written(5);
            let header = bytes.iter().position(|byte| *byte == b'\n').unwrap();
            let cut = cut.clamp(header, bytes.len());
            fs::write(dir.path().join("journal"), &bytes[..cut]).unwrap();
            let leftovers = Journal::open(dir.path()).unwrap().leftovers;
            for (n, (id, found)) in (0u32..).zip(&leftovers.undos) {
                prop_assert_eq!((*id, found), (u64::from(n), &undo(n)));
            }
            prop_assert!(leftovers.unreadable <= 1);
        }

        #[test]
        fn no_bytes_make_the_reader_panic(bytes: Vec<u8>) {
            let mut text = b"tunproxy-journal 1 {}\n".to_vec();
            text.extend(bytes);
            let _ = read(Path::new("journal"), &text);
        }
    }
}
