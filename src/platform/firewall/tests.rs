use super::*;
use crate::platform::HostPlan;
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
    assert_eq!(entrance(&shared), entrance(&plain()), "no TUN, but a LAN");
    shared.tuns.insert(3);
    let lines = entrance(&shared);
    let drop = format!("daddr {} drop", ours.addr());
    assert!(lines.find("iifname { \"lan0\" } return").unwrap() < lines.find(&drop).unwrap(), "{lines}");
}

#[test]
fn what_another_run_has_taken_is_neither_marked_nor_refused_and_its_tun_is_no_address_to_be_asked_at() {
    let mut survey = plain();
    let other = HostOptions { tun: "tun9".to_owned(), ..options() };
    survey.rules.extend(HostPlan::new(&other, &survey).unwrap().rules);
    survey.links.push(Link { index: 77, name: other.tun });
    survey.addresses.push((77, "198.18.64.1/30".parse().unwrap()));
    let chain = |options: &HostOptions, chain: &str| {
        let text = written(options, &survey).text;
        text.split(&format!("chain {chain} {{")).nth(1).and_then(|rest| rest.split("\n  };").next()).unwrap().to_owned()
    };
    let closed = HostOptions { kill_switch: true, ..options() };
    let takes = |lines: &str, word: &str| lines.find(word).unwrap_or_else(|| panic!("{word} in {lines}"));
    for (options, what) in [(options(), "jump capture_dns"), (closed.clone(), "meta mark set meta mark | ")] {
        let lines = chain(&options, "reroute");
        assert!(takes(&lines, "oifname { \"tun9\" } return") < lines.rfind(what).unwrap(), "{lines}");
    }
    for side in ["iifname", "oifname"] {
        let lines = chain(&closed, "forward");
        assert!(takes(&lines, &format!("{side} {{ \"tun9\" }} return")) < takes(&lines, "reject"), "{lines}");
    }
    for prerouting in ["entrance", "forwarded_replies", "after_port_forward"] {
        assert!(chain(&options(), prerouting).contains("iifname { \"tun9\" } return"), "{prerouting}");
    }
    assert!(!written(&options(), &survey).text.contains("asked_198_18_64_1"));
}

#[test]
fn a_table_of_our_name_that_is_not_ours_is_left_alone() {
    let mut survey = plain();
    let tables = ["tunproxy".to_owned(), "tunproxy1".to_owned()].into();
    survey.nft = NftState::Present {
        tables,
        mark_bits: 0,
        dropping_forward: Vec::new(),
        gates: Vec::new(),
        kill_switches: Vec::new(),
    };
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

fn forged(survey: &Survey) -> Vec<String> {
    let text = written(&options(), survey).text;
    let chain = text.split("chain forged {").nth(1).and_then(|rest| rest.split("\n  };").next()).unwrap();
    chain.lines().skip(1).map(|line| line.trim().to_owned()).collect()
}

#[test]
fn answers_leave_by_an_uplink_only_to_its_neighbours_and_to_private_addresses() {
    let out: Vec<String> = forged(&plain()).into_iter().filter(|line| line.contains("oifname")).collect();
    assert_eq!(out.len(), 2, "one a family: {out:#?}");
    for (line, nets) in out.iter().zip([["192.0.2.0/24", "192.168.0.0/16"], ["2001:db8:1::/64", "fc00::/7"]]) {
        assert!(line.starts_with("iif \"tun7\" oifname { \"eth0\" } ip") && line.ends_with("counter drop;"), "{line}");
        assert!(nets.iter().all(|net| line.contains(net)) && line.contains("daddr != "), "{line}");
        assert!(!line.contains("2001:db8:7::/64"), "the LAN is not behind the uplink: {line}");
    }
}

#[test]
fn who_comes_by_an_uplink_is_its_neighbour_and_by_a_lan_whoever_is_answered_there() {
    let lines = forged(&plain());
    let at = |words: &str| lines.iter().position(|line| line.contains(words)).unwrap_or_else(|| panic!("{lines:#?}"));
    assert_eq!(lines.last().map(String::as_str), Some("counter drop;"));
    assert!(at("oif != \"tun7\" return") < at("ct state established return"), "{lines:#?}");
    assert_eq!(lines[at("fib saddr . iif")], "iifname != { \"eth0\" } fib saddr . iif oif exists return;");
    let neighbours = &lines[at("iifname { \"eth0\" } ip saddr")];
    assert!(
        neighbours.contains("192.0.2.0/24") && neighbours.ends_with("fib saddr type unicast return;"),
        "{lines:#?}"
    );
    assert_eq!(
        lines[at("ip6 saddr { 2001:db8:7::/64 }")],
        "ip6 saddr { 2001:db8:7::/64 } fib saddr type unicast return;"
    );
}

#[test]
fn strangers_come_by_port_forwards_of_uplinks_alone() {
    let lines = forged(&plain());
    let forwards: Vec<&String> = lines.iter().filter(|line| line.contains("dnat")).collect();
    let wanted = ["iif \"tun7\" ct status dnat return;", "iifname { \"eth0\" } ct status dnat return;"];
    assert_eq!(forwards, wanted);
}

#[test]
fn a_point_to_point_uplink_has_no_neighbours() {
    let mut survey = plain();
    survey.routes.iter_mut().for_each(|route| route.on_link = true);
    assert!(forged(&survey).iter().all(|line| !line.contains("0.0.0.0/0") && !line.contains(" ::/0")));
}

#[test]
fn a_host_without_uplinks_has_clients_all_the_same() {
    let mut survey = plain();
    survey.routes.retain(|route| !crate::platform::survey::is_default_like(&route.to));
    let lines = forged(&survey);
    assert!(lines.contains(&"fib saddr . iif oif exists return;".to_owned()), "{lines:#?}");
    assert!(lines.iter().all(|line| !line.contains("{  }")), "{lines:#?}");
}

#[test]
fn where_nftables_cannot_ask_for_the_way_back_nobody_is_kept_out() {
    let mut survey = plain();
    survey.parameters.finds_ways_back = false;
    let lines = forged(&survey);
    assert!(lines.len() == 3 && lines[1..].iter().all(|line| line.contains("daddr != ")), "{lines:#?}");
}
