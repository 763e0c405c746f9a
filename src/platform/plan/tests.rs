use super::*;
use crate::platform::survey::tests::plain;
use crate::platform::{Family, RouteTable, RuleAction, SeenRoute};

pub(in crate::platform) fn options() -> HostOptions {
    let nets = |list: &[&str]| list.iter().map(|net| net.parse().unwrap()).collect::<Vec<IpNet>>();
    HostOptions {
        tun: "tun7".to_owned(),
        addresses: nets(&["198.18.0.1/30", "fdfe:dcba:9877::1/126"]),
        fake: nets(&["198.18.0.1/15", "fdfe:dcba:9877::/64"]),
        mtu: 1500,
        auto_route: true,
        dns_hijack: true,
        dns_servers: vec!["198.18.0.2".parse().unwrap(), "fdfe:dcba:9877::2".parse().unwrap()],
        lan_dns: Vec::new(),
        route_address: Vec::new(),
        route_exclude: Vec::new(),
        include_interface: Vec::new(),
        exclude_interface: Vec::new(),
        include_uid: Vec::new(),
        exclude_uid: Vec::new(),
        auto_forward: false,
        strict_route: false,
        kill_switch: false,
        wishes: Wishes::default(),
    }
}

fn paths(plan: &HostPlan) -> Vec<&str> {
    plan.sysctls.iter().filter(|it| !it.of_tun).map(|it| it.path.as_str()).collect()
}

#[test]
fn a_plain_desktop_keeps_its_resolver_and_its_parameters() {
    let plan = HostPlan::new(&options(), &plain()).unwrap();
    assert_eq!(plan.dns, DnsPlan::Untouched);
    assert!(paths(&plan).is_empty());
    assert!(plan.warnings.is_empty(), "{:?}", plan.warnings);
    assert!(plan.nft.is_some());
}

#[test]
fn a_kernel_without_ipv6_gets_no_ipv6() {
    let survey = Survey { ipv6: false, resolv_conf: None, ..plain() };
    let plan = HostPlan::new(&options(), &survey).unwrap();
    assert!(!plan.to_string().contains("fdfe:"), "{plan}");
    assert!(plan.addresses.iter().all(|net| net.addr().is_ipv4()));
    assert!(plan.rules.iter().all(|rule| rule.family == Family::V4));
    assert!(plan.routes.iter().all(|route| route.to.addr().is_ipv4()));
    assert!(!plan.sysctls.iter().any(|sysctl| sysctl.path.contains("ipv6")));
}

#[test]
fn forwarding_keeps_the_advertised_default_route_alive_first() {
    let mut survey = plain();
    survey.parameters.host_only_advertisements = ["eth0".to_owned(), "lan0".to_owned()].into();
    let plan = HostPlan::new(&HostOptions { auto_forward: true, ..options() }, &survey).unwrap();
    let wanted = ["net/ipv4/ip_forward", "net/ipv6/conf/eth0/accept_ra", "net/ipv6/conf/all/forwarding"];
    assert_eq!(paths(&plan), wanted);
    assert!(plan.notes.is_empty());
}

#[test]
fn what_is_on_already_is_not_set_again() {
    let mut survey = plain();
    (survey.parameters.forward_v4, survey.parameters.forward_v6) = (true, true);
    let plan = HostPlan::new(&HostOptions { auto_forward: true, ..options() }, &survey).unwrap();
    assert!(paths(&plan).is_empty());
}

#[test]
fn a_strict_uplink_of_a_gateway_learns_of_marks() {
    let mut survey = plain();
    survey.parameters.strict_reverse_path = ["eth0".to_owned(), "lan0".to_owned()].into();
    assert!(paths(&HostPlan::new(&options(), &survey).unwrap()).is_empty());
    survey.parameters.forward_v4 = true;
    assert_eq!(paths(&HostPlan::new(&options(), &survey).unwrap()), ["net/ipv4/conf/eth0/src_valid_mark"]);
}

#[test]
fn forwarding_that_is_off_is_named_with_the_way_to_switch_it_on() {
    let notes = HostPlan::new(&options(), &plain()).unwrap().notes;
    assert!(notes[0].contains("net.ipv4.ip_forward") && notes[0].contains("tun.auto-forward"), "{notes:?}");
}

#[test]
fn a_dropping_forward_chain_is_named_with_the_rule_to_add() {
    let mut survey = plain();
    let dropping_forward = vec!["ip filter FORWARD".to_owned()];
    survey.nft = NftState::Present {
        tables: ["filter".to_owned()].into(),
        mark_bits: 0,
        dropping_forward,
        gates: Vec::new(),
        kill_switches: Vec::new(),
    };
    let notes = HostPlan::new(&options(), &survey).unwrap().notes;
    let wanted = "nft insert rule ip filter FORWARD iifname tun7 accept";
    assert!(notes.iter().any(|note| note.contains(wanted)), "{notes:?}");
}

#[test]
fn a_rule_of_others_that_takes_everything_before_ours_is_named() {
    let mut survey = plain();
    let (table, to) = (RouteTable(52), "0.0.0.0/0".parse().unwrap());
    // Nothing is left before it.
    survey.rules.push(Rule { origin: 3, ..Rule::new(Family::V4, 70, RuleAction::Lookup(table)) });
    // A table with a few specific routes (a mesh VPN's) takes only those.
    assert!(HostPlan::new(&options(), &survey).unwrap().warnings.is_empty());
    survey.routes.push(SeenRoute { table, to, device: Some(2), on_link: true });
    let warnings = HostPlan::new(&options(), &survey).unwrap().warnings;
    assert!(warnings[0].contains("priority 70 lookup 52"), "{warnings:?}");
}

#[test]
fn a_wish_is_passed_over_for_the_reason_that_there_is_and_not_again_when_numbers_move() {
    let wishes = Wishes { first_priority: Some(9000), table: Some(2022), mark: None };
    let options = HostOptions { wishes, ..options() };
    let told = |survey: &Survey| HostPlan::new(&options, survey).unwrap().passed_over;
    assert_eq!(told(&plain()), [""; 0]);
    let mut survey = plain();
    survey.rules.push(Rule { origin: 3, ..Rule::new(Family::V6, 9050, RuleAction::Nop) });
    assert_eq!(told(&survey), ["rule priorities from 9000 on are in use; taking those from 9100 on instead"]);
    let mut survey = plain();
    let (table, to) = (RouteTable(52), "0.0.0.0/0".parse().unwrap());
    survey.rules.push(Rule { origin: 3, ..Rule::new(Family::V4, 5270, RuleAction::Lookup(table)) });
    survey.routes.push(SeenRoute { table, to, device: Some(2), on_link: true });
    let after = "rules from 9000 on would come after another program's that takes all traffic";
    assert_eq!(told(&survey), [format!("{after}; taking those from 5100 on instead")]);
    let moved = survey.before_others(plain().numbers(&Wishes::default()).unwrap());
    let again = HostPlan::with_numbers(&options, &survey, moved).unwrap();
    assert_eq!(again.all_warnings().collect::<Vec<_>>(), [""; 0]);
}

#[test]
fn missing_nftables_is_one_warning_that_names_what_is_lost() {
    let survey = Survey { nft: NftState::Missing("nft: not found".to_owned()), ..plain() };
    let plan = HostPlan::new(&options(), &survey).unwrap();
    assert!(plan.nft.is_none());
    assert_eq!(plan.warnings.len(), 1);
    assert!(plan.warnings[0].contains("port forwards"), "{:?}", plan.warnings);
    assert!(!plan.rules.is_empty());
}

#[test]
fn names_that_no_interface_can_have_are_refused() {
    for name in ["", "lo", "a/b", "a b", "\"; flush ruleset", "sixteen-letters-", "t\u{fc}n"] {
        let options = HostOptions { tun: name.to_owned(), ..options() };
        assert_eq!(HostPlan::new(&options, &plain()), Err(PlanError::BadName(name.to_owned())));
    }
    assert_eq!(HostPlan::check_name("eth0", &plain()), Err(PlanError::NameTaken("eth0".to_owned())));
    assert_eq!(HostPlan::check_name("tun7", &plain()), Ok(()));
}

#[test]
fn without_auto_route_only_the_tun_itself_is_set_up() {
    let plan = HostPlan::new(&HostOptions { auto_route: false, ..options() }, &plain()).unwrap();
    assert!(plan.routes.is_empty() && plan.rules.is_empty() && plan.nft.is_none());
    assert_eq!(plan.addresses.len(), 2);
}

#[test]
fn an_interface_that_is_not_there_is_named_and_the_hosts_own_traffic_is_no_interface() {
    let told = |include: &[&str], exclude: &[&str]| {
        let names = |list: &[&str]| list.iter().map(|name| (*name).to_owned()).collect();
        let options = HostOptions { include_interface: names(include), exclude_interface: names(exclude), ..options() };
        HostPlan::new(&options, &plain()).unwrap().warnings
    };
    assert_eq!(told(&["lan0", "lo"], &[]), [""; 0]);
    let warnings = told(&["lan0", "lan1"], &["wg7"]);
    assert_eq!(warnings.len(), 2, "{warnings:?}");
    assert!(warnings[0].starts_with("tun.include-interface: there is no interface lan1 now; it takes effect as soon"));
    assert!(warnings[1].starts_with("tun.exclude-interface: there is no interface wg7 now"));
}
