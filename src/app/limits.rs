//! The process's own limits.

use std::io;

use anyhow::bail;
use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::platform::descriptors;

/// Descriptors that a run takes before it carries a flow, with what it needs now and then: nft, a look at the host, those who
/// ask for its status.
const OF_A_RUN: u64 = 48;
/// The same of each worker.
const OF_A_WORKER: u64 = 8;
/// Descriptors that `exec` keeps open: the channel to its child; the device, and the socket beside a stand-in of it; the signals;
/// for each of two runtimes an epoll(7), a second name of that, an eventfd and a socket; and the pair behind these sockets.
const KEPT_BY_EXEC: u64 = 1 + 2 + 1 + 2 * 4 + 2;
/// So many flows of its command there are room for at least.
const FIRST_FLOWS: u64 = 4;
/// Descriptors that `exec` takes beside [`STANDARD`] ones. Of a small limit flows have three quarters, which are those with the
/// lowest numbers (`Dialer::for_flows`): there all that is kept open must be as well. The last quarter is for questions.
const OF_A_COMMAND: u64 = ((STANDARD - 1 + KEPT_BY_EXEC + FIRST_FLOWS) * 4).div_ceil(3) - STANDARD;
/// Where a limit is raised.
const RAISE: &str = "raise it, with LimitNOFILE=65536 in a systemd unit or `ulimit -n 65536` in a shell (beyond `ulimit -Hn` as \
                     root), and start again";

/// Thousands of flows are thousands of sockets.
pub(super) fn raise_descriptor_limit() {
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}

/// Whether there are enough descriptors for a run of so many workers: with too few it would fail halfway, or when the host
/// changes.
///
/// # Errors
/// There are not.
pub(super) fn enough_descriptors(workers: usize) -> anyhow::Result<()> {
    let open = std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count) as u64;
    match too_few(descriptors(), open, of_a_run(workers)) {
        Some(why) => bail!("{why}"),
        None => Ok(()),
    }
}

/// Why a run that is started as this program was would not begin, if it is for want of descriptors.
pub(super) fn refuses_a_start(workers: usize) -> Option<String> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).ok()?;
    too_few(hard, STANDARD, of_a_run(workers))
}

/// Whether there are enough descriptors for `exec`, once it has raised its limit: with too few its command would run without a
/// network.
///
/// # Errors
/// There are not.
pub(super) fn enough_for_a_command() -> anyhow::Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    let open = std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count) as u64;
    match too_few(hard, open.max(STANDARD), OF_A_COMMAND) {
        Some(why) => bail!("{why}"),
        None => Ok(()),
    }
}

fn of_a_run(workers: usize) -> u64 {
    OF_A_RUN + OF_A_WORKER * workers as u64
}

/// Why what takes `least` descriptors cannot begin where a process may have `limit` files open, if it cannot. `open`: those that
/// it was started with.
fn too_few(limit: u64, open: u64, least: u64) -> Option<String> {
    (limit < least + open).then(|| {
        let taken = if open > STANDARD { format!(", of which {open} are taken") } else { String::new() };
        format!(
            "a process may have no more than {limit} files open here{taken}, and tunproxy takes {} before it carries \
             anything; {RAISE}. Nothing was changed",
            least + open
        )
    })
}

/// Those that every process has, and one with which the others are counted.
const STANDARD: u64 = 4;

/// What to do about `error` if it says that descriptors have run out.
#[must_use]
pub fn descriptors_note(error: &anyhow::Error) -> Option<String> {
    let errno = |cause: &(dyn std::error::Error + 'static)| {
        let number = cause.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error);
        number.map(Errno::from_raw).or_else(|| cause.downcast_ref::<Errno>().copied())
    };
    match error.chain().find_map(errno)? {
        Errno::EMFILE => {
            Some(format!("This process may have no more than {} files open (RLIMIT_NOFILE): {RAISE}", descriptors()))
        }
        Errno::ENFILE => Some(
            "The whole system has no file descriptors left: look who has so many open, or raise sysctl fs.file-max"
                .to_owned(),
        ),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use anyhow::Context as _;

    use super::*;

    #[test]
    fn what_a_run_was_started_with_is_not_there_for_it() {
        assert_eq!(too_few(1024, 4, of_a_run(8)), None);
        assert_eq!(too_few(68, 4, of_a_run(2)), None);
        let told = too_few(67, 4, of_a_run(2)).unwrap();
        assert!(told.contains("67 files") && told.contains("takes 68") && told.contains("LimitNOFILE="), "{told}");
        assert!(!told.contains("taken"), "{told}");
        assert!(too_few(1024, 1000, of_a_run(8)).unwrap().contains("of which 1000 are taken"));
    }

    #[test]
    fn with_the_least_that_exec_takes_flows_find_descriptors() {
        let limit = STANDARD + OF_A_COMMAND;
        assert_eq!(limit, 28);
        assert!(limit - limit / 4 >= STANDARD - 1 + KEPT_BY_EXEC + FIRST_FLOWS);
    }

    #[test]
    fn an_end_for_want_of_descriptors_is_told_with_what_to_do_and_no_other() {
        let failed = |number| {
            let error: anyhow::Result<()> = Err(io::Error::from_raw_os_error(number).into());
            descriptors_note(&error.context("open a netlink socket").unwrap_err())
        };
        assert!(failed(libc::EMFILE).unwrap().contains("LimitNOFILE="));
        assert!(failed(libc::ENFILE).unwrap().contains("fs.file-max"));
        assert_eq!(failed(libc::ENODEV), None);
        assert!(descriptors_note(&Errno::EMFILE.into()).is_some());
    }
}
