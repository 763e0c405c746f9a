//! /etc/resolv.conf in its many shapes: a start makes names work, and a stop or a clean-up leaves the file as it was.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::Signal;

use super::support::client::act_in;
use super::support::program::PATIENCE;
use super::support::sites::NAME;
use super::support::tunproxy::{Place, Said, Tunproxy};
use super::support::world::{own_etc, poll_until};
use super::support::{Dump, Sites, Topology, run};

const TUN: &str = "/dev/net/tun";
/// What tunproxy writes where it has to.
const OURS: &str = "nameserver 198.18.0.2\n";
const FILE: &str = "/etc/resolv.conf";

fn desktop() -> Place {
    Place::new(
        "ipv6: true\ntun: { enable: true }\n\
         dns: { enable: true, enhanced-mode: fake-ip, nameserver: [192.168.1.1] }\nrules: ['MATCH,DIRECT']\n",
    )
}

fn sh(script: &str) -> String {
    let said = Said::of(Command::new("sh").args(["-euc", script]));
    assert!(said.succeeded(), "{script}: {said:?}");
    said.stdout
}

/// All of the host, and what else can be said of the file: its mode, its owner, its neighbours.
fn state(lab: &Topology) -> (Dump, String) {
    let about =
        "stat -c '%F %A %u %g' /etc/resolv.conf 2>/dev/null || true; ls /etc; cat /run/res/* 2>/dev/null || true";
    (Dump::take(&lab.host), sh(about))
}

#[track_caller]
fn assert_as_before(shape: &str, before: &(Dump, String), lab: &Topology) {
    let after = state(lab);
    assert_eq!(before.0.diff(&after.0), "", "{shape}");
    assert_eq!(before.1, after.1, "{shape}");
}

/// Shapes that have to be rewritten, by what makes them.
const REWRITTEN: [&str; 7] = [
    "rm -f /etc/resolv.conf",
    "rm -f /etc/resolv.conf; printf 'search lan\\nnameserver fe80::1%%eth0' > /etc/resolv.conf; chmod 640 /etc/resolv.conf",
    "rm -f /etc/resolv.conf; : > /etc/resolv.conf",
    "echo '# none' > /run/res/stub; rm -f /etc/resolv.conf; ln -s ../run/res/stub /etc/resolv.conf",
    "rm -f /etc/resolv.conf; ln -s /run/res/not-there /etc/resolv.conf",
    "rm -f /etc/resolv.conf; ln -s resolv.conf /etc/resolv.conf",
    "rm -f /etc/resolv.conf; : > /etc/resolv.conf; echo '# mine' > /run/res/mount; mount --bind /run/res/mount /etc/resolv.conf",
];

#[test]
fn each_shape_comes_back_at_a_stop_and_after_a_crash() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        own_etc("");
        sh("mkdir /run/res");
        for shape in REWRITTEN {
            sh(shape);
            let (place, before) = (desktop(), state(&lab));
            let tunproxy = place.start(&lab.host);
            assert!(fs::read_to_string(FILE).unwrap().contains(OURS), "{shape}");
            assert_eq!(act_in(&lab.host, &format!("ask {NAME}:7 x")), Ok("x".to_owned()), "{shape}");
            assert!(tunproxy.stop().success());
            assert_as_before(shape, &before, &lab);

            let place = place.start(&lab.host).kill();
            assert!(fs::read_to_string(FILE).unwrap().contains(OURS), "{shape}");
            place.clean_up(&lab.host);
            assert_as_before(shape, &before, &lab);

            let tunproxy = place.start(&lab.host).kill().start(&lab.host);
            assert_eq!(act_in(&lab.host, &format!("ask {NAME}:7 x")), Ok("x".to_owned()), "{shape}");
            assert!(tunproxy.stop().success());
            assert_as_before(shape, &before, &lab);
        }
        sh("umount /etc/resolv.conf");
    });
}

/// What a start would do to the file, and what would undo it.
fn planned(place: &Place, lab: &Topology) -> Option<serde_json::Value> {
    let said = place.look(&lab.host, "plan", &["--format", "json"]);
    assert!(said.succeeded(), "{said:?}");
    let plan: serde_json::Value = serde_json::from_str(&said.stdout).expect("a plan");
    plan["groups"].as_array().expect("groups").iter().find(|group| group["title"] == "the resolver").cloned()
}

#[test]
fn after_a_crash_a_plan_takes_the_file_for_what_it_will_be_when_ours_is_gone() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        own_etc("");
        sh("mkdir /run/res");
        for shape in REWRITTEN {
            sh(shape);
            let place = desktop();
            let before = planned(&place, &lab);
            assert!(before.is_some(), "{shape}");
            let place = place.start(&lab.host).kill();
            assert!(fs::read_to_string(FILE).unwrap().contains(OURS), "{shape}");
            assert_eq!(planned(&place, &lab), before, "{shape}");
            // Whoever has replaced it since has the last word.
            let theirs = fs::read_to_string(FILE).unwrap();
            fs::write(FILE, "nameserver 192.168.1.1\n").unwrap();
            assert_eq!(planned(&place, &lab), None, "{shape}");
            fs::write(FILE, theirs).unwrap();
            place.clean_up(&lab.host);
        }
        sh("umount /etc/resolv.conf");
    });
}

#[test]
fn ordinary_nameservers_stay_whatever_shape_holds_them() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        own_etc("");
        sh("mkdir /run/res; echo 'nameserver 192.168.1.1' > /run/res/stub");
        for shape in [
            "echo 'nameserver 192.168.1.1' > /etc/resolv.conf",
            "ln -sf ../run/res/stub /etc/resolv.conf",
            "rm /etc/resolv.conf; : > /etc/resolv.conf; mount --bind -o ro /run/res/stub /etc/resolv.conf",
        ] {
            sh(shape);
            let before = state(&lab);
            let tunproxy = desktop().start(&lab.host);
            assert_eq!(sh("cat /etc/resolv.conf"), "nameserver 192.168.1.1\n", "{shape}");
            assert_eq!(act_in(&lab.host, &format!("ask {NAME}:7 x")), Ok("x".to_owned()), "{shape}");
            assert!(tunproxy.stop().success());
            assert_as_before(shape, &before, &lab);
        }
        sh("umount /etc/resolv.conf");
    });
}

#[test]
fn a_file_that_cannot_be_written_costs_a_warning_and_nothing_else() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        own_etc("");
        sh("mkdir /run/res; echo 'search lan' > /run/res/mount");
        for (shape, undo) in [
            (
                "mount --bind /run/res/mount /etc/resolv.conf; mount -o remount,bind,ro /etc/resolv.conf",
                "umount /etc/resolv.conf",
            ),
            ("mount -o remount,bind,ro /etc", "mount -o remount,bind,rw /etc"),
            ("chattr +i /etc/resolv.conf", "chattr -i /etc/resolv.conf"),
        ] {
            // Not every file system knows that attribute, and none lets a user namespace set it.
            if !Said::of(Command::new("sh").args(["-euc", shape])).succeeded() {
                assert!(shape.starts_with("chattr"), "{shape}");
                continue;
            }
            let (place, before) = (desktop(), state(&lab));
            let tunproxy = place.start(&lab.host);
            tunproxy.line("rewrite /etc/resolv.conf");
            tunproxy.assert_carries(&lab.host);
            assert!(tunproxy.stop().success());
            assert_as_before(shape, &before, &lab);
            let place = place.start(&lab.host).kill();
            place.clean_up(&lab.host);
            assert_as_before(shape, &before, &lab);
            sh(undo);
        }
    });
}

#[test]
fn what_somebody_put_there_while_we_ran_stays() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        own_etc("");
        sh("mkdir /run/res; echo 'nameserver 192.168.1.1' > /run/res/stub");
        for replaced in [
            "echo 'nameserver 192.168.1.1' > /etc/new; mv /etc/new /etc/resolv.conf",
            "echo 'nameserver 192.168.1.1' > /etc/resolv.conf",
            "ln -sf /run/res/stub /etc/resolv.conf",
        ] {
            for crash in [false, true] {
                sh("rm -f /etc/resolv.conf; echo 'search lan' > /etc/resolv.conf");
                let tunproxy = desktop().start(&lab.host);
                assert!(fs::read_to_string(FILE).unwrap().contains(OURS));
                if crash {
                    // It would see the change, and have nothing to leave by the time it is killed.
                    tunproxy.signal(Signal::SIGSTOP);
                }
                sh(replaced);
                let theirs = sh("stat -c '%F %i' /etc/resolv.conf; cat /etc/resolv.conf");
                if crash {
                    let said = tunproxy.kill().clean_up(&lab.host);
                    assert!(said.contains("left, because it was changed since"), "{said}");
                } else {
                    assert!(tunproxy.stop().success());
                }
                assert_eq!(sh("stat -c '%F %i' /etc/resolv.conf; cat /etc/resolv.conf"), theirs, "{replaced}");
            }
        }
    });
}

/// A start for which a disk takes its time, and what somebody does to the file before what we write has got there.
fn overtaken_by<T>(lab: &Topology, act: impl FnOnce() -> T + Send) -> (Tunproxy, T)
where
    T: Send,
{
    let (place, mut slow) = (desktop(), lab.host.command("strace"));
    let command = place.run_command(&lab.host);
    slow.args(["-f", "-qq", "-o", "/dev/null", "-e", "trace=fsync", "-e", "inject=fsync:delay_enter=300000"]);
    slow.arg(command.get_program()).args(command.get_args());
    std::thread::scope(|scope| {
        let meanwhile = scope.spawn(|| {
            let ours = Path::new("/etc/resolv.conf.tunproxy-new");
            poll_until(PATIENCE, || ours.exists().then_some(())).expect("what we write");
            act()
        });
        let tunproxy = place.try_start_by(slow).unwrap_or_else(|said| panic!("{said}"));
        tunproxy.line("somebody has replaced it at the same moment");
        (tunproxy, meanwhile.join().expect("whoever was faster"))
    })
}

/// What was started is strace, which ends with the run.
fn stop(tunproxy: Tunproxy, lab: &Topology) {
    assert!(tunproxy.place().ask(&lab.host, "stop").succeeded());
    assert!(tunproxy.wait().success());
}

#[test]
fn whoever_has_replaced_the_file_in_the_moment_of_our_start_is_followed() {
    run(&[TUN, "strace"], || {
        let lab = Topology::desktop();
        own_etc("nameserver fe80::1%eth0\n");
        let theirs = "search theirs\nnameserver fe80::2%eth0\n";
        let (tunproxy, ()) = overtaken_by(&lab, || {
            fs::write("/etc/new", theirs).expect("a file");
            fs::rename("/etc/new", FILE).expect("a file in its place");
        });
        let rewritten = || {
            let text = fs::read_to_string(FILE).unwrap_or_default();
            (text.contains(OURS) && text.contains("search theirs")).then_some(())
        };
        assert!(poll_until(PATIENCE, rewritten).is_some(), "{}", tunproxy.output());
        stop(tunproxy, &lab);
        assert_eq!(fs::read_to_string(FILE).unwrap(), theirs);
    });
}

#[test]
fn what_somebody_begins_to_write_in_the_moment_of_our_start_stays_however_long_it_takes_them() {
    run(&[TUN, "strace"], || {
        let lab = Topology::desktop();
        own_etc("nameserver fe80::1%eth0\n");
        let (tunproxy, mut theirs) = overtaken_by(&lab, || File::create(FILE).expect("an empty file"));
        // Longer than an empty file is taken for one that somebody has just begun.
        std::thread::sleep(Duration::from_millis(900));
        theirs.write_all(b"nameserver 192.168.1.1\n").unwrap();
        drop(theirs);
        assert_eq!(fs::read_to_string(FILE).unwrap(), "nameserver 192.168.1.1\n", "{}", tunproxy.output());
        stop(tunproxy, &lab);
        assert_eq!(fs::read_to_string(FILE).unwrap(), "nameserver 192.168.1.1\n");
    });
}
