//! What whoever starts us has had ignored or blocked: `nohup`, a shell's job in the background, a careless parent.

use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::sys::signal::{SigHandler, SigSet, Signal};

use super::support::program::Program;
use super::support::sites::V4;
use super::support::tunproxy::{Place, Said};
use super::support::{Dump, Topology, client, run};

const TUN: &str = "/dev/net/tun";

fn profile() -> Place {
    Place::new(
        "mode: rule\nipv6: true\nlog-level: info\ntun: { enable: true }\n\
         dns: { enable: true, enhanced-mode: fake-ip, nameserver: [192.168.1.1] }\nrules: ['MATCH,REJECT']\n",
    )
}

/// Starts what `command` starts with these signals ignored and blocked.
fn with(mut command: Command, ignored: &'static [Signal], blocked: &'static [Signal]) -> Command {
    // SAFETY: between fork and exec only system calls are made.
    unsafe {
        command.pre_exec(move || {
            for signal in ignored {
                nix::sys::signal::signal(*signal, SigHandler::SigIgn)?;
            }
            Ok(blocked.iter().copied().collect::<SigSet>().thread_block()?)
        });
    }
    command
}

/// The signals of a line of proc_pid_status(5): `SigIgn:` and a hexadecimal mask.
fn signals(status: &str, name: &str) -> u64 {
    let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_else(|| panic!("{name}: {status}"));
    u64::from_str_radix(line.trim(), 16).expect("a mask")
}

fn bits(signals: &[Signal]) -> u64 {
    signals.iter().fold(0, |bits, signal| bits | 1 << (*signal as u32 - 1))
}

#[test]
fn a_command_inherits_what_the_parent_of_exec_had_ignored_and_blocked() {
    run(&[], || {
        let lab = Topology::desktop();
        let place = profile();
        const ALL: &[Signal] = &[Signal::SIGCHLD, Signal::SIGINT, Signal::SIGHUP, Signal::SIGTERM];
        for (ignored, blocked) in [(&[][..], &[][..]), (ALL, &[]), (&[], ALL), (&[Signal::SIGCHLD], &[Signal::SIGTERM])]
        {
            let mut bare = lab.host.command("grep");
            bare.args(["^Sig", "/proc/self/status"]);
            let mut wrapped = place.exec_command(&lab.host, &["--log-level", "silent"]);
            wrapped.args(["grep", "^Sig", "/proc/self/status"]);
            let [bare, wrapped] = [bare, wrapped].map(|command| Said::of(&mut with(command, ignored, blocked)));
            assert!(wrapped.succeeded(), "{wrapped:?}");
            for name in ["SigIgn:", "SigBlk:"] {
                assert_eq!(signals(&wrapped.stdout, name), signals(&bare.stdout, name), "{name} {wrapped:?} {bare:?}");
            }
            assert_eq!(signals(&wrapped.stdout, "SigIgn:") & bits(ALL), bits(ignored), "{wrapped:?}");
            assert_eq!(signals(&wrapped.stdout, "SigBlk:") & bits(ALL), bits(blocked), "{wrapped:?}");
        }
    });
}

#[test]
fn exec_sees_the_end_of_its_command_whatever_its_parent_ignored_or_blocked() {
    run(&[], || {
        let lab = Topology::desktop();
        let place = profile();
        const END: &[Signal] = &[Signal::SIGCHLD];
        for (ignored, blocked) in [(END, &[][..]), (&[], END), (END, END)] {
            let mut command = place.exec_command(&lab.host, &[]);
            command.args(["sh", "-c", "exit 7"]);
            let mut program = Program::start("exec", with(command, ignored, blocked));
            assert_eq!(program.wait().code(), Some(7), "{}", program.output());
        }
    });
}

#[test]
fn a_command_that_ignores_an_interrupt_is_ended_by_what_it_does_not_ignore() {
    run(&[], || {
        let lab = Topology::desktop();
        let mut command = profile().exec_command(&lab.host, &[]);
        command.args(["sh", "-c", "echo there; exec sleep 1000"]);
        let mut program = Program::start("exec", with(command, &[Signal::SIGINT, Signal::SIGHUP], &[]));
        program.wait_for(|line| line == "there").unwrap();
        for signal in [Signal::SIGINT, Signal::SIGHUP, Signal::SIGTERM] {
            program.signal(signal);
        }
        assert_eq!(program.wait().code(), Some(128 + Signal::SIGTERM as i32), "{}", program.output());
    });
}

#[test]
fn a_run_keeps_its_firewall_whose_end_nobody_wanted_to_hear_of() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let before = Dump::take(&lab.host);
        let place = profile();
        for (ignored, blocked) in [(&[Signal::SIGCHLD][..], &[][..]), (&[], &[Signal::SIGCHLD])] {
            let mut program = Program::start("tunproxy", with(place.run_command(&lab.host), ignored, blocked));
            program.wait_for(|line| line.starts_with("tunproxy ready")).unwrap();
            assert!(lab.host.nft("list ruleset").contains("table inet tunproxy"), "{}", program.output());
            assert!(!program.output().contains("WARN"), "{}", program.output());
            program.signal(Signal::SIGTERM);
            assert!(program.wait().success(), "{}", program.output());
            before.assert_same(&Dump::take(&lab.host));
        }
    });
}

#[test]
fn a_run_in_the_background_ignores_the_keyboard_and_heeds_who_wants_its_end() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let before = Dump::take(&lab.host);
        let place = profile();
        let mut program = Program::start(
            "tunproxy",
            with(place.run_command(&lab.host), &[Signal::SIGINT, Signal::SIGHUP, Signal::SIGTERM], &[]),
        );
        program.wait_for(|line| line.starts_with("tunproxy ready")).unwrap();
        program.signal(Signal::SIGINT);
        program.signal(Signal::SIGHUP);
        // It still carries, and nothing was said of a reload.
        let refused = client::act_in(&lab.host, &format!("connect {V4}:80"));
        assert_eq!(refused, Err("ECONNREFUSED".to_owned()), "{}", program.output());
        assert!(place.ask(&lab.host, "status").succeeded(), "{}", program.output());
        program.signal(Signal::SIGTERM);
        assert!(program.wait().success(), "{}", program.output());
        assert!(!program.output().contains("reload"), "{}", program.output());
        before.assert_same(&Dump::take(&lab.host));
    });
}

#[test]
fn a_run_passes_over_every_signal_that_means_nothing_to_it_and_none_reaches_its_children() {
    const MEANINGLESS: [&str; 12] =
        ["USR1", "USR2", "ALRM", "VTALRM", "PROF", "IO", "PWR", "STKFLT", "XCPU", "XFSZ", "34", "64"];
    run(&[TUN], || {
        let lab = Topology::desktop();
        let before = Dump::take(&lab.host);
        let place = profile();
        let mut command = place.run_command(&lab.host);
        command.args(["--log-level", "debug"]);
        let mut program = Program::start("tunproxy", command);
        program.wait_for(|line| line.starts_with("tunproxy ready")).unwrap();
        let pid = program.pid().to_string();
        for signal in MEANINGLESS {
            let from = program.line_count();
            lab.host.run("kill", &["-s", signal, &pid]);
            let told = program.wait_after(from, |line| line.contains("means nothing here"));
            assert!(told.is_ok(), "{signal}: {told:?}");
        }
        let refused = client::act_in(&lab.host, &format!("connect {V4}:80"));
        assert_eq!(refused, Err("ECONNREFUSED".to_owned()), "{}", program.output());
        // Its nft begins with the dispositions of every program.
        let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).expect("its children");
        let threads = std::fs::read_dir(format!("/proc/{pid}/task")).expect("its threads").flatten();
        let all = threads.map(|it| std::fs::read_to_string(it.path().join("children")).unwrap_or_default());
        let all: String = all.collect::<Vec<_>>().join(" ") + &children;
        let child = all.split_whitespace().next().unwrap_or_else(|| panic!("no nft: {}", program.output()));
        let status = std::fs::read_to_string(format!("/proc/{child}/status")).expect("its status");
        // Whoever runs the tests may ignore some, and so does every program that he starts.
        let own = std::fs::read_to_string("/proc/thread-self/status").expect("our status");
        let inherited = signals(&own, "SigIgn:") | bits(&[Signal::SIGPIPE]);
        assert_eq!(signals(&status, "SigIgn:") & !inherited, 0, "{status}");
        program.signal(Signal::SIGTERM);
        assert!(program.wait().success(), "{}", program.output());
        before.assert_same(&Dump::take(&lab.host));
    });
}

#[test]
fn a_run_hears_the_end_that_its_parent_had_blocked() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let before = Dump::take(&lab.host);
        for signal in [Signal::SIGTERM, Signal::SIGINT] {
            let command = with(profile().run_command(&lab.host), &[], &[Signal::SIGTERM, Signal::SIGINT]);
            let mut program = Program::start("tunproxy", command);
            program.wait_for(|line| line.starts_with("tunproxy ready")).unwrap();
            program.signal(signal);
            assert!(program.wait().success(), "{signal}: {}", program.output());
            before.assert_same(&Dump::take(&lab.host));
        }
    });
}
