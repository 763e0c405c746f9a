//! `plan`: it names every change of a start and what undoes it, and makes none.

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;

use nix::fcntl::{Flock, FlockArg};
use serde_json::Value;

use super::support::peers::Peers;
use super::support::program::{PATIENCE, Program};
use super::support::tunproxy::{Place, Said, binary};
use super::support::world::{self, set_resolv_conf};
use super::support::{Dump, Netns, Sites, Topology, run};

const NODE: &str = "/dev/net/tun";
const TUN: &str = "tunproxy0";

fn desktop() -> Place {
    Place::new(
        "ipv6: true\ntun: { enable: true }\ndns: { enable: true, enhanced-mode: fake-ip, nameserver: [192.168.1.1] }\nrules: ['MATCH,DIRECT']\n",
    )
}

fn gateway() -> Place {
    Place::new(
        "ipv6: true\ntun: { enable: true, auto-forward: true }\n\
         dns: { enable: true, enhanced-mode: fake-ip, nameserver: [192.168.1.1] }\nrules: ['MATCH,DIRECT']\n",
    )
}

/// What `plan` says, as data.
fn planned(place: &Place, ns: &Netns) -> Value {
    let said = place.look(ns, "plan", &["--format", "json"]);
    assert!(said.succeeded(), "{said:?}");
    serde_json::from_str(&said.stdout).unwrap_or_else(|error| panic!("{error}: {said:?}"))
}

fn texts<'a>(group: &'a Value, key: &str) -> Vec<&'a str> {
    group[key].as_array().expect("a list").iter().map(|text| text.as_str().expect("a text")).collect()
}

/// The commands under `key` of all groups.
fn commands<'a>(plan: &'a Value, key: &str) -> Vec<Vec<&'a str>> {
    plan["groups"].as_array().expect("groups").iter().map(|group| texts(group, key)).collect()
}

/// Types commands into a shell of the host.
fn type_in(ns: &Netns, commands: &[&str]) {
    // A table whose owner is a program that ends would go with it.
    let script = format!("PATH=$PATH:/usr/sbin:/sbin\n{}", commands.join("\n").replace(" flags owner;", ""));
    let said = Said::of(ns.command("sh").args(["-euc", &script]));
    assert!(said.succeeded(), "{script}\n{said:?}");
}

/// Keeps the device of that name running, as a program does that reads it.
fn attach(ns: &Netns) -> File {
    ns.enter(|| {
        let file = OpenOptions::new().read(true).write(true).open(NODE).expect("open /dev/net/tun");
        // struct ifreq: a name of 16 bytes, then IFF_TUN | IFF_NO_PI | IFF_MULTI_QUEUE | IFF_VNET_HDR.
        let mut request = [0u8; 40];
        request[..TUN.len()].copy_from_slice(TUN.as_bytes());
        request[16..18].copy_from_slice(&0x5101u16.to_ne_bytes());
        // SAFETY: TUNSETIFF reads and writes one struct ifreq, which the buffer has room for.
        let attached = unsafe { libc::ioctl(file.as_raw_fd(), 0x4004_54ca, request.as_mut_ptr()) };
        assert_eq!(attached, 0, "TUNSETIFF: {}", std::io::Error::last_os_error());
        file
    })
}

/// What has changed, line by line, but for the owner of the table and what a device says of its queues.
fn changes(before: &Dump, after: &Dump) -> BTreeSet<String> {
    let diff = before.diff(after);
    let of_device = |line: &str| line.contains("link/none") || line.contains("tun type tun") || line.contains(" mtu ");
    let of_owner = |line: &str| line.contains("flags owner");
    let lines = diff.lines().filter(|line| line.starts_with("  ") && !of_device(line) && !of_owner(line));
    lines.map(|line| line.replace(" # progname nft", "").trim_end().to_owned()).collect()
}

/// Starts `place` and types what it had planned, one after the other, and compares.
fn typed_by_hand(lab: &Topology, place: &Place) {
    let before = Dump::take(&lab.host);
    let plan = planned(place, &lab.host);
    before.assert_same(&Dump::take(&lab.host));
    assert!(!place.state.exists(), "a plan leaves no trace");

    let tunproxy = place.start(&lab.host);
    let started = changes(&before, &Dump::take(&lab.host));
    assert!(tunproxy.stop().success());
    before.assert_same(&Dump::take(&lab.host));

    let acts = commands(&plan, "acts");
    type_in(&lab.host, &acts[0]);
    let device = attach(&lab.host);
    type_in(&lab.host, &acts[1..].concat());
    let typed = changes(&before, &Dump::take(&lab.host));
    let only = |one: &BTreeSet<String>, other: &BTreeSet<String>| one.difference(other).cloned().collect::<Vec<_>>();
    let (not_planned, not_done) = (only(&started, &typed), only(&typed, &started));
    assert!(
        not_planned.is_empty() && not_done.is_empty(),
        "a start does what its plan does not name: {not_planned:#?}\na plan names what a start does not do: {not_done:#?}"
    );
    assert!(started.iter().any(|line| line.contains("chain reroute")), "{started:?}");

    let undo: Vec<&str> = commands(&plan, "undo").into_iter().rev().flatten().collect();
    type_in(&lab.host, &undo);
    drop(device);
    before.assert_same(&Dump::take(&lab.host));
}

#[test]
fn what_a_desktops_plan_says_can_be_typed_and_is_what_a_start_does() {
    run(&["sysctl", NODE], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        typed_by_hand(&lab, &desktop());
    });
}

#[test]
fn what_a_gateways_plan_says_can_be_typed_and_is_what_a_start_does() {
    run(&["sysctl", NODE], || {
        let lab = Topology::with_lan().rp_filter("1");
        let _sites = Sites::open(&lab);
        lab.host.sysctl("net.ipv4.ip_forward", "0");
        lab.host.sysctl("net.ipv6.conf.all.forwarding", "0");
        lab.host.sysctl("net.ipv6.conf.eth0.accept_ra", "1");
        set_resolv_conf("search lan\n");
        typed_by_hand(&lab, &gateway());
    });
}

#[test]
fn what_a_plan_says_of_a_kill_switch_can_be_typed_and_is_what_a_start_does() {
    run(&["sysctl", NODE], || {
        for more in ["", ", auto-forward: true, include-interface: [lan0]"] {
            let lab = Topology::with_lan().rp_filter("1");
            let _sites = Sites::open(&lab);
            lab.host.sysctl("net.ipv4.ip_forward", "0");
            lab.host.sysctl("net.ipv6.conf.all.forwarding", "0");
            // Somebody's server is one of those that may speak first; our own ports are not.
            let at_host = Peers::new(&lab.host);
            let _server = at_host.tcp_echo("0.0.0.0:2222".parse().unwrap());
            let place = Place::new(&format!(
                "ipv6: true\nmixed-port: 7890\nport: 7891\ntun: {{ enable: true, kill-switch: true{more} }}\n\
                 dns: {{ enable: true, listen: '127.0.0.1:5353', nameserver: [192.168.1.1] }}\nrules: ['MATCH,DIRECT']\n"
            ));
            let text = planned(&place, &lab.host).to_string();
            assert_eq!(text.contains("tcp sport { 2222 }"), more.is_empty(), "{text}");
            typed_by_hand(&lab, &place);
        }
    });
}

#[test]
fn a_plan_goes_round_what_others_have_taken() {
    run(&["sysctl", NODE], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        lab.host.ip("rule add priority 9010 fwmark 0x1000000/0x1000000 lookup 2022");
        lab.host.nft("add table inet tunproxy");
        let place = desktop();
        typed_by_hand(&lab, &place);
        let plan = planned(&place, &lab.host);
        assert_eq!(plan["numbers"]["first_priority"], 9100, "{}", plan["numbers"]);
        assert_eq!(plan["numbers"]["captured"], 2023, "{}", plan["numbers"]);
    });
}

#[test]
fn a_plan_makes_no_change_not_even_for_a_moment() {
    run(&[NODE], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let monitors = [("ip", vec!["monitor", "link", "address", "route", "rule"]), ("nft", vec!["monitor"])];
        let monitors: Vec<Program> = monitors
            .into_iter()
            .map(|(program, words)| {
                let mut command = lab.host.command(program);
                command.args(words);
                Program::start(program, command)
            })
            .collect();
        // They do not say when they listen: they do once they have heard of a change.
        let hear = |monitor: &Program, mark: &str| {
            let heard = world::poll_until(PATIENCE, || {
                lab.host.ip(&format!("rule add priority {mark} nop"));
                lab.host.ip(&format!("rule del priority {mark}"));
                lab.host.nft(&format!("add table inet mark{mark}"));
                lab.host.nft(&format!("delete table inet mark{mark}"));
                monitor.output().contains(mark).then_some(())
            });
            assert!(heard.is_some(), "{}", monitor.output());
        };
        monitors.iter().for_each(|monitor| hear(monitor, "77"));
        // Without its node a device cannot be opened.
        assert!(Said::of(std::process::Command::new("mount").args(["-t", "tmpfs", "none", "/dev/net"])).succeeded());
        assert!(desktop().look(&lab.host, "plan", &[]).succeeded());
        monitors.iter().for_each(|monitor| hear(monitor, "88"));
        for monitor in &monitors {
            let strange = |line: &&str| ["9000", "198.18", TUN, "tunproxy"].iter().any(|word| line.contains(word));
            let output = monitor.output();
            assert_eq!(output.lines().find(strange), None);
        }
    });
}

#[test]
fn while_it_runs_the_plan_is_what_is_in_force() {
    run(&[NODE], || {
        let lab = Topology::with_lan();
        let _sites = Sites::open(&lab);
        lab.host.sysctl("net.ipv4.ip_forward", "0");
        let place = gateway();
        let before = planned(&place, &lab.host);
        assert_eq!(before["in_force"], false);
        let tunproxy = place.start(&lab.host);
        let dump = Dump::take(&lab.host);
        let now = planned(&place, &lab.host);
        assert_eq!(now["in_force"], true);
        for key in ["acts", "undo"] {
            assert_eq!(commands(&now, key), commands(&before, key));
        }
        let said = place.look(&lab.host, "plan", &[]);
        assert!(said.succeeded() && said.stdout.contains("the tunproxy that runs has changed"), "{said:?}");
        dump.assert_same(&Dump::take(&lab.host));
        // From another state directory nobody can be asked: what is there belongs to a stranger.
        let other = gateway().look(&lab.host, "plan", &[]);
        assert_eq!(other.code, Some(1), "{other:?}");
        assert!(other.stdout.contains("refused: the interface tunproxy0 exists already"), "{other:?}");
        tunproxy.assert_carries(&lab.host);
        assert!(tunproxy.stop().success());
    });
}

#[test]
fn after_a_crash_the_plan_begins_with_what_was_left() {
    run(&["sysctl", NODE], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let (place, before) = (desktop(), Dump::take(&lab.host));
        let fresh = planned(&place, &lab.host);
        let place = place.start(&lab.host).kill();
        let crashed = Dump::take(&lab.host);
        let plan = planned(&place, &lab.host);
        crashed.assert_same(&Dump::take(&lab.host));
        assert_eq!(plan["groups"], fresh["groups"], "a start undoes what was left, and then finds the host as before");
        let leftovers = texts(&plan, "leftovers");
        assert!(leftovers.iter().any(|line| line.starts_with("ip -4 rule delete priority 9043")), "{leftovers:?}");
        type_in(&lab.host, &leftovers);
        before.assert_same(&Dump::take(&lab.host));
    });
}

#[test]
fn a_start_that_would_be_refused_is_told_with_the_reason() {
    run(&[NODE], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let refused = |place: &Place, ns: &Netns| {
            let said = place.look(ns, "plan", &["--format", "json"]);
            let plan: Value = serde_json::from_str(&said.stdout).unwrap_or_else(|error| panic!("{error}: {said:?}"));
            assert_eq!(said.code, Some(1), "{plan:#}");
            plan["refused"].as_str().unwrap_or_else(|| panic!("{plan:#}")).to_owned()
        };
        let silent = desktop();
        std::fs::create_dir(&silent.state).unwrap();
        let lock = std::fs::File::create(silent.state.join("lock")).unwrap();
        let held = Flock::lock(lock, FlockArg::LockExclusiveNonblock).unwrap();
        let why = refused(&silent, &lab.host);
        assert!(why.contains("another run (process ") && why.contains("does not answer"), "{why}");
        drop(held);
        let place = desktop().start(&lab.host).kill();
        let why = refused(&place, &lab.gateway);
        assert!(why.contains("another network namespace") && why.contains("--namespace-gone"), "{why}");
        std::fs::write(place.state.join("journal"), "tunproxy-journal 99 {}\n").unwrap();
        let why = refused(&place, &lab.host);
        assert!(why.contains("version 99"), "{why}");
    });
}

#[test]
fn without_privileges_a_plan_says_what_it_could_not_see() {
    run(&["setpriv", NODE], || {
        let lab = Topology::desktop();
        let place = desktop();
        let by_root = planned(&place, &lab.host);
        let by_anybody = || {
            let mut command = lab.host.command("setpriv");
            command.args(["--reuid=12345", "--regid=12345", "--clear-groups"]).arg(binary());
            command.args(["plan", "--format", "json", "--profile"]).arg(&place.profile);
            let said = Said::of(command.arg("--state-dir").arg(&place.state));
            (said.code, serde_json::from_str::<Value>(&said.stdout).unwrap_or_else(|_| panic!("{said:?}")))
        };
        let (code, plan) = by_anybody();
        assert_eq!(code, Some(3), "not everything was seen");
        assert_eq!(plan["groups"], by_root["groups"]);
        assert!(texts(&plan, "unseen")[0].contains("CAP_NET_ADMIN"), "{}", plan["unseen"]);
        assert!(texts(&by_root, "unseen").is_empty(), "{}", by_root["unseen"]);
        assert_eq!(by_root["warnings"].as_array().map(Vec::len), Some(0), "{}", by_root["warnings"]);
        // It may not ask the run of another user either.
        let tunproxy = place.start(&lab.host);
        let (code, plan) = by_anybody();
        assert_eq!((code, &plan["in_force"]), (Some(1), &Value::Bool(false)));
        assert!(plan["refused"].as_str().is_some_and(|why| why.contains(TUN)), "{plan}");
        assert!(tunproxy.stop().success());
    });
}

#[test]
fn a_profile_without_a_tun_and_one_with_mistakes_have_no_plan() {
    run(&[], || {
        let ns = Netns::new("alone");
        let quiet = Place::new("mixed-port: 7890\nrules: ['MATCH,DIRECT']\n").look(&ns, "plan", &[]);
        assert!(quiet.succeeded() && quiet.stdout.contains("tun.enable is false"), "{quiet:?}");
        let ports = Place::new("mixed-port: 7890\nrules: ['MATCH,DIRECT']\n").start(&ns);
        let running = ports.place().look(&ns, "plan", &[]);
        assert!(running.succeeded() && running.stdout.contains("has changed nothing"), "{running:?}");
        let wrong = Place::new("tun: { enable: maybe }\n").look(&ns, "plan", &[]);
        assert_eq!((wrong.code, wrong.stdout.as_str()), (Some(1), ""), "{wrong:?}");
    });
}
