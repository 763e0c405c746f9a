//! Our firewall table, kept by a child of ours: it is owned by the child's netlink socket, so nobody else can change
//! it, and it vanishes with the child, which goes when our end of its input closes, however we die.
//!
//! A kill switch's table has no owner: it is to stay however we die, and is taken down by name.

use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStderr, ChildStdin, Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use nix::unistd::{getpid, getppid};
use parking_lot::Mutex;

use super::{bounded, capability};
use crate::platform::firewall::{Nft, TableId, ruleset};
use crate::platform::survey::NftState;
use crate::platform::undo::Undone;

/// Where nft is looked for. It gets CAP_NET_ADMIN from us, so it must be where only root can put it: the caller's PATH
/// is the caller's.
const PROGRAMS: [&str; 5] =
    ["/usr/sbin/nft", "/sbin/nft", "/usr/local/sbin/nft", "/usr/bin/nft", "/run/current-system/sw/bin/nft"];
/// All of the environment that it gets: by others the caller could have it load a library of theirs (ld.so(8)), which
/// would get CAP_NET_ADMIN as well. An interactive nft would keep its history at home.
const ENVIRONMENT: [(&str, &str); 3] = [("LC_ALL", "C"), ("HOME", "/nonexistent"), ("TERM", "dumb")];
/// What nft says of a table that is not there (`strerror(ENOENT)`, in the language of [`ENVIRONMENT`]).
const NO_SUCH_TABLE: &str = "No such file or directory";
/// How long nft may take. A busy kernel may hold its lock for a while.
const PATIENCE: Duration = Duration::from_secs(10);
/// The same where the call before did not end: a stop makes many of them, and a service manager waits for it.
const LITTLE_PATIENCE: Duration = Duration::from_secs(2);

/// The last call did not end.
static HUNG: AtomicBool = AtomicBool::new(false);

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
            tables: ruleset::table_names(&ruleset).collect(),
            mark_bits: ruleset::mark_bits(&ruleset),
            dropping_forward: ruleset::dropping_forward(&ruleset),
            kill_switches: ruleset::kill_switches(&ruleset).into_iter().map(|(table, _)| table).collect(),
        },
        Err(why) => NftState::Missing(why),
    }
}

/// Expressions that are modules or options of their own, which small systems leave out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(in crate::platform) struct Knows {
    /// `socket`.
    pub(in crate::platform) sockets: bool,
    /// `ct mark`.
    pub(in crate::platform) connection_marks: bool,
}

/// Which of them nft and the kernel know. That does not change while we run; what they could not be asked is asked again.
pub(in crate::platform) fn knows() -> Knows {
    static KNOWN: Mutex<Option<Knows>> = Mutex::new(None);
    const SOCKETS: &str = "socket wildcard 1;";
    const MARKS: &str = "ct mark set ct mark | 1;";
    if let Some(known) = *KNOWN.lock() {
        return known;
    }
    let asked = |what: &str| {
        let table =
            format!("table inet tunproxy-asks {{ chain asks {{ type filter hook input priority 0; {what} }}; }};\n");
        Some(run(&["--check", "--file", "-"], &table).ok()?.status.success())
    };
    let known = match asked(&format!("{SOCKETS} {MARKS}")) {
        Some(true) => Some(Knows { sockets: true, connection_marks: true }),
        Some(false) => {
            asked(SOCKETS).zip(asked(MARKS)).map(|(sockets, marks)| Knows { sockets, connection_marks: marks })
        }
        None => None,
    };
    if let Some(Knows { sockets, connection_marks }) = known {
        if !sockets {
            tracing::debug!("nftables has no `socket` here: forged datagrams count as questions");
        }
        if !connection_marks {
            tracing::warn!(
                "nftables cannot mark connections here (CONFIG_NF_CONNTRACK_MARK): a connection that is silent for minutes \
                 may go on past the TUN when the other side speaks first"
            );
        }
    }
    *KNOWN.lock() = known;
    known.unwrap_or_default()
}

/// Has nft and the kernel check the table without loading it.
pub(in crate::platform) fn check(nft: &Nft) -> Result<(), String> {
    match run(&["--check", "--file", "-"], &nft.text) {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => Err(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

/// Loads a table that has no owner, as one batch: all of it, or nothing.
///
/// # Errors
/// nft's own words.
pub(in crate::platform) fn load(nft: &Nft) -> io::Result<()> {
    told(&run(&["--file", "-"], &nft.text)?)?;
    // Not every nft complains of what it passes over.
    match is_loaded(nft)? {
        true => Ok(()),
        false => Err(io::Error::other("nft has loaded it in part only")),
    }
}

/// Makes a table that has no owner that of `nft`, as one batch and never open in between. `stood`: what it was when we
/// wrote it last; where that is still there, what is the same in both is not touched.
///
/// # Errors
/// nft's own words, or a table of somebody else's has taken the name.
pub(in crate::platform) fn stand_again(stood: Option<&Nft>, nft: &Nft) -> io::Result<()> {
    if let Some(stood) = stood
        && is_loaded(stood)?
        && let Some(change) = stood.change_to(nft)
        && told(&run(&["--file", "-"], &change)?).is_ok()
        && is_loaded(nft)?
    {
        return Ok(());
    }
    let table = nft.lasting().ok_or_else(|| io::Error::other("the table has an owner"))?;
    let (removal, foreign) = removal(&table)?;
    if foreign {
        return Err(io::Error::other(format!("another program has made a table {} of its own", nft.table)));
    }
    told(&run(&["--file", "-"], &(removal + &nft.text))?)?;
    match is_loaded(nft)? {
        true => Ok(()),
        false => Err(io::Error::other("nft has loaded it in part only")),
    }
}

/// Whether the tables are in force, with every chain and as many rules in each as it should have.
///
/// # Errors
/// nft cannot be run, or complains of something else than that there is no such table: nobody knows then.
pub(in crate::platform) fn is_loaded(nft: &Nft) -> io::Result<bool> {
    let chains = nft.chain_lines();
    for family in ["inet", "arp"] {
        let mut wanted = chains.iter().filter(|(of, ..)| *of == family).peekable();
        if wanted.peek().is_none() {
            continue;
        }
        let output = run(&["--stateless", "--terse", "list", "table", family, &nft.table], "")?;
        if String::from_utf8_lossy(&output.stderr).contains(NO_SUCH_TABLE) {
            return Ok(false);
        }
        told(&output)?;
        let listed = String::from_utf8_lossy(&output.stdout);
        if !wanted.all(|(_, name, lines)| listed_lines(&listed, name) == Some(*lines)) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// How many lines a listed chain has; a rule that nft breaks over several counts once.
fn listed_lines(listed: &str, chain: &str) -> Option<usize> {
    let (_, chain) = listed.split_once(&format!("\n\tchain {chain} {{\n"))?;
    let lines = chain.lines().take_while(|line| *line != "\t}");
    Some(lines.filter(|line| line.starts_with("\t\t") && !line.starts_with("\t\t\t")).count())
}

/// Takes down tables that have no owner; whatever else is called so stays.
///
/// # Errors
/// nft's own words, or that it is missing.
pub(in crate::platform) fn take_down(table: &TableId) -> io::Result<Undone> {
    let (removal, foreign) = removal(table)?;
    if removal.is_empty() {
        return Ok(if foreign { Undone::LeftAlone } else { Undone::AlreadyGone });
    }
    told(&run(&["--file", "-"], &removal)?)?;
    Ok(Undone::Restored)
}

/// What nft is to be told to take down what there is of `table`, and whether others have tables of that name.
fn removal(table: &TableId) -> io::Result<(String, bool)> {
    let (mut batch, mut foreign) = (String::new(), false);
    for family in ["inet", "arp"] {
        let output = run(&["--terse", "list", "table", family, &table.name], "").map_err(explained)?;
        if output.status.success() {
            let ours = String::from_utf8_lossy(&output.stdout).contains(&format!("comment \"{}\"", table.comment));
            foreign |= !ours;
            batch.push_str(&if ours { format!("delete table {family} {};\n", table.name) } else { String::new() });
        } else if !String::from_utf8_lossy(&output.stderr).contains(NO_SUCH_TABLE) {
            told(&output)?;
        }
    }
    Ok((batch, foreign))
}

/// The child that holds the table is there and says nothing.
fn silent(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::TimedOut => io::Error::new(error.kind(), "nft does not answer"),
        _ => error,
    }
}

fn told(output: &Output) -> io::Result<()> {
    match output.status.success() {
        true => Ok(()),
        false => Err(io::Error::other(first_line(&output.stderr))),
    }
}

/// Only nft can open again what it has closed.
fn explained(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::NotFound => io::Error::new(
            error.kind(),
            "the program nft is not installed, and only it can do this: install it (apt install nftables), or reboot",
        ),
        _ => error,
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
        match is_loaded(nft)? {
            true => Ok(table),
            false => Err(io::Error::other("nft has loaded it in part only")),
        }
    }

    /// Whether the table is in force, with every chain. Where nft cannot say, it is as long as its owner lives.
    pub(in crate::platform) fn is_loaded(&self) -> bool {
        let mut owner = [PollFd::new(self.errors.as_fd(), PollFlags::empty())];
        let gone = poll(&mut owner, PollTimeout::ZERO).is_ok_and(|ready| ready > 0);
        !gone && is_loaded(&self.nft).unwrap_or(true)
    }

    /// Makes the table that of `nft`, as one batch; what is the same in both is not touched.
    ///
    /// # Errors
    /// nft's own words, or there is no way but to load it anew. The table is then what it was.
    pub(in crate::platform) fn change_to(&mut self, nft: &Nft) -> io::Result<()> {
        let text = self.nft.change_to(nft).ok_or_else(|| io::Error::other("it has to be loaded anew"))?;
        if !text.is_empty() {
            self.feed(&text)?;
        }
        self.nft = nft.clone();
        Ok(())
    }

    /// Hangs up when the child has ended, and the table with it.
    pub(in crate::platform) fn lifeline(&self) -> BorrowedFd<'_> {
        self.errors.as_fd()
    }

    /// What was loaded.
    pub(in crate::platform) fn nft(&self) -> &Nft {
        &self.nft
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
        let deadline = Instant::now() + PATIENCE;
        let lines = format!("{line}\nlist table inet {sentinel}\n");
        bounded::write_all(&mut self.input, lines.as_bytes(), deadline).map_err(silent)?;
        let said = self.hear(&sentinel, deadline)?;
        // What points at the words of an earlier complaint may come as late as this: "    ^^^^".
        match said.lines().find(|line| line.contains(char::is_alphanumeric)) {
            None => Ok(()),
            Some(complaint) => Err(io::Error::other(complaint.trim().to_owned())),
        }
    }

    /// What the child complains of before it complains of `sentinel`.
    fn hear(&mut self, sentinel: &str, deadline: Instant) -> io::Result<String> {
        let (mut heard, mut buffer) = (Vec::new(), [0; 4096]);
        loop {
            bounded::wait_for(&mut [PollFd::new(self.errors.as_fd(), PollFlags::POLLIN)], deadline).map_err(silent)?;
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
        end_with_us(command);
    })?;
    let patience = if HUNG.load(Relaxed) { LITTLE_PATIENCE } else { PATIENCE };
    let outcome = bounded::output(&mut child, input.as_bytes(), patience);
    HUNG.store(outcome.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::TimedOut), Relaxed);
    outcome.map_err(|error| match error.kind() {
        io::ErrorKind::TimedOut => {
            let words = format!("`nft {}` does not end: killed after {} s", arguments.join(" "), patience.as_secs());
            io::Error::new(error.kind(), words)
        }
        _ => error,
    })
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

/// A table that is loaded after our death would stand in no journal that is still read. The child ends with the thread that
/// starts it, which has to wait for it; one that holds a table ends with its input, whichever thread has that.
fn end_with_us(command: &mut Command) {
    let us = getpid();
    // SAFETY: between fork and exec only system calls are made, on nothing but a number.
    unsafe {
        command.pre_exec(move || {
            set_pdeathsig(Signal::SIGKILL)?;
            // It may have happened already.
            if getppid() == us { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::ESRCH)) }
        });
    }
}

fn first_line(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).lines().next().unwrap_or("nft failed and said nothing").to_owned()
}
