//! The composition root: the only place that knows everyone. Builds from a profile, starts, stops.

mod advice;
mod build;
mod control;
mod demo;
mod doctor;
mod exec;
mod guard;
mod limits;
mod load;
mod nameservers;
mod plan;
mod refusal;
mod rights;
mod run;
mod supervisor;
mod worker;

pub use control::{Command, ask};
pub use demo::{client as demo_client, demo};
pub use doctor::{Diagnosis, Finding, Severity, doctor};
pub use exec::{exec, exit_code, inside};
pub use load::{Loaded, check, load};
pub use plan::{Outline, plan};
pub use run::{gateway_notes, run};

/// Puts the host back after a crash, as the journal in `state` says; returns what was done, in words.
/// `namespace_gone`: the network namespace of the crashed run, if it was another than this, exists no more.
///
/// Run by a service manager after a service that failed (`ExecStopPost=`), it leaves a kill switch closed: nobody asked
/// for the end of that service.
///
/// # Errors
/// A run is going on there, something could not be undone, or the changes were made in another network namespace.
pub fn cleanup(state: &std::path::Path, namespace_gone: bool) -> anyhow::Result<String> {
    let failed = std::env::var("SERVICE_RESULT").ok().filter(|result| result != "success");
    let report = match &failed {
        Some(_) => crate::platform::cleanup_closed(state, namespace_gone)?,
        None => crate::platform::cleanup(state, namespace_gone)?,
    };
    if report == crate::platform::Report::default() {
        // Whoever looks in the wrong place should see it.
        return Ok(format!("nothing to undo: {} names no change", state.display()));
    }
    let because = failed.filter(|_| report.stays_closed).map(|result| {
        format!(", because the service failed (SERVICE_RESULT={result}); `tunproxy cleanup`, typed by hand, opens it")
    });
    Ok(report.to_string() + &because.unwrap_or_default())
}
