//! The composition root: the only place that knows everyone. Builds from a profile, starts, stops.

mod advice;
mod build;
mod control;
mod demo;
mod exec;
mod load;
mod nameservers;
mod run;
mod worker;

pub use control::{Command, ask};
pub use demo::{client as demo_client, demo};
pub use exec::{exec, inside};
pub use load::{Loaded, check, load};
pub use run::run;

/// Puts the host back after a crash, as the journal in `state` says; returns what was done, in words.
///
/// # Errors
/// A run is going on there, or something could not be undone.
pub fn cleanup(state: &std::path::Path) -> anyhow::Result<String> {
    Ok(crate::platform::cleanup(state)?.to_string())
}
