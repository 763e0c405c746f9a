//! Our firewall table. The program nft loads what is written; what is in force the kernel tells by itself ([`Nftables`]).
//!
//! Mostly the table belongs to a child of ours ([`OwnedTable`]). A kill switch's has no owner: it is to stay however we die,
//! and is taken down by name.

mod owned;

use std::io;

use parking_lot::Mutex;

use super::netlink::nftables::{Nftables, SeenTable, names};
use super::program::{Call, NFT, first_line, told};
use crate::platform::NetlinkError;
use crate::platform::firewall::{KILL_SWITCH_OF, Nft, TableId, is_name_of_ours};
use crate::platform::survey::NftState;
use crate::platform::undo::Undone;

pub(in crate::platform) use owned::OwnedTable;
use owned::Owner;

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
/// the same. Without `marks` there are none.
pub(in crate::platform) fn survey(marks: bool) -> (NftState, u32) {
    let found = Nftables::open().and_then(|mut nftables| {
        let (tables, dropping) = (nftables.tables()?, nftables.dropping_forward()?);
        let gates = nftables.gates(is_name_of_ours)?;
        Ok((tables, (dropping, gates), if marks { nftables.mark_bits()? } else { 0 }))
    });
    match found {
        Ok((_, _, marks)) if program().is_none() => (NftState::Missing(NOT_INSTALLED.to_owned()), marks),
        Ok((tables, (dropping_forward, gates), mark_bits)) => {
            let kill_switches = kill_switches_in(&tables).into_iter().map(|(table, _)| table).collect();
            (NftState::Present { tables: names(&tables), mark_bits, dropping_forward, gates, kill_switches }, 0)
        }
        Err(_) if program().is_none() => (NftState::Missing(NOT_INSTALLED.to_owned()), 0),
        Err(error) => (NftState::Missing(in_words(&error)), 0),
    }
}

/// A kernel that does not know the protocol has words for it that say little.
fn in_words(error: &NetlinkError) -> String {
    match error.source.raw_os_error() {
        Some(libc::EINVAL | libc::EPROTONOSUPPORT | libc::EOPNOTSUPP) => {
            format!("the kernel has no nftables ({error})")
        }
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
    inet.filter(|table| !table.dormant).filter_map(ours).collect()
}

/// The kill switches that still say no: somebody may have emptied a table without deleting it. None of ours has a chain
/// without rules.
///
/// # Errors
/// The kernel does not tell.
pub(in crate::platform) fn closed() -> io::Result<Vec<(String, String)>> {
    let read = || {
        let mut nftables = Nftables::open()?;
        let mut found = Vec::new();
        for (table, tun) in kill_switches_in(&nftables.tables()?) {
            let chains = nftables.rules_of("inet", &table)?;
            if !chains.is_empty() && chains.values().all(|rules| *rules > 0) {
                found.push((table, tun));
            }
        }
        Ok(found)
    };
    read().map_err(|error: NetlinkError| io::Error::other(in_words(&error)))
}

/// Whether the kill switch's table is there and whole.
///
/// # Errors
/// The kernel does not tell.
pub(in crate::platform) fn stands(table: &TableId) -> io::Result<bool> {
    let read = || {
        let mut nftables = Nftables::open()?;
        let is_it = |seen: &SeenTable| {
            let named =
                (seen.family(), &seen.name, seen.comment.as_ref()) == ("inet", &table.name, Some(&table.comment));
            named && !seen.dormant
        };
        match nftables.tables()?.iter().any(is_it) {
            true => nftables.rules_of("inet", &table.name).map(|found| table.is_whole(&found)),
            false => Ok(false),
        }
    };
    read().map_err(|error: NetlinkError| io::Error::other(in_words(&error)))
}

/// Expressions that are modules or options of their own, which small systems leave out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(in crate::platform) struct Knows {
    /// `socket`.
    pub(in crate::platform) sockets: bool,
    /// `ct mark`.
    pub(in crate::platform) connection_marks: bool,
    /// `fib` for what is forwarded, since Linux 5.18.
    pub(in crate::platform) ways_back: bool,
}

/// The last answer to which of them nft and the kernel know. That does not change while we run.
static KNOWN: Mutex<Option<Result<Knows, String>>> = Mutex::new(None);
/// Held by whoever asks.
static ASKING: Mutex<()> = Mutex::new(());

/// Has it found out while the start does other things: it takes the kernel its time.
pub fn ask_ahead() {
    if program().is_some() {
        // Without one it is asked when it is needed.
        let _ = std::thread::Builder::new().name("asks-nft".to_owned()).spawn(knows);
    }
}

/// What is known of it already; what could not be asked counts as not there.
pub(in crate::platform) fn known() -> Knows {
    KNOWN.lock().as_ref().and_then(|known| known.as_ref().ok().copied()).unwrap_or_default()
}

/// Which of them nft and the kernel know: asked once, and again where there was no answer.
///
/// # Errors
/// nft cannot be run, does not end, or takes nothing.
pub(in crate::platform) fn knows() -> Result<Knows, String> {
    // Whoever comes second waits for the answer to the first, whatever it is.
    let (_turn, waited) = ASKING.try_lock().map_or_else(|| (ASKING.lock(), true), |turn| (turn, false));
    let last = KNOWN.lock().clone();
    match last {
        Some(answer) if waited || answer.is_ok() => answer,
        _ => {
            let answer = ask();
            KNOWN.lock().insert(answer).clone()
        }
    }
}

fn ask() -> Result<Knows, String> {
    const SOCKETS: &str = "socket wildcard 1;";
    const MARKS: &str = "ct mark set ct mark | 1;";
    // The hook to which it came last is asked; on that of prerouting it is older.
    const WAYS_BACK: &str = "fib saddr . iif oif exists return;";
    let asked = |what: &str| {
        let table =
            format!("table inet tunproxy-asks {{ chain asks {{ type filter hook input priority 0; {what} }}; }};\n");
        NFT.run(&["--check", "--file", "-"], &table).map(|output| told(&output)).map_err(|error| error.to_string())
    };
    let found = match asked(&format!("{SOCKETS} {MARKS} {WAYS_BACK}"))? {
        Ok(()) => Knows { sockets: true, connection_marks: true, ways_back: true },
        Err(_) => Knows {
            sockets: asked(SOCKETS)?.is_ok(),
            connection_marks: asked(MARKS)?.is_ok(),
            ways_back: asked(WAYS_BACK)?.is_ok(),
        },
    };
    if found == Knows::default() {
        // One that does not take a chain without rules either takes none of ours.
        asked("")?.map_err(|error| error.to_string())?;
    }
    if !found.sockets {
        tracing::debug!("nftables has no `socket` here: forged datagrams count as questions");
    }
    if !found.ways_back {
        tracing::debug!("nftables has no `fib` for what is forwarded: sources that LAN clients forge come in");
    }
    if !found.connection_marks {
        tracing::warn!(
            "nftables cannot mark connections here (CONFIG_NF_CONNTRACK_MARK): a connection that is silent for minutes \
             may go on past the TUN when the other side speaks first"
        );
    }
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
                let before = tables()?;
                told(&call.end(&nft.text)?)?;
                seen_loaded(nft).map(|_| None).map_err(|why| taken_back(nft, &before, why))
            }
        }
    }
}

/// Takes down what was loaded of `nft` and is not what it should be: it may not even bear the words by which it would be
/// found later (kernels before 5.10 keep no comments). `before`: the tables that were there before. Returns `why`, and what
/// is left, if it cannot be done.
fn taken_back(nft: &Nft, before: &[SeenTable], why: io::Error) -> io::Error {
    let delete = || {
        let new = |seen: &SeenTable| seen.name == nft.table && !before.iter().any(|old| old.is(seen));
        let removal: String = tables()?.iter().filter(|seen| new(seen)).map(deletion).collect();
        if removal.is_empty() { Ok(()) } else { told(&NFT.run(&["--file", "-"], &removal)?) }
    };
    match delete() {
        Ok(()) => why,
        Err(error) => io::Error::new(why.kind(), format!("{why}; and what it has loaded cannot be deleted: {error}")),
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

/// Whether the tables are in force, with every chain and as many rules in each as it should have, and none switched off.
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
    if tables.iter().any(|table| table.dormant) {
        return Ok(None);
    }
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
        // It is not there yet, maybe.
        if NFT.is_held_up() {
            return Err(io::Error::other("an nft that was killed has not ended, and may load it yet"));
        }
        return Ok(if foreign { Undone::LeftAlone } else { Undone::AlreadyGone });
    }
    told(&NFT.run(&["--file", "-"], &removal).map_err(explained)?)?;
    Ok(Undone::Restored)
}

/// What nft is to be told to take down what there is of `table`, and whether others have tables of that name.
fn removal(table: &TableId) -> io::Result<(String, bool)> {
    let families = |seen: &SeenTable| seen.name == table.name && matches!(seen.family(), "inet" | "arp");
    let (ours, others): (Vec<SeenTable>, Vec<SeenTable>) =
        tables()?.into_iter().filter(families).partition(|seen| seen.comment.as_ref() == Some(&table.comment));
    Ok((ours.iter().map(deletion).collect(), !others.is_empty()))
}

fn deletion(table: &SeenTable) -> String {
    format!("delete table {} {};\n", table.family(), table.name)
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
