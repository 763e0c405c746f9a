//! What the program tells whoever asks in the wrong place, as the wrong user, or too late.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use super::support::tunproxy::{Place, Said, binary};
use super::support::world::fresh_dir;
use super::support::{Dump, Netns, Topology, run};

const TUN: &str = "/dev/net/tun";
const DESKTOP: &str = "tun: { enable: true }\ndns: { enable: true, enhanced-mode: fake-ip, nameserver: [192.168.1.1] }\n\
                       rules: ['MATCH,DIRECT']\n";

fn closing() -> Place {
    Place::new(&DESKTOP.replace("enable: true }\ndns", "enable: true, kill-switch: true }\ndns"))
}

fn told(said: &Said) -> String {
    said.stdout.clone() + &said.stderr
}

/// `tunproxy` as an ordinary user whose home is `home`.
fn by_anybody(ns: &Netns, home: &Path, args: &[&str]) -> Said {
    let mut command = ns.command("setpriv");
    command.args(["--reuid=12345", "--regid=12345", "--clear-groups"]).arg(binary()).args(args);
    Said::of(command.env("HOME", home).env_remove("XDG_STATE_HOME"))
}

#[test]
fn a_kill_switch_that_another_directory_knows_of_is_told_wherever_somebody_asks() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let place = closing();
        let other = Place::new(DESKTOP);
        let words = ["status", "stop", "cleanup"];
        let tunproxy = place.start(&lab.host);
        for word in words {
            let said = other.ask(&lab.host, word);
            assert!(!told(&said).contains("kill switch"), "somebody stands behind it: {said:?}");
        }
        let place = tunproxy.kill();
        for word in words {
            let said = other.ask(&lab.host, word);
            assert_eq!(said.code, Some(1), "{said:?}");
            let told = told(&said);
            assert!(
                told.contains("kill switch of a run that has ended is closed (firewall table inet tunproxy)"),
                "{told}"
            );
            assert!(told.contains("sudo tunproxy cleanup --state-dir DIR"), "{told}");
            assert!(told.contains("docs/host-changes.md"), "{told}");
        }
        other.rewrite("rules: [");
        let failed = other.try_start(&lab.host).err().expect("a profile with errors");
        assert!(failed.contains("kill switch of a run that has ended is closed"), "{failed}");
        // Whoever has the right directory is given the very command.
        let command = format!("`sudo tunproxy cleanup --state-dir {}`", place.state.display());
        let said = place.ask(&lab.host, "status");
        assert!(said.stderr.contains(&command), "{said:?}");
        let found = place.look(&lab.host, "doctor", &[]);
        assert!(found.stdout.contains(&command), "{found:?}");
        assert!(place.clean_up(&lab.host).contains("the host is as it was"));
        assert!(!told(&other.ask(&lab.host, "cleanup")).contains("kill switch"));
    });
}

#[test]
fn who_may_not_see_what_root_has_left_is_told_so_and_never_that_all_is_well() {
    run(&["setpriv", TUN], || {
        let lab = Topology::desktop();
        // The machine's own is none of our business.
        assert!(Said::of(Command::new("mount").args(["-t", "tmpfs", "none", "/var/lib"])).succeeded());
        let root = Place { state: "/var/lib/tunproxy".into(), ..Place::new(DESKTOP) };
        let home = fresh_dir("home");
        let before = Dump::take(&lab.host);
        let nothing = by_anybody(&lab.host, &home, &["cleanup"]);
        assert!(nothing.succeeded() && nothing.stdout.contains("nothing to undo"), "{nothing:?}");
        let root = root.start(&lab.host).kill();
        let left = Dump::take(&lab.host);
        let said = by_anybody(&lab.host, &home, &["cleanup"]);
        assert_eq!(said.code, Some(1), "{said:?}");
        assert!(said.stderr.contains("sudo tunproxy cleanup") && said.stderr.contains("/var/lib/tunproxy"), "{said:?}");
        let said = by_anybody(&lab.host, &home, &["cleanup", "--state-dir", "/var/lib/tunproxy"]);
        assert_eq!(said.code, Some(1), "{said:?}");
        assert!(said.stderr.contains("belongs to uid 0") && said.stderr.contains("Run it with sudo"), "{said:?}");
        let own = format!("{}/state", home.display());
        assert!(by_anybody(&lab.host, &home, &["cleanup", "--state-dir", &own]).succeeded(), "that was not asked");
        let said = by_anybody(&lab.host, &home, &["plan", "--profile", &root.profile.display().to_string()]);
        assert_eq!(said.code, Some(3), "{said:?}");
        assert!(said.stdout.contains("not seen: whether root runs tunproxy"), "{said:?}");
        let said = by_anybody(&lab.host, &home, &["doctor"]);
        assert!(said.stdout.contains("unseen   a tunproxy that root runs, or what it has left"), "{said:?}");
        assert!(!said.stdout.contains("no earlier run has left anything"), "{said:?}");
        assert!(!said.stdout.contains("state directory are in order"), "nobody has looked: {said:?}");
        assert!(said.stdout.contains("warning  this user cannot start a run with a TUN"), "{said:?}");
        left.assert_same(&Dump::take(&lab.host));
        root.clean_up(&lab.host);
        before.assert_same(&Dump::take(&lab.host));
    });
}

#[test]
fn a_directory_that_cannot_be_written_to_is_told_with_what_to_do() {
    run(&["setpriv"], || {
        let ns = Netns::new("alone");
        let place = Place::new("mixed-port: 7890\nrules: ['MATCH,DIRECT']\n");
        let mount = |options: &str| {
            let dir = fresh_dir("mounted");
            let said = Said::of(Command::new("mount").args(["-t", "tmpfs", "-o", options, "none"]).arg(&dir));
            assert!(said.succeeded(), "{said:?}");
            dir
        };
        let file = fresh_dir("plain").join("file");
        fs::write(&file, "").unwrap();
        let (closed, tiny) = (mount("ro"), mount("size=4k,nr_inodes=1"));
        for (state, words) in [
            (closed.clone(), "Read-only file system (os error 30); make it writable again"),
            (closed.join("below"), "Read-only file system (os error 30); make it writable again"),
            (tiny, "No space left on device (os error 28); make room there"),
            (file.clone(), "name a directory with --state-dir"),
            (file.join("below"), "name a directory with --state-dir"),
        ] {
            let place = Place { state, ..place.clone() };
            let failed = place.try_start(&ns).err().unwrap_or_else(|| panic!("{words}"));
            assert!(failed.contains(words), "{failed}");
            for word in ["status", "stop"] {
                let said = place.ask(&ns, word);
                assert!(said.code == Some(1) && said.stderr.contains("no tunproxy answers on"), "{said:?}");
            }
        }
        let profile = place.profile.display().to_string();
        let said = by_anybody(&ns, Path::new("/nonexistent"), &["--profile", &profile]);
        assert_eq!(said.code, Some(1), "{said:?}");
        assert!(said.stderr.contains("name a directory that this user may write to with --state-dir"), "{said:?}");
        let said = by_anybody(&ns, Path::new("/nonexistent"), &["cleanup"]);
        assert!(!said.stderr.contains("create"), "nothing has to be made to find nothing: {said:?}");
    });
}

#[test]
fn a_crash_that_filled_the_disk_can_be_cleaned_up_after() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let before = Dump::take(&lab.host);
        let state = fresh_dir("small");
        let said = Said::of(Command::new("mount").args(["-t", "tmpfs", "-o", "size=64k", "none"]).arg(&state));
        assert!(said.succeeded(), "{said:?}");
        let place = Place { state: state.clone(), ..closing() }.start(&lab.host).kill();
        let _ = fs::write(state.join("fill"), vec![1; 64 << 10]);
        assert!(fs::write(state.join("more"), "x").is_err(), "the disk is full");
        let said = place.clean_up(&lab.host);
        assert!(said.contains("the host is as it was"), "{said}");
        before.assert_same(&Dump::take(&lab.host));
    });
}

#[test]
fn a_run_that_was_killed_leaves_a_socket_that_says_so() {
    run(&[], || {
        let ns = Netns::new("alone");
        let place = Place::new("mixed-port: 7890\nrules: ['MATCH,DIRECT']\n").start(&ns).kill();
        for word in ["status", "stop"] {
            let said = place.ask(&ns, word);
            assert!(
                said.code == Some(1) && said.stderr.contains("was killed: `tunproxy cleanup --state-dir"),
                "{said:?}"
            );
        }
        assert!(place.start(&ns).stop().success());
    });
}

#[test]
fn a_plan_needs_no_profile_where_there_is_a_run() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let place = Place::new(DESKTOP);
        let nobody = place.ask(&lab.host, "plan");
        assert_eq!((nobody.code, nobody.stdout.as_str()), (Some(1), ""), "{nobody:?}");
        assert!(
            nobody.stderr.contains("--profile FILE") && nobody.stderr.contains("no tunproxy answers"),
            "{nobody:?}"
        );
        let tunproxy = place.start(&lab.host);
        let without = place.ask(&lab.host, "plan");
        assert!(without.succeeded() && without.stdout.contains("has changed on this host"), "{without:?}");
        // With one it is the same, and said that the file was not looked at.
        let with = place.look(&lab.host, "plan", &[]).stdout;
        assert!(with.starts_with(&without.stdout) && with.contains("was not looked at"), "{with}");
        assert!(tunproxy.stop().success());
    });
}

#[test]
fn the_last_word_of_a_stop_is_that_the_host_is_as_it_was() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        for place in [Place::new(DESKTOP), closing()] {
            let tunproxy = place.start(&lab.host);
            let (said, line) = tunproxy.line_after(|| place.ask(&lab.host, "stop"), &["the host is as it was"]);
            assert!(said.succeeded(), "{said:?}");
            let many = line.split_once("as it was: ").and_then(|(_, rest)| rest.split(' ').next()?.parse::<u32>().ok());
            assert!(many.is_some_and(|many| many > 30), "{line}");
            assert!(tunproxy.wait().success());
        }
    });
}

/// The names of all fields.
fn fields(value: &Value, found: &mut BTreeSet<String>) {
    for (name, value) in value.as_object().into_iter().flatten() {
        found.insert(name.clone());
        fields(value, found);
    }
}

#[test]
fn every_field_of_status_is_documented_and_no_other() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let place = Place::new(&format!("memory-limit: 64MB\n{DESKTOP}"));
        let tunproxy = place.start(&lab.host);
        let said = place.ask(&lab.host, "status");
        let status: Value = serde_json::from_str(&said.stdout).unwrap_or_else(|error| panic!("{error}: {said:?}"));
        assert_eq!(status["memory_limit"], 64 << 20);
        assert_eq!(status["kill_switch"], "off");
        assert!(tunproxy.stop().success());
        let place = closing();
        let tunproxy = place.start(&lab.host);
        assert!(place.ask(&lab.host, "status").stdout.contains("\"kill_switch\": \"closed\""));
        assert!(tunproxy.stop().success());
        let mut answered = BTreeSet::new();
        fields(&status, &mut answered);
        let page = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/control.md")).unwrap();
        let section = page.split("\n## status").nth(1).and_then(|rest| rest.split("\n## ").next()).unwrap();
        let cells = section.lines().filter_map(|line| line.strip_prefix("| `")?.split(" |").next());
        let mut documented: BTreeSet<String> =
            cells.flat_map(|cell| cell.split('`').step_by(2).map(str::to_owned).collect::<Vec<_>>()).collect();
        for section in ["flows", "packets", "dns"] {
            assert!(page.contains(&format!("\n`{section}`: ")), "{section}");
            documented.insert(section.to_owned());
        }
        assert_eq!(answered, documented);
    });
}

#[test]
fn wrong_arguments_end_with_two_whatever_the_command() {
    run(&[], || {
        let ns = Netns::new("alone");
        for word in ["check", "plan", "doctor", "exec", "demo", "cleanup", "status", "stop", "completions", "man"] {
            let said = Said::of(ns.command(binary()).args([word, "--no-such-option"]));
            assert_eq!(said.code, Some(2), "{word}: {said:?}");
        }
        let help = Said::of(ns.command(binary()).arg("--help"));
        assert!(help.stdout.contains("Exit codes:"), "{help:?}");
    });
}
