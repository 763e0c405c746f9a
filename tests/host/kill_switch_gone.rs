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

/// The handle of the last rule of a chain of our table.
fn last_handle(lab: &Topology, chain: &str) -> String {
    let listed = lab.host.run("nft", &["-a", "list", "chain", "inet", "tunproxy", chain]);
    let last = listed.lines().rfind(|line| line.starts_with("\t\t")).unwrap_or_else(|| panic!("{listed}"));
    last.rsplit(' ').next().expect("a handle").to_owned()
}

#[test]
fn one_that_lacks_a_single_rule_is_told_by_whoever_looks() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let before = Dump::take(&lab.host);
        let place = profile("'MATCH,REJECT'");
        let started = || {
            let tunproxy = place.start(&lab.host);
            // What the host becomes changes the table, and what it should have.
            lab.host.address("eth0", &["192.168.1.77/24"]);
            let known = || lab.host.nft("list table inet tunproxy").contains("192.168.1.77").then_some(());
            assert!(world::poll_until(Duration::from_secs(30), known).is_some(), "{}", tunproxy.output());
            // Once it answers with the new plan, all of it is on record.
            let told = || place.look(&lab.host, "plan", &[]).stdout.contains("192.168.1.77").then_some(());
            assert!(world::poll_until(Duration::from_secs(30), told).is_some(), "{}", tunproxy.output());
            drop(tunproxy.kill());
            lab.host.ip("addr del 192.168.1.77/24 dev eth0");
        };
        let open = "is not in force";
        let told = |word: &str| {
            let said = match word {
                "status" => place.ask(&lab.host, word),
                _ => place.look(&lab.host, word, &[]),
            };
            said.stdout + &said.stderr
        };
        started();
        for word in ["plan", "doctor", "status"] {
            assert!(!told(word).contains(open), "nobody has touched it: {word}: {}", told(word));
        }
        let remove = || {
            let handle = last_handle(&lab, "reroute");
            lab.host.nft(&format!("delete rule inet tunproxy reroute handle {handle}"));
        };
        remove();
        for word in ["plan", "doctor", "status"] {
            assert!(told(word).contains(open), "{word}: {}", told(word));
        }
        assert!(!told("doctor").contains("is closed (firewall table"), "{}", told("doctor"));
        assert!(place.clean_up(&lab.host).contains(open));
        before.assert_same(&Dump::take(&lab.host));
        started();
        remove();
        let tunproxy = place.start(&lab.host);
        let line = tunproxy.line(open);
        assert!(line.contains("WARN") && line.contains("lacks rules"), "{line}");
        assert!(tunproxy.stop().success());
        started();
        let tunproxy = place.start(&lab.host);
        tunproxy.line("left its kill switch closed");
        assert!(!tunproxy.output().contains(open), "{}", tunproxy.output());
        assert!(tunproxy.stop().success());
        before.assert_same(&Dump::take(&lab.host));
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
