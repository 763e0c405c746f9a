//! `plan`: what a start would change on this host now, or what the one that runs has changed. Changes nothing.

use std::fmt;
use std::path::Path;

use anyhow::Context as _;
use serde::Serialize;

use super::control::{Command, ask};
use super::limits::refuses_a_start;
use super::places::{STATE_OF_ROOT, by_root, hides_from_us};
use super::run::{Run, workers_wanted};
use crate::platform::{
    Before, Condition, FOUND_OPEN, Group, HostPlan, JournalError, Journalled, NftState, Numbers, SUSPENDED, Survey,
    condition, holder, let_go_on, may_administer_network, nft_program,
};
use crate::profile::Profile;

/// What there is to say of a run that has no TUN.
const UNCHANGED: &str = "the one that runs has changed nothing: it has no TUN";
/// The exit code where all that was seen is well, and not all could be seen.
pub(super) const NOT_ALL_SEEN: u8 = 3;

/// Changes of a host, in order, and what undoes them.
#[derive(Debug, Serialize)]
pub struct Outline {
    /// Whether they are in force already, by the run that has the same state directory.
    pub in_force: bool,
    /// What a start would undo first, because a crash has left it: the commands.
    pub leftovers: Vec<String>,
    /// A kill switch of that crash is closed: it is undone last, not first.
    pub closed: bool,
    /// The changes, in the order in which they are made.
    pub groups: Vec<Group>,
    /// The numbers chosen.
    pub numbers: Option<Numbers>,
    /// Why a start would end without changing anything.
    pub refused: Option<String>,
    /// What will not work as wished.
    pub warnings: Vec<String>,
    /// What is worth knowing.
    pub notes: Vec<String>,
    /// What could not be looked at, and what was assumed instead.
    pub unseen: Vec<String>,
}

/// The changes that a run of `profile`, which was read from `file`, with its state in `state` makes. Looks, and touches nothing: no device is opened,
/// no lock taken, no file written.
///
/// # Errors
/// The kernel does not answer, or no free numbers are left.
pub fn plan(profile: &Profile, file: &Path, state: &Path) -> anyhow::Result<Outline> {
    let again = by_root("plan", Some(file), state);
    let (mut unseen, mut obstacle) = (Vec::new(), None);
    let journal = Journalled::read(state).unwrap_or_else(|error| {
        match error {
            JournalError::Io { .. } => unseen.push(format!("what an earlier run may have left: {error}")),
            // A start cannot go past it either.
            _ => obstacle = Some(error.to_string()),
        }
        Journalled::default()
    });
    if hides_from_us(state) {
        unseen.push(format!(
            "whether root runs tunproxy, and what that has changed or left ({STATE_OF_ROOT} is closed to this user): {again}"
        ));
    }
    match in_force(state) {
        Some(Ok(Some(plan))) => {
            let shown = file.display();
            let note = format!("this is what the run that is there has changed; {shown} was not looked at");
            return Ok(Outline { notes: vec![note], ..of_the_running(&plan, &journal) });
        }
        Some(Ok(None)) => return Ok(Outline::empty(true, UNCHANGED)),
        Some(Err(error)) => unseen.push(format!("what the one that runs has changed: {error:#}")),
        None => {}
    }
    if !profile.tun.enable {
        return Ok(Outline::empty(false, "tun.enable is false, so a run of this profile changes nothing on the host"));
    }
    let mut survey = Survey::take()?;
    let opened = journal.opened().is_some();
    survey = survey.without(&journal);
    assume_a_firewall(&mut survey, &mut unseen, &again);
    let without_ipv6 = survey.foresee_ipv6();
    let run = Run { profile, state };
    let options = run.options(run.device_name());
    let refused = obstacle
        .or_else(|| refuses_a_start(workers_wanted()))
        .or_else(|| in_the_way(&journal, state))
        .or_else(|| HostPlan::may_start(&options, &survey).err().map(|error| error.to_string()));
    let plan = match (HostPlan::new(&options, &survey), &refused) {
        (Ok(plan), _) => plan,
        (Err(_), Some(_)) => return Ok(Outline { refused, unseen, ..Outline::refusing() }),
        (Err(error), None) => return Err(error.into()),
    };
    let mut outline = Outline {
        in_force: false,
        leftovers: journal.commands(),
        closed: journal.is_closed(),
        groups: plan.outline(&Before::now(&plan, &journal)),
        numbers: Some(plan.numbers),
        refused,
        warnings: plan.all_warnings().cloned().collect(),
        notes: if run.is_gateway() { plan.notes } else { Vec::new() },
        unseen,
    };
    outline.warnings.extend(without_ipv6);
    outline.warnings.extend(opened.then(|| FOUND_OPEN.to_owned()));
    Ok(outline)
}

/// The changes that the run with its state in `state` has made.
///
/// # Errors
/// Nobody answers there, or not in words that can be read.
pub fn plan_in_force(state: &Path) -> anyhow::Result<Outline> {
    let answer = match ask(state, Command::Plan) {
        Err(error) if holder(state).is_none() => Err(error.context(
            "which profile? Name it with --profile FILE, to see what a start would change. Without one this prints what the \
             tunproxy that runs has changed, and there is none",
        )),
        other => other,
    }?;
    match read(answer)? {
        Some(plan) => Ok(of_the_running(&plan, &Journalled::read(state)?)),
        None => Ok(Outline::empty(true, UNCHANGED)),
    }
}

/// What keeps a start from beginning, as far as the state directory tells.
fn in_the_way(journal: &Journalled, state: &Path) -> Option<String> {
    let shown = state.display();
    if let Some(pid) = holder(state) {
        if condition(pid) == Condition::Suspended {
            return Some(format!("another run (process {pid}) uses {shown}; {SUSPENDED}. {}", let_go_on(pid)));
        }
        return Some(format!(
            "another run (process {pid}) uses {shown} and does not answer; `tunproxy doctor` says more"
        ));
    }
    journal.blocks_a_start().then(|| {
        format!(
            "an earlier run left changes in another network namespace, recorded in {shown}: run `tunproxy cleanup` there, \
             or, if that namespace is gone, `tunproxy cleanup --namespace-gone`"
        )
    })
}

/// What the run with the state directory `state` has changed; `None` where nobody answers.
pub(super) fn in_force(state: &Path) -> Option<anyhow::Result<Option<HostPlan>>> {
    Some(read(ask(state, Command::Plan).ok()?))
}

fn read(answer: serde_json::Value) -> anyhow::Result<Option<HostPlan>> {
    match answer.get("error").and_then(serde_json::Value::as_str) {
        Some(error) => Err(anyhow::anyhow!("it answers: {error}")),
        None => serde_json::from_value(answer).context("its answer cannot be read"),
    }
}

fn of_the_running(plan: &HostPlan, journal: &Journalled) -> Outline {
    Outline {
        in_force: true,
        leftovers: Vec::new(),
        closed: false,
        groups: plan.outline(&Before::journalled(journal, plan)),
        numbers: Some(plan.numbers),
        refused: None,
        warnings: plan.all_warnings().cloned().collect(),
        notes: Vec::new(),
        unseen: Vec::new(),
    }
}

/// Whoever may not read the firewall sees what a start by root would load on a host with no other rules.
pub(super) fn assume_a_firewall(survey: &mut Survey, unseen: &mut Vec<String>, again: &str) {
    if let NftState::Missing(why) = &survey.nft
        && !may_administer_network()
        && nft_program().is_some()
    {
        unseen.push(format!(
            "the firewall's rules, for want of CAP_NET_ADMIN ({why}): it is taken to be empty. Other names and marks may \
             be chosen where its rules use these, and a chain that drops what is forwarded would not be named. Root may \
             look: {again}"
        ));
        survey.nft = NftState::empty();
        let known = &mut survey.parameters;
        (known.finds_sockets, known.marks_connections, known.finds_ways_back) = (true, true, true);
    }
}

impl Outline {
    fn empty(in_force: bool, note: &str) -> Self {
        Self { in_force, notes: vec![note.to_owned()], ..Self::refusing() }
    }

    /// One without changes.
    fn refusing() -> Self {
        Self {
            in_force: false,
            leftovers: Vec::new(),
            closed: false,
            groups: Vec::new(),
            numbers: None,
            refused: None,
            warnings: Vec::new(),
            notes: Vec::new(),
            unseen: Vec::new(),
        }
    }

    /// The exit code: 1 if a start would be refused, 3 if not everything could be looked at, else 0.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match (&self.refused, self.unseen.is_empty()) {
            (Some(_), _) => 1,
            (None, false) => NOT_ALL_SEEN,
            (None, true) => 0,
        }
    }
}

impl fmt::Display for Outline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.in_force, self.groups.is_empty()) {
            (_, true) => {}
            (true, _) => writeln!(f, "What the tunproxy that runs has changed on this host, in this order:\n")?,
            (false, _) => {
                writeln!(f, "What a start would change on this host now, in this order. Nothing was changed.\n")?;
            }
        }
        if !self.leftovers.is_empty() {
            let when = match self.closed {
                true => "an earlier run left this for its kill switch: it goes when the new one is in force",
                false => "what an earlier run left is undone first",
            };
            writeln!(f, "0. {when}")?;
            self.leftovers.iter().flat_map(|act| act.lines()).try_for_each(|line| writeln!(f, "    {line}"))?;
            writeln!(f)?;
        }
        for (number, group) in self.groups.iter().enumerate() {
            writeln!(f, "{}. {group}", number + 1)?;
        }
        if self.groups.iter().any(|group| group.acts.iter().any(|act| act.contains("flags owner"))) {
            writeln!(
                f,
                "(An owned table goes with the process that loads it; tunproxy keeps a child `nft` for that.)\n"
            )?;
        }
        let lines = [
            ("refused", self.refused.as_slice()),
            ("warning", &self.warnings),
            ("note", &self.notes),
            ("not seen", &self.unseen),
        ];
        for (word, said) in lines {
            said.iter().try_for_each(|line| writeln!(f, "{word}: {line}"))?;
        }
        Ok(())
    }
}
