//! Undoing what is done, at the end of a run: last change first, and forgotten only when it is seen to be gone.

use super::{Applied, Done, HostError};
use crate::platform::imp::resolv_conf;
use crate::platform::proof::still_in_place;
use crate::platform::severed;
use crate::platform::undo::{Undo, Undone};

impl Applied {
    pub(super) fn undo_all(&mut self) -> Result<(), HostError> {
        self.reverted = true;
        self.back.get_or_insert_default();
        // While the rules that hold them back still stand.
        let rules = self.done.iter().filter_map(|done| match done {
            Done::Change(_, Undo::Rule(rule)) => Some(rule),
            _ => None,
        });
        severed::end(&mut self.netlink, rules);
        let (mut failed, mut undone, mut void) = (Vec::new(), Vec::new(), Vec::new());
        while let Some(done) = self.done.pop() {
            match (self.undo(&done), done) {
                (Ok(Some((id, Undone::LeftAlone))), _) => void.push(id),
                (Ok(Some((id, _))), Done::Change(_, undo)) => undone.push((id, undo)),
                (Ok(_), _) => {}
                (Err(error), _) => failed.push(error),
            }
        }
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
