//! Who goes when there are too many associations, or no port for another.

use std::collections::HashMap;
use std::fmt;
use std::net::IpAddr;
use std::rc::Rc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use foldhash::fast::RandomState;
use tokio::time::Instant;

use super::{Associations, Link, MANY};
use crate::net::client_of;

/// Most answers come within this time.
pub(super) const UNDER_WAY: Duration = Duration::from_millis(250);
/// So often at once associations of others end for want of a port.
const AT_ONCE: u32 = 16;
/// After so long they may once more: whoever sends or hears something now and then is never the one who was idle longest.
const EACH: Duration = Duration::from_millis(250);
const NO_PORT: &str = "evicted: no local ports are left";

/// How often associations may still end for want of a port that they may not be able to give, because others take it.
pub(super) struct Sparing {
    left: u32,
    /// Up to when it has been paid out.
    paid: Instant,
}

impl Sparing {
    pub(super) fn new(now: Instant) -> Self {
        Self { left: AT_ONCE, paid: now }
    }

    /// Takes one, if there is one.
    fn take(&mut self, now: Instant) -> bool {
        let due = now.saturating_duration_since(self.paid).as_nanos() / EACH.as_nanos();
        let due = u32::try_from(due).unwrap_or(AT_ONCE).min(AT_ONCE - self.left);
        self.left += due;
        self.paid = if self.left == AT_ONCE { now } else { self.paid + EACH * due };
        let taken = self.left > 0;
        self.left -= u32::from(taken);
        taken
    }
}

impl Associations {
    /// Ends associations because `client` found no port, and looks how many there are now: if that is fewer than before, so
    /// many that this worker keeps no more than its part. Else one or a few, but not too often: then the client gives one of
    /// its own. False: there is none.
    pub(in crate::dispatch) fn spare_a_port(&mut self, client: IpAddr, ports: usize) -> bool {
        self.limits.ports = ports;
        let all = usize::try_from(self.counters.associations.load(Relaxed)).unwrap_or(usize::MAX);
        let kept = self.links.len().saturating_mul(self.limits.links()) / all.max(1);
        let mut spared = false;
        while self.links.len() > kept && self.evict(Duration::ZERO, &NO_PORT) {
            spared = true;
        }
        if spared {
            return true;
        }
        match self.sparing.take(Instant::now()) {
            true => self.evict(Duration::ZERO, &NO_PORT),
            false => self.evict_of(client, &NO_PORT),
        }
    }

    /// Ends associations that have been idle for `idle`, or that nobody has answered, if an answer is not just under way: a
    /// hundredth of all, so that the search pays, and one at least. Where a client has many, of those that it has; else of
    /// all. First go those that nobody has answered, and of these who was idle longest. False: there is none.
    pub(in crate::dispatch) fn evict(&mut self, idle: Duration, reason: &dyn fmt::Display) -> bool {
        let now = Instant::now();
        let may_go = |link: &&Rc<Link>| !is_of_use(link, now) || link.used() + idle <= now;
        let mut many = (self.links.len() / 100).max(1);
        let of_biggest = self.biggest().and_then(|(client, has)| {
            let of_client = |link: &&Rc<Link>| client_of(link.source.ip()) == client;
            let old: Vec<_> = self.links.values().filter(of_client).filter(may_go).cloned().collect();
            many = many.min(has / 8).max(1);
            (!old.is_empty()).then_some(old)
        });
        let mut old = of_biggest.unwrap_or_else(|| self.links.values().filter(may_go).cloned().collect());
        if old.is_empty() {
            return false;
        }
        many = many.min(old.len());
        old.select_nth_unstable_by_key(many - 1, |link| (is_of_use(link, now), link.used()));
        for link in &old[..many] {
            self.end(link, reason);
        }
        true
    }

    /// Ends one association of `client`, the one that would go first among its own. False: it has none.
    fn evict_of(&mut self, client: IpAddr, reason: &dyn fmt::Display) -> bool {
        let (now, client) = (Instant::now(), client_of(client));
        let own = self.links.values().filter(|link| client_of(link.source.ip()) == client);
        let first = own.min_by_key(|link| (is_of_use(link, now), link.used())).cloned();
        first.inspect(|link| self.end(link, reason)).is_some()
    }

    /// The client that has the most associations, and how many, if these are [`MANY`].
    fn biggest(&self) -> Option<(IpAddr, usize)> {
        let mut clients = HashMap::<IpAddr, usize, RandomState>::default();
        for link in self.links.values() {
            *clients.entry(client_of(link.source.ip())).or_default() += 1;
        }
        let many = MANY.min(self.limits.links() / 8).max(8);
        clients.into_iter().max_by_key(|(_, has)| *has).filter(|(_, has)| *has >= many)
    }
}

/// Whether somebody has answered, or may be about to.
fn is_of_use(link: &Link, now: Instant) -> bool {
    link.is_answered() || now < link.used() + UNDER_WAY
}
