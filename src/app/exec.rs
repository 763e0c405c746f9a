//! `exec`: one command in a private namespace whose only way out is us. No root, nothing on the host changes.

use std::ffi::OsString;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::Context as _;
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd, siginfo};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::unistd::Pid;
use tokio::io::unix::AsyncFd;

use super::build::{self, Addresses, Outside};
use super::limits::{enough_for_a_command, raise_descriptor_limit};
use super::worker::{self, Drain, Seed, Worker};
use crate::platform::rootless::{self, Inside};
use crate::platform::{Dialer, TunQueue, ignore_children, is_ignored, mind_children};
use crate::profile::Profile;

/// The hidden subcommand of the child half.
const INSIDE: &str = "inside";
/// How long data that the command left in its sockets may take to arrive.
const DRAIN: Drain = Drain { quiet: Duration::from_millis(500), most: Duration::from_secs(30) };

/// What a profile says of the host: nothing of it is asked in a private namespace.
pub const WITHOUT_MEANING_IN_EXEC: &[&str] = &[
    "tun.exclude-interface",
    "tun.include-interface",
    "tun.iproute2-rule-index",
    "tun.iproute2-table-index",
    "tun.kill-switch",
];

/// What is passed on to the command. The last tells of its end.
const PASSED: [Signal; 13] = [
    Signal::SIGINT,
    Signal::SIGQUIT,
    Signal::SIGTERM,
    Signal::SIGHUP,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGALRM,
    Signal::SIGVTALRM,
    Signal::SIGPROF,
    Signal::SIGIO,
    Signal::SIGPWR,
    Signal::SIGSTKFLT,
    Signal::SIGCHLD,
];

/// Runs `command` behind `profile`; returns the exit code to pass on (128 + n for signal n).
///
/// Must be called while the process has a single thread.
///
/// # Errors
/// The namespace cannot be made, a part cannot be built, or the command cannot be run ([`exit_code`]).
pub fn exec(profile: &Profile, command: &[OsString]) -> anyhow::Result<u8> {
    enough_for_a_command()?;
    let addresses = Addresses::of(profile);
    let inside = Inside {
        addresses: addresses.device.clone(),
        mtu: u32::from(profile.tun.mtu),
        nameserver: addresses.dns[0],
        queues: 1,
        dies_with_command: false,
    };
    let (channel, mut child) = start_child(&inside, command, Stdio::inherit())?;
    // The command keeps the limit that it was given; the sockets behind it are ours.
    raise_descriptor_limit();
    let queues = match rootless::receive(&channel) {
        Ok(queues) => queues,
        Err(error) => {
            let _ = child.wait();
            return Err(error.into());
        }
    };
    let stand_ins: Vec<OwnedFd> = queues.iter().filter_map(TunQueue::stand_in).collect();
    let signals = Signals::new()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        // Nobody else dials through the namespace around us, so no mark is needed there.
        let core = build::core(profile, Outside::Apart, Dialer::default(), None, true).await?;
        let (ended, _) = tokio::sync::mpsc::unbounded_channel();
        let mut workers = Vec::new();
        for (number, tun) in addresses.tuns(profile, queues).into_iter().enumerate() {
            let seed = Seed { tun: Some(tun), core: core.clone(), ended: ended.clone() };
            workers.push(Worker::start(number, seed)?);
        }
        // SAFETY: it owns its one descriptor and never exchanges it.
        let signals = unsafe { AsyncFd::register(signals) }?;
        let status = match rootless::go(&channel) {
            Ok(()) => wait(child, &signals).await?,
            Err(error) => {
                let _ = child.wait();
                return Err(error.into());
            }
        };
        // The namespace lives as long as its device: what the command left in its sockets still arrives.
        worker::drain(&workers, DRAIN, impatience(&signals)).await;
        worker::end(&workers, false);
        // Whoever is left in the background would wait for answers that nobody gives.
        for failure in stand_ins.iter().filter_map(|beside| rootless::take_down(beside).err()) {
            tracing::debug!("the device of the namespace stays up: {failure}");
        }
        Ok(code(status))
    })
}

/// The exit code that tells of `error`: 127 when the command of [`exec`] was not found, 126 when it cannot be run.
#[must_use]
pub fn exit_code(error: &anyhow::Error) -> u8 {
    error.downcast_ref::<rootless::ChildError>().map_or(1, rootless::ChildError::code)
}

/// The child half: returns only if something went wrong: the exit code, once the parent was told what.
///
/// # Errors
/// There is no parent to be told.
pub fn inside(channel: i32, description: &str, command: Vec<OsString>) -> anyhow::Result<u8> {
    let inside = serde_json::from_str(description).context("this subcommand is for `exec` alone")?;
    Ok(rootless::enter(&inside, channel, command)?)
}

/// Starts the child half, which makes the namespace `inside` and hands its device over the channel. The process must
/// have a single thread.
pub(super) fn start_child(inside: &Inside, command: &[OsString], output: Stdio) -> anyhow::Result<(OwnedFd, Child)> {
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
        .map_err(rootless::kept("open a channel to the private namespace"))?;
    let number = theirs.as_raw_fd();
    // Its end is what we wait for. The command gets from us what a parent without us would have given it.
    let forgotten = mind_children()?;
    let mut child = Command::new("/proc/self/exe");
    child
        .arg(INSIDE)
        .arg(number.to_string())
        .arg(serde_json::to_string(inside)?)
        .arg("--")
        .args(command)
        .stdout(output);
    // SAFETY: fcntl(2) and sigaction(2) are async-signal-safe, and the process has a single thread anyway.
    unsafe {
        child.pre_exec(move || {
            // The one descriptor that the child shall inherit.
            nix::errno::Errno::result(libc::fcntl(number, libc::F_SETFD, 0))?;
            if forgotten { ignore_children() } else { Ok(()) }
        });
    }
    let child = child.spawn().map_err(rootless::kept("start the private namespace"))?;
    Ok((ours, child))
}

/// The signals that are passed on, as the kernel describes them: blocked in this thread, and in every one that it
/// starts from then on, so that none is lost between two looks.
struct Signals(SignalFd);

impl Signals {
    fn new() -> nix::Result<Self> {
        let mask: SigSet = PASSED.into_iter().collect();
        mask.thread_block()?;
        Ok(Self(SignalFd::with_flags(&mask, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?))
    }
}

impl AsRawFd for Signals {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// The next signal and where it came from.
async fn next(signals: &AsyncFd<Signals>) -> std::io::Result<(Signal, siginfo)> {
    loop {
        let mut guard = signals.readable().await?;
        match signals.get_ref().0.read_signal()? {
            Some(info) => {
                if let Ok(signal) = Signal::try_from(info.ssi_signo.cast_signed()) {
                    return Ok((signal, info));
                }
            }
            None => guard.clear_ready(),
        }
    }
}

/// Waits for the command, passing signals on.
async fn wait(mut child: Child, signals: &AsyncFd<Signals>) -> anyhow::Result<ExitStatus> {
    let pid = Pid::from_raw(child.id().cast_signed());
    loop {
        // Until it is waited for, the number is the command's and nobody else's.
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        let (signal, info) = next(signals).await?;
        if signal != Signal::SIGCHLD && !by_terminal(signal, &info) {
            let _ = kill(pid, signal);
        }
    }
}

/// A terminal gives these two to the whole foreground group, the command included. It is the kernel that sends them
/// then; what somebody sent to us alone bears another code (sigaction(2)).
fn by_terminal(signal: Signal, info: &siginfo) -> bool {
    matches!(signal, Signal::SIGINT | Signal::SIGQUIT) && info.ssi_code == libc::SI_KERNEL
}

/// Ready when somebody wants us to end now.
async fn impatience(signals: &AsyncFd<Signals>) {
    while let Ok((signal, _)) = next(signals).await {
        let ends = matches!(signal, Signal::SIGINT | Signal::SIGQUIT | Signal::SIGTERM | Signal::SIGHUP);
        // What `nohup` and the like have had ignored is no wish of anybody's.
        if ends && !is_ignored(signal) {
            return;
        }
    }
    std::future::pending::<()>().await;
}

fn code(status: ExitStatus) -> u8 {
    let code = status.code().or(status.signal().map(|signal| 128 + signal)).unwrap_or(1);
    u8::try_from(code).unwrap_or(1)
}
