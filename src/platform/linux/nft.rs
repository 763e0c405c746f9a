//! Our firewall table, kept by a child of ours: it is owned by the child's netlink socket, so nobody else can change
//! it, and it vanishes with the child, which goes when our end of its input closes, however we die.
//!
//! A kill switch's table has no owner: it is to stay however we die, and is taken down by name.
//!
//! The program nft loads what is written; what is in force the kernel tells by itself ([`Nftables`]).

use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStderr, ChildStdin, Stdio};
use std::time::Instant;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use parking_lot::Mutex;

use super::bounded::{self, Deadline};
use super::netlink::nftables::{Nftables, SeenTable, names};
use super::program::{Call, NFT, first_line, told};
use crate::platform::NetlinkError;
use crate::platform::firewall::{KILL_SWITCH_OF, Nft, TableId};
use crate::platform::survey::NftState;
use crate::platform::undo::Undone;

/// What there is to say where only the program lacks.
const NOT_INSTALLED: &str = "the program nft is not installed";

/// Where the program is, if it is installed.
#[must_use]
pub fn program() -> Option<&'static str> {
    NFT.place()
}

/// The rules in force as nft prints them, without counters and the elements of sets (of which a firewall may have
/// millions). Only for what has to be read as text.
///
/// # Errors
/// nft's own words, or that it is not there.
pub fn ruleset() -> Result<String, String> {
    match NFT.run(&["--stateless", "--terse", "list", "ruleset"], "") {
        Ok(output) if output.status.success() => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        Ok(output) => Err(first_line(&output.stderr)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(NOT_INSTALLED.to_owned()),
        Err(error) => Err(format!("nft: {error}")),
    }
}

/// What is in force, as the plan needs it; and the marks that rules touch, where nft cannot be used and they are there all
/// the same.
pub(in crate::platform) fn survey() -> (NftState, u32) {
    let found = Nftables::open().and_then(|mut nftables| {
        let (tables, dropping) = (nftables.tables()?, nftables.dropping_forward()?);
        Ok((tables, dropping, nftables.mark_bits()?))
    });
    match found {
        Ok((_, _, marks)) if program().is_none() => (NftState::Missing(NOT_INSTALLED.to_owned()), marks),
        Ok((tables, dropping_forward, mark_bits)) => {
            let kill_switches = kill_switches_in(&tables).into_iter().map(|(table, _)| table).collect();
            (NftState::Present { tables: names(&tables), mark_bits, dropping_forward, kill_switches }, 0)
        }
        Err(_) if program().is_none() => (NftState::Missing(NOT_INSTALLED.to_owned()), 0),
        Err(error) => (NftState::Missing(in_words(&error)), 0),
    }
}

/// A kernel that does not know the protocol has words for it that say little.
fn in_words(error: &NetlinkError) -> String {
    match error.source.raw_os_error() {
        Some(libc::EINVAL | libc::EPROTONOSUPPORT | libc::EOPNOTSUPP) => format!("the kernel has no nftables ({error})"),
        _ => error.to_string(),
    }
}

/// All tables.
///
/// # Errors
/// The kernel does not tell.
pub(in crate::platform) fn tables() -> io::Result<Vec<SeenTable>> {
    let listed = Nftables::open().and_then(|mut nftables| nftables.tables());
    listed.map_err(|error| io::Error::other(in_words(&error)))
}

/// The inet tables that say of themselves that they are a kill switch of ours: their names, each with its TUN.
pub(in crate::platform) fn kill_switches_in(tables: &[SeenTable]) -> Vec<(String, String)> {
    let inet = tables.iter().filter(|table| table.family() == "inet");
    let ours = |table: &SeenTable| {
        let tun = table.comment.as_deref()?.strip_prefix(KILL_SWITCH_OF)?;
        Some((table.name.clone(), tun.to_owned()))
    };
    inet.filter_map(ours).collect()
}

/// Expressions that are modules or options of their own, which small systems leave out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(in crate::platform) struct Knows {
    /// `socket`.
    pub(in crate::platform) sockets: bool,
    /// `ct mark`.
    pub(in crate::platform) connection_marks: bool,
}

/// Which of them nft and the kernel know. That does not change while we run.
static KNOWN: Mutex<Option<Knows>> = Mutex::new(None);

/// Has it found out while the start does other things: it takes the kernel its time.
pub fn ask_ahead() {
    if program().is_some() {
        std::thread::spawn(knows);
    }
}

/// What is known of it already; what could not be asked counts as not there.
pub(in crate::platform) fn known() -> Knows {
    KNOWN.lock().unwrap_or_default()
}

/// Which of them nft and the kernel know: asked once, and again where there was no answer.
///
/// # Errors
/// nft does not end.
pub(in crate::platform) fn knows() -> Result<Knows, String> {
    const SOCKETS: &str = "socket wildcard 1;";
    const MARKS: &str = "ct mark set ct mark | 1;";
    // Whoever comes second waits for the answer to the first.
    let mut known = KNOWN.lock();
    if let Some(known) = *known {
        return Ok(known);
    }
    let asked = |what: &str| {
        let table =
            format!("table inet tunproxy-asks {{ chain asks {{ type filter hook input priority 0; {what} }}; }};\n");
        match NFT.run(&["--check", "--file", "-"], &table) {
            Err(error) if error.kind() == io::ErrorKind::TimedOut => Err(error.to_string()),
            answer => Ok(answer.is_ok_and(|output| output.status.success())),
        }
    };
    let found = match asked(&format!("{SOCKETS} {MARKS}"))? {
        true => Knows { sockets: true, connection_marks: true },
        false => Knows { sockets: asked(SOCKETS)?, connection_marks: asked(MARKS)? },
    };
    if !found.sockets {
        tracing::debug!("nftables has no `socket` here: forged datagrams count as questions");
    }
    if !found.connection_marks {
        tracing::warn!(
            "nftables cannot mark connections here (CONFIG_NF_CONNTRACK_MARK): a connection that is silent for minutes \
             may go on past the TUN when the other side speaks first"
        );
    }
    *known = Some(found);
    Ok(found)
}

/// An nft that is there before it is needed: to start one takes longer than to load a table.
#[derive(Debug)]
pub(in crate::platform) enum Ready {
    /// For a table that it will own.
    Owner(Owner),
    /// For one that stays.
    Once(Call),
}

impl Ready {
    /// Starts one for the table `nft`. Changes nothing.
    ///
    /// # Errors
    /// It is not installed, or cannot be started.
    pub(in crate::platform) fn begin(nft: &Nft) -> io::Result<Self> {
        match nft.comment {
            None => Owner::begin().map(Self::Owner),
            Some(_) => NFT.begin(&["--file", "-"]).map(Self::Once),
        }
    }

    /// Loads the table as one batch: all of it, or nothing. What comes back owns it; nothing does of a kill switch's.
    ///
    /// # Errors
    /// nft's own words.
    pub(in crate::platform) fn load(self, nft: &Nft) -> io::Result<Option<OwnedTable>> {
        match self {
            Self::Owner(owner) => owner.load(nft).map(Some),
            Self::Once(call) => {
                told(&call.end(&nft.text)?)?;
                seen_loaded(nft).map(|_| None)
            }
        }
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
        && told(&NFT.run(&["--file", "-"], &change)?).is_ok()
        && is_loaded(nft)?
    {
        return Ok(());
    }
    let table = nft.lasting().ok_or_else(|| io::Error::other("the table has an owner"))?;
    let (removal, foreign) = removal(&table)?;
    if foreign {
        return Err(io::Error::other(format!("another program has made a table {} of its own", nft.table)));
    }
    told(&NFT.run(&["--file", "-"], &(removal + &nft.text))?)?;
    seen_loaded(nft).map(|_| ())
}

/// Whether the tables are in force, with every chain and as many rules in each as it should have.
///
/// # Errors
/// The kernel does not tell: nobody knows then.
pub(in crate::platform) fn is_loaded(nft: &Nft) -> io::Result<bool> {
    loaded(nft).map(|handles| handles.is_some())
}

/// The handles of the tables, if all of them are in force.
fn loaded(nft: &Nft) -> io::Result<Option<Vec<u64>>> {
    let unknown = |error: NetlinkError| io::Error::other(in_words(&error));
    let wanted = nft.chain_rules();
    let mut nftables = Nftables::open().map_err(unknown)?;
    let ours = |table: &SeenTable| {
        table.name == nft.table && table.comment == nft.comment && wanted.iter().any(|(of, ..)| *of == table.family())
    };
    let tables: Vec<SeenTable> = nftables.tables().map_err(unknown)?.into_iter().filter(ours).collect();
    for table in &tables {
        let found = nftables.rules_of(table.family(), &table.name).map_err(unknown)?;
        let mut chains = wanted.iter().filter(|(of, ..)| *of == table.family());
        if !chains.all(|(_, name, rules)| found.get(*name) == Some(rules)) {
            return Ok(None);
        }
    }
    let all = wanted.iter().all(|(of, ..)| tables.iter().any(|table| *of == table.family()));
    Ok(all.then(|| tables.iter().map(|table| table.handle).collect()))
}

/// Not every nft complains of what it passes over: the handles of what it has loaded, if that is all.
fn seen_loaded(nft: &Nft) -> io::Result<Vec<u64>> {
    loaded(nft)?.ok_or_else(|| io::Error::other("nft has loaded it in part only"))
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
    told(&NFT.run(&["--file", "-"], &removal).map_err(explained)?)?;
    Ok(Undone::Restored)
}

/// What nft is to be told to take down what there is of `table`, and whether others have tables of that name.
fn removal(table: &TableId) -> io::Result<(String, bool)> {
    let families = |seen: &SeenTable| seen.name == table.name && matches!(seen.family(), "inet" | "arp");
    let (ours, others): (Vec<SeenTable>, Vec<SeenTable>) = tables()?
        .into_iter()
        .filter(families)
        .partition(|seen| seen.comment.as_ref() == Some(&table.comment));
    let delete = |seen: &SeenTable| format!("delete table {} {};\n", seen.family(), seen.name);
    Ok((ours.iter().map(delete).collect(), !others.is_empty()))
}

/// The child that holds the table is there and says nothing.
fn silent(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::TimedOut => io::Error::new(error.kind(), "nft does not answer"),
        _ => error,
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

/// A child that owns what it loads.
#[derive(Debug)]
pub(in crate::platform) struct Owner {
    child: Child,
    input: ChildStdin,
    errors: ChildStderr,
}

/// A loaded table and the child that owns it.
#[derive(Debug)]
pub(in crate::platform) struct OwnedTable {
    nft: Nft,
    /// Of the tables, one of each family.
    handles: Vec<u64>,
    owner: Owner,
}

impl OwnedTable {
    /// Loads the table as one batch: all of it, or nothing.
    ///
    /// # Errors
    /// nft's own words.
    pub(in crate::platform) fn load(nft: &Nft) -> io::Result<Self> {
        Owner::begin()?.load(nft)
    }

    /// Whether the table is in force, with every chain. Where nobody can say, it is as long as its owner lives.
    pub(in crate::platform) fn is_loaded(&self) -> bool {
        let mut owner = [PollFd::new(self.owner.errors.as_fd(), PollFlags::empty())];
        let gone = poll(&mut owner, PollTimeout::ZERO).is_ok_and(|ready| ready > 0);
        !gone && loaded(&self.nft).map_or(true, |found| found.as_ref() == Some(&self.handles))
    }

    /// By these its tables are told from those of others that come to have the same name.
    pub(in crate::platform) fn handles(&self) -> &[u64] {
        &self.handles
    }

    /// Makes the table that of `nft`, as one batch; what is the same in both is not touched.
    ///
    /// # Errors
    /// nft's own words, or there is no way but to load it anew. The table is then what it was.
    pub(in crate::platform) fn change_to(&mut self, nft: &Nft) -> io::Result<()> {
        let text = self.nft.change_to(nft).ok_or_else(|| io::Error::other("it has to be loaded anew"))?;
        if !text.is_empty() {
            self.owner.feed(&self.nft.table, &text)?;
        }
        self.nft = nft.clone();
        Ok(())
    }

    /// Hangs up when the child has ended, and the table with it.
    pub(in crate::platform) fn lifeline(&self) -> BorrowedFd<'_> {
        self.owner.errors.as_fd()
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
        self.owner.feed(&self.nft.table, &format!("flush chain inet {} {chain}", self.nft.table))
    }
}

impl Owner {
    fn begin() -> io::Result<Self> {
        let mut child = NFT.spawn(|command| {
            // Ctrl-C goes to the whole foreground group; the table must outlast the drain. It ends with its input, whichever
            // thread has that.
            command.arg("--interactive").stdout(Stdio::null()).process_group(0);
        })?;
        match (child.stdin.take(), child.stderr.take()) {
            (Some(input), Some(errors)) => Ok(Self { child, input, errors }),
            _ => Err(io::Error::other("nft was started without pipes")),
        }
    }

    fn load(mut self, nft: &Nft) -> io::Result<OwnedTable> {
        self.feed(&nft.table, &nft.text)?;
        Ok(OwnedTable { nft: nft.clone(), handles: seen_loaded(nft)?, owner: self })
    }

    /// Has the child carry out `text`, which is about `table`, as one batch.
    fn feed(&mut self, table: &str, text: &str) -> io::Result<()> {
        let begun = Instant::now();
        let outcome = self.speak(table, text);
        NFT.note(begun, &outcome);
        outcome
    }

    fn speak(&mut self, table: &str, text: &str) -> io::Result<()> {
        // Interactive nft takes one line at a time, and one line is one transaction. It says nothing about success, so
        // a second line asks for what cannot exist: its complaint tells that the first is through.
        let sentinel = format!("{table}-is-through");
        let line = text.replace('\n', " ");
        let deadline = NFT.deadline();
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
    fn hear(&mut self, sentinel: &str, deadline: Deadline) -> io::Result<String> {
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

impl Drop for Owner {
    fn drop(&mut self) {
        // The kernel takes an owned table down before the owner's exit is seen.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
