//! The state directory of a run that goes on is deleted.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};

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

/// Not even root makes a directory of that name then. The run may be faster than whoever removes one.
fn put_a_file_in_its_place(place: &Place) {
    let file = place.state.with_extension("file");
    fs::write(&file, "").expect("a file");
    while fs::rename(&file, &place.state).is_err() {
        let _ = fs::remove_dir_all(&place.state);
    }
}

#[test]
fn a_state_directory_that_cannot_come_back_is_told_alike_by_all_until_it_can() {
    run(&[TUN], || {
        let lab = Topology::with_lan();
        let _sites = Sites::open(&lab);
        let before = Dump::take(&lab.host);
        let place = profile();
        let tunproxy = place.start(&lab.host);
        put_a_file_in_its_place(&place);
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
        put_a_file_in_its_place(&place);
        tunproxy.line("cannot be put back");
        assert!(tunproxy.stop().success());
        before.assert_same(&Dump::take(&lab.host));
    });
}

#[test]
fn a_log_of_fake_addresses_that_is_deleted_is_written_anew() {
    run(&["dig", TUN], || {
        let lab = Topology::with_lan();
        let place = profile();
        let tunproxy = place.start(&lab.host);
        let log = place.state.join("fake-ip.log");
        let mut dig = lab.host.command("dig");
        let said = Said::of(dig.args(["+short", "+tries=1", "@198.18.0.2", "once.example.test", "A"]));
        assert!(said.stdout.starts_with("198.18."), "{said:?}");
        let tells = || fs::read(&log).is_ok_and(|it| it.windows(17).any(|name| name == b"once.example.test"));
        assert!(tells());
        for lose in
            [&|| fs::remove_file(&log).unwrap(), &|| fs::remove_dir_all(&place.state).unwrap()] as [&dyn Fn(); 2]
        {
            lose();
            assert!(world::poll_until(PATIENCE, || tells().then_some(())).is_some(), "{}", tunproxy.output());
        }
        assert!(tunproxy.stop().success());
    });
}

#[test]
fn while_a_state_directory_is_being_put_back_the_run_answers_and_stops() {
    run(&[TUN], || {
        let lab = Topology::with_lan();
        let before = Dump::take(&lab.host);
        let place = profile();
        let tunproxy = place.start(&lab.host);
        // A connection of before goes on without the socket's name.
        let mut asking = UnixStream::connect(place.state.join("control.sock")).unwrap();
        let mut answers = BufReader::new(asking.try_clone().unwrap());
        // Whoever is noted in the lock has gone, and somebody has it all the same: the run waits a while for that.
        let aside = place.state.with_extension("aside");
        fs::create_dir(&aside).unwrap();
        fs::write(aside.join("lock"), "4194305").unwrap();
        let lock = Flock::lock(fs::File::open(aside.join("lock")).unwrap(), FlockArg::LockExclusive).unwrap();
        fs::rename(&place.state, place.state.with_extension("old")).unwrap();
        fs::rename(&aside, &place.state).unwrap();
        let (begun, mut longest) = (Instant::now(), Duration::ZERO);
        while !tunproxy.output().contains("cannot be put back") {
            assert!(begun.elapsed() < PATIENCE, "{}", tunproxy.output());
            let asked = Instant::now();
            asking.write_all(b"{\"command\":\"ping\"}\n").unwrap();
            let mut answer = String::new();
            answers.read_line(&mut answer).unwrap();
            assert!(answer.contains("true"), "{answer}");
            longest = longest.max(asked.elapsed());
        }
        assert!(begun.elapsed() > Duration::from_secs(2), "it has waited");
        assert!(longest < Duration::from_millis(1200), "{longest:?}");
        assert!(tunproxy.stop().success());
        drop(lock);
        before.assert_same(&Dump::take(&lab.host));
    });
}
