//! A running program as its user meets it: what it answers, who may ask, how it is stopped.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::Value;

use super::support::client::act_in;
use super::support::program::{PATIENCE, Program};
use super::support::sites::{NAME, V4};
use super::support::tunproxy::{Place, Said, binary};
use super::support::{Dump, Sites, Topology, run};

const TUN: &str = "/dev/net/tun";

fn profile() -> Place {
    Place::new(
        "
mode: rule
ipv6: true
log-level: info
mixed-port: 7890
tun: { enable: true, auto-route: true, dns-hijack: ['any:53'] }
dns: { enable: true, enhanced-mode: fake-ip, nameserver: [192.168.1.1] }
rules: ['DST-PORT,81,REJECT', 'MATCH,DIRECT']
",
    )
}

#[test]
fn status_tells_what_was_done() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let tunproxy = profile().start(&lab.host);
        assert_eq!(act_in(&lab.host, &format!("ask {NAME}:7 hello")), Ok("hello".to_owned()));
        assert_eq!(act_in(&lab.host, &format!("connect {V4}:81")), Err("ECONNREFUSED".to_owned()));
        let said = tunproxy.place().ask(&lab.host, "status");
        assert!(said.succeeded(), "{said:?}");
        let status: Value = serde_json::from_str(&said.stdout).expect("JSON");
        assert_eq!(status["mode"], "rule");
        assert_eq!(status["tun"], true);
        assert_eq!(status["version"], env!("CARGO_PKG_VERSION"));
        let flows = &status["flows"];
        assert!(flows["opened"].as_u64() >= Some(1) && flows["rejected"].as_u64() >= Some(1), "{status}");
        assert!(flows["up"].as_u64() >= Some(5) && flows["down"].as_u64() >= Some(5), "{status}");
        assert!(status["fake_addresses"].as_u64() >= Some(1), "{status}");
    });
}

#[test]
fn a_stop_by_command_is_as_good_as_one_by_signal() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let before = Dump::take(&lab.host);
        let tunproxy = profile().start(&lab.host);
        tunproxy.assert_carries(&lab.host);
        let place = tunproxy.place().clone();
        assert!(place.ask(&lab.host, "stop").succeeded());
        assert!(tunproxy.wait().success());
        before.assert_same(&Dump::take(&lab.host));
        for word in ["status", "stop"] {
            let said = place.ask(&lab.host, word);
            assert_eq!(said.code, Some(1), "{said:?}");
            assert!(said.stderr.contains("no tunproxy answers on"), "{said:?}");
        }
    });
}

#[test]
fn whoever_asks_for_a_stop_hears_of_the_end_however_many_ask() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let before = Dump::take(&lab.host);
        let place = profile();
        for _ in 0..5 {
            let tunproxy = place.start(&lab.host);
            let heard = std::thread::scope(|scope| {
                let ask = || {
                    let said = place.ask(&lab.host, "stop");
                    // Nobody hears of it before it is over.
                    (said, before.diff(&Dump::take(&lab.host)))
                };
                let asking: Vec<_> = (0..6).map(|_| scope.spawn(ask)).collect();
                asking.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
            });
            for (said, changed) in heard {
                // One that came when all was over found nobody.
                let late = said.stderr.contains("no tunproxy answers on");
                assert!(late || said.succeeded() && said.stdout.contains("\"ok\": true"), "{said:?}");
                assert!(said.stderr.is_empty() || late, "{said:?}");
                assert_eq!(changed, "");
            }
            assert!(tunproxy.wait().success());
        }
    });
}

#[test]
fn who_asks_a_suspended_run_is_told_at_once_that_it_is_and_how_it_goes_on() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let before = Dump::take(&lab.host);
        let tunproxy = profile().start(&lab.host);
        let place = tunproxy.place().clone();
        tunproxy.freeze();
        let go_on = format!("kill -CONT {}", tunproxy.pid());
        let started = Instant::now();
        let asked = ["status", "stop", "cleanup"].map(|word| place.ask(&lab.host, word));
        let started_again = Said::of(&mut place.run_command(&lab.host));
        for said in asked.iter().chain([&started_again, &place.look(&lab.host, "plan", &[])]) {
            let told = said.stdout.clone() + &said.stderr;
            assert!(said.code == Some(1) && told.contains("suspended") && told.contains(&go_on), "{said:?}");
        }
        assert!(started.elapsed() < PATIENCE, "nobody has waited for an answer: {:?}", started.elapsed());
        let examined = place.look(&lab.host, "doctor", &[]);
        assert!(examined.stdout.contains("suspended") && examined.stdout.contains(&go_on), "{examined:?}");
        assert!(!examined.stdout.contains("has only just begun"), "{examined:?}");
        tunproxy.signal(Signal::SIGCONT);
        // None of those who asked for an end while it was suspended has brought it about.
        tunproxy.assert_carries(&lab.host);
        assert!(place.ask(&lab.host, "stop").succeeded());
        assert!(tunproxy.wait().success());
        before.assert_same(&Dump::take(&lab.host));
    });
}

#[test]
fn a_clean_up_or_a_start_right_after_a_kill_waits_for_the_dying() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let before = Dump::take(&lab.host);
        let place = profile();
        for _ in 0..5 {
            let tunproxy = place.start(&lab.host);
            tunproxy.signal(Signal::SIGKILL);
            let said = place.ask(&lab.host, "cleanup");
            assert!(said.succeeded(), "{said:?}");
            before.assert_same(&Dump::take(&lab.host));
            let tunproxy = place.start(&lab.host);
            tunproxy.signal(Signal::SIGKILL);
            let next = place.try_start(&lab.host).unwrap_or_else(|said| panic!("{said}"));
            next.assert_carries(&lab.host);
            // One that is well and alive is not in its way to die.
            let said = place.ask(&lab.host, "cleanup");
            assert!(said.code == Some(1) && said.stderr.contains("another run (process"), "{said:?}");
            assert!(next.stop().success());
            before.assert_same(&Dump::take(&lab.host));
        }
    });
}

#[test]
fn only_root_and_the_user_who_runs_it_may_ask() {
    run(&["setpriv", TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let tunproxy = profile().start(&lab.host);
        let socket = tunproxy.place().state.join("control.sock");
        assert_eq!(fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);
        let stranger = |word: &str| {
            let mut command = lab.host.command("setpriv");
            command.args(["--reuid=12345", "--regid=12345", "--clear-groups"]).arg(binary());
            Said::of(command.arg(word).arg("--state-dir").arg(&tunproxy.place().state))
        };
        let said = stranger("stop");
        assert_eq!(said.code, Some(1), "{said:?}");
        assert!(said.stderr.contains("ermission denied"), "{said:?}");
        // Doors left open by an administrator do not let a stranger in either.
        fs::set_permissions(&socket, fs::Permissions::from_mode(0o666)).unwrap();
        fs::set_permissions(&tunproxy.place().state, fs::Permissions::from_mode(0o755)).unwrap();
        for word in ["stop", "status"] {
            let said = stranger(word);
            assert_eq!(said.code, Some(1), "{said:?}");
            assert!((said.stdout + &said.stderr).contains("only root and the user"), "{word}");
        }
        tunproxy.assert_carries(&lab.host);
        assert!(tunproxy.stop().success());
    });
}

#[test]
fn a_signal_while_it_starts_leaves_the_host_as_it_was() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let before = Dump::take(&lab.host);
        // Wherever in the start the signal comes: each time a little later, until it is ready first.
        for delay in (0..).map(|step| Duration::from_millis(3 * step)) {
            let mut program = Program::start("tunproxy", profile().run_command(&lab.host));
            let ready = program.wait_at_most(delay, |line| line.starts_with("tunproxy ready")).is_some();
            program.signal(Signal::SIGTERM);
            let status = program.wait();
            // Before it is listening for signals they kill it, and then it has changed nothing.
            assert!(status.success() || status.code().is_none(), "{status}: {}", program.output());
            before.assert_same(&Dump::take(&lab.host));
            if ready {
                assert!(status.success(), "{status}");
                break;
            }
        }
    });
}

#[test]
fn a_device_that_is_taken_away_ends_the_run_in_words_and_puts_the_host_back() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let before = Dump::take(&lab.host);
        let tunproxy = profile().start(&lab.host);
        tunproxy.assert_carries(&lab.host);
        assert!(!tunproxy.output().contains("WARN"), "nothing to warn of: {}", tunproxy.output());
        let ((), line) = tunproxy.line_after(|| drop(lab.host.ip("link del tunproxy0")), &["TUN", "gone"]);
        assert!(line.contains("another program has deleted") && line.contains("the host is as it was"), "{line}");
        let said = tunproxy.output();
        assert!(!said.contains("ERROR") && !said.contains("stopping"), "one line says it all: {said}");
        assert_eq!(tunproxy.wait().code(), Some(1));
        before.assert_same(&Dump::take(&lab.host));
    });
}

#[test]
fn a_connection_may_ask_for_long_and_a_line_may_not_be_endless() {
    run(&[], || {
        let lab = Topology::desktop();
        let tunproxy = Place::new("mixed-port: 7890\nrules: ['MATCH,DIRECT']\n").start(&lab.host);
        let socket = tunproxy.place().state.join("control.sock");
        let stream = UnixStream::connect(&socket).unwrap();
        let mut answers = BufReader::new(&stream).lines();
        // More than the longest line, in many short ones.
        for _ in 0..5000 {
            (&stream).write_all(b"{\"command\":\"ping\"}\n").unwrap();
            let answer = answers.next().expect("an answer").unwrap();
            assert!(answer.contains("\"ok\":true"), "{answer}");
        }
        (&stream).write_all(b"nonsense\n").unwrap();
        assert!(answers.next().unwrap().unwrap().contains("not a command"));
        (&stream).write_all(&[b'x'; 64 << 10]).unwrap();
        assert!(answers.next().unwrap().unwrap().contains("longer than"));
        assert!(answers.next().is_none(), "it was closed");
        assert!(tunproxy.stop().success());
    });
}
