//! Our firewall table, kept by a child of ours: it is owned by the child's netlink socket, so nobody else can change
//! it, and it vanishes with the child, which goes when our end of its input closes, however we die.

use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStderr, ChildStdin, Command, Output, Stdio};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::capability;
use crate::platform::firewall::{self, Nft};
use crate::platform::survey::NftState;

/// Where nft is looked for. It gets CAP_NET_ADMIN from us, so it must be where only root can put it: the caller's PATH
/// is the caller's.
const PROGRAMS: [&str; 5] =
    ["/usr/sbin/nft", "/sbin/nft", "/usr/local/sbin/nft", "/usr/bin/nft", "/run/current-system/sw/bin/nft"];
/// All of the environment that it gets: by others the caller could have it load a library of theirs (ld.so(8)), which
/// would get CAP_NET_ADMIN as well. An interactive nft would keep its history at home.
const ENVIRONMENT: [(&str, &str); 3] = [("LC_ALL", "C"), ("HOME", "/nonexistent"), ("TERM", "dumb")];
/// How long nft may take. A busy kernel may hold its lock for a while.
const PATIENCE: Duration = Duration::from_secs(10);

/// Where the program is, if it is installed.
#[must_use]
pub fn program() -> Option<&'static str> {
    PROGRAMS.into_iter().find(|program| std::path::Path::new(program).exists())
}

/// The rules in force, without counters and the elements of sets (of which a firewall may have millions).
///
/// # Errors
/// nft's own words, or that it is not there.
pub fn ruleset() -> Result<String, String> {
    match run(&["--stateless", "--terse", "list", "ruleset"], "") {
        Ok(output) if output.status.success() => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        Ok(output) => Err(first_line(&output.stderr)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err("the program nft is not installed".to_owned()),
        Err(error) => Err(format!("nft: {error}")),
    }
}

/// What is in force, as the plan needs it.
pub(in crate::platform) fn survey() -> NftState {
    match ruleset() {
        Ok(ruleset) => NftState::Present {
            tables: firewall::table_names(&ruleset).collect(),
            mark_bits: firewall::mark_bits(&ruleset),
            dropping_forward: firewall::dropping_forward(&ruleset),
        },
        Err(why) => NftState::Missing(why),
    }
}

/// Has nft and the kernel check the table without loading it.
pub(in crate::platform) fn check(nft: &Nft) -> Result<(), String> {
    match run(&["--check", "--file", "-"], &nft.text) {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => Err(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

/// A loaded table and the child that owns it.
#[derive(Debug)]
pub(in crate::platform) struct OwnedTable {
    nft: Nft,
    child: Child,
    input: ChildStdin,
    errors: ChildStderr,
}

impl OwnedTable {
    /// Loads the table as one batch: all of it, or nothing.
    ///
    /// # Errors
    /// nft's own words.
    pub(in crate::platform) fn load(nft: &Nft) -> io::Result<Self> {
        let mut child = spawn(|command| {
            // Ctrl-C goes to the whole foreground group; the table must outlast the drain.
            command.arg("--interactive").stdout(Stdio::null()).process_group(0);
        })?;
        let (Some(input), Some(errors)) = (child.stdin.take(), child.stderr.take()) else {
            return Err(io::Error::other("nft was started without pipes"));
        };
        let mut table = Self { nft: nft.clone(), child, input, errors };
        table.feed(&nft.text)?;
        // Not every nft complains of what it passes over.
        match table.is_loaded() {
            true => Ok(table),
            false => Err(io::Error::other("nft has loaded it in part only")),
        }
    }

    /// Whether the table is in force, with every chain.
    pub(in crate::platform) fn is_loaded(&self) -> bool {
        let Ok(output) = run(&["--terse", "list", "table", "inet", &self.nft.table], "") else { return false };
        let listed = String::from_utf8_lossy(&output.stdout);
        self.nft.chains().all(|name| listed.contains(&format!("chain {name} {{")))
    }

    /// Empties a chain of the table; nothing to do where there is none of that name.
    ///
    /// # Errors
    /// nft's own words.
    pub(in crate::platform) fn flush(&mut self, chain: &str) -> io::Result<()> {
        if !self.nft.chains().any(|name| name == chain) {
            return Ok(());
        }
        // Only the owner may.
        self.feed(&format!("flush chain inet {} {chain}", self.nft.table))
    }

    /// Has the child carry out `text` as one batch.
    fn feed(&mut self, text: &str) -> io::Result<()> {
        // Interactive nft takes one line at a time, and one line is one transaction. It says nothing about success, so
        // a second line asks for what cannot exist: its complaint tells that the first is through.
        let sentinel = format!("{}-is-through", self.nft.table);
        let line = text.replace('\n', " ");
        self.input.write_all(format!("{line}\nlist table inet {sentinel}\n").as_bytes())?;
        let said = self.hear(&sentinel)?;
        // What points at the words of an earlier complaint may come as late as this: "    ^^^^".
        match said.lines().find(|line| line.contains(char::is_alphanumeric)) {
            None => Ok(()),
            Some(complaint) => Err(io::Error::other(complaint.trim().to_owned())),
        }
    }

    /// What the child complains of before it complains of `sentinel`.
    fn hear(&mut self, sentinel: &str) -> io::Result<String> {
        let deadline = Instant::now() + PATIENCE;
        let (mut heard, mut buffer) = (Vec::new(), [0; 4096]);
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            if poll(&mut [PollFd::new(self.errors.as_fd(), PollFlags::POLLIN)], timeout)? == 0 {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "nft does not answer"));
            }
            let length = self.errors.read(&mut buffer)?;
            heard.extend_from_slice(&buffer[..length]);
            let text = String::from_utf8_lossy(&heard);
            if length == 0 {
                let said = format!("nft has ended: {}", text.trim());
                return Err(io::Error::new(io::ErrorKind::BrokenPipe, said));
            }
            // The complaint is "Error: No such file or directory", then the line it is about.
            if let Some((before, _)) = text.split_once(sentinel) {
                let before = before.rsplit_once("Error:").map_or(before, |(before, _)| before);
                return Ok(before.to_owned());
            }
        }
    }
}

impl Drop for OwnedTable {
    fn drop(&mut self) {
        // The kernel takes an owned table down before the owner's exit is seen.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn run(arguments: &[&str], input: &str) -> io::Result<Output> {
    let mut child = spawn(|command| {
        command.args(arguments).stdout(Stdio::piped());
    })?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(input.as_bytes())?;
    }
    child.wait_with_output()
}

fn spawn(prepare: impl Fn(&mut Command)) -> io::Result<Child> {
    let mut missing = io::Error::from(io::ErrorKind::NotFound);
    for program in PROGRAMS {
        let mut command = Command::new(program);
        command.env_clear().envs(ENVIRONMENT).stdin(Stdio::piped()).stderr(Stdio::piped());
        capability::hand_down_net_admin(&mut command);
        prepare(&mut command);
        match command.spawn() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => missing = error,
            other => return other,
        }
    }
    Err(missing)
}

fn first_line(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).lines().next().unwrap_or("nft failed and said nothing").to_owned()
}
