//! Rules of other programs that stand before ours and take a part of the traffic: which, and where to.

use super::super::finding::Finding;
use super::super::record::Record;
use crate::platform::{
    Family, HostPlan, MarkMatch, Ports, RouteTable, Rule, RuleAction, ports_in_words, protocol_name, takes_everything,
};

/// The port of names.
const DNS: u16 = 53;
const QUESTIONS: Ports = Ports { first: DNS, last: DNS };
const TCP: u8 = 6;
const UDP: u8 = 17;
/// More findings than this say nothing more.
const MOST: usize = 8;

/// What another program's rule does with what it selects.
enum Fate {
    /// It goes elsewhere, or nowhere.
    Taken(String),
    /// It goes elsewhere if the table of the rule knows where.
    Partly(String),
}

/// Rules that select a part of what would come to us. `plan`: what is in force, or what a start would make.
pub(super) fn partial(record: &Record, plan: &HostPlan) -> Vec<Finding> {
    let first = plan.numbers.first_priority;
    // Rule 0 is the kernel's look-up of the host's own addresses. Those of another tunproxy are told of as such.
    let before =
        record.foreign_rules().filter(|rule| (1..first).contains(&rule.priority) && rule.origin != Rule::KERNEL);
    let parts =
        before.filter(|rule| !takes_everything(rule, plan.numbers.own) && !takes_questions_behind_ours(plan, rule));
    let found = parts.filter_map(|rule| Some((rule, fate(record, rule, first)?)));
    found.map(|(rule, fate)| told(rule, &fate, record.plan().is_some())).take(MOST).collect()
}

/// Whether a rule asks for questions for names alone, and ours that take these stand before it too.
fn takes_questions_behind_ours(plan: &HostPlan, rule: &Rule) -> bool {
    let takes = |protocol: u8| {
        let ours = Rule {
            protocol: Some(protocol),
            destination_ports: Some(QUESTIONS),
            ..Rule::new(rule.family, 0, RuleAction::Lookup(plan.numbers.always))
        };
        plan.rules.iter().any(|it| it.priority < rule.priority && *it == Rule { priority: it.priority, ..ours.clone() })
    };
    let protocols = rule.protocol.map_or(vec![TCP, UDP], |protocol| vec![protocol]);
    rule.destination_ports == Some(QUESTIONS) && !rule.inverted && protocols.into_iter().all(takes)
}

fn fate(record: &Record, rule: &Rule, first: u32) -> Option<Fate> {
    match rule.action {
        RuleAction::Lookup(RouteTable(253 | 255)) | RuleAction::Nop => None,
        // What only knows the ways to networks of the host's own.
        RuleAction::Lookup(_) if rule.suppress_prefix_length.is_some() => None,
        RuleAction::Lookup(table) => match record.leads_out(rule) {
            Some(route) => {
                let device = route.device.and_then(|index| record.survey.link_name(index));
                Some(Fate::Taken(match device {
                    Some(device) => format!("goes by {device} (table {table})"),
                    None => format!("is refused (by table {table})"),
                }))
            }
            None if !record.survey.tables.contains(&table) => None,
            None => Some(Fate::Partly(format!("goes where table {table} has a route for it"))),
        },
        RuleAction::Goto(target) if target <= first => None,
        RuleAction::Goto(_) => {
            Some(Fate::Taken("jumps over our rules and goes as if tunproxy were not there".to_owned()))
        }
        // FR_ACT_BLACKHOLE, FR_ACT_UNREACHABLE, FR_ACT_PROHIBIT (linux/fib_rules.h).
        RuleAction::Other(6) => Some(Fate::Taken("is dropped".to_owned())),
        RuleAction::Other(7 | 8) => Some(Fate::Taken("is refused".to_owned())),
        RuleAction::Other(_) => None,
    }
}

fn told(rule: &Rule, fate: &Fate, runs: bool) -> Finding {
    let (part, family) = (part(rule), if rule.family == Family::V4 { "IPv4" } else { "IPv6" });
    let whose = "another program's rule stands before ours";
    let without = if runs { "past tunproxy" } else { "past tunproxy once it runs" };
    // Whoever marks packets has chosen their path, and only his own have the mark.
    let chosen = rule.mark.is_some_and(|mark| mark.mark & mark.mask != 0) && !rule.inverted;
    match fate {
        Fate::Taken(how) if !chosen => Finding::warning(
            format!("{whose} and takes a part of the traffic: {part} ({family}) {how}, {without} ({rule})"),
            format!(
                "if that is not meant, stop the program that made it, or delete it: `sudo ip {} rule delete priority {}`; or have \
                 it made with a priority behind ours",
                if rule.family == Family::V4 { "-4" } else { "-6" },
                rule.priority
            ),
        ),
        Fate::Taken(how) | Fate::Partly(how) => {
            Finding::fine(format!("{whose}: {part} ({family}) {how}, {without} ({rule})"))
        }
    }
}

/// What a rule selects, in words.
fn part(rule: &Rule) -> String {
    let mut words = Vec::new();
    if let Some(MarkMatch { mark, mask }) = rule.mark {
        words.push(match mark & mask {
            0 => format!("with no mark in {mask:#x}"),
            _ => format!(
                "with the mark {mark:#x}{}",
                if mask == u32::MAX { String::new() } else { format!("/{mask:#x}") }
            ),
        });
    }
    words.extend(rule.protocol.map(|number| format!("of the protocol {}", protocol_name(number))));
    words.extend(rule.destination_ports.map(|ports| match (ports.first, ports.last) {
        (DNS, DNS) => format!("to port {DNS} (questions for names)"),
        _ => format!("to port {}", ports_in_words(ports)),
    }));
    words.extend(rule.source_ports.map(|ports| format!("from port {}", ports_in_words(ports))));
    words.extend(rule.from.map(|net| format!("sent from {net}")));
    words.extend(rule.to.map(|net| format!("sent to {net}")));
    words.extend(rule.iif.as_ref().map(|name| match name.as_str() {
        "lo" => "of this host itself".to_owned(),
        name => format!("that arrives by {name}"),
    }));
    words.extend(rule.oif.as_ref().map(|name| format!("of sockets bound to {name}")));
    words.extend(rule.uids.map(|(first, last)| match first == last {
        true => format!("of the user {first}"),
        false => format!("of the users {first} to {last}"),
    }));
    if rule.foreign_selectors && !rule.inverted {
        words.push("with what `ip rule` says besides".to_owned());
    }
    let all = if rule.inverted { "everything but what is" } else { "what is" };
    if words.is_empty() { "everything".to_owned() } else { format!("{all} {}", words.join(" ")) }
}

#[cfg(test)]
mod tests {
    use super::super::super::fixture::{only_problem, plan_of, quiet, running, warnings};
    use super::*;
    use crate::platform::SeenRoute;

    const TABLE: RouteTable = RouteTable(77);

    /// What is said of one rule on a host where table 77 leads out by eth0.
    fn of(mut record: Record, rule: Rule) -> Vec<Finding> {
        let to = "0.0.0.0/0".parse().unwrap();
        record.survey.routes.push(SeenRoute { table: TABLE, to, device: Some(2), on_link: false });
        record.survey.tables.extend([TABLE, RouteTable(52)]);
        record.survey.rules.push(rule);
        let found = super::super::neighbours::check(&record);
        assert!(only_problem(&found).is_none(), "{found:?}");
        found
    }

    fn rule() -> Rule {
        Rule { origin: 3, ..Rule::new(Family::V4, 100, RuleAction::Lookup(TABLE)) }
    }

    #[test]
    fn a_rule_for_questions_says_so_and_where_they_go() {
        let dns = Rule { protocol: Some(6), destination_ports: Some(Ports { first: 53, last: 53 }), ..rule() };
        let told = warnings(&of(running(), dns.clone()));
        let words = "what is of the protocol tcp to port 53 (questions for names) (IPv4) goes by eth0 (table 77), past tunproxy \
                     (rule -4 priority 100 ipproto tcp dport 53 lookup 77)";
        assert!(told[0].ends_with(words), "{told:?}");
        assert!(warnings(&of(quiet(), dns))[0].contains("past tunproxy once it runs"));
    }

    #[test]
    fn a_rule_for_questions_behind_ours_that_take_them_is_not_told() {
        let dns = Rule { destination_ports: Some(QUESTIONS), ..rule() };
        let told = |rule: &Rule, family| {
            let mut record = quiet();
            // What a start comes to beside a rule of this family.
            let beside = Rule { family, ..rule.clone() };
            record.survey.rules.push(beside.clone());
            record.start.as_mut().unwrap().plan = Some(Box::new(plan_of("", &record.survey)));
            record.survey.rules.pop();
            warnings(&of(record, beside)).len()
        };
        for taken in [dns.clone(), Rule { protocol: Some(17), to: Some("10.0.0.0/8".parse().unwrap()), ..dns.clone() }]
        {
            assert_eq!(told(&taken, Family::V4), 0, "{taken}");
        }
        let no_room = Rule { priority: 5, ..dns.clone() };
        let more = Rule { destination_ports: Some(Ports { first: 53, last: 54 }), ..dns.clone() };
        let neither = Rule { protocol: Some(132), ..dns.clone() };
        for taking in [no_room, more, neither] {
            assert_eq!(told(&taking, Family::V4), 1, "{taking}");
        }
    }

    #[test]
    fn senders_users_and_dropped_packets_are_named() {
        let net = |text: &str| Some(text.parse().unwrap());
        for (rule, words) in [
            (Rule { from: net("192.168.1.10/32"), ..rule() }, "what is sent from 192.168.1.10/32 (IPv4) goes by eth0"),
            (Rule { uids: Some((1000, 1000)), ..rule() }, "what is of the user 1000 (IPv4) goes by eth0"),
            (Rule { to: net("10.0.0.0/8"), action: RuleAction::Other(7), ..rule() }, "(IPv4) is refused"),
            (Rule { iif: Some("lan0".to_owned()), action: RuleAction::Goto(32766), ..rule() }, "jumps over our rules"),
        ] {
            let told = warnings(&of(running(), rule));
            assert!(told.len() == 1 && told[0].contains(words), "{words}: {told:?}");
        }
    }

    #[test]
    fn marks_and_tables_with_some_routes_are_told_and_are_no_fault() {
        let mark = |mark, mask| Some(MarkMatch { mark, mask });
        let marked = of(quiet(), Rule { mark: mark(0x10, 0xff), ..rule() });
        let fine = marked.iter().find(|it| it.what.contains("with the mark 0x10/0xff (IPv4) goes by eth0"));
        assert!(fine.is_some() && warnings(&marked).is_empty(), "{marked:?}");
        let net = Some("192.168.1.10/32".parse().unwrap());
        let some = of(running(), Rule { from: net, action: RuleAction::Lookup(RouteTable(52)), ..rule() });
        assert!(warnings(&some).is_empty() && some[0].what.contains("where table 52 has a route"), "{some:?}");
    }

    #[test]
    fn what_takes_nothing_is_not_told() {
        for nothing in [
            Rule { from: None, priority: 9500, ..rule() },
            Rule { suppress_prefix_length: Some(0), action: RuleAction::Lookup(RouteTable::MAIN), ..rule() },
            Rule { uids: Some((0, 0)), action: RuleAction::Lookup(RouteTable(4711)), ..rule() },
            Rule { uids: Some((0, 0)), action: RuleAction::Goto(5000), ..rule() },
        ] {
            let found = of(running(), nothing);
            assert!(found.iter().all(|it| !it.what.contains("stands before ours")), "{found:?}");
        }
    }
}
