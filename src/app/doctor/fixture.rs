//! Healthy hosts, to be broken by the tests of the checks.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, SystemTime};

use super::finding::{Finding, Severity};
use super::record::{
    Firewall, Heard, Journal, Probes, Record, ResolvConf, Resolver, Rights, RunState, Start, StateDir, System, Wanted,
};
use crate::app::run::Run;
use crate::platform::{
    Family, Gate, Hook, HostPlan, Link, NftState, Parameters, RouteKind, RouteTable, Rule, RuleAction, SeenLink,
    SeenRoute, Survey,
};

const PROFILE: &str =
    "tun: { enable: true }\ndns: { enable: true, enhanced-mode: fake-ip, nameserver: [192.168.1.1] }\n";
const TUN: &str = "tunproxy0";
const TUN_INDEX: u32 = 9;

/// The problem that was found, which must be the only one.
#[track_caller]
pub(super) fn only_problem(found: &[Finding]) -> Option<&Finding> {
    let problems: Vec<&Finding> = found.iter().filter(|finding| finding.severity == Severity::Problem).collect();
    assert!(problems.len() < 2, "{problems:#?}");
    problems.first().copied()
}

/// Has a chain of somebody's drop whatever comes to the host.
pub(super) fn deafen(record: &mut Record) {
    let NftState::Present { gates, .. } = &mut record.survey.nft else { panic!("no nft") };
    gates.push(Gate { chain: "inet adm input".to_owned(), hook: Hook::Input, drops: true, rules: Vec::new() });
}

/// What the warnings say.
pub(super) fn warnings(found: &[Finding]) -> Vec<String> {
    found.iter().filter(|finding| finding.severity == Severity::Warning).map(|finding| finding.what.clone()).collect()
}

/// A host with one uplink, on which tunproxy does not run.
pub(super) fn quiet() -> Record {
    Record {
        run: RunState::Absent,
        journal: Ok(Some(Journal::default())),
        survey: survey(),
        links: vec![link(1, "lo", 65536), link(2, "eth0", 1500)],
        our_routes: Vec::new(),
        parameters: [("net/ipv4/conf/eth0/src_valid_mark".to_owned(), "0".to_owned())].into(),
        resolver: Resolver {
            resolv_conf: ResolvConf::Text("nameserver 192.168.1.1\n".to_owned()),
            hosts: ["files", "dns"].map(str::to_owned).into(),
        },
        firewall: Firewall { installed: true, ruleset: Ok(String::new()), closed: Vec::new() },
        rights: Rights { network: true, by_file: false, node: true, node_closed: None },
        system: System {
            // 2026-01-01.
            now: SystemTime::UNIX_EPOCH + Duration::from_secs(1_767_225_600),
            built: None,
            kernel: "6.18.3-arch1".to_owned(),
            descriptors: 1 << 19,
            open: None,
            state: StateDir {
                path: "/var/lib/tunproxy".to_owned(),
                closed: None,
                hidden: false,
                distrusted: None,
                free: 1 << 30,
            },
        },
        start: Some(Start { refused: Vec::new(), stub: None, plan: Some(Box::new(plan())) }),
        read_only: false,
        profile: Some(Wanted { tun: true, device: TUN.to_owned(), fake_ip: true, ..Wanted::default() }),
        probes: Probes {
            nameservers: vec![("192.168.1.1".to_owned(), Ok(Heard::Answer(Vec::new())))],
            ..Probes::default()
        },
    }
}

/// The same with a run, and all that it has changed in place.
pub(super) fn running() -> Record {
    let mut record = quiet();
    let plan = plan();
    record.links.push(SeenLink { kind: "tun".to_owned(), ..link(TUN_INDEX, TUN, plan.mtu) });
    record.survey.links.push(Link { index: TUN_INDEX, name: TUN.to_owned() });
    record.survey.addresses.extend(plan.addresses.iter().map(|net| (TUN_INDEX, *net)));
    record.survey.rules.extend(plan.rules.clone());
    record.survey.tables.extend([plan.numbers.captured, plan.numbers.always]);
    record.our_routes = plan
        .routes
        .iter()
        .map(|route| SeenRoute {
            table: route.table,
            to: route.to,
            device: Some(TUN_INDEX),
            on_link: matches!(route.kind, RouteKind::Device(_)),
        })
        .collect();
    record.survey.routes.extend(record.our_routes.clone());
    record.parameters.extend(plan.sysctls.iter().map(|it| (it.path.clone(), it.value.clone())));
    record.firewall.ruleset = Ok(plan.nft.as_ref().map_or_else(String::new, |nft| {
        let chains: String = nft.chains().map(|chain| format!("\tchain {chain} {{\n\t}}\n")).collect();
        format!("table inet {} {{ # progname nft\n\tflags owner\n{chains}}}\n", nft.table)
    }));
    let fake = "198.18.7.7".parse().unwrap();
    record.probes.question = Some(("192.168.1.1:53".parse().unwrap(), Ok(vec![fake])));
    record.start = None;
    record.run = RunState::Answers { pid: 4711, seconds: 60, looped: 0, plan: Some(Box::new(plan)) };
    record
}

fn plan() -> HostPlan {
    plan_of("", &survey())
}

/// What a start comes to on a host like `survey`, with these keys in the profile's `tun` besides.
pub(super) fn plan_of(keys: &str, survey: &Survey) -> HostPlan {
    let text = PROFILE.replace("enable: true }\ndns", &format!("enable: true, {keys} }}\ndns"));
    let (profile, report) = crate::profile::read("profile.yaml", text.as_bytes());
    assert!(!report.has_errors(), "{report}");
    let profile = profile.unwrap();
    let run = Run { profile: &profile, state: Path::new("/nowhere") };
    HostPlan::new(&run.options(TUN), survey).unwrap()
}

fn link(index: u32, name: &str, mtu: u32) -> SeenLink {
    SeenLink { index, name: name.to_owned(), kind: String::new(), up: true, carrier: true, mtu }
}

fn survey() -> Survey {
    let route =
        |to: &str, on_link| SeenRoute { table: RouteTable::MAIN, to: to.parse().unwrap(), device: Some(2), on_link };
    let rules = Family::BOTH.into_iter().flat_map(|family| {
        [(0, 255), (32766, 254)]
            .map(|(priority, table)| Rule::new(family, priority, RuleAction::Lookup(RouteTable(table))))
    });
    Survey {
        device: None,
        tuns: std::collections::BTreeSet::new(),
        links: vec![Link { index: 1, name: "lo".to_owned() }, Link { index: 2, name: "eth0".to_owned() }],
        addresses: vec![
            (1, "127.0.0.1/8".parse().unwrap()),
            (2, "192.168.1.10/24".parse().unwrap()),
            (2, "2001:db8:2::10/64".parse().unwrap()),
        ],
        rules: rules.collect(),
        aside: Vec::new(),
        routes: vec![
            route("0.0.0.0/0", false),
            route("192.168.1.0/24", true),
            route("::/0", false),
            route("2001:db8:2::/64", true),
        ],
        tables: BTreeSet::from([RouteTable(254), RouteTable(255)]),
        gateways: BTreeSet::new(),
        known_uplinks: BTreeSet::new(),
        nft: NftState::empty(),
        other_marks: 0,
        parameters: Parameters::default(),
        ipv6: true,
        kernel_ipv6: true,
        listening: BTreeSet::new(),
        answering: BTreeSet::new(),
        unconnected: BTreeSet::new(),
        users: vec![(0, u32::MAX - 1)],
        resolv_conf: Some("nameserver 192.168.1.1\n".to_owned()),
        resolved: false,
    }
}
