//! Undoing what a run left that ended without doing so: by `cleanup`, and at the next start.

use std::fmt;
use std::io;
use std::path::Path;

use super::applied::HostError;
use super::imp::nft;
use super::journal::{Journal, Origin};
use super::proof::{firewall, still_in_place};
use super::routing::Rule;
use super::severed;
use super::undo::{Undo, Undone};
use super::{Netlink, Turn};

/// What to say of a kill switch that ought to be closed and is not.
pub const FOUND_OPEN: &str = "the kill switch of the earlier run is not in force: its firewall table is gone, or lacks rules. \
                              Another program has removed it, unless that run was killed before it was ready; since then \
                              traffic may have left unprotected";

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
    /// The kill switch of the crashed run was left as it was found, with the rules and routes that belong to it.
    pub stays_closed: bool,
    /// Its firewall table was not there, or lacked rules ([`FOUND_OPEN`]).
    pub found_open: bool,
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
        match (self.stays_closed, self.found_open) {
            (true, false) => {
                f.write_str("\nthe kill switch stays closed: nothing but the LAN is reached until the next start")
            }
            (_, true) => write!(f, "\n{FOUND_OPEN}"),
            (false, false) => Ok(()),
        }
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
    /// Whether an earlier run left its kill switch here, or what others have left of it.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.leftovers.origin == Origin::Here && self.leftovers.undos.iter().any(|(_, undo)| undo.refuses())
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

    /// Ends connections that an earlier run carried and left behind a closed kill switch.
    pub(super) fn end_connections(&self, netlink: &mut Netlink) {
        if self.is_closed() {
            severed::end(netlink, self.rules().iter(), None);
        }
    }

    /// Undoes what an earlier run left, last change first, and forgets it.
    ///
    /// # Errors
    /// What could not be undone; it stays in the journal, and the next replay tries again. [`HostError::Elsewhere`]:
    /// nothing was done.
    pub fn replay(&mut self) -> Result<Report, HostError> {
        self.replay_but(|_| false)
    }

    /// The same, except that a closed kill switch stays as it is, and in the journal. What of it is gone is forgotten: the
    /// next run may come to make the very same, and that will not be the earlier one's to undo.
    ///
    /// # Errors
    /// As [`Journal::replay`].
    pub fn replay_closed(&mut self) -> Result<Report, HostError> {
        if !self.is_closed() {
            return self.replay();
        }
        let found_open = !has_closed(&self.leftovers.undos);
        let gone = self.forget_gone()?;
        let mut report = if self.is_closed() { self.replay_but(Undo::closes)? } else { self.replay()? };
        report.found_open |= found_open;
        report.already_gone += gone;
        Ok(report)
    }

    /// Forgets what of a kill switch is not in place any more; returns how much.
    fn forget_gone(&mut self) -> Result<usize, HostError> {
        let (tables, others): (Vec<&Undo>, Vec<&Undo>) = self
            .leftovers
            .undos
            .iter()
            .map(|(_, undo)| undo)
            .filter(|undo| undo.closes())
            .partition(|undo| matches!(undo, Undo::Table(_)));
        let mut still: Vec<Undo> = still_in_place(&mut Netlink::open()?, &others)?.into_iter().cloned().collect();
        // Of a name there are two tables, in two families: either takes the name.
        let names: Vec<String> = match tables.is_empty() {
            true => Vec::new(),
            false => firewall()?.into_iter().map(|table| table.name).collect(),
        };
        let taken = |undo: &Undo| matches!(undo, Undo::Table(table) if names.contains(&table.name));
        still.extend(tables.into_iter().filter(|undo| taken(undo)).cloned());
        let (gone, left): (Vec<_>, Vec<_>) = std::mem::take(&mut self.leftovers.undos)
            .into_iter()
            .partition(|(_, undo)| undo.closes() && !still.contains(undo));
        self.leftovers.undos = left;
        self.forget(&gone.iter().map(|(id, _)| *id).collect::<Vec<_>>())?;
        Ok(gone.len())
    }

    fn replay_but(&mut self, stays: impl Fn(&Undo) -> bool) -> Result<Report, HostError> {
        let elsewhere = |namespace| HostError::Elsewhere { journal: self.path().to_owned(), namespace };
        let due = self.leftovers.due().map_err(elsewhere)?;
        let mut report = Report { unreadable: self.leftovers.unreadable, died: due.died.len(), ..Report::default() };
        let is_table = |(_, undo): &(u64, Undo)| matches!(undo, Undo::Table(_));
        report.found_open = due.undos.iter().any(is_table) && !has_closed(&due.undos);
        let (mut failed, mut kept, mut void, mut done) = (Vec::new(), Vec::new(), due.died, Vec::new());
        if !due.undos.is_empty() {
            let mut netlink = Netlink::open()?;
            // While the rules that hold them back still stand.
            let rules = due.undos.iter().filter(|(_, undo)| !stays(undo)).filter_map(|(_, undo)| match undo {
                Undo::Rule(rule) => Some(rule),
                _ => None,
            });
            severed::end(&mut netlink, rules, None);
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
            let (still, unseen) = match still_in_place(&mut netlink, &undos) {
                Ok(still) => (still.into_iter().cloned().collect::<Vec<Undo>>(), false),
                Err(error) => {
                    failed.push(error.to_string());
                    (Vec::new(), true)
                }
            };
            for (id, undo) in done {
                if unseen {
                    kept.push((id, undo));
                } else if still.contains(&undo) {
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
        // Even where something is left: what is gone another run may come to make the very same, and that will not be this
        // one's to undo.
        match self.forget(&void) {
            Err(error) if failed.is_empty() => return Err(error.into()),
            Err(error) => failed.push(error.to_string()),
            Ok(()) => {}
        }
        if failed.is_empty() { Ok(report) } else { Err(HostError::NotUndone(failed)) }
    }
}

/// Whether one of the kill switch's tables among `undos` is in force. While a table is changed, what it was and what it is to
/// become are both on record.
///
/// # Errors
/// The firewall cannot be read.
pub(super) fn stands<'a>(undos: impl Iterator<Item = &'a Undo>) -> io::Result<bool> {
    for undo in undos {
        if let Undo::Table(table) = undo
            && nft::stands(table)?
        {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Whether the kill switch among `undos` is in force. Where the firewall cannot be read, the journal's word stands.
fn has_closed(undos: &[(u64, Undo)]) -> bool {
    stands(undos.iter().map(|(_, undo)| undo)).unwrap_or(true)
}
