use std::net::{IpAddr, SocketAddr};

use proptest::prelude::*;

use super::*;
use crate::net::{Address, Host};
use crate::session::{Fact, Inbound, Network};

/// A TCP session from 10.0.0.2:40000 to `host` and `port`.
pub(crate) fn session(host: &str, port: u16) -> Session {
    Session::new(
        Network::Tcp,
        Inbound::Tun,
        SocketAddr::from(([10, 0, 0, 2], 40000)),
        Address { host: Host::parse(host).unwrap(), port },
    )
}

fn rule(text: &str) -> Rule {
    match parse(text) {
        Ok(Line::Rule(rule)) => rule,
        other => panic!("{text}: {other:?}"),
    }
}

fn verdict(text: &str, session: &Session) -> Match {
    rule(text).matcher.matches(session)
}

fn resolved(mut session: Session, ip: &str) -> Session {
    session.resolved = Fact::Known(ip.parse::<IpAddr>().unwrap());
    session
}

#[test]
fn domain_rules_match_whole_names_suffixes_and_parts() {
    for (text, host, expected) in [
        ("DOMAIN,Example.COM,X", "example.com", Match::Match),
        ("DOMAIN,example.com,X", "www.example.com", Match::Miss),
        ("DOMAIN-SUFFIX,example.com,X", "example.com", Match::Match),
        ("DOMAIN-SUFFIX,example.com,X", "a.b.Example.com.", Match::Match),
        ("DOMAIN-SUFFIX,example.com,X", "badexample.com", Match::Miss),
        ("DOMAIN-SUFFIX,com,X", "example.com", Match::Match),
        ("DOMAIN-KEYWORD,AMPL,X", "example.com", Match::Match),
        ("DOMAIN-KEYWORD,ampl,X", "192.0.2.1", Match::Miss),
        ("DOMAIN,bücher.example,X", "xn--bcher-kva.example", Match::Match),
        ("DOMAIN-SUFFIX,Пример,X", "a.xn--e1afmkfd", Match::Match),
    ] {
        assert_eq!(verdict(text, &session(host, 443)), expected, "{text} on {host}");
    }
}

#[test]
fn address_rules_ask_for_the_address_of_a_name_once() {
    let name = session("example.com", 443);
    assert_eq!(verdict("IP-CIDR,192.0.2.0/24,X", &name), Match::Needs(FactKind::Ip));
    assert_eq!(verdict("IP-CIDR,192.0.2.0/24,X", &resolved(name.clone(), "192.0.2.7")), Match::Match);
    assert_eq!(verdict("IP-CIDR,192.0.2.0/24,X", &resolved(name.clone(), "198.51.100.7")), Match::Miss);
    let failed = Session { resolved: Fact::Failed, ..name };
    assert_eq!(verdict("IP-CIDR,192.0.2.0/24,X", &failed), Match::Miss);
}

#[test]
fn no_resolve_only_takes_the_question_away() {
    let name = session("example.com", 443);
    assert_eq!(verdict("IP-CIDR,192.0.2.0/24,X,no-resolve", &name), Match::Miss);
    assert_eq!(verdict("IP-CIDR,192.0.2.0/24,X,no-resolve", &resolved(name, "192.0.2.7")), Match::Match);
    assert_eq!(verdict("IP-CIDR,192.0.2.0/24,X,no-resolve", &session("192.0.2.1", 1)), Match::Match);
}

#[test]
fn both_address_types_take_both_families_and_host_bits() {
    assert_eq!(verdict("IP-CIDR6,192.0.2.9/24,X", &session("192.0.2.1", 1)), Match::Match);
    assert_eq!(verdict("IP-CIDR,2001:db8::/32,X", &session("2001:db8::1", 1)), Match::Match);
    assert_eq!(verdict("IP-CIDR,0.0.0.0/0,X", &session("2001:db8::1", 1)), Match::Miss);
}

#[test]
fn source_rules_look_at_the_source_and_ask_nobody() {
    let name = session("example.com", 443);
    assert_eq!(verdict("SRC-IP-CIDR,10.0.0.0/8,X", &name), Match::Match);
    assert_eq!(verdict("IP-CIDR,10.0.0.0/8,X,src", &name), Match::Match);
    assert_eq!(verdict("IP-CIDR,192.0.2.0/24,X,src", &name), Match::Miss);
}

#[test]
fn port_rules_take_single_ports_and_ranges_in_any_order() {
    for (port, expected) in [(80, true), (443, true), (1000, true), (1500, true), (2001, false), (81, false)] {
        assert_eq!(verdict("DST-PORT,80/443/2000-1000,X", &session("192.0.2.1", port)), expected.into(), "{port}");
    }
    assert_eq!(verdict("SRC-PORT,40000,X", &session("192.0.2.1", 80)), Match::Match);
    // An echo request has none, whatever stands in their place.
    let ping = Session { network: Network::Icmp, ..session("192.0.2.1", 80) };
    assert_eq!(verdict("SRC-PORT,40000,X", &ping), Match::Miss);
    assert_eq!(verdict("DST-PORT,0-65535,X", &ping), Match::Miss);
    let many: Vec<String> = (1..=28).map(|port| port.to_string()).collect();
    assert!(parse(&format!("DST-PORT,{},X", many.join("/"))).is_ok());
    assert!(matches!(parse(&format!("DST-PORT,{}/29,X", many.join("/"))), Err(RuleError::Payload { .. })));
    for bad in ["", "80-", "-80", "65536", "+80", "80//81", "*", "a"] {
        assert!(matches!(parse(&format!("DST-PORT,{bad},X")), Err(RuleError::Payload { .. })), "{bad}");
    }
}

#[test]
fn network_rules_tell_tcp_udp_and_icmp_apart() {
    let udp = Session { network: Network::Udp, ..session("192.0.2.1", 53) };
    assert_eq!(verdict("NETWORK,UDP,X", &udp), Match::Match);
    assert_eq!(verdict("network,tcp,X", &udp), Match::Miss);
    let ping = Session { network: Network::Icmp, ..udp };
    assert_eq!(verdict("NETWORK,ICMP,X", &ping), Match::Match);
    assert_eq!(verdict("NETWORK,udp,X", &ping), Match::Miss);
    assert!(matches!(parse("NETWORK,sctp,X"), Err(RuleError::Payload { .. })));
}

#[test]
fn fields_are_trimmed_and_match_has_no_payload() {
    let spaced = rule("  domain , example.com ,  My Proxy  ");
    assert_eq!((spaced.kind, &*spaced.payload, &*spaced.target), ("DOMAIN", "example.com", "My Proxy"));
    let last = rule("MATCH,DIRECT,no-resolve");
    assert_eq!((&*last.payload, &*last.target, last.ignored.len()), ("", "DIRECT", 0));
    assert_eq!(last.matcher.matches(&session("example.com", 1)), Match::Match);
}

#[test]
fn parameters_are_case_sensitive_and_unknown_ones_are_kept_for_a_warning() {
    let odd = rule("IP-CIDR,10.0.0.0/8,X,No-Resolve,fast,no-resolve");
    assert_eq!(odd.ignored, ["No-Resolve", "fast"]);
    assert_eq!(rule("DOMAIN,a.b,X,no-resolve").ignored.len(), 0);
    assert_eq!(rule("DOMAIN,a.b,X,src").ignored, ["src"]);
}

#[test]
fn wrong_lines_say_what_was_expected() {
    for shape in ["", ",a,b", "MATCH", "DOMAIN,a.b", "DOMAIN,a.b,", "GEOIP,CN", "MATCH,"] {
        assert_eq!(parse(shape).unwrap_err(), RuleError::Shape, "{shape}");
    }
    assert_eq!(parse("DOMIAN,a.b,X").unwrap_err(), RuleError::UnknownType("DOMIAN".to_owned()));
    for payload in ["IP-CIDR,300.0.0.0/8,X", "IP-CIDR,10.0.0.1,X", "DOMAIN,,X", "DOMAIN-KEYWORD,,X"] {
        assert!(matches!(parse(payload), Err(RuleError::Payload { why: BadPayload { harmless: false, .. }, .. })));
    }
    for dead in ["DOMAIN,*.a.b,X", "DOMAIN-SUFFIX,+.a.b,X", "DOMAIN-SUFFIX,.a.b,X", "DOMAIN,a b,X"] {
        assert!(
            matches!(parse(dead), Err(RuleError::Payload { why: BadPayload { harmless: true, .. }, .. })),
            "{dead}"
        );
    }
}

#[test]
fn types_that_are_not_built_give_their_target() {
    for (text, target) in [
        ("GEOIP,CN,DIRECT,no-resolve", "DIRECT"),
        ("AND,((DOMAIN,a.b),(NETWORK,UDP)),REJECT", "REJECT"),
        ("DOMAIN-REGEX,^a{1,3},Proxy", "Proxy"),
        ("sub-rule,(NETWORK,tcp),list", "list"),
    ] {
        match parse(text) {
            Ok(Line::NotYet(rule)) => assert_eq!(rule.target, target),
            other => panic!("{text}: {other:?}"),
        }
    }
}

#[test]
fn no_type_is_both_built_and_missing() {
    assert!(TYPES.iter().all(|kind| !NOT_YET.contains(&kind.name)));
}

proptest! {
    #[test]
    fn no_line_makes_it_panic(text in "([A-Z-]{0,14},)?.{0,60}", kind in 0..TYPES.len(), payload in ".{0,40}") {
        let _ = parse(&text);
        let _ = parse(&format!("{},{payload},X", TYPES[kind].name));
    }

    #[test]
    fn an_index_would_find_exactly_what_the_condition_matches(
        host in "([ab]\\.){0,3}[ab]", payload in "([ab]\\.){0,2}[ab]", suffix: bool,
    ) {
        let kind = if suffix { "DOMAIN-SUFFIX" } else { "DOMAIN" };
        let rule = rule(&format!("{kind},{payload},X"));
        let found = match rule.matcher.lookup().unwrap() {
            Lookup::Name(name) => host == name,
            Lookup::Suffix(apex) => host == apex || host.ends_with(&format!(".{apex}")),
        };
        prop_assert_eq!(Match::from(found), rule.matcher.matches(&session(&host, 1)));
    }
}
