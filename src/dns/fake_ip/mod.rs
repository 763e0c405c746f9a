//! Fake addresses: every name gets one of its own, and keeps it across restarts.

use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use parking_lot::Mutex;
use tokio::runtime::Handle;

use super::filter::Filter;
use crate::net::Name;

mod log;
mod pool;
mod shares;

use log::{Log, Record};
use pool::{Pool, RENEWAL};

pub(in crate::dns) use pool::Exhausted;

/// A client may use an answer for so long beyond its TTL: browsers keep what the system's resolver told them for a
/// minute, because it does not tell them the TTL.
const GRACE_SECONDS: u32 = 60;
/// Names copied per turn of the lock while the log is compacted.
const SNAPSHOT_CHUNK: usize = 512;
/// The log is compacted when it has grown by so many bytes over twice what it needs.
const SLACK: u64 = 4 << 20;

/// Why the DNS service cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// A `fake-ip-range` without a single address to hand out.
    #[error("the fake-IP range {0} is too small: its first four addresses and the last are not handed out")]
    RangeTooSmall(IpNet),
}

/// What an address means to us.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fake {
    /// A fake address, and the name that it stands for.
    Name(Name),
    /// In a fake range, but handed out to nobody: refuse it, never guess.
    Unknown,
    /// A real address.
    NotFake,
}

/// While this lives, the fake address it was made for keeps its name. It holds nothing for a real address, nor for a client
/// that has used up its part of the fake ones.
#[must_use = "the address is released when this is dropped"]
#[derive(Default)]
pub struct Held(Option<(Arc<FakeIp>, bool, u32)>);

impl std::fmt::Debug for Held {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Held").field(&self.0.as_ref().map(|(_, _, slot)| slot)).finish()
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Some((fake, v6, slot)) = self.0.take() {
            let now = fake.seconds(super::now());
            let pool = if v6 { fake.v6.as_ref() } else { Some(&fake.v4) };
            pool.into_iter().for_each(|pool| pool.release(slot, now, fake.recording(now)));
        }
    }
}

/// Both pools, the filter in front of them and the log behind them.
pub(super) struct FakeIp {
    filter: Filter,
    /// Of every fake answer, in seconds.
    pub(super) ttl: u32,
    v4: Pool,
    v6: Option<Pool>,
    log: Option<Log>,
    start: Instant,
    /// Seconds for which earlier runs went on, as far as their records tell. Together with those of this run they are the
    /// time of everything in here: it has no jumps, and stands still while nothing runs.
    before: u32,
    runtime: Handle,
    compaction: Mutex<Compaction>,
}

/// How it stands with the writing of the whole log.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Compaction {
    Idle,
    Running,
    /// One has failed: a disk that is full would be tried again with every batch.
    GivenUp,
}

impl FakeIp {
    /// Builds the pools, and fills them from the log.
    pub(super) fn open(
        ranges: (Ipv4Net, Option<Ipv6Net>),
        filter: Filter,
        ttl: u32,
        path: Option<&Path>,
        runtime: Handle,
    ) -> Result<Self, OpenError> {
        let grace = GRACE_SECONDS.saturating_add(ttl);
        let v4 = Pool::new(IpNet::V4(ranges.0), grace)?;
        let v6 = ranges.1.map(|range| Pool::new(IpNet::V6(range), grace)).transpose()?;
        let (start, compaction) = (super::now(), Mutex::new(Compaction::Idle));
        let mut fake = Self { filter, ttl, v4, v6, log: None, start, before: 0, runtime, compaction };
        if let Some(path) = path {
            match fake.load(path) {
                Ok(log) => fake.log = Some(log),
                Err(error) => tracing::warn!(
                    path = %path.display(), %error,
                    "the fake-IP log cannot be used; after a restart names may get other addresses"
                ),
            }
        }
        Ok(fake)
    }

    /// What was used last in an earlier run comes last. A record may be as late as [`RENEWAL`], but nothing is younger than the
    /// last of all.
    fn load(&mut self, path: &Path) -> std::io::Result<Log> {
        let log::Contents { mut records, unsound } = log::read(path)?;
        let count = records.len();
        // A compaction writes in any order.
        records.sort_by_key(|record| record.at);
        self.before = records.last().map_or(0, |record| record.at);
        for Record { name, ip, at } in records {
            // A range or a filter that changed since leaves entries without a place.
            if let Some(pool) = self.pool(ip).filter(|_| self.filter.fakes(name.as_str())) {
                pool.restore(name, ip, at.saturating_add(RENEWAL).min(self.before));
            }
        }
        if unsound || count > 2 * self.names() {
            let mut bytes = Vec::new();
            self.snapshot(&mut bytes);
            log::replace(path, &bytes)?;
        }
        Log::append_to(path)
    }

    /// Whether `name` (lower-case) gets fake addresses.
    pub(super) fn fakes(&self, name: &str) -> bool {
        self.filter.fakes(name)
    }

    /// Whether there are fake IPv6 addresses.
    pub(super) fn has_v6(&self) -> bool {
        self.v6.is_some()
    }

    /// The fake address of `name` in one family, for `client`. [`FakeIp::flush`] must return before the answer leaves.
    pub(super) fn address(&self, name: &str, v6: bool, client: IpAddr, now: Instant) -> Result<IpAddr, Exhausted> {
        let pool = if v6 { self.v6.as_ref().ok_or(Exhausted)? } else { &self.v4 };
        let now = self.seconds(now);
        pool.address(name, client, now, self.recording(now))
    }

    /// Writes what is in use at `now` to the log.
    fn recording(&self, now: u32) -> impl FnOnce(&Name, IpAddr) {
        move |name, ip| {
            if let Some(log) = &self.log {
                log.append(name, ip, now);
            }
        }
    }

    /// What `ip` stands for. Who asks does not use it by that.
    pub(super) fn name_of(&self, ip: IpAddr) -> Fake {
        self.pool(ip).map_or(Fake::NotFake, |pool| pool.name_of(ip).map_or(Fake::Unknown, Fake::Name))
    }

    /// What `ip` stands for, and keeps to as long as the other result lives, for a flow of `client`.
    pub(super) fn hold(self: &Arc<Self>, ip: IpAddr, client: IpAddr, now: Instant) -> (Fake, Held) {
        let Some(pool) = self.pool(ip) else { return (Fake::NotFake, Held::default()) };
        let now = self.seconds(now);
        match pool.hold(ip, client, now, self.recording(now)) {
            Some((name, slot)) => (Fake::Name(name), Held(slot.map(|slot| (Arc::clone(self), ip.is_ipv6(), slot)))),
            None => (Fake::Unknown, Held::default()),
        }
    }

    /// Returns once every address handed out before the call is in the log.
    pub(super) fn flush(self: &Arc<Self>) {
        let Some(length) = self.log.as_ref().and_then(Log::flush) else { return };
        // A record has about forty bytes. The look at both tables is two uncontended locks per written batch.
        let needed = self.names() as u64 * 64;
        if length > 2 * needed + SLACK && self.begins_compaction(Compaction::Idle) {
            let fake = Arc::clone(self);
            self.runtime.spawn_blocking(move || fake.compact());
        }
    }

    /// Whether the caller is to write the log anew: nobody does, and it stands as in `from` or better.
    fn begins_compaction(&self, from: Compaction) -> bool {
        let mut compaction = self.compaction.lock();
        let begins = *compaction == Compaction::Idle || *compaction == from;
        if begins {
            *compaction = Compaction::Running;
        }
        begins
    }

    fn compact(&self) {
        let Some(log) = &self.log else { return };
        let outcome = log.compact(|out| self.snapshot(out));
        *self.compaction.lock() = if outcome.is_ok() { Compaction::Idle } else { Compaction::GivenUp };
        if let Err(error) = outcome {
            tracing::warn!(%error, "the fake-IP log could not be written anew; it goes on as it is");
        }
    }

    /// Writes the log anew if its file was taken away. True: it was, and is there again.
    pub(super) fn put_back(&self) -> bool {
        let is_in_place = || self.log.as_ref().is_none_or(Log::is_in_place);
        if is_in_place() || !self.begins_compaction(Compaction::GivenUp) {
            return false;
        }
        self.compact();
        is_in_place()
    }

    fn snapshot(&self, out: &mut Vec<u8>) {
        for pool in std::iter::once(&self.v4).chain(&self.v6) {
            let mut from = 0;
            while pool.visit(from, SNAPSHOT_CHUNK, |name, ip, at| log::encode(out, name, ip, at)) {
                from += SNAPSHOT_CHUNK;
            }
        }
    }

    fn pool(&self, ip: IpAddr) -> Option<&Pool> {
        std::iter::once(&self.v4).chain(&self.v6).find(|pool| pool.contains(ip))
    }

    /// How many addresses have a name.
    pub(super) fn names(&self) -> usize {
        self.v4.len() + self.v6.as_ref().map_or(0, Pool::len)
    }

    fn seconds(&self, now: Instant) -> u32 {
        let running = now.saturating_duration_since(self.start).as_secs();
        self.before.saturating_add(u32::try_from(running).unwrap_or(u32::MAX))
    }
}

/// FNV-1a, mixed at the end: the same in every run and version, because addresses in the log follow from it.
fn stable_hash(bytes: &[u8]) -> u64 {
    let hash = bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3));
    let hash = (hash ^ (hash >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93);
    hash ^ (hash >> 32)
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
