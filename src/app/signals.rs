//! What signals mean to a run.

use std::io;

use nix::sys::signal::Signal as Known;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::task::spawn_local;

use crate::platform::is_ignored;

/// Signals that end a process by default (signal(7)) and have no meaning here. Those that tell of a fault of the process itself
/// are not among them: SIGSEGV, SIGABRT and the like.
const WITHOUT_MEANING: [libc::c_int; 10] = [
    libc::SIGUSR1,
    libc::SIGUSR2,
    libc::SIGALRM,
    libc::SIGVTALRM,
    libc::SIGPROF,
    libc::SIGIO,
    libc::SIGPWR,
    libc::SIGSTKFLT,
    libc::SIGXCPU,
    libc::SIGXFSZ,
];

/// The signals that mean something to a run; while it is there, none of them kills the process. One that was ignored when
/// we began stays so (`nohup`, a shell's job in the background), except SIGTERM: somebody must be able to end us.
pub(super) struct Signals {
    interrupt: Option<Signal>,
    quit: Option<Signal>,
    terminate: Signal,
    hangup: Option<Signal>,
}

impl Signals {
    /// Must be called inside of a `LocalSet`.
    ///
    /// # Errors
    /// A signal cannot be listened to.
    pub(super) fn new() -> io::Result<Self> {
        let unless_ignored = |kind: SignalKind| match Known::try_from(kind.as_raw_value()) {
            Ok(known) if is_ignored(known) => {
                tracing::info!("{known} is ignored, as it was when this program was started");
                Ok(None)
            }
            _ => signal(kind).map(Some),
        };
        for number in without_meaning() {
            if let Some(received) = unless_ignored(SignalKind::from_raw(number))? {
                spawn_local(pass_over(number, received));
            }
        }
        Ok(Self {
            interrupt: unless_ignored(SignalKind::interrupt())?,
            quit: unless_ignored(SignalKind::quit())?,
            terminate: signal(SignalKind::terminate())?,
            hangup: unless_ignored(SignalKind::hangup())?,
        })
    }

    /// Returns when it is time to stop.
    pub(super) async fn end(&mut self) {
        loop {
            tokio::select! {
                () = heard(&mut self.interrupt) => return,
                () = heard(&mut self.quit) => return,
                _ = self.terminate.recv() => return,
                () = heard(&mut self.hangup) => {
                    tracing::warn!("reload is not there yet: SIGHUP changes nothing, restart to read the profile again");
                }
            }
        }
    }
}

/// Returns when the signal comes, if it is one that we listen to.
async fn heard(signal: &mut Option<Signal>) {
    match signal {
        Some(signal) => drop(signal.recv().await),
        None => std::future::pending().await,
    }
}

/// The same with those of realtime, of which each ends a process too.
fn without_meaning() -> impl Iterator<Item = libc::c_int> {
    WITHOUT_MEANING.into_iter().chain(libc::SIGRTMIN()..=libc::SIGRTMAX())
}

/// Says of each such signal that nothing comes of it. It is handled and not ignored: what is handled is the default again in
/// the programs that we start (execve(2)).
async fn pass_over(number: libc::c_int, mut received: Signal) {
    let name = Known::try_from(number).map_or_else(|_| format!("signal {number}"), |known| known.to_string());
    while received.recv().await.is_some() {
        tracing::debug!("{name} means nothing here: it is passed over");
    }
}
