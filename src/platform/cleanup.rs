//! Undoing what a run left that ended without doing so: by `cleanup`, and at the next start.

use std::fmt;
use std::path::Path;

use super::Netlink;
use super::applied::HostError;
use super::journal::{Journal, Origin};
use super::undo::Undone;

/// What a clean-up did.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Report {
    /// What was put back, one line each.
    pub restored: Vec<String>,
    /// How many changes were gone already.
    pub already_gone: usize,
    /// What somebody changed after us, and which therefore stays.
    pub left_alone: Vec<String>,
    /// How many changes died with the kernel or the network namespace that they were made in.
    pub died: usize,
    /// How many lines of the journal could not be read (torn by a crash while they were written: not yet acted on).
    pub unreadable: usize,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if *self == Self::default() {
            return f.write_str("nothing to undo");
        }
        for line in &self.restored {
            writeln!(f, "undone: {line}")?;
        }
        for line in &self.left_alone {
            writeln!(f, "left, because it was changed since: {line}")?;
        }
        write!(f, "{} undone, {} already gone", self.restored.len(), self.already_gone)?;
        if self.died > 0 {
            write!(f, ", {} gone with an earlier boot or with another network namespace", self.died)?;
        }
        if self.unreadable > 0 {
            write!(f, ", {} torn lines skipped", self.unreadable)?;
        }
        Ok(())
    }
}

/// Undoes what a crashed run left, by its journal in `state_dir`. Doing it twice is harmless.
///
/// `namespace_gone`: what was made in another network namespace of this boot is taken as gone with it. Nobody can find
/// that out by looking, since a namespace may be held by a descriptor or a process that is not seen from here.
///
/// # Errors
/// A run is going on there, the journal is a newer version's, something could not be undone (it stays journalled), or
/// [`HostError::Elsewhere`].
pub fn cleanup(state_dir: &Path, namespace_gone: bool) -> Result<Report, HostError> {
    let mut journal = Journal::open(state_dir)?;
    if namespace_gone && matches!(journal.leftovers.origin, Origin::Elsewhere(_)) {
        journal.leftovers.origin = Origin::Gone;
    }
    journal.replay()
}

impl Journal {
    /// Undoes what an earlier run left, last change first, and forgets it.
    ///
    /// # Errors
    /// What could not be undone; it stays in the journal, and the next replay tries again. [`HostError::Elsewhere`]:
    /// nothing was done.
    pub fn replay(&mut self) -> Result<Report, HostError> {
        let elsewhere = |namespace| HostError::Elsewhere { journal: self.path().to_owned(), namespace };
        let due = self.leftovers.due().map_err(elsewhere)?;
        let mut report = Report { unreadable: self.leftovers.unreadable, died: due.died, ..Report::default() };
        let mut failed = Vec::new();
        let mut kept = Vec::new();
        if !due.undos.is_empty() {
            let mut netlink = Netlink::open()?;
            for (id, undo) in due.undos {
                match undo.perform(&mut netlink) {
                    Ok(Undone::Restored) => report.restored.push(undo.to_string()),
                    Ok(Undone::AlreadyGone) => report.already_gone += 1,
                    Ok(Undone::LeftAlone) => report.left_alone.push(undo.to_string()),
                    Err(error) => {
                        failed.push(error.to_string());
                        kept.push((id, undo));
                    }
                }
            }
        }
        if failed.is_empty() {
            self.clear()?;
            return Ok(report);
        }
        kept.reverse();
        self.leftovers.undos = kept;
        Err(HostError::NotUndone(failed))
    }
}
