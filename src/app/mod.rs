//! The composition root: the only place that knows everyone. Builds from a profile, starts, stops.

mod advice;
mod build;
mod control;
mod demo;
mod exec;
mod limits;
mod load;
mod nameservers;
mod refusal;
mod rights;
mod run;
mod supervisor;
mod worker;

pub use control::{Command, ask};
pub use demo::{client as demo_client, demo};
pub use exec::{exec, exit_code, inside};
pub use load::{Loaded, check, load};
pub use run::{gateway_notes, run};

/// Puts the host back after a crash, as the journal in `state` says; returns what was done, in words.
/// `namespace_gone`: the network namespace of the crashed run, if it was another than this, exists no more.
///
/// # Errors
/// A run is going on there, something could not be undone, or the changes were made in another network namespace.
pub fn cleanup(state: &std::path::Path, namespace_gone: bool) -> anyhow::Result<String> {
    let report = crate::platform::cleanup(state, namespace_gone)?;
    if report == crate::platform::Report::default() {
        // Whoever looks in the wrong place should see it.
        return Ok(format!("nothing to undo: {} names no change", state.display()));
    }
    Ok(report.to_string())
}
