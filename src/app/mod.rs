//! The composition root: the only place that knows everyone. Builds from a profile, starts, stops.

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
pub use load::{Loaded, load};
pub use run::run;

/// x
pub fn cleanup(_state: &std::path::Path) -> anyhow::Result<String> {
    anyhow::bail!("not wired")
}
