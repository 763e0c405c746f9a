//! Keeping a plan true while the host changes: what somebody removed comes back, and what the host has become is planned
//! for anew.

use std::fmt;
use std::time::{Duration, Instant};

use super::look::Look;
use super::look::stands_for;
use super::{Applied, Done, HostError, Step};
use crate::platform::PlanError;
use crate::platform::imp::nft::{self, OwnedTable};
use crate::platform::layout;
use crate::platform::plan::{HostOptions, HostPlan};
use crate::platform::resolver::DnsPlan;
use crate::platform::survey::NftState;
use crate::platform::undo::Undo;
use crate::platform::{Hurry, Turn};

/// What failed is tried again after this, then after twice as long, and so on.
const FIRST_RETRY: Duration = Duration::from_millis(200);
/// After so many attempts only a further change of the host is a reason for another one.
const RETRIES: u32 = 6;

/// Where something has changed, beyond links, addresses, routes, rules and parameters, which are looked at every time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Seen {
    /// In nftables.
    pub firewall: bool,
    /// In /etc/resolv.conf or systemd-resolved.
    pub resolver: bool,
}

impl Seen {
    /// Nobody knows what has changed.
    pub const EVERYTHING: Self = Self { firewall: true, resolver: true };
}

/// What a look at the host came to.
#[derive(Debug, Default)]
pub struct Settled {
    /// What somebody had removed, and a second look found in place again.
    pub restored: Vec<Step>,
    /// What the host as it is now asks for: done and looked at.
    pub changed: Vec<Change>,
    /// What could not be done, and why; not said twice in a row.
    pub failed: Vec<String>,
    /// What will not work as wished on this host as it is now, and did before.
    pub warnings: Vec<String>,
    /// The same for what is worth knowing on a gateway.
    pub notes: Vec<String>,
    /// When to look again, whatever happens.
    pub again: Option<Duration>,
}

/// What a host that has changed asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// This is new.
    Set(Step),
    /// This was undone: it is needed no more.
    Dropped(Step),
    /// Anything else, in words.
    Other(String),
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Set(step) => write!(f, "{step} is set"),
            Self::Dropped(step) => write!(f, "delete {step}: it is needed no more"),
            Self::Other(words) => f.write_str(words),
        }
    }
}

/// Why a run cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum SettleError {
    /// Somebody has deleted the interface.
    #[error("the TUN device {0} is gone: another program has deleted or renamed it")]
    Gone(String),
    /// The host cannot be looked at, or the journal cannot be written.
    #[error(transparent)]
    Host(#[from] HostError),
    /// There is no plan for what the host has become.
    #[error(transparent)]
    Plan(#[from] PlanError),
}

/// What one look has to tell the next.
#[derive(Debug, Default)]
pub(super) struct Settling {
    /// The number of our interface.
    pub(super) device: Option<u32>,
    /// Since when /etc/resolv.conf names nobody.
    pub(super) bare_since: Option<Instant>,
    /// What failed last, the start included.
    pub(super) failed: Vec<String>,
    failures: u32,
}

impl Settling {
    /// Before the first look. `device`: the number of our interface.
    pub(super) fn of(device: Option<u32>) -> Self {
        Self { device, ..Self::default() }
    }
}

impl Applied {
    /// Looks at the host, plans anew with the same numbers, and makes the plan true: what is missing comes back, what is
    /// new is journalled and done, what is needed no more is undone. Nothing happens on a host that has not changed.
    ///
    /// # Errors
    /// [`SettleError`]: the run had better end. What merely failed is in [`Settled::failed`].
    pub fn settle(&mut self, options: &HostOptions, seen: Seen) -> Result<Settled, SettleError> {
        self.settle_in(None, options, seen)
    }

    /// `turn`: that of this process to take numbers on this host, as long as this goes on.
    fn settle_in(&mut self, turn: Option<&Turn>, options: &HostOptions, seen: Seen) -> Result<Settled, SettleError> {
        let look = self.look(seen)?;
        let gone = || SettleError::Gone(self.plan.tun.clone());
        let device = look.link.ok_or_else(gone)?.index;
        if *self.settling.device.get_or_insert(device) != device {
            return Err(gone());
        }
        let mut survey = self.without_ours(look.survey.clone(), device);
        let (numbers, why) = match options.auto_route {
            true => survey.place_of(self.plan.numbers, options.wishes.first_priority),
            false => (self.plan.numbers, ""),
        };
        let numbers = match self.intruder(&look) {
            Some(_) if options.auto_route => survey.with_other_tables(numbers),
            _ => numbers,
        };
        // A run that starts just now may be about to take the same: what it has taken is to be seen.
        if numbers != self.plan.numbers && turn.is_none() {
            let turn = Turn::wait();
            // What nobody waits for is not worth doing without.
            if Hurry::is_there() {
                return Ok(Settled::default());
            }
            return self.settle_in(Some(&turn), options, seen);
        }
        let mut settled = Settled::default();
        survey.resolv_conf = self.resolver_of_others(&mut settled)?;
        let unfinished = self.resolver_is_unfinished(survey.resolv_conf.as_deref(), &mut settled);
        let mut plan = HostPlan::with_numbers(options, &survey, numbers)?;
        if unfinished {
            plan.dns = self.resolver_meanwhile();
        }
        if let NftState::Missing(_) = survey.nft {
            plan.nft.clone_from(&self.plan.nft);
        }
        if self.plan.nft.is_none() {
            plan.nft = None;
        }
        self.follow(plan, why, &mut settled);
        let open = self.not_in_place(&look);
        self.carry_out(open, seen, &look, &mut settled)?;
        self.take_back(&mut settled)?;
        if let Err(error) = self.journal.lock().compact(self.done.iter().filter_map(recorded)) {
            settled.failed.push(error.to_string());
        }
        // Whatever failed because of that need not be told.
        if !settled.failed.is_empty() {
            let link = self.netlink.link_state(&self.plan.tun).map_err(HostError::from)?;
            if link.is_none_or(|link| link.index != device) {
                return Err(SettleError::Gone(self.plan.tun.clone()));
            }
        }
        self.mind_failures(&mut settled);
        Ok(settled)
    }

    /// Makes `plan` the one to be true, and tells what is new about it. `why`: the reason where its rules stand elsewhere.
    fn follow(&mut self, plan: HostPlan, why: &str, settled: &mut Settled) {
        let old = std::mem::replace(&mut self.plan, plan);
        self.plan.passed_over.clone_from(&old.passed_over);
        let new = &self.plan;
        let (from, to) = (old.numbers.first_priority, new.numbers.first_priority);
        if from != to {
            settled.changed.push(Change::Other(format!("{why}: ours move from priority {from} to {to}")));
        }
        let (from, to) = (old.numbers, new.numbers);
        if from.captured != to.captured {
            settled.changed.push(Change::Other(format!(
                "another program has a route in table {} or {}, which are ours: they move to tables {} and {}",
                from.captured, from.always, to.captured, to.always
            )));
        }
        settled.warnings.extend(new.warnings.iter().filter(|it| !old.warnings.contains(it)).cloned());
        settled.notes.extend(new.notes.iter().filter(|it| !old.notes.contains(it)).cloned());
    }

    /// Does what is open, each inverse on the disk before its act, and looks at what came of it.
    fn carry_out(
        &mut self,
        mut open: Vec<Step>,
        seen: Seen,
        look: &Look,
        settled: &mut Settled,
    ) -> Result<(), SettleError> {
        // A device that was made too small for IPv6 takes nothing of it until it is as large as it was.
        open.sort_by_key(|step| *step != Step::Link);
        let mut planned: Vec<(Step, bool, Vec<Undo>)> = open
            .into_iter()
            .map(|step| {
                let before = self.was_done(&step, look);
                let undos = self.new_undos(&step);
                (step, before, undos)
            })
            .collect();
        if planned.is_empty() {
            return Ok(());
        }
        let lasting = planned.iter().flat_map(|(.., undos)| undos).filter(|undo| undo.outlives_us());
        let mut ids = match self.journal.lock().record(lasting) {
            Ok(ids) => ids.into_iter(),
            // What needs no record, or has it, is done all the same: the kill switch before all.
            Err(error) => {
                settled.failed.push(error.to_string());
                for (_, _, undos) in planned.iter_mut().filter(|(step, ..)| *step == Step::Firewall) {
                    undos.retain(|undo| !self.has_table_on_record(undo));
                }
                planned.retain(|(.., undos)| !undos.iter().any(Undo::outlives_us));
                Vec::new().into_iter()
            }
        };
        let mut acts = Vec::new();
        let mut void = Vec::new();
        for (step, before, undos) in planned {
            let number = |undo: Undo| (undo.outlives_us().then(|| ids.next()).flatten(), undo);
            let undos: Vec<(Option<u64>, Undo)> = undos.into_iter().map(number).collect();
            if step == Step::Resolver && self.is_overtaken() {
                void.extend(undos.into_iter().filter_map(|(id, _)| id));
                settled.again = Some(Duration::ZERO);
                continue;
            }
            match self.do_again(&step) {
                Ok(done) => {
                    void.extend(self.keep(&step, undos, done));
                    acts.push((step, before));
                }
                Err(error) => {
                    let (doubtful, never): (Vec<_>, Vec<_>) =
                        undos.into_iter().partition(|(_, undo)| undo.may_be_in_place(&error));
                    void.extend(self.keep(&step, doubtful, None));
                    void.extend(never.into_iter().filter_map(|(id, _)| id));
                    settled.failed.push(error.to_string());
                }
            }
        }
        self.journal.lock().void(&void).map_err(HostError::from)?;
        let firewall = acts.iter().any(|(step, _)| *step == Step::Firewall);
        let resolver = seen.resolver && acts.iter().any(|(step, _)| *step == Step::Resolver);
        let look = self.look(Seen { firewall, resolver })?;
        let open = self.not_in_place(&look);
        for (step, before) in acts {
            match (open.contains(&step), before) {
                (true, _) => settled.failed.push(format!("{step} was set, but is not there")),
                (false, true) => settled.restored.push(step),
                (false, false) => settled.changed.push(Change::Set(step)),
            }
        }
        Ok(())
    }

    /// Whether the table that `undo` takes down is on record, with however many rules: what takes it down is the same.
    fn has_table_on_record(&self, undo: &Undo) -> bool {
        let same = |done: &Undo| match (done, undo) {
            (Undo::Table(done), Undo::Table(it)) => (&done.name, &done.comment) == (&it.name, &it.comment),
            _ => false,
        };
        self.done.iter().any(|done| matches!(done, Done::Change(Some(_), done) if same(done)))
    }

    /// Does one step again, with its inverse on the disk before.
    pub(super) fn do_on_record(&mut self, step: &Step) -> Result<(), HostError> {
        let undos = self.new_undos(step);
        let lasting: Vec<&Undo> = undos.iter().filter(|undo| undo.outlives_us()).collect();
        let ids = self.journal.lock().record(lasting)?;
        let done = self.do_again(step);
        let void = match done {
            Ok(done) => {
                let mut ids = ids.into_iter();
                let number = |undo: Undo| (undo.outlives_us().then(|| ids.next()).flatten(), undo);
                let undos = undos.into_iter().map(number).collect();
                self.keep(step, undos, done)
            }
            Err(error) => {
                self.journal.lock().void(&ids)?;
                return Err(error);
            }
        };
        Ok(self.journal.lock().void(&void)?)
    }

    /// The inverses of a step that are not on record yet.
    fn new_undos(&self, step: &Step) -> Vec<Undo> {
        let on_record =
            |undo: &Undo| self.done.iter().any(|done| matches!(done, Done::Change(_, done) if done == undo));
        match step {
            Step::Resolver => self.new_rewriting(step),
            // Of a kill switch the record tells how many rules its chains have, and so is new with each change of them.
            Step::Firewall => self.undos(step).into_iter().filter(|undo| !on_record(undo)).collect(),
            _ if self.done.iter().any(|done| stands_for(done, step)) => Vec::new(),
            _ => self.undos(step),
        }
    }

    pub(super) fn do_again(&mut self, step: &Step) -> Result<Option<Done>, HostError> {
        if *step != Step::Firewall {
            return self.perform(step);
        }
        let Some(nft) = self.plan.nft.clone() else { return Ok(None) };
        if self.plan.has_kill_switch() {
            // Until it stands, nobody knows what does.
            let stood = self.standing.take();
            let done = nft::stand_again(stood.as_ref(), &nft);
            done.map_err(|source| HostError::io("load the kill switch again", source))?;
            self.standing = Some(nft);
            return Ok(None);
        }
        let loaded = self.done.iter_mut().find_map(|done| match done {
            Done::Firewall(table) => Some(table),
            Done::Change(..) | Done::Resolved => None,
        });
        if let Some(table) = loaded
            && table.is_loaded()
            && table.change_to(&nft).is_ok()
        {
            return Ok(None);
        }
        // Two tables of one name cannot be.
        self.done.retain(|done| !matches!(done, Done::Firewall(_)));
        let table = OwnedTable::load(&nft).map_err(|source| HostError::io("load the firewall table", source))?;
        Ok(Some(Done::Firewall(table)))
    }

    /// Takes note of how the step is undone, in the place that the order of undoing gives it. Returns the records that
    /// this makes void.
    fn keep(&mut self, step: &Step, undos: Vec<(Option<u64>, Undo)>, done: Option<Done>) -> Vec<u64> {
        let mut void = Vec::new();
        if *step == Step::Resolver && (done.is_some() || !undos.is_empty()) {
            self.done.retain(|done| match done {
                Done::Change(id, Undo::ResolvConf { .. }) => {
                    void.extend(*id);
                    false
                }
                Done::Resolved => false,
                Done::Change(..) | Done::Firewall(_) => true,
            });
        }
        if *step == Step::Firewall && !undos.is_empty() {
            self.done.retain(|done| match done {
                Done::Change(id, Undo::Table(_)) => {
                    void.extend(*id);
                    false
                }
                Done::Change(..) | Done::Firewall(_) | Done::Resolved => true,
            });
        }
        for done in undos.into_iter().map(|(id, undo)| Done::Change(id, undo)).chain(done) {
            let rank = self.rank(&done);
            let at = self.done.iter().position(|other| self.rank(other) > rank).unwrap_or(self.done.len());
            self.done.insert(at, done);
        }
        void
    }

    /// Where a change stands among those that are undone from last to first.
    fn rank(&self, done: &Done) -> (u8, u8) {
        match done {
            Done::Change(_, Undo::Address { .. }) => (0, 0),
            Done::Change(_, Undo::Route(_)) => (1, 0),
            Done::Change(_, Undo::Rule(rule)) => {
                let stage = layout::stage(rule, &self.plan.numbers);
                (if stage < layout::CAPTURE_STAGE { 2 } else { 5 }, stage)
            }
            Done::Change(_, Undo::Sysctl { .. }) => (3, 0),
            Done::Firewall(_) | Done::Change(_, Undo::Table(_)) => (4, 0),
            Done::Resolved | Done::Change(_, Undo::ResolvConf { .. }) => (6, 0),
        }
    }

    /// Undoes what is done and not planned any more, last change first.
    fn take_back(&mut self, settled: &mut Settled) -> Result<(), SettleError> {
        let steps = self.plan.steps();
        // Rules that take traffic, and the routes they lead to, go only when those are there that take it instead.
        let is_rule = |step: &&Step| matches!(step, Step::Rule(_));
        let replaced = steps.iter().filter(is_rule).all(|step| self.done.iter().any(|done| stands_for(done, step)));
        let wanted = |done: &Done, dns: &DnsPlan| match done {
            Done::Change(_, Undo::Rule(_) | Undo::Route(_)) if !replaced => true,
            Done::Resolved => matches!(dns, DnsPlan::Resolved { .. }),
            Done::Change(_, Undo::ResolvConf { .. }) => matches!(dns, DnsPlan::Rewrite { .. }),
            done => steps.iter().any(|step| stands_for(done, step)),
        };
        let mut void = Vec::new();
        for at in (0..self.done.len()).rev() {
            if wanted(&self.done[at], &self.plan.dns) {
                continue;
            }
            let done = self.done.remove(at);
            match self.undo(&done) {
                Ok(undone) => {
                    void.extend(undone.map(|(id, _)| id));
                    settled.changed.extend(said_of(&done));
                }
                Err(error) => {
                    settled.failed.push(error);
                    self.done.insert(at, done);
                }
            }
        }
        Ok(self.journal.lock().void(&void).map_err(HostError::from)?)
    }

    /// Has what failed tried again, less and less often, and tells of it once.
    fn mind_failures(&mut self, settled: &mut Settled) {
        let last = std::mem::replace(&mut self.settling.failed, settled.failed.clone());
        settled.failed.retain(|failure| !last.contains(failure));
        if self.settling.failed.is_empty() {
            self.settling.failures = 0;
            return;
        }
        if self.settling.failures < RETRIES {
            let retry = FIRST_RETRY * 2_u32.pow(self.settling.failures);
            settled.again = Some(settled.again.map_or(retry, |again| again.min(retry)));
            self.settling.failures += 1;
        }
    }
}

fn said_of(done: &Done) -> Option<Change> {
    match done {
        Done::Change(_, Undo::Rule(rule)) => Some(Change::Dropped(Step::Rule(rule.clone()))),
        Done::Change(_, Undo::Route(route)) => Some(Change::Dropped(Step::Route(route.clone()))),
        Done::Change(_, undo) => Some(Change::Other(format!("{undo}: it is needed no more"))),
        Done::Resolved => Some(Change::Other("systemd-resolved is asked for nothing any more".to_owned())),
        Done::Firewall(_) => None,
    }
}

/// What the journal has to hold of a change.
fn recorded(done: &Done) -> Option<(u64, &Undo)> {
    match done {
        Done::Change(Some(id), undo) => Some((*id, undo)),
        Done::Change(None, _) | Done::Firewall(_) | Done::Resolved => None,
    }
}
