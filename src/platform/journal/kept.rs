//! A state directory that somebody deletes while we run: it comes back, so that a crash after that can be cleaned up.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use super::{Journal, JournalError, Record, lock};

impl Journal {
    /// Puts back what of lock and journal is not in the state directory any more, and the directory. True: something was
    /// missing.
    ///
    /// # Errors
    /// [`JournalError`]: another run has begun to use the directory, or the file system refuses.
    pub fn put_back(&mut self) -> Result<bool, JournalError> {
        let (has_lock, has_file) = (self.has_lock(), self.has_file());
        let Some(dir) = self.path.parent().filter(|_| !(has_lock && has_file)).map(Path::to_owned) else {
            return Ok(false);
        };
        if !has_lock {
            let failed = |source| JournalError::Io { act: "create", path: dir.clone(), source };
            lock::make_directory(&dir).map_err(failed)?;
            self.locks.push(lock::take(&dir)?);
        }
        if !has_file {
            self.put_file_back().map_err(|source| self.failed("write", source))?;
        }
        Ok(true)
    }

    fn has_lock(&self) -> bool {
        self.locks.last().is_some_and(|lock| is_at(&self.path.with_file_name("lock"), lock))
    }

    /// Whether the file is there, if there ought to be one.
    fn has_file(&self) -> bool {
        match &self.file {
            Some(file) => is_at(&self.path, file),
            None => self.is_clean() || self.path.exists(),
        }
    }

    /// What was written is still there to be read, as long as the file is open.
    fn put_file_back(&mut self) -> io::Result<()> {
        match &self.file {
            Some(file) => {
                let length = usize::try_from(self.end.whole).map_err(io::Error::other)?;
                let mut bytes = vec![0; length];
                file.read_exact_at(&mut bytes, 0)?;
                self.put(&bytes, self.end.clone())
            }
            None => {
                let undos = self.leftovers.undos.iter();
                let records: Vec<Record> =
                    undos.map(|(id, undo)| Record::Undo { id: *id, undo: undo.clone() }).collect();
                self.create(&records)
            }
        }
    }
}

/// Whether `path` names the open `file`. Some file systems tell another device by a name than by a descriptor.
fn is_at(path: &Path, file: &File) -> bool {
    let inode = |found: io::Result<fs::Metadata>| found.ok().map(|found| found.ino());
    let named = inode(fs::symlink_metadata(path));
    named.is_some() && named == inode(file.metadata())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::routing::{Family, Rule, RuleAction};
    use crate::platform::undo::Undo;

    fn undo(priority: u32) -> Undo {
        Undo::Rule(Rule::new(Family::V4, priority, RuleAction::Nop))
    }

    #[test]
    fn what_was_recorded_is_back_after_the_directory_was_deleted_and_goes_on() {
        let base = tempfile::tempdir().unwrap();
        let dir = base.path().join("state");
        let mut journal = Journal::open(&dir).unwrap();
        assert!(!journal.put_back().unwrap(), "nothing is missing");
        let ids = journal.record([&undo(1), &undo(2)]).unwrap();
        journal.void(&ids[..1]).unwrap();
        let ways: [&dyn Fn(); 4] = [
            &|| fs::remove_dir_all(&dir).unwrap(),
            &|| fs::remove_file(dir.join("journal")).unwrap(),
            &|| fs::remove_file(dir.join("lock")).unwrap(),
            &|| fs::rename(&dir, base.path().join("elsewhere")).unwrap(),
        ];
        for (round, lose) in (10..).zip(ways) {
            lose();
            // As long as nobody has noticed it goes into a file without a name.
            journal.record([&undo(round)]).unwrap();
            assert!(journal.put_back().unwrap());
            assert!(!journal.put_back().unwrap());
            journal.record([&undo(round + 10)]).unwrap();
            assert!(matches!(Journal::open(&dir), Err(JournalError::Locked { .. })), "somebody has it");
        }
        drop(journal);
        let undos = Journal::open(&dir).unwrap().leftovers.undos;
        let priorities = [2, 10, 20, 11, 21, 12, 22, 13, 23];
        assert_eq!(undos.into_iter().map(|(_, undo)| undo).collect::<Vec<_>>(), priorities.map(undo));
    }

    #[test]
    fn a_directory_that_another_run_has_taken_meanwhile_is_left_to_it() {
        let base = tempfile::tempdir().unwrap();
        let dir = base.path().join("state");
        let mut journal = Journal::open(&dir).unwrap();
        journal.record([&undo(1)]).unwrap();
        fs::remove_dir_all(&dir).unwrap();
        let other = Journal::open(&dir).unwrap();
        assert!(matches!(journal.put_back(), Err(JournalError::Locked { .. })));
        drop(other);
        assert!(journal.put_back().unwrap());
    }

    #[test]
    fn what_is_left_of_an_earlier_run_is_put_back_too() {
        let base = tempfile::tempdir().unwrap();
        let dir = base.path().join("state");
        Journal::open(&dir).unwrap().record([&undo(1)]).unwrap();
        let mut journal = Journal::open(&dir).unwrap();
        fs::remove_dir_all(&dir).unwrap();
        assert!(journal.put_back().unwrap());
        drop(journal);
        assert_eq!(Journal::open(&dir).unwrap().leftovers.undos.len(), 1);
    }

    #[test]
    fn the_end_of_a_run_whose_directory_is_gone_is_no_failure() {
        let base = tempfile::tempdir().unwrap();
        let dir = base.path().join("state");
        let mut journal = Journal::open(&dir).unwrap();
        journal.record([&undo(1)]).unwrap();
        fs::remove_dir_all(&dir).unwrap();
        journal.clear().unwrap();
    }
}
