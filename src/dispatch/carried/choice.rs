//! Which flows and dials give way when no descriptor is left: those of the client that has most, the ones it misses least.
//!
//! Clients that have no open flow may be one that forges addresses. All of them together count as one client, and so take
//! one part from the others, not one for each address.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::net::IpAddr;
use std::time::Duration;

use foldhash::fast::RandomState;
use tokio::time::Instant;

/// A flow in which data has moved since then gives way to nobody while there are others: it is what counts as idle where
/// memory is short.
pub(in crate::dispatch) const IDLE: Duration = Duration::from_secs(5);
/// A dial that nobody has answered for so long is like an idle flow: its SYN was lost twice.
pub(super) const SLOW: Duration = Duration::from_secs(3);
/// Where nobody has anything idle, a flow in which data has moved since then stays, as does a dial that is younger: most
/// exchanges pause for less.
pub(super) const STALE: Duration = Duration::from_millis(500);
/// The part of what may go that goes at a time, so that the search pays.
const PART: usize = 16;
/// A client that has no more than that, or without an open flow dials no more, is not the one that has most.
const FEW: usize = 8;

/// A flow or a dial.
#[derive(Debug, Clone, Copy)]
pub(super) struct Candidate {
    pub(super) number: u64,
    pub(super) client: IpAddr,
    /// It is not open yet.
    pub(super) dial: bool,
    /// When data last moved in it; of a dial, its begin.
    pub(super) since: Instant,
}

/// What came of a search.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Choice {
    /// These are to give way: one at least.
    These(Vec<u64>),
    /// None can before then.
    NotBefore(Instant),
    /// There are none.
    Nobody,
}

/// Who has a part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Holder {
    /// All who have no open flow.
    Strangers,
    Client(IpAddr),
}

/// What one client has.
#[derive(Clone, Copy, Default)]
struct Has {
    flows: usize,
    dials: usize,
}

/// What each has, and what the one who asks may take from it.
struct Shares {
    of: HashMap<IpAddr, Has, RandomState>,
    strangers: usize,
    /// The most dials of one of them.
    most: usize,
    /// What everybody would have if all had the same.
    part: usize,
    asker: IpAddr,
}

impl Shares {
    fn of(all: impl Iterator<Item = Candidate>, asker: IpAddr) -> Self {
        let mut of = HashMap::<IpAddr, Has, RandomState>::default();
        let mut total = 0;
        for candidate in all {
            let has = of.entry(candidate.client).or_default();
            *(if candidate.dial { &mut has.dials } else { &mut has.flows }) += 1;
            total += 1;
        }
        let strange = || of.values().filter(|has| has.flows == 0).map(|has| has.dials);
        let (strangers, most) = (strange().sum(), strange().max().unwrap_or_default());
        let asks_strangely = of.get(&asker).is_none_or(|has| has.flows == 0);
        let clients = of.values().filter(|has| has.flows > 0).count();
        let holders = clients + usize::from(strangers > 0 || asks_strangely);
        Self { of, strangers, most, part: total / holders.max(1), asker }
    }

    fn holder(&self, client: IpAddr) -> Holder {
        match self.of.get(&client) {
            Some(has) if has.flows > 0 => Holder::Client(client),
            _ => Holder::Strangers,
        }
    }

    /// How much `holder` has.
    fn has(&self, holder: Holder) -> usize {
        match holder {
            Holder::Strangers => self.strangers,
            Holder::Client(client) => self.of.get(&client).map_or(0, |has| has.flows + has.dials),
        }
    }

    fn dials(&self, client: IpAddr) -> usize {
        self.of.get(&client).map_or(0, |has| has.dials)
    }

    /// Whether `holder` has less than half of a part.
    fn has_little(&self, holder: Holder) -> bool {
        self.has(holder) * 2 < self.part
    }

    /// Whether `holder` gives dials that might still be answered: not to one who has as much, or each would end the others'.
    fn gives_dials(&self, holder: Holder) -> bool {
        let own = self.holder(self.asker);
        match holder {
            Holder::Strangers if own == holder => !self.has_little(own) && self.dials(self.asker) < self.most.max(FEW),
            _ => self.has(holder) > self.part && self.has(own) < self.part,
        }
    }

    /// When `candidate` may go: as one that is idle, for want of such, and for want of anything of those who have more than
    /// the one who asks. None: never.
    fn dues(&self, candidate: &Candidate) -> [Option<Instant>; 3] {
        let (holder, own) = (self.holder(candidate.client), self.holder(self.asker));
        let (much, little) = (self.has(holder) > self.part, self.has_little(holder));
        let modest = self.has(own) < self.part;
        let gives_idle = much || !little && (holder == own || modest);
        let gives = if candidate.dial { self.gives_dials(holder) } else { much || !little && holder == own };
        let idle = candidate.since + if candidate.dial { SLOW } else { IDLE };
        [gives_idle.then_some(idle), gives.then(|| candidate.since + STALE), (little && holder == own).then_some(idle)]
    }

    /// What goes first among what one holder has: dials, those of the stranger who has most, and what is oldest.
    fn order(&self, candidate: &Candidate) -> (bool, Reverse<usize>, Instant) {
        let strange = self.holder(candidate.client) == Holder::Strangers;
        let dials = if strange { self.dials(candidate.client) } else { 0 };
        (!candidate.dial, Reverse(dials), candidate.since)
    }
}

/// Whether `client` has more than an equal part of `all`, and more than a few.
pub(super) fn has_more_than_a_part(all: impl Iterator<Item = Candidate>, client: IpAddr) -> bool {
    let shares = Shares::of(all, client);
    let has = shares.has(shares.holder(client));
    has > shares.part && has > FEW
}

/// Which of `all` are to go for a new one of `asker`: idle ones first, and of these those of the client that has most.
pub(super) fn choose(all: impl Iterator<Item = Candidate> + Clone, asker: IpAddr, now: Instant) -> Choice {
    let shares = Shares::of(all.clone(), asker);
    let (mut best, mut first) = (None, None::<Instant>);
    // By what it is, and by how much its holder has.
    let rank = |candidate: &Candidate| {
        let level = shares.dues(candidate).iter().position(|due| due.is_some_and(|due| due <= now))?;
        let holder = shares.holder(candidate.client);
        Some((level, Reverse(shares.has(holder)), holder))
    };
    for candidate in all.clone() {
        let due = shares.dues(&candidate).into_iter().flatten().min();
        first = first.into_iter().chain(due).min();
        best = best.into_iter().chain(rank(&candidate)).min();
    }
    if best.is_none() {
        return first.map_or(Choice::Nobody, Choice::NotBefore);
    }
    let mut found: Vec<_> =
        all.filter(|it| rank(it) == best).map(|candidate| (shares.order(&candidate), candidate.number)).collect();
    let many = (found.len() / PART).max(1);
    found.select_nth_unstable(many - 1);
    Choice::These(found[..many].iter().map(|(_, number)| *number).collect())
}

#[cfg(test)]
mod tests;
