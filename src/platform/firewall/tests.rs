use super::*;
use crate::platform::plan::tests::options;
use crate::platform::routing::{RouteTable, Rule, RuleAction};
use crate::platform::survey::Wishes;
use crate::platform::survey::tests::plain;

fn written(options: &HostOptions, survey: &Survey) -> Nft {
    nft(options, &survey.numbers(&Wishes::default()).unwrap(), survey).unwrap()
}

#[test]
fn a_kill_switch_is_whole_while_each_chain_has_as_many_rules_as_it_should() {
    let nft = written(&HostOptions { kill_switch: true, ..options() }, &plain());
    let table = nft.lasting().unwrap();
    let found = table.rules.clone();
    assert!(table.is_whole(&found) && found["reroute"] > 3, "{found:?}");
    let with = |chain: &str, rules: usize| {
        let mut found = found.clone();
        found.insert(chain.to_owned(), rules);
        table.is_whole(&found)
    };
    assert!(!with("reroute", found["reroute"] - 1) && !with("caught", 0));
    assert!(with("reroute", found["reroute"] + 1) && with("of_somebody", 0), "what others add is theirs");
    let mut without = found.clone();
    without.remove("caught");
    assert!(!table.is_whole(&without));
    // One of an older version's journal says nothing of rules.
    let json = r#"{"name":"tunproxy","comment":"kill switch of tun7"}"#;
    let old: TableId = serde_json::from_str(json).unwrap();
    assert!(old.is_whole(&without) && !old.is_whole(&[("caught".to_owned(), 0)].into()) && !old.is_whole(&[].into()));
    assert_eq!(serde_json::to_string(&old).unwrap(), json);
}

#[test]
fn an_interface_that_has_our_address_too_is_another_runs_and_goes_on_being_answered() {
    let entrance = |survey: &Survey| {
        let text = written(&options(), survey).text;
        text.split("chain entrance").nth(1).and_then(|rest| rest.split("\n  };").next()).unwrap().to_owned()
    };
    assert!(!entrance(&plain()).contains("iifname"));
    let mut shared = plain();
    let ours = options().addresses[0];
    shared.addresses.push((3, ours));
    let lines = entrance(&shared);
    let drop = format!("daddr {} drop", ours.addr());
    assert!(lines.find("iifname { \"lan0\" } return").unwrap() < lines.find(&drop).unwrap(), "{lines}");
}

#[test]
fn a_table_of_our_name_that_is_not_ours_is_left_alone() {
    let mut survey = plain();
    let tables = ["tunproxy".to_owned(), "tunproxy1".to_owned()].into();
    survey.nft = NftState::Present { tables, mark_bits: 0, dropping_forward: Vec::new(), kill_switches: Vec::new() };
    let nft = written(&options(), &survey);
    assert_eq!(nft.table, "tunproxy2");
    assert!(nft.text.starts_with("create table inet tunproxy2 {"), "{}", nft.text);
}

#[test]
fn what_comes_from_the_tuns_address_is_never_taken_for_an_answer_nor_what_an_earlier_run_has_marked() {
    let mut survey = plain();
    let crashed = Rule {
        mark: Some(MarkMatch { mark: 0x0200_0000, mask: 0x0200_0000 }),
        action: RuleAction::Lookup(RouteTable(2023)),
        ..survey.rules[0].clone()
    };
    survey.rules.push(crashed.clone());
    survey.set_aside(&[crashed]);
    for kill_switch in [false, true] {
        let options = HostOptions { kill_switch, ..options() };
        let numbers = survey.numbers(&Wishes::default()).unwrap();
        assert_eq!((numbers.capture.mark & 0x0200_0000, numbers.earlier), (0, 0x0200_0000));
        let text = nft(&options, &numbers, &survey).unwrap().text;
        let bits = numbers.capture.mark | 0x0200_0000;
        assert!(text.contains(&format!("ct direction reply ct mark & {bits:#x} == 0")), "{text}");
        let reroute = text.split("chain reroute {").nth(1).unwrap();
        let first = |what: &str| reroute.find(what).unwrap_or_else(|| panic!("{what} in {reroute}"));
        let own = options.addresses[0].addr();
        assert!(first(&format!("saddr {own} return")) < first("ct direction reply"), "{reroute}");
    }
    survey.parameters.marks_connections = false;
    assert!(!written(&options(), &survey).text.contains("ct mark"));
}

#[test]
fn every_local_address_but_loopback_and_the_tun_has_its_set() {
    let text = written(&options(), &plain()).text;
    for address in ["192.0.2.2", "192.168.7.1", "2001:db8:1::2", "2001:db8:7::1"] {
        assert!(text.contains(&format!("saddr set {address};")), "{address} in {text}");
    }
    assert!(!text.contains("saddr set 127.0.0.1"), "{text}");
}

#[test]
fn who_asks_for_a_socket_that_is_not_there_is_not_remembered_where_nftables_can_tell() {
    let asked = |finds_sockets: bool| {
        let mut survey = plain();
        survey.parameters.finds_sockets = finds_sockets;
        let text = written(&options(), &survey).text;
        let updates: Vec<bool> = text
            .lines()
            .filter(|line| line.contains("update @"))
            .map(|line| line.contains("socket wildcard 1 update @"))
            .collect();
        assert!(!updates.is_empty(), "{text}");
        updates
    };
    assert!(asked(true).into_iter().all(|asks| asks) && !asked(false).contains(&true));
}

#[test]
fn an_exact_own_mark_is_set_and_compared_whole() {
    let wishes = Wishes { mark: Some(crate::platform::Fwmark(6666)), ..Wishes::default() };
    let survey = plain();
    let text = nft(&options(), &survey.numbers(&wishes).unwrap(), &survey).unwrap().text;
    assert!(text.contains("meta mark 0x1a0a return"), "{text}");
    assert!(!text.contains("meta mark | 0x1a0a"), "{text}");
}

#[test]
fn what_comes_by_an_uplink_for_another_link_is_let_through_and_nothing_else() {
    let text = written(&options(), &plain()).text;
    let lines: Vec<&str> = text.lines().filter(|line| line.contains("fib daddr oifname")).collect();
    let [line] = lines[..] else { panic!("{text}") };
    assert!(line.contains("iifname { \"eth0\" } fib daddr oifname { \"lan0\" }"), "{line}");
    let mut without_lan = plain();
    without_lan.links.retain(|link| link.name != "lan0");
    assert!(!written(&options(), &without_lan).text.contains("fib daddr oifname"));
}

#[test]
fn questions_are_marked_in_a_chain_of_their_own_and_only_in_families_that_have_rules() {
    let marks = |options: &HostOptions, survey: &Survey| {
        let text = written(options, survey).text;
        let chain = text.split_once("chain capture_dns {").map(|(_, rest)| rest.split('}').next().map(str::to_owned));
        chain.flatten().map(|chain| chain.contains("meta nfproto ipv4"))
    };
    assert_eq!(marks(&options(), &plain()), Some(false));
    assert_eq!(marks(&options(), &Survey { ipv6: false, ..plain() }), Some(true));
    assert_eq!(marks(&HostOptions { dns_hijack: false, ..options() }, &plain()), None);
}

#[test]
fn the_questions_of_whoever_is_left_out_are_not_marked() {
    let text = |options: &HostOptions| written(options, &plain()).text;
    let users = HostOptions { exclude_uid: vec![(1000, 1000), (2000, 2999)], ..options() };
    let (before, _) = text(&users).split_once("jump capture_dns").map(|(a, b)| (a.to_owned(), b.to_owned())).unwrap();
    assert!(before.trim_end().ends_with("meta skuid { 1000-1000, 2000-2999 } return;"), "{before}");
    let lan_only = HostOptions { include_interface: vec!["lan0".to_owned()], ..options() };
    assert!(!text(&lan_only).contains("jump capture_dns"));
    let lan_dns = vec!["lan0".to_owned()];
    let without_lan = HostOptions { exclude_interface: lan_dns.clone(), lan_dns, ..options() };
    assert!(!text(&without_lan).contains("lan_dns") && text(&without_lan).contains("jump capture_dns"));
}

#[test]
fn names_are_served_to_the_lan_but_never_to_an_uplink() {
    let lan_dns = vec!["lan0".to_owned(), "eth0".to_owned()];
    let text = written(&HostOptions { lan_dns, ..options() }, &plain()).text;
    assert!(text.contains("iifname { \"lan0\" } meta l4proto { tcp, udp } th dport 53"), "{text}");
    let only_uplink = HostOptions { lan_dns: vec!["eth0".to_owned()], ..options() };
    assert!(!written(&only_uplink, &plain()).text.contains("lan_dns"));
}
