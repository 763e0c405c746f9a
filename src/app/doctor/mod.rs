//! `doctor`: looks at a host, whether tunproxy runs on it or not, and says in plain words what is wrong and what to do.
//!
//! ```text
//! gather (the host), probe (the network) ─► Record ─► checks, pure, one file each ─► Findings
//! ```

mod checks;
mod finding;
#[cfg(test)]
mod fixture;
mod gateways;
mod gather;
mod probe;
mod record;
mod ruleset;

use std::fmt;
use std::path::Path;

use serde::Serialize;

pub use finding::{Finding, Severity};

use super::load;
use super::places::by_root;
use super::plan::NOT_ALL_SEEN;
use record::Record;

/// What is wrong with a host, and what is not.
#[derive(Debug, Serialize)]
pub struct Diagnosis {
    /// What the checks found, the worst first.
    pub findings: Vec<Finding>,
    /// What could not be looked at.
    pub unseen: Vec<String>,
}

/// Examines this host, for a run of the profile at `profile` if one is given, with its state in `state`. Changes nothing.
///
/// # Errors
/// The kernel does not answer.
pub fn doctor(profile: Option<&Path>, state: &Path) -> anyhow::Result<Diagnosis> {
    let mut unseen = Vec::new();
    let loaded = profile.map(load::check);
    let again = by_root("doctor", profile, state);
    let mut record = gather::host(loaded.as_ref(), state, &again, &mut unseen)?;
    let usable = loaded.as_ref().filter(|loaded| !loaded.report.has_errors());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    record.probes = runtime.block_on(probe::all(&record, usable));
    if let (Some(start), Some(profile)) = (&mut record.start, usable.and_then(|loaded| loaded.profile.as_ref())) {
        let _runtime = runtime.enter();
        start.refused.extend(gather::ports_in_use(profile, state, &record.survey));
    }
    if record.probes.captured {
        unseen.push(format!(
            "nameservers and proxies past the run, which takes CAP_NET_ADMIN: root may ask them ({again})"
        ));
    }
    Ok(Diagnosis { findings: findings(&record), unseen })
}

fn findings(record: &Record) -> Vec<Finding> {
    let of = |(name, check): &checks::Check| check(record).into_iter().map(|it| Finding { check: name, ..it });
    let mut found: Vec<Finding> = checks::ALL.iter().flat_map(of).collect();
    found.sort_by_key(|finding| finding.severity);
    found
}

impl Diagnosis {
    fn count(&self, severity: Severity) -> usize {
        self.findings.iter().filter(|finding| finding.severity == severity).count()
    }

    /// The exit code: 1 when something does not work, 3 when nothing was found and not everything could be looked at.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match (self.count(Severity::Problem), self.unseen.is_empty()) {
            (1.., _) => 1,
            (0, false) => NOT_ALL_SEEN,
            (0, true) => 0,
        }
    }
}

impl fmt::Display for Diagnosis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for Finding { severity, what, advice, .. } in &self.findings {
            let word = match severity {
                Severity::Problem => "PROBLEM",
                Severity::Warning => "warning",
                Severity::Fine => "fine   ",
            };
            writeln!(f, "{word}  {what}")?;
            if !advice.is_empty() {
                writeln!(f, "         what to do: {advice}")?;
            }
        }
        self.unseen.iter().try_for_each(|what| writeln!(f, "unseen   {what}"))?;
        let (problems, warnings) = (self.count(Severity::Problem), self.count(Severity::Warning));
        writeln!(f, "{}, {}", counted(problems, "problem"), counted(warnings, "warning"))
    }
}

fn counted(many: usize, what: &str) -> String {
    format!("{many} {what}{}", if many == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_healthy_host_has_neither_problems_nor_warnings_whether_tunproxy_runs_or_not() {
        for record in [fixture::quiet(), fixture::running()] {
            let bad: Vec<Finding> =
                findings(&record).into_iter().filter(|finding| finding.severity != Severity::Fine).collect();
            assert!(bad.is_empty(), "{bad:#?}");
        }
    }

    #[test]
    fn the_worst_comes_first_and_decides_the_exit_code() {
        let mut record = fixture::running();
        record.links.retain(|link| link.name != "tunproxy0");
        record.system.descriptors = 64;
        let diagnosis = Diagnosis { findings: findings(&record), unseen: vec!["the moon".to_owned()] };
        let told = diagnosis.to_string();
        assert!(told.starts_with("PROBLEM  the TUN tunproxy0 is gone"), "{told}");
        assert!(told.ends_with("unseen   the moon\n1 problem, 1 warning\n"), "{told}");
        assert_eq!(diagnosis.exit_code(), 1);
        let json = serde_json::to_value(&diagnosis).unwrap();
        assert_eq!(json["findings"][0]["check"], "device");
        assert_eq!(json["findings"][0]["severity"], "problem");
        assert!(json["findings"][0]["do"].as_str().is_some_and(|advice| advice.contains("log")));
        let healthy = Diagnosis { findings: findings(&fixture::quiet()), unseen: Vec::new() };
        assert_eq!(healthy.exit_code(), 0);
        assert_eq!(Diagnosis { unseen: vec!["the moon".to_owned()], ..healthy }.exit_code(), NOT_ALL_SEEN);
    }

    #[test]
    fn every_problem_and_every_warning_says_what_to_do() {
        let mut record = fixture::quiet();
        record.survey.routes.clear();
        record.rights.node = false;
        record.firewall.installed = false;
        record.system.descriptors = 64;
        let found = findings(&record);
        assert!(found.iter().filter(|it| it.severity != Severity::Fine).count() >= 4, "{found:#?}");
        for finding in found {
            assert_eq!(finding.advice.is_empty(), finding.severity == Severity::Fine, "{finding:?}");
        }
    }
}
