//! The profile: its mistakes, and whether its proxies can be reached.

use super::super::finding::Finding;
use super::super::record::{Record, Server};
use super::firewall::{dropped_here, is_of_our_own, is_silence, let_out, unheard};
use crate::platform::interface_not_there;

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
    found.extend(profile.open_resolver.iter().map(|(what, advice)| Finding::warning(what.clone(), advice.clone())));
    let missing = |(_, name): &&(&str, String)| record.links.iter().all(|link| link.name != *name);
    found.extend(profile.interfaces.iter().filter(missing).map(|(key, name)| {
        Finding::warning(
            interface_not_there(key, name),
            "if it is misspelt, write it as `ip link` shows it, without `@`",
        )
    }));
    let servers = &record.probes.servers;
    let waits = |server: &&Server| is_placeholder(server) && !server.used;
    let (placeholders, meant): (Vec<&Server>, Vec<&Server>) = servers.iter().partition(waits);
    let dead = meant.iter().filter_map(|server| Some((server, server.outcome.as_ref().err()?)));
    found.extend(dead.map(|(server, why)| ours(record, server, why).unwrap_or_else(|| unreachable(server, why))));
    if found.is_empty() {
        found.push(Finding::fine(match meant.len() {
            0 => "the profile can be run".to_owned(),
            many => format!("the profile can be run, and each of its {many} proxies accepts connections"),
        }));
    }
    found.extend(placeholders.into_iter().map(placeholder));
    found
}

/// Whether it has an address that stands for others, and nobody is there: who refuses is somebody.
fn is_placeholder(server: &Server) -> bool {
    let refused = |why: &String| why.contains("refused");
    server.example && server.outcome.as_ref().is_err_and(|why| !refused(why))
}

/// One that this host's own firewall keeps from being asked, or heard.
fn ours(record: &Record, server: &Server, why: &str) -> Option<Finding> {
    let shown = &server.shown;
    if is_of_our_own(why) {
        let (what, advice) =
            (format!("the proxy {shown} cannot be reached from here: {}", dropped_here(record)), let_out(record));
        return Some(if server.used { Finding::problem(what, advice) } else { Finding::warning(what, advice) });
    }
    let gate = record.deaf().filter(|_| is_silence(why) && !is_placeholder(server))?;
    Some(unheard(&format!("the proxy {shown}"), &gate.chain))
}

/// A proxy that does not answer. It matters only where flows go there.
fn unreachable(server: &Server, why: &str) -> Finding {
    let Server { shown, place, used, .. } = server;
    let example = is_placeholder(server);
    let placeholder = if example { ". It is a placeholder: its address is reserved for examples" } else { "" };
    let what = format!("the proxy {shown} cannot be reached from here: {why}{placeholder}");
    let advice = match example {
        true => format!("write your own proxy's `server` and `port` at {place}, or take it out"),
        false => format!("look whether its `server` and `port` are right ({place}) and whether it runs"),
    };
    match used {
        true => Finding::problem(what, advice + "; what goes there is refused meanwhile"),
        false => Finding::warning(what + "; no rule leads there as things stand", advice),
    }
}

/// One that waits for its owner, as in a profile that was just copied.
fn placeholder(Server { shown, place, .. }: &Server) -> Finding {
    Finding::fine(format!(
        "the proxy {shown} is a placeholder, and no rule leads there: before one does, it must be replaced by your own ({place})"
    ))
}

#[cfg(test)]
mod tests {
    use super::super::super::finding::Severity;
    use super::super::super::fixture::{deafen, only_problem, quiet, running, warnings};
    use super::*;

    #[test]
    fn a_profile_without_mistakes_is_fine_and_none_is_not_looked_at() {
        assert!(only_problem(&check(&running())).is_none());
        assert!(check(&Record { profile: None, ..quiet() }).is_empty());
    }

    #[test]
    fn an_interface_that_is_not_there_is_a_warning_and_one_that_is_none() {
        let mut record = running();
        let there = record.links[0].name.clone();
        let named = vec![("include-interface", there), ("exclude-interface", "wg7".to_owned())];
        record.profile.as_mut().unwrap().interfaces = named;
        let told = warnings(&check(&record));
        assert!(told.len() == 1 && told[0].contains("tun.exclude-interface: there is no interface wg7"), "{told:?}");
    }

    #[test]
    fn a_profile_that_answers_strangers_is_told_what_to_write_instead() {
        let mut record = running();
        record.profile.as_mut().unwrap().open_resolver =
            Some(("dns.listen: [::]:53".to_owned(), "name one".to_owned()));
        let told = warnings(&check(&record));
        assert_eq!(told, ["dns.listen: [::]:53"], "{told:?}");
    }

    #[test]
    fn what_the_hosts_own_firewall_keeps_in_or_out_is_not_blamed_on_the_proxy() {
        let mut record = quiet();
        let denied = std::io::Error::from_raw_os_error(libc::EPERM).to_string();
        record.probes.servers = vec![Server {
            shown: "mine (9.9.9.9:1080)".to_owned(),
            place: "mine.yaml:7".to_owned(),
            used: true,
            example: false,
            outcome: Err(denied),
        }];
        let found = check(&record);
        assert!(only_problem(&found).unwrap().what.contains("firewall drops what it sends"), "{found:?}");
        record.probes.servers[0].outcome = Err("no answer in 6 s".to_owned());
        assert!(only_problem(&check(&record)).unwrap().what.contains("no answer"), "nothing is in its way");
        deafen(&mut record);
        let found = check(&record);
        assert!(only_problem(&found).is_none() && warnings(&found)[0].contains("chain inet adm input"), "{found:?}");
    }

    #[test]
    fn mistakes_and_dead_proxies_are_named() {
        let mut record = quiet();
        let server = |shown: &str, outcome| Server {
            shown: shown.to_owned(),
            place: "mine.yaml:7".to_owned(),
            used: true,
            example: false,
            outcome,
        };
        let dead = server("dead (9.9.9.9:1080)", Err("connection refused".to_owned()));
        record.probes.servers = vec![server("alive (9.9.9.8:1080)", Ok(())), dead.clone()];
        let found = check(&record);
        let problem = only_problem(&found).unwrap();
        assert!(problem.what.contains("dead (9.9.9.9:1080)") && problem.advice.contains("mine.yaml:7"), "{problem:?}");
        record.probes.servers = vec![Server { used: false, ..dead.clone() }];
        assert!(only_problem(&check(&record)).is_none() && warnings(&check(&record)).len() == 1);
        // What the profile came with is a remark, until something goes there.
        let silent = Server { example: true, outcome: Err("no answer in 6 s".to_owned()), ..dead.clone() };
        record.probes.servers = vec![Server { used: false, ..silent.clone() }];
        let found = check(&record);
        assert!(found.iter().all(|it| it.severity == Severity::Fine) && found.len() == 2, "{found:?}");
        assert!(found[0].what == "the profile can be run" && found[1].what.contains("must be replaced"), "{found:?}");
        record.probes.servers = vec![silent];
        assert!(only_problem(&check(&record)).unwrap().what.contains("is a placeholder"));
        record.probes.servers = vec![Server { example: true, ..dead }];
        assert!(!only_problem(&check(&record)).unwrap().what.contains("placeholder"), "somebody has refused");
        record.probes.servers = vec![server("alive (9.9.9.8:1080)", Ok(()))];
        record.profile.as_mut().unwrap().warnings = 2;
        assert!(warnings(&check(&record))[0].contains("2 in all"));
        record.profile.as_mut().unwrap().errors = vec!["3:1: rules: expected a list".to_owned()];
        assert!(only_problem(&check(&record)).unwrap().what.contains("3:1"));
    }
}
