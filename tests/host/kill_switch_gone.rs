//! A kill switch that another program has removed: told as it is, and closed again.

use std::time::Duration;

use super::kill_switch::{assert_closed, escapes_in, profile, proven_capture, tries};
use super::support::escapes::{self, Attempts};
use super::support::tunproxy::Place;
use super::support::{Dump, Sites, Topology, run, world};

const TUN: &str = "/dev/net/tun";

#[test]
fn one_that_was_removed_after_a_crash_is_told_and_closed_again() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let mut capture = proven_capture(&lab);
        let before = Dump::take(&lab.host);
        let state = |place: &Place| {
            let said = place.ask(&lab.host, "status");
            said.stdout.lines().find(|line| line.contains("kill_switch")).unwrap_or_default().trim().to_owned()
        };
        let mut place = profile("'MATCH,REJECT'");
        for removal in ["flush ruleset", "flush table inet tunproxy", "delete table inet tunproxy"] {
            place = place.start(&lab.host).kill();
            lab.host.nft(removal);
            lab.host.enter(escapes::all_ways);
            let planned = place.look(&lab.host, "plan", &[]);
            assert!(planned.stdout.contains("the kill switch of the earlier run is not in force"), "{planned:?}");
            let already = escapes_in(&mut capture);
            let tunproxy = place.start(&lab.host);
            let line = tunproxy.line("is not in force");
            assert!(line.contains("WARN") && line.contains("may have left unprotected"), "{line}");
            let attempts = Attempts::from(&lab.host);
            attempts.wait(tries() / 4);
            drop(attempts);
            assert_closed(&mut capture, already, removal);
            assert_eq!(state(&place), "\"kill_switch\": \"closed\",");
            let said = tunproxy.output();
            for untrue in ["left its kill switch closed", "another program removed", "in use", "all the time"] {
                assert!(!said.contains(untrue), "{untrue} after {removal}: {said}");
            }
            assert!(tunproxy.stop().success());
            before.assert_same(&Dump::take(&lab.host));
        }
        // A rule that is gone, and made again by the next run, is not the earlier run's to delete.
        let tunproxy = place.start(&lab.host);
        place = tunproxy.kill();
        lab.host.ip("-4 rule flush protocol kernel");
        lab.host.ip("-4 rule add priority 0 lookup local");
        for priority in [("32766", "main"), ("32767", "default")] {
            lab.host.ip(&format!("-4 rule add priority {} lookup {}", priority.0, priority.1));
        }
        let before = ip_rules(&lab);
        let tunproxy = place.start(&lab.host);
        tunproxy.line("left its kill switch closed");
        tunproxy.assert_carries(&lab.host);
        let said = tunproxy.output();
        assert!(!said.contains("another program removed") && !said.contains("in use"), "{said}");
        assert!(tunproxy.stop().success());
        assert!(before.iter().all(|rule| ip_rules(&lab).contains(rule) || rule.starts_with('9')), "{before:?}");
    });
}

fn ip_rules(lab: &Topology) -> Vec<String> {
    lab.host.ip("-4 rule").lines().map(str::to_owned).collect()
}

#[test]
fn what_keeps_it_from_closing_again_is_seen_in_the_status() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let tunproxy = profile("'MATCH,DIRECT'").start(&lab.host);
        let state = || {
            let said = tunproxy.place().ask(&lab.host, "status").stdout;
            ["closed", "open", "off", "unknown"]
                .into_iter()
                .find(|word| said.contains(&format!("\"kill_switch\": \"{word}\"")))
        };
        assert_eq!(state(), Some("closed"));
        // Another program takes the very name.
        lab.host.nft("delete table inet tunproxy; add table inet tunproxy");
        tunproxy.line("another program has made a table tunproxy of its own");
        assert_eq!(state(), Some("open"));
        lab.host.nft("delete table inet tunproxy");
        let closed = world::poll_until(Duration::from_secs(30), || (state() == Some("closed")).then_some(()));
        assert!(closed.is_some(), "{}", tunproxy.output());
        assert!(tunproxy.stop().success());
    });
}
