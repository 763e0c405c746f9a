//! How it stands with another process, by proc(5).

use std::fs;
use std::path::Path;

/// `PF_EXITING` of the kernel: it gives back what it has, and runs no more of its program.
const EXITING: u64 = 0x4;
/// SIGKILL in a mask of signals.
const KILL: u64 = 1 << (libc::SIGKILL - 1);

/// How it stands with a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Condition {
    /// There is none of that number, as far as can be seen from here, or nothing of it but how it has ended.
    Gone,
    /// It was killed, and the kernel is about to take back what it holds: locks, ports, a TUN.
    Dying,
    /// A signal has stopped it (SIGSTOP, or Ctrl-Z): it does nothing until SIGCONT.
    Suspended,
    /// None of these.
    Alive,
}

/// How it stands with process `pid`.
#[must_use]
pub fn condition(pid: i32) -> Condition {
    let read = |path: String| fs::read_to_string(path).ok();
    let Some(stat) = read(format!("/proc/{pid}/stat")) else { return Condition::Gone };
    let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().filter_map(Result::ok);
    let status = |thread: fs::DirEntry| fs::read_to_string(thread.path().join("status")).ok();
    let threads: Vec<String> = threads.filter_map(status).collect();
    match of_stat(&stat) {
        // The first thread waits for the others, which hold what they share.
        Condition::Gone if threads.len() > 1 => Condition::Dying,
        Condition::Gone => Condition::Gone,
        // What kills a process is pending for each of its threads, until that has run.
        _ if threads.iter().any(|status| is_killed(status)) => Condition::Dying,
        other => other,
    }
}

/// Another process that has a file open which was `path`, and is deleted, as far as this user may look.
pub(in crate::platform) fn holder_of_deleted(path: &Path) -> Option<i32> {
    let deleted = format!("{} (deleted)", path.display());
    let us = std::process::id().cast_signed();
    let has = |link: fs::DirEntry| fs::read_link(link.path()).is_ok_and(|to| to.as_os_str() == deleted.as_str());
    let processes = fs::read_dir("/proc").ok()?.filter_map(Result::ok);
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok()).filter(|pid| *pid != us);
    pids.into_iter().find(|pid| {
        let descriptors = fs::read_dir(format!("/proc/{pid}/fd"));
        descriptors.into_iter().flatten().filter_map(Result::ok).any(has)
    })
}

/// By the text of /proc/PID/stat: "4711 (name) S 1 4711 4711 0 -1 4194560 ...". The name may hold anything.
fn of_stat(stat: &str) -> Condition {
    let Some((_, rest)) = stat.rsplit_once(") ") else { return Condition::Gone };
    let mut fields = rest.split_ascii_whitespace();
    let state = fields.next().unwrap_or_default();
    let flags = fields.nth(5).and_then(|flags| flags.parse().ok()).unwrap_or(0_u64);
    match state {
        "Z" | "X" | "x" => Condition::Gone,
        _ if flags & EXITING != 0 => Condition::Dying,
        "T" => Condition::Suspended,
        _ => Condition::Alive,
    }
}

/// Whether SIGKILL waits for a thread, by the text of its `status`.
fn is_killed(status: &str) -> bool {
    let masks = status.lines().filter_map(|line| line.strip_prefix("SigPnd:").or(line.strip_prefix("ShdPnd:")));
    masks.filter_map(|mask| u64::from_str_radix(mask.trim(), 16).ok()).any(|mask| mask & KILL != 0)
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};

    use nix::sys::signal::{Signal, kill};
    use nix::sys::wait::{Id, WaitPidFlag, waitid};
    use nix::unistd::Pid;

    use super::*;

    fn sleeper() -> (Child, i32) {
        let child = Command::new("sleep").arg("60").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        (child, pid)
    }

    #[test]
    fn a_process_lives_is_suspended_dies_and_is_gone() {
        let (mut child, number) = sleeper();
        let pid = Pid::from_raw(number);
        assert_eq!(condition(number), Condition::Alive);
        kill(pid, Signal::SIGSTOP).unwrap();
        waitid(Id::Pid(pid), WaitPidFlag::WSTOPPED).unwrap();
        assert_eq!(condition(number), Condition::Suspended);
        kill(pid, Signal::SIGCONT).unwrap();
        waitid(Id::Pid(pid), WaitPidFlag::WCONTINUED).unwrap();
        assert_eq!(condition(number), Condition::Alive);
        kill(pid, Signal::SIGKILL).unwrap();
        let killed = condition(number);
        assert!(matches!(killed, Condition::Dying | Condition::Gone), "from the very moment on: {killed:?}");
        waitid(Id::Pid(pid), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT).unwrap();
        assert_eq!(condition(number), Condition::Gone, "though nobody has asked what became of it");
        child.wait().unwrap();
        assert_eq!(condition(number), Condition::Gone);
    }

    #[test]
    fn a_name_may_look_like_a_state() {
        let stat =
            |name: &str, state: &str, flags: u64| of_stat(&format!("7 ({name}) {state} 1 7 7 0 -1 {flags} 0 0 0 0"));
        assert_eq!(stat("a) Z (b", "S", 0x0040_0100), Condition::Alive);
        assert_eq!(stat("a) S (b", "T", 0x0040_0100), Condition::Suspended);
        assert_eq!(stat("tunproxy", "S", 0x0040_0104), Condition::Dying);
        assert_eq!(stat("tunproxy", "Z", 0x0040_0104), Condition::Gone);
        assert_eq!(of_stat("nonsense"), Condition::Gone);
    }

    #[test]
    fn a_kill_that_waits_is_seen_among_other_signals() {
        assert!(is_killed("Name:\tx\nSigPnd:\t0000000000000100\nShdPnd:\t0000000000000000\n"));
        assert!(is_killed("SigPnd:\t0000000000000000\nShdPnd:\t0000000000004102\n"));
        assert!(!is_killed("SigPnd:\t0000000000000002\nShdPnd:\t0000000000004000\nSigBlk:\t0000000000000100\n"));
    }
}
