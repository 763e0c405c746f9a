//! Undoing what a run left that ended without doing so: by `cleanup`, and at the next start.

use std::fmt;
use std::path::Path;

use super::applied::HostError;
use super::journal::{Journal, Origin};
use super::proof::still_in_place;
use super::routing::Rule;
use super::undo::{Undo, Undone};
use super::{Netlink, Turn};

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
    /// The kill switch of the crashed run was left closed, with the rules and routes that belong to it.
    pub stays_closed: bool,
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
        if !self.restored.is_empty() && self.left_alone.is_empty() && !self.stays_closed {
            f.write_str(": read again, the host is as it was before that run")?;
        }
        if self.stays_closed {
            f.write_str("\nthe kill switch stays closed: nothing but the LAN is reached until the next start")?;
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
    let mut journal = opened(state_dir, namespace_gone)?;
    let _turn = Turn::wait();
    journal.replay()
}

/// The same, but a kill switch stays closed, because nobody asked for the end of the run.
///
/// # Errors
/// As [`cleanup`].
pub fn cleanup_closed(state_dir: &Path, namespace_gone: bool) -> Result<Report, HostError> {
    let mut journal = opened(state_dir, namespace_gone)?;
    let _turn = Turn::wait();
    journal.replay_closed()
}

fn opened(state_dir: &Path, namespace_gone: bool) -> Result<Journal, HostError> {
    let mut journal = Journal::open(state_dir)?;
    if namespace_gone && matches!(journal.leftovers.origin, Origin::Elsewhere(_)) {
        journal.leftovers.origin = Origin::Gone;
    }
    Ok(journal)
}

impl Journal {
    /// Whether an earlier run left its kill switch closed here.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        let table = |(_, undo): &(u64, Undo)| matches!(undo, Undo::Table(_));
        self.leftovers.origin == Origin::Here && self.leftovers.undos.iter().any(table)
    }

    /// The rules that an earlier run left, as far as the journal knows.
    #[must_use]
    pub fn rules(&self) -> Vec<Rule> {
        let rule = |(_, undo): &(u64, Undo)| match undo {
            Undo::Rule(rule) => Some(rule.clone()),
            _ => None,
        };
        self.leftovers.undos.iter().filter_map(rule).collect()
    }

    /// Undoes what an earlier run left, last change first, and forgets it.
    ///
    /// # Errors
    /// What could not be undone; it stays in the journal, and the next replay tries again. [`HostError::Elsewhere`]:
    /// nothing was done.
    pub fn replay(&mut self) -> Result<Report, HostError> {
        self.replay_but(|_| false)
    }

    /// The same, except that a closed kill switch stays as it is, and in the journal.
    ///
    /// # Errors
    /// As [`Journal::replay`].
    pub fn replay_closed(&mut self) -> Result<Report, HostError> {
        if self.is_closed() { self.replay_but(Undo::closes) } else { self.replay() }
    }

    fn replay_but(&mut self, stays: impl Fn(&Undo) -> bool) -> Result<Report, HostError> {
        let elsewhere = |namespace| HostError::Elsewhere { journal: self.path().to_owned(), namespace };
        let due = self.leftovers.due().map_err(elsewhere)?;
        let mut report = Report { unreadable: self.leftovers.unreadable, died: due.died.len(), ..Report::default() };
        let (mut failed, mut kept, mut void, mut done) = (Vec::new(), Vec::new(), due.died, Vec::new());
        if !due.undos.is_empty() {
            let mut netlink = Netlink::open()?;
            for (id, undo) in due.undos {
                if stays(&undo) {
                    report.stays_closed = true;
                    kept.push((id, undo));
                    continue;
                }
                match undo.perform(&mut netlink) {
                    Ok(Undone::Restored) => done.push((id, undo)),
                    Ok(Undone::AlreadyGone) => {
                        void.push(id);
                        report.already_gone += 1;
                    }
                    Ok(Undone::LeftAlone) => {
                        void.push(id);
                        report.left_alone.push(undo.to_string());
                    }
                    Err(error) => {
                        failed.push(error.to_string());
                        kept.push((id, undo));
                    }
                }
            }
            // Only what a second look finds gone counts as undone.
            let undos: Vec<&Undo> = done.iter().map(|(_, undo)| undo).collect();
            let still: Vec<Undo> = still_in_place(&mut netlink, &undos)?.into_iter().cloned().collect();
            for (id, undo) in done {
                if still.contains(&undo) {
                    failed.push(format!("{undo}: it was done, and the change is there all the same"));
                    kept.push((id, undo));
                } else {
                    void.push(id);
                    report.restored.push(undo.to_string());
                }
            }
        }
        kept.sort_by_key(|(id, _)| *id);
        self.leftovers.undos = kept;
        self.leftovers.unreadable = 0;
        if failed.is_empty() {
            self.forget(&void)?;
            return Ok(report);
        }
        Err(HostError::NotUndone(failed))
    }
}
