//! A kill switch that a run left closed: told to whoever wonders why nothing leaves, with the command that opens it.

use std::path::Path;

use super::places::{STATE_OF_ROOT, cleanup_of};
use crate::platform::{Journalled, holder, left_closed};

/// What to say of a kill switch that is closed on this host with no run behind it, to somebody who has asked for `state`.
/// None where there is none, or where this user may not look at the firewall.
#[must_use]
pub fn closed_note(state: &Path) -> Option<String> {
    if let Some(note) = opened_note(state) {
        return Some(note);
    }
    let found = left_closed()?;
    Some(format!(
        "The kill switch of a run that has ended is closed (firewall table inet {}): nothing leaves this host but to its own \
         networks. To open it: {}",
        found.table,
        how_to_open(state)
    ))
}

/// What to say of a kill switch that a journal, that in `state` or root's own, knows to be closed, while its firewall table is
/// not what it should be.
fn opened_note(state: &Path) -> Option<String> {
    let note = |state: &Path| {
        let journal = Journalled::read(state).ok().filter(|_| holder(state).is_none())?;
        Some(format!("{}. {}", what_is_open(journal.opened()?), how_to_close(state)))
    };
    note(state).or_else(|| note(Path::new(STATE_OF_ROOT)))
}

/// A kill switch without its firewall table, in words.
pub(super) fn what_is_open(table: &str) -> String {
    format!(
        "The kill switch of an earlier run is not in force: its firewall table inet {table} is gone, or lacks rules, as after \
         `nft flush ruleset`. What is bound to an interface or an address leaves this host past it, and our rules refuse the rest"
    )
}

/// What to do about that.
pub(super) fn how_to_close(state: &Path) -> String {
    format!("Start tunproxy again, which closes it; or `{}`, which puts the host back without it", cleanup_of(state))
}

/// The command that opens it, as far as journals tell whose it is.
pub(super) fn how_to_open(state: &Path) -> String {
    let is_its = |state: &&Path| Journalled::read(state).is_ok_and(|journal| journal.is_closed());
    match [state, Path::new(STATE_OF_ROOT)].into_iter().find(is_its) {
        Some(state) => {
            format!("`{}`; or start tunproxy again, which keeps it closed", cleanup_of(state))
        }
        None => "`sudo tunproxy cleanup --state-dir DIR` with the state directory of that run; if that is lost, \
                 docs/host-changes.md says how to do it by hand"
            .to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_that_knows_nothing_of_it_is_not_named() {
        let dir = tempfile::tempdir().unwrap();
        let told = how_to_open(dir.path());
        assert!(told.contains("--state-dir DIR") || told.contains("`sudo tunproxy cleanup`"), "{told}");
    }
}
