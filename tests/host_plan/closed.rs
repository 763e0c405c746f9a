//! A closed host: what the kill switch lets past, what is missed of it, and whose tables it takes down.

use tunproxy::platform::{HostOptions, HostPlan, Journal, Step, Survey, Wishes, cleanup, cleanup_closed};

use crate::host::{NODE, TUN, assert_same, build, dump, open_tun, options, plan};
use crate::sandbox::sh;
use crate::support::run;
use crate::traffic::{ask, serve, start};
use crate::undone::ORDINARY;

fn closed() -> HostOptions {
    HostOptions { kill_switch: true, ..options() }
}

#[test]
fn what_the_profile_excludes_passes_a_closed_host_and_its_port_53_does_not() {
    run(&[NODE], || {
        build(ORDINARY);
        let route_exclude = vec!["203.0.113.0/28".parse().unwrap(), "2001:db8:9::/64".parse().unwrap()];
        for (address, from) in [("203.0.113.9", "192.0.2.2:0"), ("[2001:db8:9::9]", "[2001:db8:1::2]:0")] {
            for port in [53, 5000] {
                serve("net", "NET", &format!("{address}:{port}"));
                assert_eq!(ask(from, &format!("{address}:{port}")), "NET", "before the start");
            }
        }
        let mut running = start(&HostOptions { route_exclude, ..closed() });
        for (address, from) in [("203.0.113.9", "192.0.2.2:0"), ("[2001:db8:9::9]", "[2001:db8:1::2]:0")] {
            for bound in ["", from] {
                assert_eq!(ask(bound, &format!("{address}:5000")), "NET", "{address} from {bound:?}");
                assert_eq!(ask(bound, &format!("{address}:53")), "TUN", "{address} from {bound:?}");
            }
        }
        assert_eq!(ask("192.0.2.2:0", "203.0.113.99:5000"), "TUN", "not excluded, and bound");
        running.applied.revert().unwrap();
    });
}

#[test]
fn only_what_the_profile_names_is_closed() {
    run(&[NODE], || {
        build(ORDINARY);
        serve("net", "NET", "203.0.113.9:5000");
        let route_address = vec!["203.0.113.64/26".parse().unwrap()];
        let mut running = start(&HostOptions { route_address, ..closed() });
        for bound in ["", "192.0.2.2:0"] {
            assert_eq!(ask(bound, "203.0.113.9:5000"), "NET", "from {bound:?}");
            assert_eq!(ask(bound, "203.0.113.77:5000"), "TUN", "from {bound:?}");
        }
        running.applied.revert().unwrap();
    });
}

#[test]
fn a_kill_switch_that_somebody_took_down_is_missed() {
    run(&[NODE], || {
        build(ORDINARY);
        let state = tempfile::tempdir().unwrap();
        let tun = open_tun(TUN);
        let mut applied = plan(&closed()).apply(Journal::open(state.path()).unwrap()).unwrap();
        assert_eq!(applied.missing().unwrap(), []);
        sh("nft delete table inet tunproxy; ip route del unreachable default table 2022 metric 4294967294");
        let missing = applied.missing().unwrap();
        assert!(missing.contains(&Step::Firewall), "{missing:?}");
        assert!(
            missing.iter().any(|step| step.to_string().contains("unreachable 0.0.0.0/0 table 2022")),
            "{missing:?}"
        );
        applied.revert().unwrap();
        drop(tun);
    });
}

#[test]
fn a_table_that_somebody_else_made_in_our_place_stays() {
    run(&[NODE], || {
        build(ORDINARY);
        let before = dump();
        let state = tempfile::tempdir().unwrap();
        let tun = open_tun(TUN);
        drop(plan(&closed()).apply(Journal::open(state.path()).unwrap()).unwrap());
        drop(tun);
        assert!(sh("nft list ruleset").contains("kill switch of tun7"), "dropped, and still closed");
        sh("nft 'delete table inet tunproxy; add table inet tunproxy { comment \"theirs\"; }'");
        let kept = cleanup_closed(state.path(), false).unwrap();
        assert!(kept.stays_closed && kept.restored.is_empty(), "{kept}");
        let report = cleanup(state.path(), false).unwrap();
        assert!(
            report.restored.iter().any(|line| line == "delete the firewall table tunproxy"),
            "the other half: {report}"
        );
        let left = sh("nft list ruleset");
        assert!(left.contains("theirs") && !left.contains("table arp"), "{left}");
        sh("nft delete table inet tunproxy");
        assert_same(&before, &dump());
    });
}

#[test]
fn a_start_beside_a_closed_host_takes_numbers_of_its_own_and_follows_no_mark_of_the_old() {
    run(&[NODE], || {
        build(ORDINARY);
        let before = dump();
        let state = tempfile::tempdir().unwrap();
        let tun = open_tun(TUN);
        drop(plan(&closed()).apply(Journal::open(state.path()).unwrap()).unwrap());
        drop(tun);
        let journal = Journal::open(state.path()).unwrap();
        assert!(journal.is_closed());
        let mut survey = Survey::take().unwrap();
        survey.set_aside(&journal.rules());
        // What is in the way is our own: no reason to warn of wishes that are not granted.
        let wishes = Wishes { first_priority: Some(9000), table: Some(2022), ..Wishes::default() };
        let planned = HostPlan::new(&HostOptions { wishes, ..closed() }, &survey).unwrap();
        assert!(planned.warnings.is_empty(), "{:?}", planned.warnings);
        let first = planned.numbers.first_priority;
        assert_eq!((first, planned.nft.as_ref().map(|nft| nft.table.as_str())), (9100, Some("tunproxy1")));
        assert!(!planned.rules.iter().any(|rule| rule.priority == first + 1), "no old mark is anybody's path");
        let tun = open_tun(TUN);
        let mut applied = planned.apply(journal).unwrap();
        assert!(applied.taken_over().is_some_and(|report| report.restored.len() > 20), "{:?}", applied.taken_over());
        assert_eq!(applied.missing().unwrap(), []);
        let rules = sh("ip rule; ip -6 rule; nft list ruleset");
        assert!(!rules.contains("9043:") && rules.contains("9143:") && !rules.contains("tunproxy {"), "{rules}");
        applied.revert().unwrap();
        drop(tun);
        assert_same(&before, &dump());
        assert!(!state.path().join("journal").exists());
    });
}
