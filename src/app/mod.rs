//! The composition root: the only place that knows everyone. Builds from a profile, starts, stops.

mod advice;
mod build;
mod cleanup;
mod closed;
mod control;
mod demo;
mod doctor;
mod exec;
mod guard;
mod keeper;
mod limits;
mod load;
mod nameservers;
mod places;
mod plan;
mod refusal;
mod rights;
mod run;
mod signals;
mod status;
mod supervisor;
mod turn;
mod worker;

pub use cleanup::{Cleaned, cleanup};
pub use closed::closed_note;
pub use control::{Command, ask};
pub use demo::{client as demo_client, demo};
pub use doctor::{Diagnosis, Finding, Severity, doctor};
pub use exec::{WITHOUT_MEANING_IN_EXEC, exec, exit_code, inside};
pub use limits::descriptors_note;
pub use load::{Loaded, check, load};
pub use places::STATE_OF_ROOT;
pub use plan::{Outline, plan, plan_in_force};
pub use run::{host_notes, run};

/// What a program does first that starts others: see to it that it is told of their end, whatever its parent ignored.
///
/// # Errors
/// The kernel refuses, which it never does.
pub fn begin() -> std::io::Result<()> {
    crate::platform::mind_children().map(drop)
}
