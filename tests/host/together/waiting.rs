//! A start that has to wait until another run is done with its changes: it can be ended meanwhile.

use std::fs::File;

use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::Signal;

use super::{TUN, place};
use crate::support::program::Program;
use crate::support::tunproxy::Place;
use crate::support::{Dump, Netns, Topology, run};

/// The turn to change the host, in the hand of a run that does not come to its end.
fn somebody_changes(host: &Netns) -> Flock<File> {
    host.enter(|| {
        let namespace = File::open("/proc/thread-self/ns/net").expect("the namespace");
        Flock::lock(namespace, FlockArg::LockExclusiveNonblock).expect("nobody else has it")
    })
}

#[test]
fn whoever_is_told_to_stop_while_it_waits_stops_at_once_and_has_changed_nothing() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let before = Dump::take(&lab.host);
        let turn = somebody_changes(&lab.host);
        for signal in [Signal::SIGINT, Signal::SIGTERM] {
            let mut waiting = Program::start("tunproxy", place("tun1", "").run_command(&lab.host));
            waiting.wait_for(|line| line.contains("waiting for it")).expect("another run is at work");
            waiting.signal(signal);
            assert!(waiting.wait().success());
            let said = waiting.output();
            // It had waited to the end, would it say these.
            for word in ["does not come to its end", "tunproxy ready"] {
                assert!(!said.contains(word), "{said}");
            }
        }
        before.assert_same(&Dump::take(&lab.host));
        drop(turn);
        place("tun1", "").start(&lab.host).assert_carries(&lab.host);
    });
}

#[test]
fn whoever_was_told_to_stop_while_it_waits_has_undone_what_a_crash_had_left() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let before = Dump::take(&lab.host);
        let left = place("tun1", ", kill-switch: true").start(&lab.host).kill();
        let turn = somebody_changes(&lab.host);
        let mut waiting = Program::start("tunproxy", left.run_command(&lab.host));
        waiting.wait_for(|line| line.contains("waiting for it")).expect("another run is at work");
        waiting.signal(Signal::SIGTERM);
        assert!(waiting.wait().success());
        before.assert_same(&Dump::take(&lab.host));
        drop(turn);
    });
}

#[test]
fn whoever_has_no_tun_changes_nothing_and_waits_for_nobody() {
    run(&[], || {
        let lab = Topology::desktop();
        let turn = somebody_changes(&lab.host);
        let ports = Place::new("mixed-port: 7890\nlog-level: info\nrules: ['MATCH,DIRECT']\n");
        let running = ports.start(&lab.host);
        assert!(!running.output().contains("waiting for it"), "{}", running.output());
        assert!(running.stop().success());
        drop(turn);
    });
}

#[test]
fn a_stop_waits_once_for_whoever_does_not_come_to_an_end_and_names_them() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let before = Dump::take(&lab.host);
        let running = place("tun1", "").start(&lab.host);
        let turn = somebody_changes(&lab.host);
        // What has ours move: that takes the turn.
        let vpn =
            ["route add default via 192.168.1.1 table 51820", "rule add priority 8990 not fwmark 0xca6c lookup 51820"];
        let ((), _) = running.line_after(|| vpn.iter().for_each(|words| drop(lab.host.ip(words))), &["waiting for it"]);
        running.signal(Signal::SIGTERM);
        let told = running.line("does not come to its end");
        assert!(told.contains(&format!("process {} (", std::process::id())), "{told}");
        running.line("the host is as it was");
        let said = running.output();
        assert_eq!(said.matches("does not come to its end").count(), 1, "{said}");
        assert!(!said.contains("ours move from priority"), "{said}");
        assert!(running.wait().success());
        lab.host.ip("rule del priority 8990");
        lab.host.ip("route flush table 51820");
        before.assert_same(&Dump::take(&lab.host));
        drop(turn);
    });
}
