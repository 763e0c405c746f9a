//! The machine: clock, kernel, descriptors, the state directory.

use std::time::{Duration, SystemTime};

use super::super::finding::Finding;
use super::super::record::Record;

/// 2025-10-01: nothing of this program is older.
const WRITTEN: Duration = Duration::from_secs(1_759_276_800);
/// What file systems and time zones may be off by.
const SLACK: Duration = Duration::from_secs(2 * 24 * 3600);
/// Half a human life later no certificate of today is valid.
const LATEST: Duration = Duration::from_secs(30 * 365 * 24 * 3600);
/// `ip rule` with ports and protocols.
const RULES: (u32, u32) = (4, 17);
/// nftables with an owner.
const OWNER: (u32, u32) = (5, 12);
/// Fewer make a busy host wait.
const DESCRIPTORS: u64 = 4096;
/// The journal and the log of fake addresses need little.
const FREE: u64 = 8 << 20;

pub(super) fn check(record: &Record) -> Vec<Finding> {
    let mut found: Vec<Finding> =
        [clock(record), kernel(record), descriptors(record), open_files(record)].into_iter().flatten().collect();
    found.extend(state(record));
    if found.is_empty() {
        found.push(Finding::fine(format!(
            "clock, kernel ({}){} are in order",
            record.system.kernel,
            if record.system.state.hidden { " and limits" } else { ", limits and state directory" }
        )));
    }
    found
}

fn clock(record: &Record) -> Option<Finding> {
    let system = &record.system;
    let (now, start) = (system.now, SystemTime::UNIX_EPOCH + WRITTEN);
    let before_file = system.built.is_some_and(|built| now + SLACK < built);
    let wrong = if now + SLACK < start || before_file {
        "before this program was made"
    } else if now > start + LATEST {
        "decades after this program was made"
    } else {
        return None;
    };
    Some(Finding::problem(
        format!("the clock is wrong: it shows a time {wrong}, so that TLS certificates seem invalid"),
        "set it: `sudo timedatectl set-ntp true`, or `sudo date --set=...`",
    ))
}

fn kernel(record: &Record) -> Option<Finding> {
    let release = &record.system.kernel;
    let mut numbers = release.split(['.', '-', '+']).map_while(|part| part.parse::<u32>().ok());
    let version = (numbers.next()?, numbers.next()?);
    let advice = "install a newer kernel: 5.12 or later has all that is needed";
    if version < RULES {
        return Some(Finding::problem(
            format!("the kernel {release} has no routing rules by port and protocol"),
            advice,
        ));
    }
    (version < OWNER).then(|| {
        let what = format!("the kernel {release} has no firewall tables with an owner, so that ours is not loaded");
        Finding::warning(what, advice)
    })
}

fn descriptors(record: &Record) -> Option<Finding> {
    let limit = record.system.descriptors;
    (limit < DESCRIPTORS).then(|| {
        Finding::warning(
            format!("a process may have {limit} files open, and each connection takes two"),
            "raise the hard limit: LimitNOFILE=65536 in a systemd unit, or `ulimit -Hn 65536` as root",
        )
    })
}

fn open_files(record: &Record) -> Option<Finding> {
    let (open, limit) = record.system.open.filter(|(open, limit)| open * 10 >= limit * 9)?;
    Some(Finding::warning(
        format!("tunproxy has {open} of {limit} files open: new connections push out those that are idle longest"),
        "raise the hard limit (LimitNOFILE=65536 in a systemd unit), and look who opens so many: `tunproxy status`",
    ))
}

fn state(record: &Record) -> Vec<Finding> {
    let state = &record.system.state;
    let path = &state.path;
    let mut found = Vec::new();
    if let Some(why) = &state.closed {
        found.push(Finding::problem(
            format!("nothing can be written to the state directory {path}: {why}; without its journal no run starts"),
            "make it writable, or name another with --state-dir",
        ));
    }
    if let Some((what, advice)) = &state.distrusted {
        found.push(Finding::warning(what.clone(), advice.clone()));
    }
    if state.free < FREE {
        found.push(Finding::problem(
            format!("the disk that holds the state directory {path} is full: {} KiB are free", state.free >> 10),
            "delete something there, or name another directory with --state-dir",
        ));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::super::super::fixture::{only_problem, quiet, running, warnings};
    use super::*;

    #[test]
    fn a_machine_of_today_is_fine() {
        assert!(only_problem(&check(&quiet())).is_none());
        assert!(only_problem(&check(&running())).is_none());
    }

    #[test]
    fn a_clock_that_stands_before_the_program_or_decades_later_is_wrong() {
        let mut record = quiet();
        for wrong in [Duration::ZERO, WRITTEN + LATEST + SLACK] {
            record.system.now = SystemTime::UNIX_EPOCH + wrong;
            assert!(only_problem(&check(&record)).unwrap().what.contains("the clock is wrong"));
        }
        record.system.now = SystemTime::UNIX_EPOCH + WRITTEN + SLACK;
        assert!(only_problem(&check(&record)).is_none());
        record.system.built = Some(record.system.now + SLACK + SLACK);
        assert!(only_problem(&check(&record)).is_some());
    }

    #[test]
    fn an_old_kernel_a_low_limit_and_a_full_or_closed_disk_are_named() {
        let with = |change: &dyn Fn(&mut Record)| {
            let mut record = quiet();
            change(&mut record);
            check(&record)
        };
        assert!(only_problem(&with(&|it| it.system.kernel = "4.9.0-19-amd64".to_owned())).is_some());
        assert!(warnings(&with(&|it| it.system.kernel = "5.10.0-28-amd64".to_owned()))[0].contains("owner"));
        assert!(only_problem(&with(&|it| it.system.kernel = "6.18+".to_owned())).is_none());
        assert!(warnings(&with(&|it| it.system.descriptors = 1024))[0].contains("1024"));
        assert!(only_problem(&with(&|it| it.system.state.free = 0)).unwrap().what.contains("is full"));
        assert!(warnings(&with(&|it| it.system.open = Some((950, 1024))))[0].contains("950 of 1024"));
        assert!(warnings(&with(&|it| it.system.open = Some((95, 1024)))).is_empty());
        let told = |found: &[Finding]| found[0].what.contains("state directory");
        assert!(told(&check(&quiet())) && !told(&with(&|it| it.system.state.hidden = true)), "nobody has looked");
        let open = ("everybody may write to it".to_owned(), "chmod go-w".to_owned());
        let open = with(&|it| it.system.state.distrusted = Some(open.clone()));
        assert!(warnings(&open)[0].contains("everybody may write"), "{open:?}");
        let closed = with(&|it| it.system.state.closed = Some("Read-only file system".to_owned()));
        assert!(only_problem(&closed).unwrap().what.contains("Read-only file system"));
    }
}
