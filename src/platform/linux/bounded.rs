//! Programs that we run and wait for, but not for ever: a service manager that waits for us would end us in the middle.

use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::process::{Child, Output};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Between two looks whether a program has ended that has closed its output.
const LOOK: Duration = Duration::from_millis(2);
/// What a program that was killed has to end.
const LAST_BREATH: Duration = Duration::from_secs(1);

/// Gives `input` to a child with pipes and waits for its end. A child that has not ended after `patience` is killed and
/// reaped; what it has started itself is not waited for.
///
/// # Errors
/// `TimedOut`: it was killed. Else what reading and waiting report; it is killed then as well.
pub(super) fn output(child: &mut Child, input: &[u8], patience: Duration) -> io::Result<Output> {
    let outcome = talk(child, input, Instant::now() + patience);
    if outcome.is_err() {
        // It may have ended by itself meanwhile.
        let _ = child.kill();
        reap(child, Instant::now() + LAST_BREATH);
    }
    outcome
}

/// Waits for the end of a child that was killed. One that is held up within the kernel stays until we end.
fn reap(child: &mut Child, deadline: Instant) {
    while matches!(child.try_wait(), Ok(None)) && Instant::now() < deadline {
        std::thread::sleep(LOOK);
    }
}

fn talk(child: &mut Child, input: &[u8], deadline: Instant) -> io::Result<Output> {
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
        if Instant::now() >= deadline {
            return Err(io::ErrorKind::TimedOut.into());
        }
        std::thread::sleep(LOOK);
    }
}

/// Writes all of `bytes` to a child that reads them before `deadline`.
///
/// # Errors
/// `TimedOut`, or what writing reports.
pub(super) fn write_all(mut pipe: impl Write + AsFd, mut bytes: &[u8], deadline: Instant) -> io::Result<()> {
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
pub(super) fn wait_for(descriptors: &mut [PollFd<'_>], deadline: Instant) -> io::Result<()> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        // A millisecond more, lest the last one be spent in turns of none.
        let timeout = PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
        match poll(descriptors, timeout) {
            Ok(0) if Instant::now() >= deadline => return Err(io::ErrorKind::TimedOut.into()),
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
        let said = output(&mut shell("cat; echo done >&2; exit 3"), &input, LONG).unwrap();
        assert_eq!((said.stdout.len(), said.stderr.as_slice(), said.status.code()), (1 << 20, &b"done\n"[..], Some(3)));
        // It need not read what it is told.
        let said = output(&mut shell("exec <&-; echo no"), &input, LONG).unwrap();
        assert_eq!(said.stdout, b"no\n");
    }

    #[test]
    fn a_program_that_does_not_end_is_killed_whatever_it_has_left_open() {
        for script in ["sleep 1000", "exec sleep 1000", "exec >&- 2>&- <&-; exec sleep 1000", "sleep 1000 & wait"] {
            let mut child = shell(script);
            let (start, input) = (Instant::now(), vec![b'x'; 1 << 20]);
            let error = output(&mut child, &input, Duration::from_millis(200)).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::TimedOut, "{script}");
            assert!(start.elapsed() < LONG / 2, "{script}");
            assert!(child.try_wait().unwrap().is_some(), "{script}: it is reaped");
        }
    }

    #[test]
    fn nobody_waits_for_a_reader_that_does_not_read() {
        let mut child = shell("sleep 1000");
        let (mut stdin, deadline) = (child.stdin.take().unwrap(), Instant::now() + Duration::from_millis(200));
        let error = write_all(&mut stdin, &vec![b'x'; 1 << 20], deadline).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
