//! `cleanup`: puts the host back after a crash, and says what it could not see.

use std::path::Path;

use super::closed::closed_note;
use super::places::{STATE_OF_ROOT, hides_from_us};
use crate::platform::{self, Report, lost_by};

/// What a clean-up came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cleaned {
    /// What was done, in words.
    pub said: String,
    /// Why the host may not be as it was, all the same.
    pub but: Option<String>,
    /// There was something to be undone.
    pub busy: bool,
}

impl Cleaned {
    /// The exit code: 1 if nothing was to be undone where it was looked for, and all is not well.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        u8::from(self.but.is_some() && !self.busy)
    }
}

/// Puts the host back after a crash, as the journal in `state` says.
/// `namespace_gone`: the network namespace of the crashed run, if it was another than this, exists no more.
/// `chosen`: somebody has named `state`; else it is this user's own, and root's may be the one that was meant.
///
/// Run by a service manager after a service that failed (`ExecStopPost=`), it leaves a kill switch closed: nobody asked
/// for the end of that service.
///
/// # Errors
/// A run is going on there, something could not be undone, or the changes were made in another network namespace.
pub fn cleanup(state: &Path, chosen: bool, namespace_gone: bool) -> anyhow::Result<Cleaned> {
    let managed = std::env::var("SERVICE_RESULT").ok();
    let failed = managed.as_deref().filter(|result| *result != "success");
    let report = match failed {
        _ if is_absent(state) && lost_by(state).is_none() => Report::default(),
        Some(_) => platform::cleanup_closed(state, namespace_gone)?,
        None => platform::cleanup(state, namespace_gone)?,
    };
    let busy = report != Report::default();
    let said = match (busy, failed.filter(|_| report.stays_closed && !report.found_open)) {
        // Whoever looks in the wrong place should see it.
        (false, _) => format!("nothing to undo: {} names no change", state.display()),
        (true, None) => report.to_string(),
        (true, Some(result)) => format!(
            "{report}, because the service failed (SERVICE_RESULT={result}); `tunproxy cleanup`, typed by hand, opens it"
        ),
    };
    let hidden = (!chosen && hides_from_us(state)).then(|| {
        format!(
            "This user cannot see whether a run by root has left something ({STATE_OF_ROOT} is closed to it). Root can: \
             sudo tunproxy cleanup"
        )
    });
    // A service manager cleans up after its own service, whatever else is on the host.
    let closed = || closed_note(state).filter(|_| managed.is_none());
    Ok(Cleaned { said, but: hidden.or_else(closed), busy })
}

/// Whether there is no such directory, so that none has to be made to find out that nothing is in it.
fn is_absent(state: &Path) -> bool {
    state.try_exists().is_ok_and(|there| !there)
}
