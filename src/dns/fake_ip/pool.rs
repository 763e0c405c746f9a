//! One range of fake addresses: which name has which, and which may be given to another name.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use foldhash::fast::RandomState;
use ipnet::IpNet;
use parking_lot::Mutex;

use super::OpenError;
use super::shares::{Owner, Shares};
use super::stable_hash;
use crate::dns::lru::Order;
use crate::net::Name;

/// At most so many names have an address at a time (about 40 MB when all are taken).
const MAX_NAMES: usize = 1 << 18;
/// Of a larger range, only so many addresses are used: the map of taken ones stays at 2 MB of untouched zero pages.
const MAX_SPAN: u64 = 1 << 24;
/// The network's own address, the TUN's, the TUN's DNS server and one more are never handed out.
const FIRST: u64 = 4;
/// A use is recorded if the last that was is so many seconds ago: what is known after a crash is right to so much.
pub(super) const RENEWAL: u32 = 300;

/// The pool of one address family.
pub(super) struct Pool {
    range: IpNet,
    /// Seconds for which an address stays with its name after the last time it was answered or used.
    grace: u32,
    table: Mutex<Table>,
}

struct Table {
    by_name: HashMap<Name, u32, RandomState>,
    /// Offset from the first address that is handed out -> slot.
    by_offset: HashMap<u32, u32, RandomState>,
    entries: Vec<Entry>,
    vacant: Vec<u32>,
    /// Entries that no flow holds and that may still be in use, the one touched longest ago first.
    fresh: Order,
    /// Entries whose grace is over, in the same order.
    ripe: Order,
    ripe_count: usize,
    shares: Shares,
    taken: Bitmap,
    capacity: usize,
}

struct Entry {
    name: Name,
    offset: u32,
    /// Second of the program's run in which the entry was last answered or used.
    touched: u32,
    /// When that was last recorded.
    recorded: u32,
    /// Flows that use the address now.
    holds: u32,
    is_ripe: bool,
    /// Who used it last, of those who had a part left for it: it counts as theirs while it is in use.
    owner: Owner,
}

/// No address can be given out: all are held or were answered a moment ago.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::dns) struct Exhausted;

impl Pool {
    /// A pool of the addresses of `range`.
    pub(super) fn new(range: IpNet, grace: u32) -> Result<Self, OpenError> {
        let range = range.trunc();
        let host_bits = u32::from(range.max_prefix_len() - range.prefix_len());
        // IPv4 keeps its broadcast address out as well; IPv6 has none.
        let reserved = FIRST + u64::from(matches!(range, IpNet::V4(_)));
        let span = 1u64.checked_shl(host_bits).unwrap_or(u64::MAX).saturating_sub(reserved).min(MAX_SPAN);
        if span == 0 {
            return Err(OpenError::RangeTooSmall(range));
        }
        let capacity = MAX_NAMES.min(span as usize);
        let table = Table {
            by_name: HashMap::default(),
            by_offset: HashMap::default(),
            entries: Vec::new(),
            vacant: Vec::new(),
            fresh: Order::new(),
            ripe: Order::new(),
            ripe_count: 0,
            shares: Shares::default(),
            taken: Bitmap::new(span as usize),
            capacity,
        };
        Ok(Self { range, grace, table: Mutex::new(table) })
    }

    /// Whether `ip` lies in the range, handed out or not.
    pub(super) fn contains(&self, ip: IpAddr) -> bool {
        self.range.contains(&ip)
    }

    /// The address of `name`, which stays its own for the grace from `now` on. `record` hears of a new one before
    /// anybody else can see it, and of an old one now and then. It counts as `client`'s from now on; who has used up his
    /// part gets none, but for names that are his already.
    pub(super) fn address(
        &self,
        name: &str,
        client: IpAddr,
        now: u32,
        record: impl FnOnce(&Name, IpAddr),
    ) -> Result<IpAddr, Exhausted> {
        let mut table = self.table.lock();
        table.ripen(now, self.grace);
        let owner = table.shares.owner(client);
        if let Some(&slot) = table.by_name.get(name) {
            // Else it might be another name's before whoever hears it has come to it.
            if !table.claim(slot, owner) {
                return Err(Exhausted);
            }
            self.touch(&mut table, slot, now, record);
            return Ok(self.ip(table.entries[slot as usize].offset));
        }
        // Only names that `Name` takes reach the pool; any other is turned away like a full pool.
        let name = Name::new(name).map_err(|_| Exhausted)?;
        let offset = table.free_offset(&name, owner)?;
        table.add(name.clone(), offset, owner, now);
        let ip = self.ip(offset);
        record(&name, ip);
        Ok(ip)
    }

    /// The name that has `ip`. Who asks does not use it by that.
    pub(super) fn name_of(&self, ip: IpAddr) -> Option<Name> {
        let table = self.table.lock();
        let slot = *table.by_offset.get(&self.offset(ip)?)?;
        Some(table.entries[slot as usize].name.clone())
    }

    /// The name that has `ip`, for a flow of `client`, and the slot that keeps it until [`Pool::release`]. There is no slot
    /// where `client` has used up his part: the name has the address for as long as nobody else needs it.
    pub(super) fn hold(
        &self,
        ip: IpAddr,
        client: IpAddr,
        now: u32,
        record: impl FnOnce(&Name, IpAddr),
    ) -> Option<(Name, Option<u32>)> {
        let mut table = self.table.lock();
        let slot = *table.by_offset.get(&self.offset(ip)?)?;
        table.ripen(now, self.grace);
        let owner = table.shares.owner(client);
        let name = table.entries[slot as usize].name.clone();
        if !table.claim(slot, owner) {
            return Some((name, None));
        }
        self.touch(&mut table, slot, now, record);
        table.entries[slot as usize].holds += 1;
        if table.entries[slot as usize].holds == 1 {
            table.fresh.unlink(slot);
        }
        Some((name, Some(slot)))
    }

    /// Ends one hold; the last one leaves the entry as fresh as if it had just been answered.
    pub(super) fn release(&self, slot: u32, now: u32, record: impl FnOnce(&Name, IpAddr)) {
        let mut table = self.table.lock();
        let entry = &mut table.entries[slot as usize];
        entry.holds -= 1;
        if entry.holds == 0 {
            table.fresh.push(slot);
        }
        self.touch(&mut table, slot, now, record);
    }

    /// Notes a use of an entry that counts as in use.
    fn touch(&self, table: &mut Table, slot: u32, now: u32, record: impl FnOnce(&Name, IpAddr)) {
        table.touch(slot, now);
        let entry = &mut table.entries[slot as usize];
        if now >= entry.recorded.saturating_add(RENEWAL) {
            entry.recorded = now;
            record(&entry.name, self.ip(entry.offset));
        }
    }

    /// Gives `name` the address it had in an earlier run, where it was last used at `now`; a later record of either overrides
    /// an earlier one, and must come after it.
    pub(super) fn restore(&self, name: Name, ip: IpAddr, now: u32) -> bool {
        let Some(offset) = self.offset(ip) else { return false };
        let mut table = self.table.lock();
        let old = [table.by_name.get(&name).copied(), table.by_offset.get(&offset).copied()];
        old.into_iter().flatten().for_each(|slot| table.remove(slot));
        if table.by_name.len() >= table.capacity {
            return false;
        }
        table.add(name, offset, Owner::NOBODY, now);
        true
    }

    /// How many names have an address.
    pub(super) fn len(&self) -> usize {
        self.table.lock().by_name.len()
    }

    /// Calls `each` for up to `count` entries from slot `from` on, with when they were last used; false once there are no
    /// more.
    pub(super) fn visit(&self, from: usize, count: usize, mut each: impl FnMut(&Name, IpAddr, u32)) -> bool {
        let table = self.table.lock();
        for entry in table.entries.iter().skip(from).take(count) {
            // A vacant slot keeps its last contents.
            if table.by_name.get(&entry.name).is_some_and(|&slot| table.entries[slot as usize].offset == entry.offset) {
                each(&entry.name, self.ip(entry.offset), entry.touched);
            }
        }
        from + count < table.entries.len()
    }

    fn ip(&self, offset: u32) -> IpAddr {
        let host = u64::from(offset) + FIRST;
        match self.range {
            // The offset is below the range's size, so neither addition leaves the range.
            IpNet::V4(range) => Ipv4Addr::from_bits(range.network().to_bits() + host as u32).into(),
            IpNet::V6(range) => Ipv6Addr::from_bits(range.network().to_bits() + u128::from(host)).into(),
        }
    }

    fn offset(&self, ip: IpAddr) -> Option<u32> {
        let host = match (self.range, ip) {
            (IpNet::V4(range), IpAddr::V4(ip)) if range.contains(&ip) => {
                u128::from(ip.to_bits() - range.network().to_bits())
            }
            (IpNet::V6(range), IpAddr::V6(ip)) if range.contains(&ip) => ip.to_bits() - range.network().to_bits(),
            _ => return None,
        };
        let offset = host.checked_sub(u128::from(FIRST))?;
        (offset < self.span() as u128).then_some(offset as u32)
    }

    fn span(&self) -> usize {
        let host_bits = u32::from(self.range.max_prefix_len() - self.range.prefix_len());
        let reserved = FIRST + u64::from(matches!(self.range, IpNet::V4(_)));
        1u64.checked_shl(host_bits).unwrap_or(u64::MAX).saturating_sub(reserved).min(MAX_SPAN) as usize
    }
}

impl Table {
    fn touch(&mut self, slot: u32, now: u32) {
        let entry = &mut self.entries[slot as usize];
        if entry.touched < now {
            entry.touched = now;
            if entry.holds == 0 {
                self.fresh.touch(slot);
            }
        }
    }

    /// Counts an entry as in use by `owner`, whoever had it before. False: he has used up his part. Then the entry stays as
    /// it is, and if its grace is over, it is the last that another name gets.
    fn claim(&mut self, slot: u32, owner: Owner) -> bool {
        let entry = &self.entries[slot as usize];
        let (is_ripe, former) = (entry.is_ripe, entry.owner);
        if !is_ripe && former == owner {
            return true;
        }
        if !self.shares.may_take(owner, self.left()) {
            if is_ripe {
                self.ripe.touch(slot);
            }
            return false;
        }
        match is_ripe {
            true => {
                self.ripe.unlink(slot);
                self.ripe_count -= 1;
                self.fresh.push(slot);
            }
            false => self.shares.discharge(former),
        }
        self.shares.charge(owner);
        let entry = &mut self.entries[slot as usize];
        (entry.is_ripe, entry.owner) = (false, owner);
        true
    }

    /// Addresses that are not in use.
    fn left(&self) -> usize {
        self.capacity - (self.by_name.len() - self.ripe_count)
    }

    /// Finds the entries whose grace is over by now.
    fn ripen(&mut self, now: u32, grace: u32) {
        while let Some(oldest) = self.fresh.oldest() {
            let entry = &mut self.entries[oldest as usize];
            if now < entry.touched.saturating_add(grace) {
                break;
            }
            entry.is_ripe = true;
            self.shares.discharge(entry.owner);
            self.fresh.unlink(oldest);
            self.ripe.push(oldest);
            self.ripe_count += 1;
        }
    }

    /// The free address nearest behind the name's hash, so that a lost record gives the same one again; in a full
    /// pool the address that was touched longest ago, if its grace is over.
    fn free_offset(&mut self, name: &Name, owner: Owner) -> Result<u32, Exhausted> {
        if !self.shares.may_take(owner, self.left()) {
            return Err(Exhausted);
        }
        if self.by_name.len() < self.capacity {
            let start = (stable_hash(name.as_str().as_bytes()) % self.taken.len as u64) as usize;
            if let Some(offset) = self.taken.next_free(start) {
                return Ok(offset as u32);
            }
        }
        let oldest = self.ripe.oldest().ok_or(Exhausted)?;
        let offset = self.entries[oldest as usize].offset;
        self.remove(oldest);
        Ok(offset)
    }

    fn add(&mut self, name: Name, offset: u32, owner: Owner, now: u32) {
        let entry = Entry { name: name.clone(), offset, touched: now, recorded: now, holds: 0, is_ripe: false, owner };
        let slot = match self.vacant.pop() {
            Some(slot) => {
                self.entries[slot as usize] = entry;
                slot
            }
            None => {
                // At most MAX_NAMES entries.
                self.entries.push(entry);
                self.entries.len() as u32 - 1
            }
        };
        self.by_name.insert(name, slot);
        self.by_offset.insert(offset, slot);
        self.taken.set(offset as usize, true);
        self.fresh.push(slot);
        self.shares.charge(owner);
    }

    /// Forgets an entry that nobody holds.
    fn remove(&mut self, slot: u32) {
        let Entry { name, offset, is_ripe, owner, .. } = &self.entries[slot as usize];
        // Both records of one restore may name the same slot.
        if self.by_name.get(name) != Some(&slot) {
            return;
        }
        self.by_name.remove(name);
        self.by_offset.remove(offset);
        self.taken.set(*offset as usize, false);
        match is_ripe {
            true => {
                self.ripe.unlink(slot);
                self.ripe_count -= 1;
            }
            false => {
                self.shares.discharge(*owner);
                self.fresh.unlink(slot);
            }
        }
        self.vacant.push(slot);
    }
}

/// One bit per address, so that a free one is found a word at a time however full the pool is.
struct Bitmap {
    words: Vec<u64>,
    len: usize,
}

impl Bitmap {
    fn new(len: usize) -> Self {
        Self { words: vec![0; len.div_ceil(64)], len }
    }

    fn set(&mut self, at: usize, taken: bool) {
        let bit = 1 << (at % 64);
        match taken {
            true => self.words[at / 64] |= bit,
            false => self.words[at / 64] &= !bit,
        }
    }

    /// The first free position at or behind `start`, going round once.
    fn next_free(&self, start: usize) -> Option<usize> {
        let words = self.words.len();
        (0..=words).find_map(|step| {
            let word = (start / 64 + step) % words;
            let mut free = !self.words[word];
            if step == 0 {
                free &= u64::MAX << (start % 64);
            }
            // Bits behind the end are free, but are no positions; lower ones of the same word come first.
            let at = word * 64 + free.trailing_zeros() as usize;
            (free != 0 && at < self.len).then_some(at)
        })
    }
}

#[cfg(test)]
#[path = "pool_tests.rs"]
mod tests;
