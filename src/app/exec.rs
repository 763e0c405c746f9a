//! `exec`: one command in a private namespace whose only way out is us. No root, nothing on the host changes.

use std::ffi::OsString;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::Context as _;
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::unistd::Pid;
use tokio::signal::unix::{SignalKind, signal};

use super::build::{self, Addresses};
use super::worker::{Drain, Seed, Worker};
use crate::platform::Dialer;
use crate::platform::rootless::{self, Inside};
use crate::profile::Profile;

/// The hidden subcommand of the child half.
const INSIDE: &str = "inside";
/// How long data that the command left in its sockets may take to arrive.
const DRAIN: Drain = Drain { quiet: Duration::from_millis(500), most: Duration::from_secs(30) };

/// Runs `command` behind `profile`; returns the exit code to pass on (128 + n for signal n).
///
/// Must be called while the process has a single thread.
///
/// # Errors
/// The namespace cannot be made, or a part cannot be built.
pub fn exec(profile: &Profile, command: &[OsString]) -> anyhow::Result<u8> {
    let addresses = Addresses::of(profile);
    let inside = Inside {
        addresses: addresses.device.clone(),
        mtu: u32::from(profile.tun.mtu),
        nameserver: addresses.dns[0],
        queues: 1,
    };
    let (channel, mut child) = start_child(&inside, command, Stdio::inherit())?;
    let queues = match rootless::receive(&channel) {
        Ok(queues) => queues,
        Err(error) => {
            let _ = child.wait();
            return Err(error.into());
        }
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        // Nobody else dials through the namespace around us, so no mark is needed there.
        let core = build::core(profile, Dialer::default(), None).await?;
        let (ended, _) = tokio::sync::mpsc::unbounded_channel();
        let mut workers = Vec::new();
        for (number, tun) in addresses.tuns(profile, queues).into_iter().enumerate() {
            let seed = Seed { tun: Some(tun), core: core.clone(), ended: ended.clone() };
            workers.push(Worker::start(number, seed)?);
        }
        rootless::go(&channel).context("the private namespace is gone")?;
        let status = wait(child).await?;
        // The namespace lives as long as its device: what the command left in its sockets still arrives.
        workers.iter().for_each(|worker| worker.drain(DRAIN));
        for failure in workers.iter().filter_map(|worker| worker.join().err()) {
            tracing::error!("a worker failed: {failure}");
        }
        Ok(code(status))
    })
}

/// The child half: never returns unless something went wrong.
///
/// # Errors
/// The description of the namespace is not ours.
pub fn inside(channel: i32, description: &str, command: Vec<OsString>) -> anyhow::Error {
    match serde_json::from_str(description) {
        Ok(inside) => rootless::enter(&inside, channel, command).into(),
        Err(error) => anyhow::Error::from(error).context("this subcommand is for `exec` alone"),
    }
}

/// Starts the child half, which makes the namespace `inside` and hands its device over the channel. The process must
/// have a single thread.
pub(super) fn start_child(inside: &Inside, command: &[OsString], output: Stdio) -> anyhow::Result<(OwnedFd, Child)> {
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
    let number = theirs.as_raw_fd();
    let mut child = Command::new("/proc/self/exe");
    child
        .arg(INSIDE)
        .arg(number.to_string())
        .arg(serde_json::to_string(inside)?)
        .arg("--")
        .args(command)
        .stdout(output);
    // SAFETY: fcntl(2) is async-signal-safe, and the process has a single thread anyway.
    unsafe {
        child.pre_exec(move || {
            // The one descriptor that the child shall inherit.
            nix::errno::Errno::result(libc::fcntl(number, libc::F_SETFD, 0)).map(drop).map_err(Into::into)
        });
    }
    let child = child.spawn().context("cannot start the private namespace")?;
    Ok((ours, child))
}

/// Waits for the command, passing signals on.
async fn wait(mut child: Child) -> anyhow::Result<ExitStatus> {
    let pid = Pid::from_raw(child.id().cast_signed());
    let mut exited = tokio::task::spawn_blocking(move || child.wait());
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut quit = signal(SignalKind::quit())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hangup = signal(SignalKind::hangup())?;
    let mut one = signal(SignalKind::user_defined1())?;
    let mut two = signal(SignalKind::user_defined2())?;
    loop {
        let passed = tokio::select! {
            status = &mut exited => return Ok(status??),
            _ = interrupt.recv() => Signal::SIGINT,
            _ = quit.recv() => Signal::SIGQUIT,
            _ = terminate.recv() => Signal::SIGTERM,
            _ = hangup.recv() => Signal::SIGHUP,
            _ = one.recv() => Signal::SIGUSR1,
            _ = two.recv() => Signal::SIGUSR2,
        };
        // A terminal gives these two to the whole foreground group, the command included.
        let by_terminal = matches!(passed, Signal::SIGINT | Signal::SIGQUIT) && in_foreground();
        if !by_terminal {
            let _ = kill(pid, passed);
        }
    }
}

fn in_foreground() -> bool {
    nix::unistd::tcgetpgrp(std::io::stdin()).is_ok_and(|group| group == nix::unistd::getpgrp())
}

fn code(status: ExitStatus) -> u8 {
    let code = status.code().or(status.signal().map(|signal| 128 + signal)).unwrap_or(1);
    u8::try_from(code).unwrap_or(1)
}
