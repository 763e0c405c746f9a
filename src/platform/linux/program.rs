//! The programs of the system that we run. Each has one entry here, which knows where it is looked for, what of ours it
//! gets, how long it may take, and whether it came to an end when it was called last. Nobody else starts them.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, getpid, getppid};
use parking_lot::Mutex;

use super::bounded::{self, Deadline};
use super::capability;

/// How long a call may take. A busy kernel may hold the lock of its firewall for a while.
const PATIENCE: Duration = Duration::from_secs(10);
/// The same where the call before did not end: a stop makes many of them, and a service manager waits for it.
const LITTLE_PATIENCE: Duration = Duration::from_secs(2);

/// Loads rules into nftables. It gets CAP_NET_ADMIN from us, so it must be where only root can put it: the caller's PATH is
/// the caller's. By variables of the environment the caller could have it load a library of theirs (ld.so(8)), which would
/// get the capability as well; an interactive nft would keep its history at home.
pub(super) static NFT: Program = Program {
    name: "nft",
    places: &["/usr/sbin/nft", "/sbin/nft", "/usr/local/sbin/nft", "/usr/bin/nft", "/run/current-system/sw/bin/nft"],
    trusted: Some(&[("LC_ALL", "C"), ("HOME", "/nonexistent"), ("TERM", "dumb")]),
    hung: AtomicBool::new(false),
    late: Mutex::new(Vec::new()),
};

/// Tells systemd-resolved of a link, by a bus that may never answer. It needs nothing of ours.
pub(super) static RESOLVECTL: Program = Program {
    name: "resolvectl",
    places: &["resolvectl"],
    trusted: None,
    hung: AtomicBool::new(false),
    late: Mutex::new(Vec::new()),
};

/// A program of the system.
pub(in crate::platform) struct Program {
    name: &'static str,
    /// Where it is looked for; without a slash, in the caller's PATH.
    places: &'static [&'static str],
    /// Of one that gets CAP_NET_ADMIN: all of its environment.
    trusted: Option<&'static [(&'static str, &'static str)]>,
    /// The last call did not end.
    hung: AtomicBool,
    /// Those that were killed and had not ended when nobody waited for them any longer.
    late: Mutex<Vec<Pid>>,
}

impl Program {
    /// Where it is, if it is installed at one of its fixed places.
    pub(super) fn place(&self) -> Option<&'static str> {
        self.places.iter().copied().find(|place| std::path::Path::new(place).exists())
    }

    /// Runs it, gives it `input`, and waits for its end; not for ever.
    ///
    /// # Errors
    /// It is not installed, or was killed because it did not end.
    pub(super) fn run(&'static self, arguments: &[&str], input: &str) -> io::Result<Output> {
        self.begin(arguments)?.end(input)
    }

    /// Starts it; it may get ready before it is told anything. The thread that starts it has to wait for it: it ends with
    /// that.
    ///
    /// # Errors
    /// It is not installed, or cannot be started.
    pub(super) fn begin(&'static self, arguments: &[&str]) -> io::Result<Call> {
        let child = self.spawn(|command| {
            command.args(arguments).stdout(Stdio::piped());
            end_with_us(command);
        })?;
        Ok(Call { program: self, child, words: format!("{} {}", self.name, arguments.join(" ")) })
    }

    /// Starts it with pipes for what it is told and what it complains of.
    ///
    /// # Errors
    /// It is not installed, or cannot be started.
    pub(super) fn spawn(&self, prepare: impl Fn(&mut Command)) -> io::Result<Child> {
        let mut missing = io::Error::from(io::ErrorKind::NotFound);
        for place in self.places {
            let mut command = Command::new(place);
            command.stdin(Stdio::piped()).stderr(Stdio::piped());
            if let Some(environment) = self.trusted {
                command.env_clear().envs(environment.iter().copied());
                capability::hand_down_net_admin(&mut command);
            }
            prepare(&mut command);
            match command.spawn() {
                Err(error) if error.kind() == io::ErrorKind::NotFound => missing = error,
                other => return other,
            }
        }
        Err(missing)
    }

    /// When a call that begins now has taken too long.
    pub(super) fn deadline(&self) -> Deadline {
        Deadline::after(self.patience())
    }

    /// Kills one that was started by this entry, and waits a little for its end.
    pub(super) fn give_up(&self, child: &mut Child) {
        if !bounded::give_up(child) {
            self.late.lock().extend(child.id().try_into().map(Pid::from_raw));
        }
    }

    /// Whether one that was killed has not ended: what it was told may still be done. Reaps those that have.
    pub(super) fn is_held_up(&self) -> bool {
        let mut late = self.late.lock();
        late.retain(|child| matches!(waitpid(*child, Some(WaitPidFlag::WNOHANG)), Ok(WaitStatus::StillAlive)));
        !late.is_empty()
    }

    fn patience(&self) -> Duration {
        if self.hung.load(Relaxed) { LITTLE_PATIENCE } else { PATIENCE }
    }

    /// Takes note whether a call that began at `begun` came to its end. One that was cut short tells nothing.
    pub(super) fn note<T>(&self, begun: Instant, outcome: &io::Result<T>) {
        let late = outcome.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::TimedOut);
        if !late || begun.elapsed() >= LITTLE_PATIENCE {
            self.hung.store(late, Relaxed);
        }
    }
}

/// A program that runs and waits to be told something.
#[derive(Debug)]
pub(in crate::platform) struct Call {
    program: &'static Program,
    child: Child,
    words: String,
}

impl Call {
    /// Tells it `input`, which is all, and waits for its end.
    ///
    /// # Errors
    /// It was killed because it did not end, or cannot be spoken to.
    pub(super) fn end(mut self, input: &str) -> io::Result<Output> {
        let (begun, patience) = (Instant::now(), self.program.patience());
        let outcome = bounded::output(&mut self.child, input.as_bytes(), Deadline::after(patience));
        self.program.note(begun, &outcome);
        outcome.map_err(|error| match error.kind() {
            io::ErrorKind::TimedOut => {
                // With less where there was a hurry.
                let waited = begun.elapsed().min(patience).as_secs();
                io::Error::new(error.kind(), format!("`{}` does not end: killed after {waited} s", self.words))
            }
            _ => error,
        })
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        // It has ended, or nobody needs it.
        if matches!(self.child.try_wait(), Ok(None)) {
            self.program.give_up(&mut self.child);
        }
    }
}

impl std::fmt::Debug for Program {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name)
    }
}

/// Whether it did what it was told, or its own words.
pub(super) fn told(output: &Output) -> io::Result<()> {
    match output.status.success() {
        true => Ok(()),
        false => Err(io::Error::other(first_line(&output.stderr))),
    }
}

/// The first of its words.
pub(super) fn first_line(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).lines().next().unwrap_or("it failed and said nothing").to_owned()
}

/// A table that is loaded after our death would stand in no journal that is still read. The child ends with the thread that
/// starts it, which has to wait for it.
fn end_with_us(command: &mut Command) {
    let us = getpid();
    // SAFETY: between fork and exec only system calls are made, on nothing but a number.
    unsafe {
        command.pre_exec(move || {
            set_pdeathsig(Signal::SIGKILL)?;
            // It may have happened already.
            if getppid() == us { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::ESRCH)) }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn program(name: &'static str, places: &'static [&'static str]) -> Program {
        Program { name, places, trusted: None, hung: AtomicBool::new(false), late: Mutex::new(Vec::new()) }
    }

    static SLEEPER: Program = program("sleep", &["/nowhere/sleep", "sleep"]);

    #[test]
    fn after_a_call_that_did_not_end_the_next_gets_less_time() {
        let late: io::Result<()> = Err(io::ErrorKind::TimedOut.into());
        let long_ago = Instant::now().checked_sub(PATIENCE).unwrap();
        SLEEPER.note(Instant::now(), &late);
        assert!(SLEEPER.deadline().left() > LITTLE_PATIENCE, "one that was cut short has not hung");
        SLEEPER.note(long_ago, &late);
        assert!(SLEEPER.deadline().left() <= LITTLE_PATIENCE);
        SLEEPER.note(long_ago, &Ok(()));
        assert!(SLEEPER.deadline().left() > LITTLE_PATIENCE);
    }

    #[test]
    fn a_program_is_looked_for_in_one_place_after_the_other() {
        assert!(SLEEPER.run(&["0"], "").unwrap().status.success());
        let missing = program("no", &["/nowhere/no"]);
        let error = missing.spawn(|_| {}).unwrap_err();
        assert_eq!((error.kind(), missing.place()), (io::ErrorKind::NotFound, None));
    }

    #[test]
    fn one_that_did_not_end_when_it_was_killed_holds_up_until_it_has_and_is_reaped() {
        static LATE: Program = program("sleep", &["sleep"]);
        assert!(!LATE.is_held_up());
        let call = LATE.begin(&["1000"]).unwrap();
        let pid = Pid::from_raw(call.child.id().try_into().unwrap());
        LATE.late.lock().push(pid);
        assert!(LATE.is_held_up() && LATE.is_held_up());
        nix::sys::signal::kill(pid, Signal::SIGKILL).unwrap();
        let end = Instant::now() + Duration::from_secs(60);
        while LATE.is_held_up() {
            assert!(Instant::now() < end, "it was killed");
        }
        assert!(nix::sys::signal::kill(pid, None).is_err(), "it is reaped");
        drop(LATE.begin(&["1000"]).unwrap());
        assert!(!LATE.is_held_up(), "it ended at once");
    }

    #[test]
    fn a_call_that_nobody_goes_on_with_leaves_no_process() {
        let call = SLEEPER.begin(&["1000"]).unwrap();
        let child = nix::unistd::Pid::from_raw(call.child.id().try_into().unwrap());
        drop(call);
        assert!(nix::sys::signal::kill(child, None).is_err(), "it is reaped");
    }
}
