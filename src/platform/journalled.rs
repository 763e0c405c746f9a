//! What a run has journalled, as somebody else sees it: without the lock, and without touching it.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::cleanup::stands;
use super::imp::resolv_conf;
use super::journal::{Journal, JournalError, Leftovers, Origin};
use super::routing::{RouteKind, Rule};
use super::survey::{NftState, Survey};
use super::undo::Undo;
use super::words;

/// The journal of a run that goes on, or that has crashed.
#[derive(Debug, Default)]
pub struct Journalled(Leftovers);

impl Journalled {
    /// Reads the journal in `state_dir`; an empty one where there is none.
    ///
    /// # Errors
    /// A newer version wrote it, or it may not be read.
    pub fn read(state_dir: &Path) -> Result<Self, JournalError> {
        Journal::peek(state_dir).map(Self)
    }

    /// Whether it names no change.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.undos.is_empty()
    }

    /// Whether the changes were made in this kernel and this network namespace.
    #[must_use]
    pub fn is_of_here(&self) -> bool {
        self.0.origin == Origin::Here
    }

    /// Whether the changes were made in another network namespace of this kernel.
    #[must_use]
    pub fn is_of_elsewhere(&self) -> bool {
        matches!(self.0.origin, Origin::Elsewhere(_))
    }

    /// Whether a start would refuse to go past it: it names what only that other namespace can be freed of.
    #[must_use]
    pub fn blocks_a_start(&self) -> bool {
        self.is_of_elsewhere() && self.undos().any(|undo| !undo.outlives_kernel())
    }

    /// Whether a kill switch is closed, which the next start takes down only when its own is in force.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.is_of_here() && self.undos().any(Undo::refuses)
    }

    /// The firewall table of the kill switch that is to be closed ([`Journalled::is_closed`]).
    #[must_use]
    pub fn kill_switch(&self) -> Option<&str> {
        let table = self.undos().find_map(|undo| match undo {
            Undo::Table(table) => Some(table.name.as_str()),
            _ => None,
        });
        table.filter(|_| self.is_of_here())
    }

    /// The firewall table of a kill switch that is to be closed and is not in force: gone, or without some of its rules. None
    /// where the firewall may not be looked at.
    #[must_use]
    pub fn opened(&self) -> Option<&str> {
        self.kill_switch().filter(|_| stands(self.undos()).is_ok_and(|stands| !stands))
    }

    /// The rules that it would delete.
    pub fn rules(&self) -> impl Iterator<Item = &Rule> {
        self.undos().filter_map(|undo| match undo {
            Undo::Rule(rule) => Some(rule),
            _ => None,
        })
    }

    /// What a person would type to undo the changes, in the order in which that is done.
    #[must_use]
    pub fn commands(&self) -> Vec<String> {
        self.to_be_undone().map(words::put_back).collect()
    }

    /// How to undo each change, in the order in which they were made.
    pub(super) fn undos(&self) -> impl DoubleEndedIterator<Item = &Undo> {
        self.0.undos.iter().map(|(_, undo)| undo)
    }

    /// `undo`, which was read off the host as it is, of a change that is made after a replay: it puts back what the replay will
    /// have left.
    pub(super) fn beyond(&self, mut undo: Undo) -> Undo {
        let here = self.is_of_here();
        // Of several for one place the first was what came before all of them.
        for left in self.undos().filter(|left| here || left.outlives_kernel()) {
            match (&mut undo, left) {
                (Undo::ResolvConf { path, old, .. }, Undo::ResolvConf { path: of, ours, old: before })
                    if path == of && resolv_conf::is_begun(of, ours, before) =>
                {
                    old.clone_from(before);
                }
                (Undo::Sysctl { path, old, .. }, Undo::Sysctl { path: of, ours, old: before })
                    if path == of && ours.as_ref().is_none_or(|ours| ours == old) =>
                {
                    old.clone_from(before);
                }
                _ => continue,
            }
            break;
        }
        undo
    }

    /// What a replay here would do, last change first: what died with its kernel needs nothing.
    fn to_be_undone(&self) -> impl Iterator<Item = &Undo> {
        let here = self.is_of_here();
        self.undos().rev().filter(move |undo| here || undo.outlives_kernel())
    }
}

impl Survey {
    /// The host as it would be once `journal` were replayed: so a start finds it after a crash.
    #[must_use]
    pub fn without(mut self, journal: &Journalled) -> Self {
        let closed = journal.is_closed();
        if closed {
            let ours: Vec<Rule> = journal.rules().cloned().collect();
            self.set_aside(&ours);
        }
        for undo in journal.to_be_undone().filter(|undo| !(closed && undo.closes())) {
            match undo {
                Undo::Rule(rule) => self.rules.retain(|found| found != rule),
                // The routes to the TUN went with it, so that nothing else of ours is in that table.
                Undo::Route(route) if !matches!(route.kind, RouteKind::Device(_)) => {
                    self.tables.remove(&route.table);
                }
                Undo::Table(table) => {
                    if let NftState::Present { tables, kill_switches, .. } = &mut self.nft {
                        tables.remove(&table.name);
                        kill_switches.retain(|name| *name != table.name);
                    }
                }
                Undo::Sysctl { path, old, .. } => self.put_back(path, old),
                Undo::ResolvConf { path, ours, old } => {
                    self.resolv_conf = resolv_conf::once_restored(path, ours, old);
                }
                Undo::Route(_) | Undo::Address { .. } => {}
            }
        }
        self
    }

    fn put_back(&mut self, path: &str, old: &str) {
        match path {
            "net/ipv4/ip_forward" => self.parameters.forward_v4 = old != "0",
            "net/ipv6/conf/all/forwarding" => self.parameters.forward_v6 = old != "0",
            other => {
                let interface = other.strip_prefix("net/ipv6/conf/").and_then(|rest| rest.strip_suffix("/accept_ra"));
                if let Some(interface) = interface.filter(|_| old == "1") {
                    self.parameters.host_only_advertisements.insert(interface.to_owned());
                }
            }
        }
    }
}

/// The process that holds the state directory, if one does. The lock itself is not touched: whoever tried it would keep
/// a run from starting meanwhile.
#[must_use]
pub fn holder(state_dir: &Path) -> Option<i32> {
    let path = state_dir.join("lock");
    let file = fs::metadata(&path).ok()?;
    // Whoever may not read it takes the device's word.
    let noted = fs::read_to_string(&path).ok().and_then(|note| note.trim().parse().ok());
    holder_in(&fs::read_to_string("/proc/locks").ok()?, (file.dev(), file.ino()), noted)
}

/// Looks for the lock on the file (device, inode) among those of proc_locks(5): "1: FLOCK  ADVISORY  WRITE 4711 00:1f:4242 0
/// EOF". Some file systems (btrfs) show files another device than the one that stands there; then `noted` has to be the
/// process: an inode's number alone is that of many files.
pub(super) fn holder_in(locks: &str, (device, inode): (u64, u64), noted: Option<i32>) -> Option<i32> {
    locks.lines().find_map(|line| {
        let mut words = line.split_whitespace().skip(1);
        (words.next()? == "FLOCK").then_some(())?;
        let (pid, file) = (words.nth(2)?.parse::<i32>().ok()?, words.next()?);
        let mut parts = file.split(':');
        let mut hex = || u64::from_str_radix(parts.next()?, 16).ok();
        let shown = (hex()?, hex()?);
        let number = parts.next()?.parse::<u64>().ok()?;
        let same = shown == (nix::sys::stat::major(device), nix::sys::stat::minor(device)) || noted == Some(pid);
        (number == inode && same).then_some(pid)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::plan::tests::options;
    use crate::platform::survey::tests::plain;
    use crate::platform::{HostPlan, Wishes};

    #[test]
    fn a_lock_is_told_by_its_device_and_inode() {
        let locks = "1: POSIX  ADVISORY  WRITE 7 00:1f:42 0 EOF\n2: FLOCK  ADVISORY  WRITE 4711 fe:01:42 0 EOF\n";
        let device = nix::sys::stat::makedev(0xfe, 1);
        assert_eq!(holder_in(locks, (device, 42), None), Some(4711));
        assert_eq!(holder_in(locks, (device, 43), Some(4711)), None);
        // A file of another disk has the same number.
        let other = nix::sys::stat::makedev(0, 0x1f);
        assert_eq!(holder_in(locks, (other, 42), Some(7)), None);
        assert_eq!(holder_in(locks, (other, 42), Some(4711)), Some(4711));
        assert_eq!(holder_in("2: FLOCK", (device, 42), None), None);
    }

    #[test]
    fn who_holds_a_state_directory_is_found_without_touching_the_lock() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(holder(dir.path()), None);
        let journal = Journal::open(dir.path()).unwrap();
        assert_eq!(holder(dir.path()), i32::try_from(std::process::id()).ok());
        drop(journal);
        assert_eq!(holder(dir.path()), None);
    }

    #[test]
    fn what_a_crashed_run_has_set_is_nothing_that_the_next_puts_back() {
        let set = |path: &str, ours: &str, old: &str| Undo::Sysctl {
            path: path.to_owned(),
            ours: Some(ours.to_owned()),
            old: old.to_owned(),
        };
        let dir = tempfile::tempdir().unwrap();
        let forward = "net/ipv4/ip_forward";
        Journal::open(dir.path()).unwrap().record(&[set(forward, "1", "0")]).unwrap();
        let journalled = Journalled::read(dir.path()).unwrap();
        assert_eq!(journalled.beyond(set(forward, "1", "1")), set(forward, "1", "0"));
        // Somebody has set it since: that stays.
        assert_eq!(journalled.beyond(set(forward, "1", "2")), set(forward, "1", "2"));
        let other = set("net/ipv6/conf/all/forwarding", "1", "1");
        assert_eq!(journalled.beyond(other.clone()), other);
    }

    #[test]
    fn a_host_without_the_leftovers_of_a_crash_gives_the_numbers_of_before() {
        let plan = HostPlan::new(&options(), &plain()).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let mut journal = Journal::open(dir.path()).unwrap();
        let undos: Vec<Undo> = plan.rules.iter().cloned().map(Undo::Rule).collect();
        journal.record(&undos).unwrap();
        let mut crashed = plain();
        crashed.rules.extend(plan.rules.clone());
        assert_eq!(crashed.numbers(&Wishes::default()).unwrap().first_priority, 8900, "before what it refuses");
        let journalled = Journalled::read(dir.path()).unwrap();
        assert!(journalled.is_of_here() && !journalled.is_empty());
        assert_eq!(crashed.without(&journalled).numbers(&Wishes::default()), plain().numbers(&Wishes::default()));
        assert!(dir.path().join("journal").exists());
    }
}
