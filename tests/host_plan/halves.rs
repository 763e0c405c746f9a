//! A stop goes back in two halves: first what takes new traffic, and later what open flows live on.

use tunproxy::platform::{HostOptions, Journal, cleanup};

use crate::host::{NODE, TUN, assert_same, build, dump, open_tun, options, plan};
use crate::sandbox::sh;
use crate::support::run;
use crate::traffic::{ask, device, serve};
use crate::undone::{LINK_LOCAL, ORDINARY};

#[test]
fn the_first_half_of_going_back_frees_new_traffic_and_spares_open_flows() {
    run(&[NODE], || {
        build(LINK_LOCAL);
        let before = dump();
        let state = tempfile::tempdir().unwrap();
        let tun = open_tun(TUN);
        let mut applied = plan(&options()).apply(Journal::open(state.path()).unwrap()).unwrap();
        let (new, open) = (["203.0.113.77", "2001:db8:9::9"], ["203.0.113.77 from 198.18.0.1", "198.18.7.7"]);
        assert_eq!(new.map(device), [TUN; 2]);
        let questions = ["203.0.113.9:53", "[2001:db8:9::9]:53"];
        for at in questions {
            serve("net", "NET", at);
        }
        applied.release().unwrap();
        assert_eq!(new.map(device), ["eth0"; 2]);
        // The firewall lets go of questions too, and drops none.
        assert_eq!(questions.map(|to| ask("", to)), ["NET"; 2]);
        assert_eq!(ask("192.0.2.2:0", questions[0]), "NET");
        assert_eq!(open.map(device), [TUN; 2]);
        assert_eq!(sh("cat /etc/resolv.conf"), LINK_LOCAL);
        applied.revert().unwrap();
        drop(tun);
        assert_same(&before, &dump());
        assert!(!state.path().join("journal").exists());
    });
}

#[test]
fn a_gateway_that_goes_back_by_halves_takes_its_clients_questions_and_not_its_own() {
    run(&[NODE], || {
        build(ORDINARY);
        let state = tempfile::tempdir().unwrap();
        let tun = open_tun(TUN);
        let mut applied =
            plan(&HostOptions { auto_forward: true, ..options() }).apply(Journal::open(state.path()).unwrap()).unwrap();
        let at = "203.0.113.9:53";
        serve("net", "NET", at);
        let of_a_client = || sh("ip route get 203.0.113.9 from 192.168.7.5 iif lan0 ipproto udp dport 53");
        assert!(of_a_client().contains(TUN), "{}", of_a_client());
        applied.release().unwrap();
        assert!(of_a_client().contains(TUN), "{}", of_a_client());
        assert_eq!(ask("", at), "NET");
        applied.revert().unwrap();
        drop(tun);
    });
}

#[test]
fn after_kill_9_between_the_halves_of_going_back_a_cleanup_does_the_rest() {
    run(&[NODE], || {
        build(LINK_LOCAL);
        let before = dump();
        let state = tempfile::tempdir().unwrap();
        let tun = open_tun(TUN);
        let mut applied = plan(&options()).apply(Journal::open(state.path()).unwrap()).unwrap();
        applied.release().unwrap();
        let left = std::fs::read(state.path().join("journal")).unwrap();
        applied.revert().unwrap();
        drop((applied, tun));
        // As if the second half had never come: what was undone in the first is not undone again.
        let crashed = tempfile::tempdir().unwrap();
        std::fs::write(crashed.path().join("journal"), left).unwrap();
        let report = cleanup(crashed.path(), false).unwrap();
        assert!(report.restored.is_empty() && report.already_gone > 0, "{report}");
        assert!(report.left_alone.is_empty(), "{report}");
        assert_same(&before, &dump());
    });
}
