//! Programs that we run and wait for, but not for ever: a service manager that waits for us would end us in the middle.
//! Where somebody wants to stop, what is waited for meanwhile gets little more time ([`Hurry`]).

use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::process::{Child, Output};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use parking_lot::Mutex;

/// Between two looks whether a program has ended that has closed its output.
const LOOK: Duration = Duration::from_millis(2);
/// What a program that was killed has to end.
const LAST_BREATH: Duration = Duration::from_secs(1);
/// How long what is waited for may still take once there is a hurry.
const HURRIED: Duration = Duration::from_secs(2);
/// So often whoever waits looks whether there is one.
const NOTICE: Duration = Duration::from_millis(100);

/// Since when there is a hurry.
static SINCE: Mutex<Option<Instant>> = Mutex::new(None);

/// As long as this is there, nobody waits for a program for long, and what is waited for already has two seconds left: the
/// run is to end, and what it still does is in vain. A call that ends early has done all of its work or nothing.
#[derive(Debug)]
pub struct Hurry(());

impl Hurry {
    /// There is a hurry from now on.
    #[must_use]
    pub fn begin() -> Self {
        *SINCE.lock() = Some(Instant::now());
        Self(())
    }

    /// Whether there is one.
    #[must_use]
    pub fn is_there() -> bool {
        SINCE.lock().is_some()
    }
}

impl Drop for Hurry {
    fn drop(&mut self) {
        *SINCE.lock() = None;
    }
}

/// Until when something may take, which a [`Hurry`] brings nearer.
#[derive(Debug, Clone, Copy)]
pub(super) struct Deadline(Instant);

impl Deadline {
    /// So long from now on.
    pub(super) fn after(patience: Duration) -> Self {
        Self(Instant::now() + patience)
    }

    /// What is left.
    pub(super) fn left(self) -> Duration {
        let hurried = SINCE.lock().map(|since| since + HURRIED);
        let end = hurried.map_or(self.0, |end| end.min(self.0));
        end.saturating_duration_since(Instant::now())
    }
}

/// Gives `input` to a child with pipes and waits for its end. A child that has not ended at `deadline` is killed and
/// reaped; what it has started itself is not waited for.
///
/// # Errors
/// `TimedOut`: it was killed. Else what reading and waiting report; it is killed then as well.
pub(super) fn output(child: &mut Child, input: &[u8], deadline: Deadline) -> io::Result<Output> {
    let outcome = talk(child, input, deadline);
    if outcome.is_err() {
        give_up(child);
    }
    outcome
}

/// Kills and reaps a child. False: it has not ended in time, and does what it is held up in.
pub(super) fn give_up(child: &mut Child) -> bool {
    // It may have ended by itself meanwhile.
    let _ = child.kill();
    reap(child, Instant::now() + LAST_BREATH)
}

/// Waits for the end of a child that was killed; tells whether it came. One that is held up within the kernel stays.
fn reap(child: &mut Child, deadline: Instant) -> bool {
    while matches!(child.try_wait(), Ok(None)) {
        if Instant::now() >= deadline {
            return false;
        }
        std::thread::sleep(LOOK);
    }
    true
}

fn talk(child: &mut Child, input: &[u8], deadline: Deadline) -> io::Result<Output> {
    let (mut stdin, mut stdout, mut stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let (mut left, mut heard, mut complaints) = (input, Vec::new(), Vec::new());
    unblock(stdin.as_ref())?;
    unblock(stdout.as_ref())?;
    unblock(stderr.as_ref())?;
    loop {
        if stdin.as_mut().is_some_and(|pipe| put(pipe, &mut left)) {
            stdin = None;
        }
        if stdout.as_mut().is_some_and(|pipe| take(pipe, &mut heard)) {
            stdout = None;
        }
        if stderr.as_mut().is_some_and(|pipe| take(pipe, &mut complaints)) {
            stderr = None;
        }
        let pipes = [
            stdin.as_ref().map(|pipe| PollFd::new(pipe.as_fd(), PollFlags::POLLOUT)),
            stdout.as_ref().map(|pipe| PollFd::new(pipe.as_fd(), PollFlags::POLLIN)),
            stderr.as_ref().map(|pipe| PollFd::new(pipe.as_fd(), PollFlags::POLLIN)),
        ];
        let mut pipes: Vec<PollFd<'_>> = pipes.into_iter().flatten().collect();
        if pipes.is_empty() {
            break;
        }
        wait_for(&mut pipes, deadline)?;
    }
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Output { status, stdout: heard, stderr: complaints });
        }
        if deadline.left().is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        std::thread::sleep(LOOK);
    }
}

/// Writes all of `bytes` to a child that reads them before `deadline`.
///
/// # Errors
/// `TimedOut`, or what writing reports.
pub(super) fn write_all(mut pipe: impl Write + AsFd, mut bytes: &[u8], deadline: Deadline) -> io::Result<()> {
    unblock(Some(&pipe))?;
    while !bytes.is_empty() {
        match pipe.write(bytes) {
            Ok(put) => bytes = &bytes[put..],
            Err(error) if is_for_later(&error) => {
                wait_for(&mut [PollFd::new(pipe.as_fd(), PollFlags::POLLOUT)], deadline)?;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Waits until one of `descriptors` is ready, or has come to its end.
///
/// # Errors
/// `TimedOut` at `deadline`, or what poll(2) reports.
pub(super) fn wait_for(descriptors: &mut [PollFd<'_>], deadline: Deadline) -> io::Result<()> {
    loop {
        // A millisecond more, lest the last one be spent in turns of none.
        let most = deadline.left().min(NOTICE) + Duration::from_millis(1);
        let timeout = PollTimeout::try_from(most).unwrap_or(PollTimeout::MAX);
        match poll(descriptors, timeout) {
            Ok(0) if deadline.left().is_zero() => return Err(io::ErrorKind::TimedOut.into()),
            Ok(0) | Err(Errno::EINTR) => {}
            Ok(_) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}

/// Writes what the pipe takes. True: nothing more is to be written, since that was all, or since nobody reads.
fn put(pipe: &mut impl Write, left: &mut &[u8]) -> bool {
    while !left.is_empty() {
        match pipe.write(left) {
            Ok(put) => *left = &left[put..],
            Err(error) => return !is_for_later(&error),
        }
    }
    true
}

/// Reads what there is. True: there will be no more.
fn take(pipe: &mut impl Read, heard: &mut Vec<u8>) -> bool {
    match pipe.read_to_end(heard) {
        Ok(_) => true,
        Err(error) => !is_for_later(&error),
    }
}

fn is_for_later(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

/// Only our end of the pipe: the child's is another open file.
fn unblock(pipe: Option<impl AsFd>) -> io::Result<()> {
    let Some(pipe) = pipe else { return Ok(()) };
    let flags = OFlag::from_bits_retain(fcntl(pipe.as_fd(), FcntlArg::F_GETFL)?);
    fcntl(pipe.as_fd(), FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    fn shell(script: &str) -> Child {
        let mut command = Command::new("sh");
        command.args(["-c", script]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().unwrap()
    }

    #[test]
    fn a_program_that_ends_has_said_all_and_how_it_ended() {
        let input = vec![b'x'; 1 << 20];
        let said = output(&mut shell("cat; echo done >&2; exit 3"), &input, Deadline::after(LONG)).unwrap();
        assert_eq!((said.stdout.len(), said.stderr.as_slice(), said.status.code()), (1 << 20, &b"done\n"[..], Some(3)));
        // It need not read what it is told.
        let said = output(&mut shell("exec <&-; echo no"), &input, Deadline::after(LONG)).unwrap();
        assert_eq!(said.stdout, b"no\n");
    }

    #[test]
    fn a_program_that_does_not_end_is_killed_whatever_it_has_left_open() {
        for script in ["sleep 1000", "exec sleep 1000", "exec >&- 2>&- <&-; exec sleep 1000", "sleep 1000 & wait"] {
            let mut child = shell(script);
            let (start, input) = (Instant::now(), vec![b'x'; 1 << 20]);
            let error = output(&mut child, &input, Deadline::after(Duration::from_millis(200))).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::TimedOut, "{script}");
            assert!(start.elapsed() < LONG / 2, "{script}");
            assert!(child.try_wait().unwrap().is_some(), "{script}: it is reaped");
        }
    }

    #[test]
    fn nobody_waits_for_a_reader_that_does_not_read() {
        let mut child = shell("sleep 1000");
        let (mut stdin, deadline) = (child.stdin.take().unwrap(), Deadline::after(Duration::from_millis(200)));
        let error = write_all(&mut stdin, &vec![b'x'; 1 << 20], deadline).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
