//! A host that runs out of something: threads, memory, disk. And a clock that is another one than at the last run.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use nix::mount::{MsFlags, mount};

use super::support::client::act_in;
use super::support::service::{OPEN_TUN, open_tun, service};
use super::support::sites::{NAME, V4, V6};
use super::support::tunproxy::{Place, Said, Tunproxy, UNKNOWN_FAKE};
use super::support::{Dump, Netns, Sites, Topology, run, world};

const TUN: &str = "/dev/net/tun";
const PROFILE: &str = "
mode: rule
ipv6: true
log-level: info
profile: { store-fake-ip: true }
tun: { enable: true, auto-route: true, dns-hijack: ['any:53'] }
dns: { enable: true, enhanced-mode: fake-ip, nameserver: [192.168.1.1] }
rules: ['MATCH,DIRECT']
";

/// `command`, run by another program.
fn by(ns: &Netns, wrapper: &[&str], command: &Command) -> Command {
    let mut wrapped = ns.command(wrapper[0]);
    wrapped.args(&wrapper[1..]).arg(command.get_program()).args(command.get_args());
    wrapped
}

fn carries(lab: &Topology) {
    for site in [V4, V6, NAME] {
        assert_eq!(act_in(&lab.host, &format!("ask {site}:7 x")), Ok("x".to_owned()), "{site}");
    }
}

fn is_plain(said: &str) -> bool {
    let ugly = ["panicked", "stack backtrace", "memory allocation of", "Os {"];
    // The last line is the reason.
    said.lines().last().is_some_and(|line| line.starts_with("tunproxy: "))
        && !ugly.iter().any(|word| said.contains(word))
}

#[test]
fn without_room_for_its_threads_it_says_so_and_the_host_stays_as_it_was() {
    run(&["prlimit", "setpriv", OPEN_TUN], || {
        open_tun();
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let before = Dump::take(&lab.host);
        let place = service(PROFILE);
        let (mut refusals, mut advised) = (0, false);
        for limit in 1..40 {
            let limit = format!("--nproc={limit}");
            let command = by(&lab.host, &["prlimit", &limit], &place.run_command(&lab.host));
            match place.try_start_by(command) {
                Ok(tunproxy) => {
                    carries(&lab);
                    assert!(tunproxy.stop().success(), "{limit}");
                    before.assert_same(&Dump::take(&lab.host));
                    assert!(refusals > 1 && advised, "{refusals} limits were too low");
                    return;
                }
                Err(said) => {
                    assert!(is_plain(&said), "{limit}: {said}");
                    before.assert_same(&Dump::take(&lab.host));
                    refusals += 1;
                    advised |= said.contains("`ulimit -u`");
                }
            }
        }
        panic!("no limit is enough");
    });
}

#[test]
fn without_memory_it_ends_or_says_so_and_the_next_start_finds_its_way() {
    run(&["prlimit", TUN], || {
        let lab = Topology::desktop();
        let before = Dump::take(&lab.host);
        let place = Place::new(PROFILE);
        let (mut crashes, mut shortages) = (0, 0);
        for megabytes in (8..4096).step_by(4) {
            let limit = format!("--as={}", megabytes << 20);
            let command = by(&lab.host, &["prlimit", &limit], &place.run_command(&lab.host));
            let Ok(tunproxy) = place.try_start_by(command) else {
                crashes += 1;
                place.clean_up(&lab.host);
                before.assert_same(&Dump::take(&lab.host));
                continue;
            };
            let refused = act_in(&lab.host, &format!("connect {UNKNOWN_FAKE} 3")) == Err("ECONNREFUSED".to_owned());
            if !refused {
                // There is no room for a flow.
                shortages += 1;
                tunproxy.line("the system gives no more");
            }
            assert!(tunproxy.stop().success(), "{limit}");
            before.assert_same(&Dump::take(&lab.host));
            if refused {
                world::measured(&format!(
                    "{megabytes} MiB are enough; {crashes} starts failed, {shortages} were short"
                ));
                assert!(crashes > 0, "no limit was too low");
                return;
            }
        }
        panic!("no limit is enough");
    });
}

/// Makes the state directory a small disk of its own.
fn small_disk(place: &Place, options: &str) {
    fs::create_dir(&place.state).expect("a directory on the lab's desk");
    mount(Some("tmpfs"), &place.state, Some("tmpfs"), MsFlags::empty(), Some(options)).expect("a mount of the lab");
}

/// Writes until nothing more fits.
fn fill(directory: &Path) {
    let mut file = fs::OpenOptions::new().create(true).append(true).open(directory.join("filler")).expect("a file");
    while file.write_all(&[b'x'; 512]).is_ok() {}
    drop(file);
    assert!(fs::write(directory.join("probe"), [b'x'; 4096]).is_err(), "the disk is full");
    let _ = fs::remove_file(directory.join("probe"));
}

fn make_room(directory: &Path) {
    fs::remove_file(directory.join("filler")).expect("the filler");
}

#[test]
fn a_disk_that_is_full_is_said_before_anything_is_changed() {
    run(&[TUN], || {
        for (options, is_full_of_files) in [("size=16k", false), ("nr_inodes=1", true)] {
            let lab = Topology::desktop();
            let before = Dump::take(&lab.host);
            let place = Place::new(PROFILE);
            small_disk(&place, options);
            if !is_full_of_files {
                fill(&place.state);
            }
            let said = Said::of(&mut place.run_command(&lab.host));
            assert_eq!(said.code, Some(1), "{said:?}");
            let told = is_plain(&said.stderr) || said.stderr.contains("No space left on device");
            assert!(told && said.stderr.contains("state"), "{options}: {said:?}");
            before.assert_same(&Dump::take(&lab.host));
        }
    });
}

/// Whether the rule that lets the mark of another program pass is there.
fn lets_pass(host: &Netns, mark: &str) -> bool {
    host.ip("rule").lines().any(|rule| rule.contains(&format!("fwmark {mark}")) && rule.contains("goto"))
}

fn await_pass(host: &Netns, mark: &str, tunproxy: &Tunproxy) {
    let found = world::poll_until(Duration::from_secs(30), || lets_pass(host, mark).then_some(()));
    assert!(found.is_some(), "{mark}: {}\n{}", host.ip("rule"), tunproxy.output());
}

#[test]
fn a_disk_that_fills_up_stops_changes_and_the_log_of_names_and_nothing_else() {
    run(&["dig", TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let host = &lab.host;
        let before = Dump::take(host);
        let place = Place::new(PROFILE);
        small_disk(&place, "size=256k");
        let tunproxy = place.start(host);
        carries(&lab);
        fill(&place.state);

        // Another program takes a path of its own, for which there has to be a rule of ours.
        let (first, second) = ("0x80000/0xff0000", "0x40000000/0x40000000");
        host.ip(&format!("rule add priority 5210 fwmark {first} lookup main"));
        let said = tunproxy.line("journal");
        assert!(said.contains("WARN") || said.contains("ERROR"), "{said}");
        assert!(!lets_pass(host, first), "what is not on the disk is not done");
        carries(&lab);

        for part in 0..4 {
            let names: Vec<String> =
                (0..100).map(|number| format!("a-rather-long-name-{part}-{number}.example.test")).collect();
            let mut words = vec!["+short", "+tries=1"];
            words.extend(names.iter().map(String::as_str));
            let answers = host.run("dig", &words);
            assert_eq!(answers.lines().filter(|line| line.starts_with("198.18.")).count(), 100, "{answers}");
        }
        let told = || tunproxy.output().lines().filter(|line| line.contains("fake-IP log")).count();
        assert_eq!(told(), 1, "{}", tunproxy.output());

        make_room(&place.state);
        host.ip(&format!("rule add priority 5211 fwmark {second} lookup main"));
        await_pass(host, first, &tunproxy);
        await_pass(host, second, &tunproxy);
        carries(&lab);
        fill(&place.state);
        for (priority, mark) in [(5210, first), (5211, second)] {
            host.ip(&format!("rule del priority {priority} fwmark {mark}"));
        }
        let status = place.ask(host, "status");
        assert!(status.succeeded(), "{status:?}");
        assert!(tunproxy.stop().success());
        before.assert_same(&Dump::take(host));
        // Names that were not written may have other addresses; those that were have theirs.
        make_room(&place.state);
        let again = place.start(host);
        carries(&lab);
        assert!(again.stop().success());
        before.assert_same(&Dump::take(host));
    });
}

#[test]
fn a_crash_on_a_full_disk_is_cleaned_up_all_the_same() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let before = Dump::take(&lab.host);
        let place = Place::new(PROFILE);
        small_disk(&place, "size=64k");
        let tunproxy = place.start(&lab.host);
        fill(&place.state);
        tunproxy.kill().clean_up(&lab.host);
        before.assert_same(&Dump::take(&lab.host));
    });
}

#[test]
fn a_clock_that_has_jumped_since_the_last_run_is_no_matter() {
    run(&["unshare", TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let before = Dump::take(&lab.host);
        let place = Place::new(PROFILE);
        // Three years, and nearly as far as a clock can be set.
        for offset in ["100000000", "4000000000"] {
            drop(place.start(&lab.host).kill());
            let wrapper = ["unshare", "--time", "--monotonic", offset, "--boottime", offset, "--fork", "--kill-child"];
            let command = by(&lab.host, &wrapper, &place.run_command(&lab.host));
            let tunproxy = place.try_start_by(command).unwrap_or_else(|said| panic!("{offset}: {said}"));
            carries(&lab);
            assert_eq!(act_in(&lab.host, &format!("datagram {V4}:7 x")), Ok("x".to_owned()));
            lab.host.ip("rule del priority 9043");
            tunproxy.line("it is back");
            let status = place.ask(&lab.host, "status");
            assert!(status.succeeded(), "{status:?}");
            // In the order of that clock and of the other: what it left is found by a run under either.
            let stopped = place.ask(&lab.host, "stop");
            assert!(stopped.succeeded(), "{stopped:?}\n{}", tunproxy.output());
            assert!(tunproxy.wait().success());
            before.assert_same(&Dump::take(&lab.host));
        }
        // A log of names and a journal of tomorrow.
        let tomorrow = std::time::SystemTime::now() + Duration::from_secs(86_400);
        drop(place.start(&lab.host).kill());
        for entry in fs::read_dir(&place.state).expect("the state directory").flatten() {
            let file = fs::File::open(entry.path());
            let _ = file.and_then(|file| file.set_modified(tomorrow));
        }
        let tunproxy = place.start(&lab.host);
        carries(&lab);
        assert!(tunproxy.stop().success());
        before.assert_same(&Dump::take(&lab.host));
    });
}
