//! Stands guard over what a run has changed on the host: a thread that sleeps until the kernel tells of a change.

mod pace;
mod words;

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow};
use tokio::sync::mpsc;

use super::refusal::explain_thread;
use crate::platform::{
    Applied, Fwmark, HostOptions, HostPlan, Hurry, Seen, SettleError, Settled, Stranded, Watch, Woken,
};
use pace::{Pace, Tell};
use words::FEW;

/// Looks may take a third of the time where changes never end, so that a busy host stays usable.
const REST_PER_LOOK: u32 = 2;
/// But what is missing must not wait for longer than this.
const LONGEST_REST: Duration = Duration::from_millis(500);

/// The thread, and the host's changes that it keeps true.
pub(super) struct Guard {
    thread: JoinHandle<Applied>,
    /// Closing it ends the thread.
    stop: io::PipeWriter,
}

impl Guard {
    /// Takes `applied` over until [`Guard::dismiss`]. `options` are those that it was planned from. What makes a run useless
    /// is sent to `trouble`. `gateway`: others use this host as theirs. `mark` is that of our own sockets. `board` shows the
    /// plan in force.
    ///
    /// # Errors
    /// There is no thread for it; the host is then as it was before.
    pub(super) fn post(
        applied: Applied,
        options: HostOptions,
        gateway: bool,
        mark: Option<Fwmark>,
        board: &Board,
        trouble: mpsc::UnboundedSender<anyhow::Error>,
    ) -> anyhow::Result<Self> {
        board.write(applied.plan());
        let (stopped, stop) = io::pipe().context("cannot make a pipe")?;
        let watchman = Watchman { applied, board: board.clone(), options, gateway, mark, pace: Pace::default() };
        let thread = Builder::new()
            .name("guard".to_owned())
            .spawn(move || watchman.stand(stopped, &trouble))
            .map_err(|error| explain_thread("that guards the host's settings", &error))?;
        Ok(Self { thread, stop })
    }

    /// Ends the guard; what it guarded is the caller's again. A program that it is waiting for is not waited for any longer:
    /// what it was to put back is undone next.
    ///
    /// # Errors
    /// The thread panicked in spite of all.
    pub(super) fn dismiss(self) -> anyhow::Result<Applied> {
        let _hurry = Hurry::begin();
        drop(self.stop);
        self.thread.join().map_err(|_| anyhow!("the guard of the host's settings panicked"))
    }
}

/// Where the plan in force is to be read while the guard has it.
#[derive(Debug, Clone, Default)]
pub(super) struct Board(Arc<Mutex<Option<HostPlan>>>);

impl Board {
    /// None: nothing has been changed on the host.
    pub(super) fn read(&self) -> Option<HostPlan> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn write(&self, plan: &HostPlan) {
        let mut board = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if board.as_ref() != Some(plan) {
            *board = Some(plan.clone());
        }
    }
}

/// What keeps the guard from its work: told once, and tried again less and less often.
#[derive(Debug, Default)]
struct Stumbles {
    told: String,
    times: u32,
}

impl Stumbles {
    /// How long to wait before the next attempt.
    fn over(&mut self, error: &SettleError) -> Duration {
        let words = error.to_string();
        if self.told != words {
            tracing::warn!("the host's settings cannot be looked after just now: {words}");
            self.told = words;
        }
        self.times += 1;
        LONGEST_REST * 2_u32.pow(self.times.min(7))
    }
}

struct Watchman {
    applied: Applied,
    board: Board,
    options: HostOptions,
    gateway: bool,
    /// Of our own sockets, if they have one.
    mark: Option<Fwmark>,
    pace: Pace,
}

impl Watchman {
    fn stand(mut self, stop: io::PipeReader, trouble: &mpsc::UnboundedSender<anyhow::Error>) -> Applied {
        // What it guards must not be lost with it: whoever ends the run puts the host back, or leaves it closed.
        let watched = catch_unwind(AssertUnwindSafe(|| self.watch(stop)));
        let ended = watched.unwrap_or_else(|_| Err(anyhow!("the guard of the host's settings panicked")));
        if let Err(error) = ended {
            // The run may be over already.
            let _ = trouble.send(error);
        }
        self.applied
    }

    /// Returns when told to stop.
    fn watch(&mut self, stop: io::PipeReader) -> anyhow::Result<()> {
        let numbers = self.applied.plan().numbers;
        let mut watch = match Watch::open(
            &[numbers.captured, numbers.always],
            self.applied.behind_link().as_deref(),
            stop,
        ) {
            Ok(watch) => watch,
            Err(error) => {
                tracing::warn!(
                    "changes of this host go unnoticed ({error}): what another program removes stays away, and what the \
                     network becomes is not followed"
                );
                return Ok(());
            }
        };
        // What has changed since the plan was made, nobody has told.
        let mut seen = Seen::EVERYTHING;
        let mut stumbles = Stumbles::default();
        let mut stranded = Stranded::default();
        loop {
            let begun = Instant::now();
            let stranded_again = self.reset_stranded(&mut stranded, begun);
            let again = match self.applied.settle(&self.options, seen) {
                Ok(settled) => {
                    self.board.write(self.applied.plan());
                    let numbers = self.applied.plan().numbers;
                    watch.follow(&[numbers.captured, numbers.always]);
                    self.tell(&settled, Instant::now());
                    stumbles = Stumbles::default();
                    settled.again
                }
                Err(error @ SettleError::Gone(_)) => return Err(error.into()),
                Err(error) => Some(stumbles.over(&error)),
            };
            let again = again.into_iter().chain(stranded_again).min();
            let rest = (begun.elapsed() * REST_PER_LOOK).min(LONGEST_REST).max(self.pace.rest(Instant::now()));
            if watch.rest(rest)? {
                return Ok(());
            }
            seen = match watch.wait(again.map(|again| again.saturating_sub(rest)), self.applied.lifeline())? {
                Woken::Stop => return Ok(()),
                Woken::Changed(seen) => seen,
                // What is tried again may be anything.
                Woken::Time => Seen::EVERYTHING,
            };
        }
    }

    /// Whoever talks through an address that the host has lost is to begin anew, by another one. Returns when to look
    /// again.
    fn reset_stranded(&self, stranded: &mut Stranded, now: Instant) -> Option<Duration> {
        match stranded.reset(self.mark?, now) {
            Ok(reset) => {
                if reset.connections > 0 {
                    tracing::info!(
                        "this host has lost an address: {} connections from it were reset",
                        reset.connections
                    );
                }
                reset.again
            }
            Err(error) => {
                tracing::warn!("connections from lost addresses are not looked for: {error}");
                None
            }
        }
    }

    fn tell(&mut self, settled: &Settled, now: Instant) {
        for line in words::changes(&settled.changed) {
            tracing::info!("this host has changed: {line}");
        }
        for change in settled.changed.iter().filter(|_| settled.changed.len() > FEW) {
            tracing::debug!("this host has changed: {change}");
        }
        for failure in &settled.failed {
            tracing::error!("this host's settings: {failure}");
        }
        for warning in &settled.warnings {
            tracing::warn!("{warning}");
        }
        for note in settled.notes.iter().filter(|_| self.gateway) {
            tracing::warn!("{note}");
        }
        match self.pace.restored(now, settled.restored.len()) {
            Tell::Each if settled.restored.len() > FEW => {
                tracing::warn!("another program removed {}; all of it is back", words::summed(settled.restored.iter()));
                for step in &settled.restored {
                    tracing::debug!("it is back: {step}");
                }
            }
            Tell::Each => {
                for step in &settled.restored {
                    tracing::warn!("another program removed {step}; it is back");
                }
            }
            Tell::Sum(many) => tracing::warn!(
                "another program removes what is ours again and again ({}, for instance): it has been put back {many} \
                 times, and from now on it is no more than once a second. Has that program leave it alone, or one of \
                 the two go",
                settled.restored.first().map(ToString::to_string).unwrap_or_default()
            ),
            Tell::Nothing => {}
        }
    }
}
