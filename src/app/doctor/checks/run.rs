//! Whether tunproxy runs, and what an earlier run has left.

use std::path::Path;

use super::super::finding::Finding;
use super::super::record::{Record, RunState};
use crate::app::closed::{how_to_close, how_to_open, what_is_open};
use crate::app::places::cleanup_of;
use crate::platform::{KillSwitch, Rule, RuleAction, SUSPENDED, let_go_on, rule_command};

pub(super) fn check(record: &Record) -> Vec<Finding> {
    match &record.run {
        RunState::Answers { pid, seconds, plan, .. } => {
            let tun = plan.as_ref().map_or("without a TUN".to_owned(), |plan| format!("with the TUN {}", plan.tun));
            let runs = Finding::fine(format!("tunproxy runs: process {pid}, since {seconds} s, {tun}"));
            // The run may have been given another file since, and which it was is not asked of it.
            let unasked = record.profile.is_none().then(|| {
                Finding::fine(
                    "the profile's proxies were not looked at: with `tunproxy doctor --profile FILE` they are, and its own \
                     nameservers",
                )
            });
            [runs].into_iter().chain(unasked).chain(closed(record)).collect()
        }
        RunState::Silent(pid) => vec![Finding::problem(
            format!("process {pid} holds the state directory {} and does not answer", record.system.state.path),
            format!(
                "if it has only just begun to start or to stop, look again; else its log may say why: `kill {pid}`, or \
                 `kill -9 {pid}`, and then `tunproxy cleanup`"
            ),
        )],
        RunState::Suspended(pid) => vec![Finding::problem(
            format!("process {pid} holds the state directory {}; {SUSPENDED}", record.system.state.path),
            format!(
                "{}. If it is not wanted any more: `kill -9 {pid}`, and then `{}`",
                let_go_on(pid),
                cleanup_of(Path::new(&record.system.state.path))
            ),
        )],
        RunState::Lost(pid) => vec![Finding::problem(
            format!(
                "tunproxy runs (process {pid}), and its state directory {} was deleted since: nobody can ask it, and after a crash \
                 nothing tells what to undo",
                record.system.state.path
            ),
            format!(
                "look again: it puts the directory back within a second. If it cannot, its log says why; `mkdir -m 700 -p {}` (by \
                 its user) helps, or `kill {pid}`, which puts the host back, and a new start",
                record.system.state.path
            ),
        )],
        RunState::Absent | RunState::Hidden => absent(record),
    }
}

fn absent(record: &Record) -> Vec<Finding> {
    let mut found = match &record.journal {
        Err(journal) => vec![Finding::problem(
            format!(
                "the journal of an earlier run cannot be used, neither by a start nor by a clean-up: {}",
                journal.what
            ),
            journal.advice.clone(),
        )],
        // Whoever may not look is told so elsewhere.
        Ok(None) => Vec::new(),
        Ok(Some(journal)) if journal.commands.is_empty() && !journal.elsewhere => match record.run {
            RunState::Hidden => Vec::new(),
            _ => vec![Finding::fine("tunproxy does not run here, and no earlier run has left anything")],
        },
        Ok(Some(journal)) if journal.elsewhere => vec![Finding::problem(
            "an earlier run ended in another network namespace without putting it back",
            "run `tunproxy cleanup` in that namespace (nsenter --net=...); if it is gone, `tunproxy cleanup \
             --namespace-gone`",
        )],
        Ok(Some(journal)) => vec![Finding::problem(
            format!(
                "an earlier run ended without putting the host back: {} changes are left, and undone by `{}` and the like",
                journal.commands.len(),
                journal.commands[0].lines().next().unwrap_or_default(),
            ),
            format!("run `{}`; the next start does it, too", cleanup_of(Path::new(&record.system.state.path))),
        )],
    };
    found.extend(closed(record));
    found.extend(opened(record));
    found.extend(strays(record));
    found
}

/// The firewall table of a kill switch that ought to be closed, if that is not there, or not whole.
fn open_table(record: &Record) -> Option<&String> {
    record.journal.as_ref().ok()?.as_ref().filter(|journal| journal.opened)?.kill_switch.as_ref()
}

fn opened(record: &Record) -> Option<Finding> {
    let table = open_table(record)?;
    (!matches!(record.run, RunState::Hidden))
        .then(|| Finding::problem(what_is_open(table), how_to_close(Path::new(&record.system.state.path))))
}

/// A kill switch that no run stands behind, whether a journal knows of it or not.
fn closed(record: &Record) -> Option<Finding> {
    let has_tun = |found: &KillSwitch| record.links.iter().any(|link| link.name == found.tun);
    let is_open = |found: &KillSwitch| open_table(record) == Some(&found.table);
    let found = record.firewall.closed.iter().find(|found| !has_tun(found) && !is_open(found))?;
    Some(Finding::problem(
        format!(
            "the kill switch of an earlier run is closed (firewall table inet {}): nothing leaves this host but to its own \
             networks",
            found.table
        ),
        format!("open it with {}", how_to_open(Path::new(&record.system.state.path))),
    ))
}

/// Rules as we make them that look into empty tables, and that no journal of ours knows.
fn strays(record: &Record) -> Option<Finding> {
    let is_stray = |rule: &&Rule| {
        let RuleAction::Lookup(table) = rule.action else { return false };
        // The kernel's own rules name tables of its own; 0 is that of an l3mdev rule.
        let named = !matches!(table.0, 0 | 253..=255) && rule.priority > 0;
        named && rule.origin == Rule::KERNEL && !rule.foreign_selectors && !record.survey.tables.contains(&table)
    };
    let strays: Vec<&Rule> = record.foreign_rules().filter(is_stray).collect();
    let first = strays.first()?;
    let by_hand = format!("delete each, as in `sudo {}`, or reboot", rule_command("delete", first));
    let advice = match record.journal {
        // Then no clean-up will do it.
        Err(_) => format!("if the journal cannot be made to count (above), {by_hand}"),
        Ok(_) => {
            format!("run `sudo tunproxy cleanup --state-dir DIR` with the state directory of that run; or {by_hand}")
        }
    };
    Some(Finding::warning(
        match strays.len() {
            1 => format!("1 rule looks into an empty table, as a crashed run leaves it: {first}"),
            many => format!("{many} rules look into empty tables, as a crashed run leaves them: {first} and the like"),
        },
        advice,
    ))
}

#[cfg(test)]
mod tests {
    use super::super::super::fixture::{only_problem, quiet, running};
    use super::super::super::record::{Journal, Unusable};
    use super::*;
    use crate::platform::{Family, RouteTable, SeenLink};

    #[test]
    fn a_run_that_answers_and_a_host_without_one_are_fine() {
        assert!(only_problem(&check(&running())).is_none());
        assert!(only_problem(&check(&quiet())).is_none());
    }

    #[test]
    fn without_a_profile_it_is_said_that_proxies_were_not_looked_at() {
        let told = |record: Record| check(&record).iter().any(|it| it.what.contains("doctor --profile FILE"));
        assert!(!told(running()));
        assert!(told(Record { profile: None, ..running() }));
        assert!(!told(Record { profile: None, ..quiet() }));
    }

    #[test]
    fn a_run_that_holds_its_directory_and_says_nothing_is_named_with_its_process() {
        let found = check(&Record { run: RunState::Silent(4711), ..quiet() });
        assert!(only_problem(&found).unwrap().what.contains("process 4711"), "{found:?}");
    }

    #[test]
    fn one_that_is_suspended_is_told_with_how_it_goes_on() {
        let found = check(&Record { run: RunState::Suspended(4711), ..quiet() });
        let problem = only_problem(&found).unwrap();
        assert!(problem.what.contains("suspended") && problem.advice.contains("`kill -CONT 4711`"), "{found:?}");
    }

    #[test]
    fn one_whose_directory_was_deleted_is_not_called_absent() {
        let found = check(&Record { run: RunState::Lost(4711), ..quiet() });
        let problem = only_problem(&found).unwrap();
        assert!(problem.what.contains("runs (process 4711)") && problem.advice.contains("`kill 4711`"), "{found:?}");
        assert_eq!(found.len(), 1, "{found:?}");
    }

    #[test]
    fn leftovers_of_a_crash_are_to_be_cleaned_up() {
        let journal = Journal { commands: vec!["ip -4 rule delete priority 9000".to_owned()], ..Journal::default() };
        let found = check(&Record { journal: Ok(Some(journal)), ..quiet() });
        assert!(only_problem(&found).unwrap().advice.contains("sudo tunproxy cleanup"), "{found:?}");
        let elsewhere = Journal { elsewhere: true, ..Journal::default() };
        let found = check(&Record { journal: Ok(Some(elsewhere)), ..quiet() });
        assert!(only_problem(&found).unwrap().advice.contains("--namespace-gone"), "{found:?}");
    }

    #[test]
    fn a_kill_switch_that_nobody_stands_behind_is_named() {
        let mut record = quiet();
        record.firewall.closed = vec![KillSwitch { table: "tunproxy".to_owned(), tun: "tunproxy0".to_owned() }];
        let found = check(&record);
        assert!(only_problem(&found).unwrap().advice.contains("sudo tunproxy cleanup"), "{found:?}");
        assert!(closed(&quiet()).is_none());
        // That of a run which goes on, with another state directory, has its TUN.
        record.links.push(SeenLink { name: "tunproxy0".to_owned(), ..SeenLink::default() });
        assert!(closed(&record).is_none());
    }

    #[test]
    fn what_nobody_could_see_is_not_called_fine() {
        assert!(check(&Record { journal: Ok(None), ..quiet() }).is_empty());
        assert!(check(&Record { run: RunState::Hidden, ..quiet() }).is_empty());
    }

    #[test]
    fn a_journal_that_a_clean_up_refuses_is_told_with_what_helps() {
        let journal = Unusable { what: "line 2 is damaged".to_owned(), advice: "reboot".to_owned() };
        let found = check(&Record { journal: Err(journal), ..quiet() });
        let problem = only_problem(&found).unwrap();
        assert!(problem.what.contains("line 2 is damaged") && problem.advice == "reboot", "{problem:?}");
    }

    #[test]
    fn rules_that_no_journal_knows_and_that_lead_nowhere_are_named() {
        let mut record = quiet();
        record.survey.rules.push(Rule::new(Family::V4, 9043, RuleAction::Lookup(RouteTable(2022))));
        let found = check(&record);
        assert!(found.iter().any(|it| it.advice.contains("ip -4 rule delete priority 9043 lookup 2022")), "{found:?}");
        record.survey.tables.insert(RouteTable(2022));
        assert_eq!(check(&record).len(), 1);
    }

    #[test]
    fn a_kill_switch_whose_table_somebody_flushed_is_missed() {
        let journal = |opened| Journal { kill_switch: Some("tunproxy".to_owned()), opened, ..Journal::default() };
        let mut record = Record { journal: Ok(Some(journal(true))), ..quiet() };
        let found = check(&record);
        assert!(only_problem(&found).unwrap().what.contains("inet tunproxy is gone"), "{found:?}");
        // What is left of it is not called closed as well.
        record.firewall.closed = vec![KillSwitch { table: "tunproxy".to_owned(), tun: "tunproxy0".to_owned() }];
        assert!(opened(&record).is_some() && closed(&record).is_none());
        record.journal = Ok(Some(journal(false)));
        assert!(opened(&record).is_none() && closed(&record).is_some());
    }

    #[test]
    fn beside_a_journal_that_no_clean_up_takes_rules_are_to_be_deleted_by_hand() {
        let mut record = quiet();
        record.survey.rules.push(Rule::new(Family::V4, 9043, RuleAction::Lookup(RouteTable(2022))));
        record.journal = Err(Unusable { what: "line 2 is damaged".to_owned(), advice: "reboot".to_owned() });
        let found = check(&record);
        let strays = found.iter().find(|it| it.what.contains("empty table")).unwrap();
        assert!(strays.advice.contains("delete each") && !strays.advice.contains("cleanup"), "{strays:?}");
    }
}
