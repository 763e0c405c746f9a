//! The state directory of a run that goes on is deleted.

use std::fs;

use super::support::program::PATIENCE;
use super::support::tunproxy::{Place, Said};
use super::support::{Dump, Sites, Topology, run, world};

const TUN: &str = "/dev/net/tun";
/// What is told when it is back.
const BACK: &str = "deleted the state directory";

fn profile() -> Place {
    Place::new(
        "
mode: rule
ipv6: true
log-level: info
tun: { enable: true, auto-forward: true }
dns: { enable: true, enhanced-mode: fake-ip, nameserver: [192.168.1.1] }
rules: ['MATCH,DIRECT']
",
    )
}

/// Waits until the run answers by its state directory, as it did before.
fn until_it_answers(lab: &Topology, place: &Place) {
    let answers = || place.ask(&lab.host, "status").succeeded().then_some(());
    assert!(world::poll_until(PATIENCE, answers).is_some(), "{:?}", place.ask(&lab.host, "status"));
}

#[test]
fn a_state_directory_that_is_deleted_comes_back_and_a_crash_after_that_is_cleaned_up() {
    run(&[TUN], || {
        let lab = Topology::with_lan();
        let _sites = Sites::open(&lab);
        let before = Dump::take(&lab.host);
        let place = profile();
        let tunproxy = place.start(&lab.host);
        let journal = place.state.join("journal");
        let written = fs::read(&journal).unwrap();
        let ways: [&dyn Fn(); 3] = [
            &|| fs::remove_dir_all(&place.state).unwrap(),
            &|| ["control.sock", "lock"].iter().for_each(|name| fs::remove_file(place.state.join(name)).unwrap()),
            &|| fs::rename(&place.state, place.state.with_extension("old")).unwrap(),
        ];
        for lose in ways {
            lose();
            until_it_answers(&lab, &place);
            assert_eq!(fs::read(&journal).unwrap(), written, "{}", tunproxy.output());
        }
        tunproxy.line(BACK);
        assert_eq!(tunproxy.output().matches(BACK).count(), 1, "{}", tunproxy.output());
        let examined = place.look(&lab.host, "doctor", &[]).stdout;
        assert!(examined.contains("tunproxy runs: process"), "{examined}");
        fs::remove_dir_all(&place.state).unwrap();
        // Whoever comes before it is back waits for that.
        let said = place.ask(&lab.host, "cleanup");
        assert!(said.code == Some(1) && said.stderr.contains("another run (process"), "{said:?}");
        until_it_answers(&lab, &place);
        tunproxy.kill().clean_up(&lab.host);
        before.assert_same(&Dump::take(&lab.host));
    });
}

#[test]
fn a_run_without_a_device_puts_its_state_directory_back_too() {
    run(&[], || {
        let lab = Topology::desktop();
        let place = Place::new("mixed-port: 7890\nrules: ['MATCH,DIRECT']\n");
        let tunproxy = place.start(&lab.host);
        fs::remove_dir_all(&place.state).unwrap();
        until_it_answers(&lab, &place);
        assert!(place.ask(&lab.host, "stop").succeeded());
        assert!(tunproxy.wait().success());
        assert!(!place.state.join("control.sock").exists());
    });
}

#[test]
fn a_state_directory_that_cannot_come_back_is_told_alike_by_all_until_it_can() {
    run(&[TUN], || {
        let lab = Topology::with_lan();
        let _sites = Sites::open(&lab);
        let before = Dump::take(&lab.host);
        let place = profile();
        let tunproxy = place.start(&lab.host);
        fs::remove_dir_all(&place.state).unwrap();
        // Not even root makes a directory of that name now.
        fs::write(&place.state, "").unwrap();
        tunproxy.line("cannot be put back");
        let pid = format!("process {}", tunproxy.pid());
        let asked = ["status", "stop", "cleanup"].map(|word| place.ask(&lab.host, word));
        for said in asked.iter().chain([&Said::of(&mut place.run_command(&lab.host))]) {
            let told = said.stdout.clone() + &said.stderr;
            assert!(said.code == Some(1) && told.contains(&pid) && told.contains("was deleted since"), "{said:?}");
        }
        let examined = place.look(&lab.host, "doctor", &[]).stdout;
        assert!(examined.contains(&pid) && examined.contains("was deleted since"), "{examined}");
        for contradiction in ["does not run", "another state directory", "earlier run", "exists already"] {
            assert!(!examined.contains(contradiction), "{contradiction}: {examined}");
        }
        tunproxy.assert_carries(&lab.host);
        fs::remove_file(&place.state).unwrap();
        until_it_answers(&lab, &place);
        tunproxy.kill().clean_up(&lab.host);
        before.assert_same(&Dump::take(&lab.host));
    });
}

#[test]
fn a_run_whose_state_directory_is_gone_for_good_puts_the_host_back_at_its_end() {
    run(&[TUN], || {
        let lab = Topology::with_lan();
        let before = Dump::take(&lab.host);
        let place = profile();
        let tunproxy = place.start(&lab.host);
        fs::remove_dir_all(&place.state).unwrap();
        fs::write(&place.state, "").unwrap();
        tunproxy.line("cannot be put back");
        assert!(tunproxy.stop().success());
        before.assert_same(&Dump::take(&lab.host));
    });
}
