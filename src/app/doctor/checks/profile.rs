//! The profile: its mistakes, and whether its proxies can be reached.

use super::super::finding::Finding;
use super::super::record::Record;

/// More errors than this say nothing more.
const MOST: usize = 5;

pub(super) fn check(record: &Record) -> Vec<Finding> {
    let Some(profile) = &record.profile else { return Vec::new() };
    let mut found: Vec<Finding> = profile
        .errors
        .iter()
        .take(MOST)
        .map(|error| {
            Finding::problem(
                format!("the profile cannot be run: {error}"),
                "correct it; `tunproxy check` shows the place",
            )
        })
        .collect();
    if profile.warnings > 0 {
        found.push(Finding::warning(
            format!("`check` warns of something in the profile, {} in all", profile.warnings),
            "read them: `tunproxy check --profile FILE`",
        ));
    }
    let servers = &record.probes.servers;
    let dead = servers.iter().filter_map(|(server, outcome)| Some((server, outcome.as_ref().err()?)));
    found.extend(dead.map(|(server, why)| {
        Finding::problem(
            format!("the proxy {server} cannot be reached from here: {why}"),
            "look whether its `server` and `port` are right and whether it runs; what goes there is refused meanwhile",
        )
    }));
    if found.is_empty() {
        found.push(Finding::fine(match servers.len() {
            0 => "the profile can be run".to_owned(),
            many => format!("the profile can be run, and each of its {many} proxies accepts connections"),
        }));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::super::super::fixture::{only_problem, quiet, running, warnings};
    use super::*;

    #[test]
    fn a_profile_without_mistakes_is_fine_and_none_is_not_looked_at() {
        assert!(only_problem(&check(&running())).is_none());
        assert!(check(&Record { profile: None, ..quiet() }).is_empty());
    }

    #[test]
    fn mistakes_and_dead_proxies_are_named() {
        let mut record = quiet();
        record.probes.servers = vec![
            ("alive (203.0.113.3:1080)".to_owned(), Ok(())),
            ("dead (203.0.113.4:1080)".to_owned(), Err("connection refused".to_owned())),
        ];
        assert!(only_problem(&check(&record)).unwrap().what.contains("dead (203.0.113.4:1080)"));
        record.probes.servers.truncate(1);
        record.profile.as_mut().unwrap().warnings = 2;
        assert!(warnings(&check(&record))[0].contains("2 in all"));
        record.profile.as_mut().unwrap().errors = vec!["3:1: rules: expected a list".to_owned()];
        assert!(only_problem(&check(&record)).unwrap().what.contains("3:1"));
    }
}
