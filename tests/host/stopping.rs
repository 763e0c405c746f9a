//! The way down: what goes in which order, what may finish, and who waits for it.

use nix::sys::signal::Signal;

use super::support::client::act_in;
use super::support::program::{PATIENCE, Program};
use super::support::sites::{NAME, V4, V6};
use super::support::topology::{CLIENT_V4, CLIENT_V6};
use super::support::tunproxy::Place;
use super::support::{Capture, Dump, Netns, Sites, Topology, run, world};

const TUN: &str = "/dev/net/tun";
/// What a download gets in a second.
const RATE: &str = "10M";
/// A download that ends well within the drain, also on a slow machine.
const SHORT: &str = "3000000";
/// A download that would far outlast a drain. (The site digests it before its first byte: no more than needed.)
const LONG: &str = "150000000";

fn profile(more: &str) -> Place {
    Place::new(&format!(
        "
mode: rule
ipv6: true
log-level: info
dns: {{ enable: true, enhanced-mode: fake-ip, nameserver: [192.168.1.1] }}
rules: ['MATCH,DIRECT']
{more}
"
    ))
}

#[test]
fn captures_go_first_then_what_open_flows_need_and_the_device_last() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let tunproxy = profile("tun: { enable: true }").start(&lab.host);
        let mut command = lab.host.command("ip");
        command.args(["monitor", "rule", "address", "link"]);
        let monitor = Program::start("ip monitor", command);
        // It does not say when it listens: it does once it has heard of a change.
        let hears = world::poll_until(PATIENCE, || {
            lab.host.ip("rule add priority 77 nop");
            lab.host.ip("rule del priority 77");
            (monitor.line_count() > 0).then_some(())
        });
        assert!(hears.is_some(), "{}", monitor.output());
        assert!(tunproxy.stop().success());
        let gone = |line: &str| line.starts_with("Deleted") && line.contains("tunproxy0") && line.contains("mtu");
        monitor.wait_for(gone).unwrap_or_else(|said| panic!("{said}"));
        let heard = monitor.output();
        let at = |words: &str| {
            let found = heard.lines().position(|line| line.starts_with("Deleted") && line.contains(words));
            found.unwrap_or_else(|| panic!("no end of {words}: {heard}"))
        };
        let order = ["9043:", "9040:", "9021:", "9000:", "198.18.0.1/30"].map(at);
        assert!(order.is_sorted(), "{order:?}: {heard}");
        assert!(heard.lines().position(gone) > order.last().copied(), "{heard}");
    });
}

/// Keeps the kernel from taking in a whole download at once, so that it is really under way for its time.
fn small_buffers(lab: &Topology) {
    for ns in [Some(&lab.host), lab.lan.as_ref()].into_iter().flatten() {
        for key in ["net.ipv4.tcp_rmem", "net.ipv4.tcp_wmem"] {
            ns.sysctl(key, "4096 131072 524288");
        }
    }
}

fn slow_download(ns: &Netns, site: &str, bytes: &str, options: &[&str]) -> Program {
    let mut command = ns.command("curl");
    let url = format!("http://{site}/bytes/{bytes}");
    command.args(["-sSg", "--limit-rate", RATE, "-o", "/dev/null", "-w", "%{size_download}\n"]);
    command.args(options).arg(&url);
    Program::start("curl", command)
}

/// One of the counters of flows, as the run tells it.
fn counted(place: &Place, lab: &Topology, what: &str) -> Option<u64> {
    let status: serde_json::Value = serde_json::from_str(&place.ask(&lab.host, "status").stdout).ok()?;
    status["flows"][what].as_u64()
}

/// Waits until so many flows have been opened.
fn until_open(place: &Place, lab: &Topology, flows: u64) {
    let open = || (counted(place, lab, "opened")? >= flows).then_some(());
    assert!(world::poll_until(PATIENCE, open).is_some(), "no {flows} flows were opened");
}

#[test]
fn a_download_through_a_proxy_port_may_finish() {
    run(&["curl"], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        small_buffers(&lab);
        let tunproxy = profile("mixed-port: 7890").start(&lab.host);
        let mut curl = slow_download(&lab.host, V4, SHORT, &["-x", "http://127.0.0.1:7890"]);
        until_open(tunproxy.place(), &lab, 1);
        assert!(tunproxy.stop().success());
        assert!(curl.wait().success(), "{}", curl.output());
        assert_eq!(curl.output(), SHORT);
    });
}

/// Two downloads by `ns` through the device are under way when a stop comes.
fn finish_through_the_device(lab: &Topology, ns: &Netns, options: &str) {
    small_buffers(lab);
    let mut capture = Capture::start(&lab.host, "eth0");
    capture.prove(|mark| assert_eq!(act_in(&lab.host, &format!("datagram {V4}:7 {mark}")), Ok(mark.to_owned())));
    let tunproxy = profile(&format!("tun: {{ enable: true{options} }}")).start(&lab.host);
    let mut downloads = [V4, V6].map(|site| slow_download(ns, site, SHORT, &[]));
    until_open(tunproxy.place(), lab, 2);
    assert!(tunproxy.stop().success());
    for curl in &mut downloads {
        assert!(curl.wait().success(), "{}", curl.output());
        assert_eq!(curl.output(), SHORT);
    }
    let inner = ["198.18.0.1", "fdfe:", CLIENT_V4, CLIENT_V6];
    capture.assert_nothing("a packet of a flow of ours that left past us", |packet| {
        packet.ip.is_some_and(|ip| inner.iter().any(|inner| ip.source.ip().to_string().starts_with(inner)))
    });
}

#[test]
fn downloads_of_the_host_may_finish_and_none_of_their_packets_goes_past_us() {
    run(&["curl", TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        finish_through_the_device(&lab, &lab.host, "");
    });
}

#[test]
fn downloads_of_a_lan_client_may_finish_and_none_of_their_packets_goes_past_us() {
    run(&["curl", TUN], || {
        let lab = Topology::with_lan();
        let _sites = Sites::open(&lab);
        finish_through_the_device(&lab, lab.client(), ", auto-forward: true");
    });
}

#[test]
fn a_second_signal_cuts_the_wait_short() {
    run(&["curl"], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        small_buffers(&lab);
        let tunproxy = profile("mixed-port: 7890").start(&lab.host);
        let mut curl = slow_download(&lab.host, V4, LONG, &["-x", "http://127.0.0.1:7890"]);
        until_open(tunproxy.place(), &lab, 1);
        // A flow that moves nothing is not waited for.
        let moves = || (counted(tunproxy.place(), &lab, "down")? > 0).then_some(());
        assert!(world::poll_until(PATIENCE, moves).is_some(), "{}", curl.output());
        let ((), _line) = tunproxy.line_after(|| tunproxy.signal(Signal::SIGTERM), &["stopping"]);
        let ((), _line) = tunproxy.line_after(|| tunproxy.signal(Signal::SIGTERM), &["not waiting any longer"]);
        assert!(tunproxy.wait().success());
        assert!(!curl.wait().success(), "{}", curl.output());
    });
}

#[test]
fn every_way_to_end_it_from_a_terminal_leaves_the_host_as_it_was() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let before = Dump::take(&lab.host);
        let place = profile("tun: { enable: true }");
        for signal in [Signal::SIGINT, Signal::SIGQUIT] {
            let tunproxy = place.start(&lab.host);
            assert_eq!(act_in(&lab.host, &format!("ask {NAME}:7 x")), Ok("x".to_owned()));
            tunproxy.signal(signal);
            assert!(tunproxy.wait().success(), "{signal}");
            before.assert_same(&Dump::take(&lab.host));
        }
    });
}

#[test]
fn the_command_stop_returns_when_the_host_is_as_it_was() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let before = Dump::take(&lab.host);
        let place = profile("tun: { enable: true }");
        let mut last = None;
        for _ in 0..3 {
            let tunproxy = place.start(&lab.host);
            assert_eq!(act_in(&lab.host, &format!("ask {NAME}:7 x")), Ok("x".to_owned()));
            let said = place.ask(&lab.host, "stop");
            assert!(said.succeeded(), "{said:?}");
            // Nothing is waited for here.
            before.assert_same(&Dump::take(&lab.host));
            assert!(!place.state.join("control.sock").exists());
            last = Some(tunproxy);
        }
        assert!(last.is_some_and(|tunproxy| tunproxy.wait().success()));
    });
}

#[test]
fn a_second_signal_cuts_short_the_waiting_for_another_run_that_changes_the_host() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let before = Dump::take(&lab.host);
        let place = profile("tun: { enable: true }");
        let tunproxy = place.start(&lab.host);
        // What another run would have, and which does not come to its end.
        let namespace = std::fs::File::open(format!("/proc/{}/ns/net", tunproxy.pid())).expect("its namespace");
        let turn = nix::fcntl::Flock::lock(namespace, nix::fcntl::FlockArg::LockExclusive).expect("the turn");
        tunproxy.signal(Signal::SIGTERM);
        tunproxy.line("a second signal cuts that short");
        tunproxy.signal(Signal::SIGTERM);
        let said = tunproxy.line("the host is as it was");
        assert!(!tunproxy.output().contains("does not come to its end"), "it waited to the end: {said}");
        assert!(tunproxy.wait().success());
        drop(turn);
        assert_eq!(before.diff(&Dump::take(&lab.host)), "");
    });
}
