//! Why a journal cannot be used, and what to do then.

use std::fmt;
use std::io;
use std::path::PathBuf;

use super::file;
use super::format::{OLDEST, VERSION};
use crate::platform::imp::process::Condition;

/// What to do about a journal that cannot be used.
const REMEDY: &str = "Undo by hand what it stood for (`ip rule` and `ip -6 rule` show our rules as `proto kernel`, \
                      from priority 9000 on), or reboot; look at /etc/resolv.conf; then delete the file";

/// What there is to say of a run in that condition.
pub const SUSPENDED: &str = "it is suspended (by SIGSTOP or Ctrl-Z), so that it neither carries traffic nor answers";

/// How a suspended process goes on.
#[must_use]
pub fn let_go_on(pid: impl fmt::Display) -> String {
    format!("`kill -CONT {pid}` lets it go on")
}

/// Why the journal cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// Somebody else has the state directory.
    Locked {
        /// The state directory.
        dir: PathBuf,
        /// The process that holds it, as far as it says.
        pid: String,
        /// How it stands with that process.
        holder: Condition,
    },
    /// Somebody has deleted the state directory of a run that goes on.
    Lost {
        /// The state directory.
        dir: PathBuf,
        /// The process of that run.
        pid: i32,
    },
    /// A newer program wrote it.
    Version {
        /// The journal.
        path: PathBuf,
        /// Its version.
        found: String,
    },
    /// It does not begin as a journal does.
    Foreign {
        /// The journal.
        path: PathBuf,
    },
    /// A line was changed after it had been written. What it stood for is not known, so nothing is undone.
    Damaged {
        /// The journal.
        path: PathBuf,
        /// The line, counted from 1.
        line: usize,
        /// What is wrong with it.
        why: &'static str,
    },
    /// It is nothing that a run of ours writes, or others may have written it.
    Untrusted {
        /// The journal.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
        /// What to do first.
        remedy: String,
    },
    /// The file system refuses.
    Io {
        /// What was tried.
        act: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
}

impl JournalError {
    /// What is wrong, without what to do about it.
    #[must_use]
    pub fn what(&self) -> String {
        match self {
            Self::Locked { dir, pid, holder: Condition::Suspended } => {
                format!("another run (process {pid}) uses {}, and {SUSPENDED}", dir.display())
            }
            Self::Locked { dir, pid, .. } => format!("another run (process {pid}) uses {}", dir.display()),
            Self::Lost { dir, pid } => {
                format!("process {pid} runs with {}, which was deleted since and could not be put back", dir.display())
            }
            Self::Version { path, found } => {
                format!("{} is of version {found}, this program knows versions {OLDEST} to {VERSION}", path.display())
            }
            Self::Foreign { path } => {
                format!(
                    "{} is no journal of tunproxy, or its first line is damaged; nothing was undone",
                    path.display()
                )
            }
            Self::Damaged { path, line, why } => format!(
                "line {line} of {} {why}: somebody edited it, or the disk damaged it. Nothing was undone",
                path.display()
            ),
            Self::Untrusted { path, why, .. } => format!("{} {why}; nothing was undone", path.display()),
            Self::Io { act, path, source } => format!("{act} {}: {source}", path.display()),
        }
    }

    /// What to do about it; empty where nobody knows better than the system's own words.
    #[must_use]
    pub fn advice(&self) -> String {
        match self {
            Self::Locked { pid, holder: Condition::Suspended, .. } => {
                format!("{}; then `tunproxy stop` ends it, too", let_go_on(pid))
            }
            Self::Locked { .. } => "stop it (`tunproxy stop`), or give this one its own --state-dir".to_owned(),
            Self::Lost { dir, pid } => format!(
                "its log says why; `kill {pid}` ends it and puts the host back, `mkdir -m 700 -p {}` (by its user) lets it go on",
                dir.display()
            ),
            Self::Version { .. } => {
                "run `cleanup` with the version that wrote it, or reboot and delete the file".to_owned()
            }
            Self::Foreign { .. } => format!("Is this the right state directory? {REMEDY}"),
            Self::Damaged { .. } => REMEDY.to_owned(),
            Self::Untrusted { remedy, .. } => format!(
                "{remedy}. Or put it aside, and undo what it stood for by hand (`tunproxy doctor` shows what stands) or reboot; \
                 or name another --state-dir"
            ),
            Self::Io { act, path, source } => file::advice(act, path, source),
        }
    }
}

impl fmt::Display for JournalError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (what, advice) = (self.what(), self.advice());
        match self {
            _ if advice.is_empty() => f.write_str(&what),
            Self::Locked { .. } | Self::Lost { .. } | Self::Io { .. } => write!(f, "{what}; {advice}"),
            Self::Version { .. } => write!(f, "{what}: {advice}"),
            Self::Foreign { .. } | Self::Damaged { .. } | Self::Untrusted { .. } => {
                write!(f, "{what}. {advice}")
            }
        }
    }
}
