//! Two runs in one network namespace, each with a state directory and a device of its own.

mod side_by_side;
mod waiting;

use super::support::tunproxy::{Place, Tunproxy};
use super::support::{Dump, Netns, Topology, run};

const TUN: &str = "/dev/net/tun";

/// A profile with a device of its own.
fn place(device: &str, more: &str) -> Place {
    Place::new(&format!(
        "
mode: rule
log-level: info
tun: {{ enable: true, auto-route: true, device: {device}, dns-hijack: ['any:53']{more} }}
dns: {{ enable: true, enhanced-mode: fake-ip, nameserver: [192.168.1.1] }}
rules: ['MATCH,DIRECT']
"
    ))
}

/// Has `old` stop while `new` starts: both at the same moment, in whatever order they get to the host.
fn relieve(host: &Netns, old: Tunproxy, new: &Place) -> Tunproxy {
    std::thread::scope(|scope| {
        let starting = scope.spawn(|| new.start(host));
        end(old);
        starting.join().expect("a start")
    })
}

fn end(run: Tunproxy) {
    run.signal(nix::sys::signal::Signal::SIGTERM);
    // Only what a second look finds gone is told so.
    let line = run.line("the host is as it was");
    assert!(line.contains("changes undone"), "{line}");
    assert!(run.wait().success());
}

fn rules(host: &Netns) -> Vec<String> {
    let both = host.ip("-4 rule") + &host.ip("-6 rule");
    both.lines().map(str::to_owned).collect()
}

fn come_and_go(more: &str) {
    let lab = Topology::desktop();
    let before = Dump::take(&lab.host);
    let mut here = [place("tun1", more).start(&lab.host), place("tun2", more).start(&lab.host)];
    for number in 3..9 {
        let [first, second] = here;
        let third = relieve(&lab.host, first, &place(&format!("tun{number}"), more));
        second.assert_carries(&lab.host);
        here = [second, third];
    }
    let [first, second] = here;
    end(first);
    second.assert_carries(&lab.host);
    let lost = second.output().lines().filter(|line| line.contains("it is back")).count();
    assert_eq!(lost, 0, "nobody took anything of its: {}", second.output());
    end(second);
    before.assert_same(&Dump::take(&lab.host));
}

#[test]
fn runs_that_come_and_go_at_the_same_moment_take_nothing_of_each_other() {
    run(&[TUN], || come_and_go(""));
}

#[test]
fn runs_with_kill_switches_that_come_and_go_at_the_same_moment_take_nothing_of_each_other() {
    run(&[TUN], || come_and_go(", kill-switch: true"));
}

#[test]
fn many_that_start_at_once_have_numbers_of_their_own() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let before = Dump::take(&lab.host);
        let places: Vec<Place> = (1..=4).map(|number| place(&format!("tun{number}"), "")).collect();
        let runs: Vec<Tunproxy> = std::thread::scope(|scope| {
            let starting: Vec<_> = places.iter().map(|place| scope.spawn(|| place.start(&lab.host))).collect();
            starting.into_iter().map(|start| start.join().expect("a start")).collect()
        });
        let own = |rule: &&String| rule.contains("iif tun") && rule.contains("goto");
        let rules = rules(&lab.host);
        let mut priorities: Vec<&str> = rules.iter().filter(own).filter_map(|rule| rule.split(':').next()).collect();
        priorities.sort_unstable();
        priorities.dedup();
        assert_eq!(priorities.len(), 4, "{rules:#?}");
        std::thread::scope(|scope| runs.into_iter().for_each(|run| drop(scope.spawn(|| end(run)))));
        before.assert_same(&Dump::take(&lab.host));
    });
}

#[test]
fn what_a_crashed_run_has_left_is_cleaned_up_beside_one_that_runs_without_touching_it() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let before = Dump::take(&lab.host);
        let first = place("tun1", "").start(&lab.host);
        let second = place("tun2", "").start(&lab.host);
        let left = first.kill();
        let third = place("tun3", "").start(&lab.host);
        left.clean_up(&lab.host);
        for run in [&second, &third] {
            assert!(!run.output().contains("it is back"), "{}", run.output());
        }
        end(second);
        third.assert_carries(&lab.host);
        end(third);
        before.assert_same(&Dump::take(&lab.host));
    });
}

#[test]
fn a_second_host_that_shares_the_state_directory_touches_nothing_of_the_first() {
    run(&[TUN], || {
        let lab = Topology::with_lan();
        let other = lab.client();
        let before = [&lab.host, other].map(Dump::take);
        let shared = place("tun1", ", kill-switch: true");
        let first = shared.start(&lab.host);
        let refused = shared.try_start(other).err().expect("the directory is taken");
        assert!(refused.contains("another") && !refused.contains("panicked"), "{refused}");
        let cleaned = shared.ask(other, "cleanup");
        assert!(!cleaned.succeeded(), "{cleaned:?}");
        before[1].assert_same(&Dump::take(other));
        first.assert_carries(&lab.host);
        assert!(!first.output().contains("it is back"), "{}", first.output());

        // It dies. From outside nobody can tell whether its namespace is still there.
        let left = first.kill();
        let closed = Dump::take(&lab.host);
        let refused = shared.try_start(other).err().expect("another namespace's journal");
        assert!(refused.contains("namespace"), "{refused}");
        let cleaned = shared.ask(other, "cleanup");
        assert!(!cleaned.succeeded() && cleaned.stderr.contains("namespace"), "{cleaned:?}");
        before[1].assert_same(&Dump::take(other));
        closed.assert_same(&Dump::take(&lab.host));
        left.clean_up(&lab.host);
        before[0].assert_same(&Dump::take(&lab.host));

        let second = shared.start(other);
        second.assert_carries(other);
        end(second);
        for (ns, before) in [&lab.host, other].into_iter().zip(&before) {
            before.assert_same(&Dump::take(ns));
        }
    });
}
