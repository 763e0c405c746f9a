//! What a parent leaves a process: signals that are ignored or blocked (execve(2) keeps both).

use std::io;
use std::sync::OnceLock;

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

/// Whether whoever started us has had `signal` ignored, and nobody here handles it since: `nohup`, or a shell that put us
/// into the background.
#[must_use]
pub fn is_ignored(signal: Signal) -> bool {
    let mut found = std::mem::MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: without a new action the call only writes the old one, of the size that it is given.
    let read = unsafe { libc::sigaction(signal as i32, std::ptr::null(), found.as_mut_ptr()) };
    // SAFETY: it was zeroed, which is an action, and perhaps written.
    read == 0 && unsafe { found.assume_init() }.sa_sigaction == libc::SIG_IGN
}

/// Whether SIGCHLD was ignored when this process began.
static FORGOTTEN: OnceLock<bool> = OnceLock::new();

/// Gives children an end that can be waited for: where SIGCHLD is ignored the kernel forgets them (waitpid(2), ECHILD).
/// Returns whether it was ignored when this was first called.
///
/// # Errors
/// The kernel refuses, which it never does.
pub fn mind_children() -> io::Result<bool> {
    let were_forgotten = *FORGOTTEN.get_or_init(|| is_ignored(Signal::SIGCHLD));
    if were_forgotten {
        set_children(SigHandler::SigDfl)?;
    }
    Ok(were_forgotten)
}

/// Has SIGCHLD ignored again, as a parent had left it. May be called between fork and exec.
///
/// # Errors
/// The kernel refuses, which it never does.
pub fn ignore_children() -> io::Result<()> {
    set_children(SigHandler::SigIgn)
}

fn set_children(handler: SigHandler) -> io::Result<()> {
    let action = SigAction::new(handler, SaFlags::empty(), SigSet::empty());
    // SAFETY: no handler of ours is involved.
    unsafe { sigaction(Signal::SIGCHLD, &action) }?;
    Ok(())
}

/// Lets every signal through to this thread and to those that it starts from then on.
///
/// # Errors
/// The kernel refuses, which it never does.
pub fn unblock_signals() -> io::Result<()> {
    Ok(SigSet::empty().thread_set_mask()?)
}
