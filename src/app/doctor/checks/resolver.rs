//! What programs ask for names, and whether an answer comes.

use std::net::IpAddr;

use super::super::finding::Finding;
use super::super::record::{Heard, Record, ResolvConf};
use super::firewall::{dropped_here, is_of_our_own, is_silence, let_out, unheard};
use crate::app::nameservers::NAME_OTHERS;
use crate::platform::{DnsPlan, HostPlan, NftState, RuleAction, can_be_asked, nameservers};

pub(super) fn check(record: &Record) -> Vec<Finding> {
    let mut found: Vec<Finding> = shape(record).into_iter().collect();
    found.extend(question(record));
    found.extend(looped(record));
    found.extend(record.probes.nameservers.iter().filter_map(|asked| nameserver(record, asked)));
    found.extend(record.probes.listed.iter().filter_map(|asked| listed(record, asked)));
    found.extend(sources(record));
    if found.is_empty() {
        found.push(Finding::fine(match (&record.probes.question, record.probes.nameservers.is_empty()) {
            (Some((asked, _)), _) => format!("names are answered: {asked} was asked as programs do"),
            (None, false) => "every nameserver answers".to_owned(),
            (None, true) => "resolv.conf names a nameserver".to_owned(),
        }));
    }
    found
}

/// resolv.conf itself.
fn shape(record: &Record) -> Option<Finding> {
    let install = "write one into it, as in `nameserver 9.9.9.9`, or start what else writes it (NetworkManager, \
                   systemd-resolved)";
    let text = match &record.resolver.resolv_conf {
        ResolvConf::Missing => {
            return Some(Finding::problem("there is no /etc/resolv.conf: programs find no names", install));
        }
        ResolvConf::Dangling(target) => {
            return Some(Finding::problem(
                format!("/etc/resolv.conf is a link to {target}, which is not there: programs find no names"),
                "start the service that writes that file, or replace the link by a file with a nameserver",
            ));
        }
        ResolvConf::Unreadable(why) => {
            return Some(Finding::problem(
                format!("/etc/resolv.conf cannot be read: {why}"),
                "make it a text file that all may read (mode 0644)",
            ));
        }
        ResolvConf::Text(text) => text,
    };
    let listed = nameservers(text);
    if let Some(plan) = record.plan() {
        return while_running(plan, text, &listed).or_else(|| useless(&listed));
    }
    if listed.is_empty() {
        return Some(Finding::problem("/etc/resolv.conf names no nameserver: programs find no names", install));
    }
    useless(&listed)
}

/// Where nothing that resolv.conf names is an address.
fn useless(listed: &[&str]) -> Option<Finding> {
    (!listed.is_empty() && !listed.iter().any(|server| can_be_asked(server))).then(|| {
        Finding::problem(
            format!(
                "/etc/resolv.conf names no nameserver that could be asked ({}): programs find no names",
                listed.join(", ")
            ),
            "write the address of one there, as in `nameserver 9.9.9.9`",
        )
    })
}

/// What stands in resolv.conf must be what the plan was made for.
fn while_running(plan: &HostPlan, text: &str, listed: &[&str]) -> Option<Finding> {
    let again = "tunproxy follows that file: look again in some seconds. If it is still so, its log says why; and find out who \
                 writes it";
    match &plan.dns {
        DnsPlan::Rewrite { text: ours, .. } if text != ours => Some(Finding::problem(
            "tunproxy had written /etc/resolv.conf, and somebody has written something else into it since",
            again,
        )),
        DnsPlan::Rewrite { .. } => None,
        DnsPlan::Untouched | DnsPlan::Resolved { .. } if plan.rules.is_empty() => None,
        DnsPlan::Untouched | DnsPlan::Resolved { .. } => {
            let past = listed.iter().find(|server| is_of_a_link(server));
            match (past, listed.is_empty()) {
                (Some(server), _) => Some(Finding::problem(
                    format!(
                        "/etc/resolv.conf now names {server}, an address of one link: such questions go past tunproxy"
                    ),
                    again,
                )),
                (None, true) => Some(Finding::problem(
                    "/etc/resolv.conf names no nameserver any more: programs find no names",
                    again,
                )),
                (None, false) => None,
            }
        }
    }
}

fn is_of_a_link(server: &str) -> bool {
    let address = server.split('%').next().unwrap_or_default();
    matches!(address.parse(), Ok(IpAddr::V6(ip)) if ip.is_unicast_link_local())
}

/// The question that was asked as programs ask.
fn question(record: &Record) -> Option<Finding> {
    let plan = record.plan()?;
    let (asked, answer) = record.probes.question.as_ref()?;
    let fake = record.profile.as_ref().is_some_and(|profile| profile.fake_ip);
    match answer {
        Err(why) if is_of_our_own(why) => Some(Finding::problem(
            format!("a question for a name to {asked} does not leave this host: {}", dropped_here(record)),
            let_out(record),
        )),
        Err(why) => Some(Finding::problem(
            format!("a question for a name to {asked} comes to nothing: {why}"),
            format!(
                "see what the log of tunproxy says; `tunproxy status` counts questions and answers under `dns`{}",
                strict_chains(record, &plan.tun)
            ),
        )),
        Ok(addresses) if fake && !addresses.iter().any(|ip| is_fake(plan, *ip)) => Some(Finding::problem(
            format!("a question for a name to {asked} was answered by somebody else: {addresses:?} is no fake address"),
            "something answers before tunproxy, or sends questions past it (a VPN's own DNS, a local cache with \
             encrypted upstreams): switch that off, or have it ask tunproxy",
        )),
        Ok(_) => None,
    }
}

/// Chains of others that may be why.
fn strict_chains(record: &Record, tun: &str) -> String {
    let NftState::Present { gates, .. } = &record.survey.nft else { return String::new() };
    let each: Vec<String> = gates.iter().map(|gate| format!("`sudo {}`", gate.remedy(tun))).collect();
    match each.is_empty() {
        true => String::new(),
        false => format!(". If a firewall of yours drops what {tun} carries: {}", each.join("; ")),
    }
}

/// Whether an address is of a range that the plan leads into the TUN as fake.
pub(in super::super) fn is_fake(plan: &HostPlan, ip: IpAddr) -> bool {
    let always = RuleAction::Lookup(plan.numbers.always);
    plan.rules.iter().any(|rule| rule.action == always && rule.to.is_some_and(|to| to.contains(&ip)))
}

/// A nameserver whose own questions come to the run, which answers them with fake addresses.
fn looped(record: &Record) -> Option<Finding> {
    let (many, servers) = (record.looped(), &record.probes.looped);
    let advice = format!("{NAME_OTHERS}, and start again; or leave out the user that it runs as (`tun.exclude-uid`)");
    let others = record.probes.nameservers.len() > servers.len();
    let what =
        "whose own questions come to tunproxy: it hands our fake addresses back to us, and names cannot be looked up";
    match servers.first() {
        Some(server) if others => {
            Some(Finding::warning(format!("tunproxy asks the nameserver {server}, {what} there"), advice))
        }
        Some(server) => Some(Finding::problem(format!("tunproxy asks the nameserver {server}, {what}"), advice)),
        // It could not be asked.
        None if many > 0 && record.probes.captured => {
            Some(Finding::problem(format!("tunproxy asks a nameserver {what} ({many} times since the start)"), advice))
        }
        None if many > 0 => Some(Finding::warning(
            format!(
                "nameservers have answered tunproxy with its own fake addresses {many} times since the start: their questions \
                 came to it. Now none that was asked does"
            ),
            advice,
        )),
        None => None,
    }
}

fn nameserver(record: &Record, (server, outcome): &(String, Result<Heard, String>)) -> Option<Finding> {
    let why = match outcome {
        Ok(heard) => return without_internet(record, server, heard),
        Err(why) => why,
    };
    if is_of_our_own(why) {
        return Some(Finding::problem(
            format!("questions to the nameserver {server} do not leave this host: {}", dropped_here(record)),
            let_out(record),
        ));
    }
    if let Some(gate) = record.deaf().filter(|_| is_silence(why)) {
        return Some(unheard(&format!("the nameserver {server}"), &gate.chain));
    }
    Some(Finding::problem(
        format!("the nameserver {server} does not answer: {why}"),
        format!(
            "look whether it can be reached from here (`dig @{server} example.com`), or name another one under `dns.nameserver`"
        ),
    ))
}

/// One that is there, and has no answer to a question for a name of the internet.
fn without_internet(record: &Record, server: &str, heard: &Heard) -> Option<Finding> {
    let said = match heard {
        Heard::Answer(_) => return None,
        Heard::Refusal(code) => format!("it answers {code}"),
        Heard::OfItsOwn => "it answers only what it knows by itself".to_owned(),
    };
    let is_here = |ip: IpAddr| ip.is_loopback() || record.survey.addresses.iter().any(|(_, net)| net.addr() == ip);
    let on_this_host = server.parse().is_ok_and(is_here);
    let advice = match on_this_host && record.plan().is_some_and(|plan| !plan.rules.is_empty()) {
        true => {
            format!("its questions may come to tunproxy, which then asks those whom it asks. {NAME_OTHERS}")
        }
        false => "look whether the internet can be reached from there, and whether it answers for this host".to_owned(),
    };
    Some(Finding::warning(
        format!("the nameserver {server} is there, and gets no answer from the internet: {said}"),
        advice,
    ))
}

/// One that programs ask as long as no run answers in its place.
fn listed(record: &Record, (server, outcome): &(String, Result<Heard, String>)) -> Option<Finding> {
    let why = match outcome {
        Ok(heard) => return without_internet(record, server, heard),
        Err(why) => why,
    };
    if is_of_our_own(why) {
        return Some(Finding::warning(
            format!(
                "questions to the nameserver {server} in /etc/resolv.conf do not leave this host: {}",
                dropped_here(record)
            ),
            let_out(record),
        ));
    }
    if let Some(gate) = record.deaf().filter(|_| is_silence(why)) {
        return Some(unheard(&format!("the nameserver {server} in /etc/resolv.conf"), &gate.chain));
    }
    Some(Finding::warning(
        format!(
            "the nameserver {server} in /etc/resolv.conf does not answer: {why}. While tunproxy runs it answers in its place; \
             without it programs find no names there"
        ),
        format!("look whether it can be reached from here (`dig @{server} example.com`), or write another one there"),
    ))
}

/// Sources of names that do not ask resolv.conf's nameservers.
fn sources(record: &Record) -> Option<Finding> {
    let plan = record.plan().filter(|plan| !plan.rules.is_empty())?;
    let mut before_dns = record.resolver.hosts.iter().take_while(|source| *source != "dns");
    let told = matches!(plan.dns, DnsPlan::Resolved { .. });
    let asks_past = before_dns.find(|source| match source.as_str() {
        "resolve" => record.survey.resolved && !told,
        // Those whose names end in "_minimal" ask for names in .local alone.
        "mdns" | "mdns4" | "mdns6" => true,
        _ => false,
    })?;
    let in_file = format!("`{asks_past}` before `dns` in /etc/nsswitch.conf");
    Some(match asks_past.as_str() {
        "resolve" => Finding::warning(
            format!(
                "programs ask systemd-resolved directly ({in_file}), which was not told of the TUN: what it asks in the \
                 clear comes to tunproxy, what it asks over TLS goes past"
            ),
            "point /etc/resolv.conf to its stub (ln -sf /run/systemd/resolve/stub-resolv.conf /etc/resolv.conf) and \
             restart tunproxy, or set DNSOverTLS=no in resolved.conf",
        ),
        source => Finding::warning(
            format!("programs ask their neighbours for every name by multicast, and not only for .local ({in_file})"),
            format!("write `{source}_minimal [NOTFOUND=return]` there instead of `{source}`"),
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::super::super::fixture::{only_problem, quiet, running, warnings};
    use super::super::super::record::RunState;
    use super::*;

    fn with(resolv_conf: ResolvConf, mut record: Record) -> Vec<Finding> {
        record.resolver.resolv_conf = resolv_conf;
        check(&record)
    }

    fn text(text: &str) -> ResolvConf {
        ResolvConf::Text(text.to_owned())
    }

    #[test]
    fn a_host_whose_nameservers_answer_is_fine() {
        assert!(only_problem(&check(&running())).is_none());
        assert!(only_problem(&check(&quiet())).is_none());
    }

    #[test]
    fn every_broken_shape_of_resolv_conf_is_told_apart() {
        for (shape, words) in [
            (ResolvConf::Missing, "there is no /etc/resolv.conf"),
            (ResolvConf::Dangling("/run/stub".to_owned()), "a link to /run/stub"),
            (ResolvConf::Unreadable("Permission denied".to_owned()), "cannot be read: Permission denied"),
            (text("search lan\n"), "names no nameserver"),
            (text("nameserver 999.1.1.1\n"), "no nameserver that could be asked (999.1.1.1)"),
        ] {
            assert!(only_problem(&with(shape, quiet())).unwrap().what.contains(words), "{words}");
        }
        for (shape, words) in [
            ("nameserver fe80::1%eth0", "an address of one link"),
            ("", "names no nameserver any more"),
            ("nameserver 999.1.1.1", "could be asked (999.1.1.1)"),
        ] {
            assert!(only_problem(&with(text(shape), running())).unwrap().what.contains(words), "{words}");
        }
    }

    #[test]
    fn an_answer_that_is_not_ours_is_told_from_none() {
        let mut record = running();
        let asked = "192.168.1.1:53".parse().unwrap();
        record.probes.question = Some((asked, Ok(vec!["203.0.113.1".parse().unwrap()])));
        assert!(only_problem(&check(&record)).unwrap().what.contains("answered by somebody else"));
        record.probes.question = Some((asked, Err("no answer in 3 s".to_owned())));
        assert!(only_problem(&check(&record)).unwrap().what.contains("comes to nothing: no answer"));
        // Without fake addresses nobody can tell from an answer who gave it.
        record.probes.question = Some((asked, Ok(vec!["203.0.113.1".parse().unwrap()])));
        record.profile.as_mut().unwrap().fake_ip = false;
        assert!(only_problem(&check(&record)).is_none());
    }

    #[test]
    fn a_nameserver_that_is_silent_is_named() {
        let mut record = quiet();
        record.probes.nameservers.push(("203.0.113.53".to_owned(), Err("no answer in 3 s".to_owned())));
        assert!(only_problem(&check(&record)).unwrap().what.contains("203.0.113.53"));
        let mut record = quiet();
        record.probes.listed.push(("192.168.1.77".to_owned(), Err("no answer in 4 s".to_owned())));
        assert!(warnings(&check(&record))[0].contains("192.168.1.77 in /etc/resolv.conf"));
    }

    #[test]
    fn a_nameserver_that_is_there_and_has_no_internet_is_a_warning() {
        for heard in [Heard::OfItsOwn, Heard::Refusal("SERVFAIL"), Heard::Refusal("REFUSED")] {
            let mut record = quiet();
            record.probes.nameservers = vec![("203.0.113.53".to_owned(), Ok(heard))];
            let found = check(&record);
            assert!(only_problem(&found).is_none(), "{found:?}");
            assert!(warnings(&found)[0].contains("203.0.113.53 is there, and gets no answer"), "{found:?}");
        }
        let mut record = running();
        let own = record.survey.addresses[1].1.addr().to_string();
        for here in ["127.0.0.1".to_owned(), own] {
            record.probes.nameservers = vec![(here, Ok(Heard::OfItsOwn))];
            assert!(check(&record)[0].advice.contains("come to tunproxy"));
        }
    }

    #[test]
    fn a_nameserver_whose_questions_come_to_the_run_is_a_problem() {
        let mut record = running();
        record.probes.nameservers = vec![("127.0.0.1".to_owned(), Ok(Heard::Answer(Vec::new())))];
        record.probes.looped = vec!["127.0.0.1".to_owned()];
        let found = check(&record);
        let problem = only_problem(&found).unwrap();
        assert!(
            problem.what.contains("127.0.0.1") && problem.advice.contains("`nameserver: [9.9.9.9]`"),
            "{problem:?}"
        );
        record.probes.nameservers.push(("9.9.9.9".to_owned(), Ok(Heard::Answer(Vec::new()))));
        assert!(only_problem(&check(&record)).is_none() && warnings(&check(&record)).len() == 1);
        // What the run has counted, where nobody could be asked past it, and where that is over.
        let mut record = running();
        if let RunState::Answers { looped, .. } = &mut record.run {
            *looped = 3;
        }
        assert!(warnings(&check(&record))[0].contains("3 times since the start"));
        record.probes.captured = true;
        assert!(only_problem(&check(&record)).unwrap().what.contains("3 times since the start"));
    }

    #[test]
    fn a_firewall_that_lets_no_question_out_is_told_from_a_silent_nameserver() {
        let mut record = quiet();
        let denied = std::io::Error::from_raw_os_error(libc::EPERM).to_string();
        record.probes.nameservers.push(("203.0.113.53".to_owned(), Err(denied)));
        let found = check(&record);
        assert!(only_problem(&found).unwrap().advice.contains("nft list ruleset"), "{found:?}");
    }

    #[test]
    fn a_resolved_that_is_asked_past_resolv_conf_is_a_warning() {
        let mut record = running();
        record.survey.resolved = true;
        record.resolver.hosts = ["files", "resolve", "[!UNAVAIL=return]", "dns"].map(str::to_owned).into();
        assert!(warnings(&check(&record))[0].contains("nsswitch.conf"));
        record.resolver.hosts = ["files", "mdns4_minimal", "dns", "resolve"].map(str::to_owned).into();
        assert!(warnings(&check(&record)).is_empty());
        record.resolver.hosts = ["files", "mdns4", "dns"].map(str::to_owned).into();
        assert!(warnings(&check(&record))[0].contains("multicast"));
    }
}
