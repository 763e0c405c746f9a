//! `doctor`: on a healthy host it finds no problem, and where one thing is broken it names exactly that.

mod missing;
mod own_firewall;
mod running;
mod starts;
mod way_out;

use std::process::Command;

use serde_json::Value;

use super::support::client::act_in;
use super::support::program::PATIENCE;
use super::support::sites::NAME;
use super::support::topology::HOST_LAN_V4;
use super::support::tunproxy::{Place, Said, Tunproxy};
use super::support::world::poll_until;
use super::support::{Dump, Netns, Sites, Topology, run};

const TUN: &str = "/dev/net/tun";

fn desktop() -> Place {
    Place::new(
        "ipv6: true\ntun: { enable: true }\n\
         dns: { enable: true, enhanced-mode: fake-ip, nameserver: [192.168.1.1] }\nrules: ['MATCH,DIRECT']\n",
    )
}

fn gateway() -> Place {
    Place::new(&format!(
        "ipv6: true\ntun: {{ enable: true, auto-forward: true }}\n\
         dns: {{ enable: true, listen: '{HOST_LAN_V4}:53', enhanced-mode: fake-ip, nameserver: [192.168.1.1] }}\n\
         rules: ['MATCH,DIRECT']\n"
    ))
}

/// What the doctor says, after it was seen to have changed nothing.
fn examine(place: &Place, ns: &Netns) -> Value {
    let before = Dump::take(ns);
    let said = place.look(ns, "doctor", &["--format", "json"]);
    before.assert_same(&Dump::take(ns));
    let found: Value = serde_json::from_str(&said.stdout).unwrap_or_else(|error| panic!("{error}: {said:?}"));
    let unseen = 3 * i32::from(found["unseen"] != serde_json::json!([]));
    assert_eq!(said.code, Some(if told(&found, "problem").is_empty() { unseen } else { 1 }), "{said:?}");
    found
}

/// What was found of one severity: "what -> what to do". What the machine that runs the tests lacks is its own business.
fn told(found: &Value, severity: &str) -> Vec<String> {
    let of_the_machine =
        |it: &Value| it["severity"] == "warning" && ["system", "rights"].iter().any(|word| it["check"] == *word);
    let findings = found["findings"].as_array().expect("findings").iter();
    let of_it = findings.filter(|finding| finding["severity"] == severity && !of_the_machine(finding));
    of_it.map(|it| format!("{} -> {}", it["what"].as_str().unwrap_or(""), it["do"].as_str().unwrap_or(""))).collect()
}

/// Holds that nothing is wrong.
#[track_caller]
fn assert_healthy(place: &Place, ns: &Netns) {
    let found = examine(place, ns);
    assert_eq!((told(&found, "problem"), told(&found, "warning")), (Vec::new(), Vec::new()), "{found:#}");
    assert_eq!(found["unseen"].as_array().map(Vec::len), Some(0), "{found:#}");
}

/// Holds that there is one problem, and that it is told with all of `words`.
#[track_caller]
fn assert_one(severity: &str, place: &Place, ns: &Netns, words: &[&str]) {
    let found = examine(place, ns);
    let told = told(&found, severity);
    let [one] = told.as_slice() else { panic!("not one {severity}, but {told:#?} in {found:#}") };
    assert!(words.iter().all(|word| one.contains(word)), "{words:?} in {one}");
}

/// Kills a run, and waits until the kernel has taken down what goes with it: the child that owns the firewall table ends by
/// itself, a little later.
fn killed(tunproxy: Tunproxy, ns: &Netns) -> Place {
    let place = tunproxy.kill();
    let gone = || (!ns.run("nft", &["list", "tables"]).contains("tunproxy")).then_some(());
    assert!(poll_until(PATIENCE, gone).is_some(), "the firewall table is still there");
    place
}

fn sh(script: &str) {
    let said = Said::of(Command::new("sh").args(["-euc", script]));
    assert!(said.succeeded(), "{script}: {said:?}");
}

#[test]
fn a_healthy_desktop_has_no_problem_before_while_and_after_a_run() {
    run(&[TUN], || {
        let lab = Topology::desktop().rp_filter("1");
        let _sites = Sites::open(&lab);
        let place = desktop();
        assert_healthy(&place, &lab.host);
        assert!(!place.state.exists());
        let tunproxy = place.start(&lab.host);
        assert_eq!(act_in(&lab.host, &format!("ask {NAME}:7 x")), Ok("x".to_owned()));
        assert_healthy(&place, &lab.host);
        tunproxy.assert_carries(&lab.host);
        assert!(tunproxy.stop().success());
        assert_healthy(&place, &lab.host);
        let text = place.look(&lab.host, "doctor", &[]);
        assert!(text.succeeded() && text.stdout.ends_with(" warnings\n"), "{text:?}");
    });
}

#[test]
fn a_healthy_gateway_has_no_problem() {
    run(&[TUN], || {
        let lab = Topology::with_lan().rp_filter("1");
        let _sites = Sites::open(&lab);
        let place = gateway();
        assert_healthy(&place, &lab.host);
        let tunproxy = place.start(&lab.host);
        assert_healthy(&place, &lab.host);
        assert!(tunproxy.stop().success());
    });
}
