//! Undoing what is done, at the end of a run: last change first, and forgotten only when it is seen to be gone.

use super::{Applied, Done, HostError};
use crate::platform::imp::resolv_conf;
use crate::platform::layout::{self, CAPTURE_STAGE};
use crate::platform::proof::still_in_place;
use crate::platform::routing::{Rule, RuleAction};
use crate::platform::severed;
use crate::platform::undo::{Undo, Undone};

/// What became of changes that were to be undone.
#[derive(Default)]
struct Outcome {
    failed: Vec<String>,
    /// By their numbers in the journal.
    undone: Vec<(u64, Undo)>,
    /// Numbers of those that need no second look.
    void: Vec<u64>,
}

impl Applied {
    pub(super) fn undo_all(&mut self) -> Result<(), HostError> {
        self.reverted = true;
        self.back.get_or_insert_default();
        let mut outcome = Outcome::default();
        // First what has connections begin through us, then those that have begun. What holds them back goes last, and not
        // before a second look: a connect() may have had its address before and have been finished since.
        let begins = |done: &Done| match done {
            Done::Resolved | Done::Change(_, Undo::ResolvConf { .. }) => true,
            Done::Change(_, Undo::Rule(rule)) => {
                rule.action != RuleAction::UNREACHABLE && layout::stage(rule, &self.plan.numbers) >= CAPTURE_STAGE
            }
            Done::Change(..) | Done::Firewall(_) => false,
        };
        let refuses =
            |done: &Done| matches!(done, Done::Change(_, Undo::Rule(rule)) if rule.action == RuleAction::UNREACHABLE);
        let (begin, rest): (Vec<Done>, Vec<Done>) = std::mem::take(&mut self.done).into_iter().partition(begins);
        self.undo_each(begin, &mut outcome);
        severed::end(&mut self.netlink, rules_of(&rest), self.settling.device);
        let (refuse, rest): (Vec<Done>, Vec<Done>) = rest.into_iter().partition(refuses);
        self.undo_each(rest, &mut outcome);
        severed::end(&mut self.netlink, rules_of(&refuse), self.settling.device);
        self.undo_each(refuse, &mut outcome);
        let Outcome { mut failed, undone, mut void } = outcome;
        // The journal forgets only what a second look finds gone.
        let undos: Vec<&Undo> = undone.iter().map(|(_, undo)| undo).collect();
        match still_in_place(&mut self.netlink, &undos) {
            Ok(still) => {
                failed.extend(still.iter().map(|undo| format!("{undo}: it is in place all the same")));
                void.extend(undone.iter().filter(|(_, undo)| !still.contains(&undo)).map(|(id, _)| *id));
            }
            Err(error) => failed.push(error.to_string()),
        }
        if failed.is_empty() && self.journal.lock().is_clean() {
            return Ok(self.journal.lock().clear()?);
        }
        self.journal.lock().void(&void)?;
        if failed.is_empty() {
            return Ok(());
        }
        Err(HostError::NotUndone(failed))
    }

    /// Undoes these, from last to first.
    fn undo_each(&mut self, mut all: Vec<Done>, outcome: &mut Outcome) {
        while let Some(done) = all.pop() {
            match (self.undo(&done), done) {
                (Ok(Some((id, Undone::LeftAlone))), _) => outcome.void.push(id),
                (Ok(Some((id, _))), Done::Change(_, undo)) => outcome.undone.push((id, undo)),
                (Ok(_), _) => {}
                (Err(error), _) => outcome.failed.push(error),
            }
        }
    }

    /// Undoes one change; returns its number in the journal, if it has one, and what became of it.
    pub(super) fn undo(&mut self, done: &Done) -> Result<Option<(u64, Undone)>, String> {
        match done {
            // It goes when it is dropped.
            Done::Firewall(table) => {
                self.back.iter_mut().for_each(|back| {
                    back.others += 1;
                    back.tables.extend(table.handles());
                });
                Ok(None)
            }
            Done::Resolved => {
                resolv_conf::forget_resolved(&self.plan.tun);
                self.back.iter_mut().for_each(|back| back.others += 1);
                Ok(None)
            }
            Done::Change(id, undo) => match undo.perform(&mut self.netlink) {
                Ok(Undone::LeftAlone) => {
                    tracing::warn!("somebody changed it since, so it stays: {undo}");
                    self.back.iter_mut().for_each(|back| back.left += 1);
                    Ok(id.map(|id| (id, Undone::LeftAlone)))
                }
                Ok(how) => {
                    self.back.iter_mut().for_each(|back| back.undone.push(undo.clone()));
                    Ok(id.map(|id| (id, how)))
                }
                Err(error) => Err(format!("{undo}: {error}")),
            },
        }
    }
}

fn rules_of(all: &[Done]) -> impl Iterator<Item = &Rule> {
    all.iter().filter_map(|done| match done {
        Done::Change(_, Undo::Rule(rule)) => Some(rule),
        _ => None,
    })
}

impl Drop for Applied {
    fn drop(&mut self) {
        if self.reverted {
            return;
        }
        match self.leave_closed() {
            Some(Ok(())) => tracing::error!(
                "the kill switch stays closed: nothing but the LAN is reached until the next start, or until \
                 `tunproxy cleanup`"
            ),
            Some(Err(error)) => tracing::error!("the kill switch is open, and cannot be closed again: {error}"),
            None => {
                if let Err(error) = self.undo_all() {
                    tracing::error!("the host could not be put back: {error}");
                }
            }
        }
    }
}
