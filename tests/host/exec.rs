//! `exec` as a wrapper of programs: signals, exit codes, limits, and what it leaves of the host's files.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::fs::symlink;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use super::support::client::act_in;
use super::support::program::{PATIENCE, Program};
use super::support::sites::{NAME, V4};
use super::support::tunproxy::{Place, Said};
use super::support::world::{self, own_etc};
use super::support::{Capture, Sites, Topology, run};

const PROFILE: &str = "
mode: rule
ipv6: true
log-level: info
dns: { enable: true, enhanced-mode: fake-ip, nameserver: [192.168.1.1] }
rules: ['MATCH,DIRECT']
";

#[test]
fn a_signal_reaches_the_command_and_its_end_is_told() {
    run(&[], || {
        let lab = Topology::desktop();
        let place = Place::new(PROFILE);
        for (signal, code) in
            [(Signal::SIGTERM, 143), (Signal::SIGINT, 130), (Signal::SIGHUP, 129), (Signal::SIGUSR1, 138)]
        {
            let mut command = place.exec_command(&lab.host, &[]);
            command.args(["sh", "-c", "echo there; exec sleep 1000"]);
            let mut program = Program::start("exec", command);
            program.wait_for(|line| line == "there").unwrap();
            program.signal(signal);
            assert_eq!(program.wait().code(), Some(code), "{signal}: {}", program.output());
        }
    });
}

/// A program in the foreground of a terminal of its own.
struct AtTerminal {
    keyboard: File,
    child: Child,
    lines: std::io::Lines<BufReader<std::process::ChildStdout>>,
}

impl AtTerminal {
    fn start(mut command: Command) -> Self {
        let (mut ours, mut theirs) = (-1, -1);
        let none = std::ptr::null_mut();
        // SAFETY: the call writes two descriptors; names and settings are left out.
        let opened = unsafe { libc::openpty(&raw mut ours, &raw mut theirs, none, none.cast(), none.cast()) };
        assert_eq!(opened, 0, "{}", std::io::Error::last_os_error());
        // SAFETY: both were opened just now, for us.
        let (ours, theirs) = unsafe { (OwnedFd::from_raw_fd(ours), OwnedFd::from_raw_fd(theirs)) };
        command.stdin(theirs).stdout(Stdio::piped()).stderr(Stdio::null());
        // SAFETY: two system calls, between fork and exec.
        unsafe {
            command.pre_exec(|| {
                nix::unistd::setsid()?;
                nix::errno::Errno::result(libc::ioctl(0, libc::TIOCSCTTY, 0))?;
                Ok(())
            });
        }
        let mut child = command.spawn().expect("a program");
        let lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        Self { keyboard: ours.into(), child, lines }
    }

    fn next(&mut self) -> String {
        self.lines.next().expect("another line").expect("text")
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().cast_signed()), signal).expect("a running program");
    }
}

impl Drop for AtTerminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn an_interrupt_reaches_a_command_in_the_foreground_whoever_sends_it() {
    run(&[], || {
        let lab = Topology::desktop();
        let mut command = Place::new(PROFILE).exec_command(&lab.host, &[]);
        let script = "trap 'echo interrupted' INT; trap 'echo quit' QUIT; trap 'exit 7' TERM
                      echo there; while :; do sleep 0.05; done";
        command.args(["sh", "-c", script]);
        let mut program = AtTerminal::start(command);
        assert_eq!(program.next(), "there");
        // Another process, at us alone.
        program.signal(Signal::SIGINT);
        assert_eq!(program.next(), "interrupted");
        program.signal(Signal::SIGQUIT);
        assert_eq!(program.next(), "quit");
        // The terminal, at all of the foreground.
        program.keyboard.write_all(b"\x03").unwrap();
        assert_eq!(program.next(), "interrupted");
        program.signal(Signal::SIGTERM);
        assert!(program.lines.next().is_none(), "each came once");
        assert_eq!(program.child.wait().unwrap().code(), Some(7));
    });
}

#[test]
fn a_command_that_does_not_run_is_told_once_with_the_code_of_a_shell() {
    run(&[], || {
        let lab = Topology::desktop();
        let place = Place::new(PROFILE);
        for (command, code) in [("no-such-command", 127), ("/etc/passwd", 126)] {
            let said = place.exec(&lab.host, command, &[]);
            assert_eq!(said.code, Some(code), "{said:?}");
            assert_eq!(said.stderr.matches(command).count(), 1, "{said:?}");
            let said = place.exec_with(&lab.host, &["--log-format", "json"], command, &[]);
            assert_eq!(said.code, Some(code), "{said:?}");
            let [line] = said.stderr.lines().collect::<Vec<_>>()[..] else { panic!("{said:?}") };
            let line: Value = serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
            assert!(line["message"].as_str().is_some_and(|message| message.contains(command)), "{line}");
        }
    });
}

#[test]
fn a_command_inherits_its_limits_and_no_descriptor_of_ours() {
    run(&[], || {
        let lab = Topology::desktop();
        let place = Place::new(PROFILE);
        let mut command = lab.host.command("sh");
        let exec = place.exec_command(&lab.host, &[]);
        // Reading a closed descriptor fails before anything is run.
        let look = "for fd in 3 4 5 6 7 8 9; do (: <&$fd) 2>/dev/null && echo open $fd; done
                    ulimit -n; grep 'open files' /proc/$PPID/limits; yes | head -1";
        // What whoever runs the tests left open is not ours.
        let bare = "ulimit -Sn 200; exec 3>&- 4>&- 5>&- 6>&- 7>&- 8>&- 9>&-; exec \"$@\"";
        command.args(["-c", bare, "sh"]).arg(exec.get_program()).args(exec.get_args());
        let said = Said::of(command.args(["sh", "-c", look]));
        let lines: Vec<&str> = said.stdout.lines().collect();
        let [own, ours, "y"] = lines[..] else { panic!("{said:?}") };
        assert_eq!(own, "200");
        let words: Vec<&str> = ours.split_whitespace().collect();
        assert_eq!(words[3], words[4], "the limit of the proxy is as high as it may be: {ours}");
        assert_ne!(words[3], "200", "{ours}");
        assert!(!said.stderr.contains("Broken pipe"), "a pipe that breaks ends a program quietly: {said:?}");
    });
}

#[test]
fn resolver_settings_of_every_shape_are_covered_and_never_written() {
    run(&[], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let place = Place::new(PROFILE);
        own_etc("");
        let file = Path::new("/etc/resolv.conf");
        let folder = Path::new("/run/there");
        fs::create_dir(folder).unwrap();
        fs::create_dir_all("/run/systemd/resolve").unwrap();
        let passwd = fs::read_to_string("/etc/passwd").unwrap();
        fs::remove_file(file).unwrap();
        for link in [
            None,
            Some("/run/there/stub"),
            Some("../run/nowhere/stub"),
            Some("resolv.conf"),
            Some("../run/systemd/resolve/stub-resolv.conf"),
        ] {
            if let Some(target) = link {
                symlink(target, file).unwrap();
            }
            let said = place.exec(&lab.host, "cat", &["/etc/resolv.conf", "/etc/passwd"]);
            assert!(said.stdout.contains("\nnameserver 198.18.0.2\n"), "{link:?}: {said:?}");
            assert!(said.stdout.ends_with(&passwd), "the rest of /etc is there: {link:?}: {said:?}");
            assert_eq!(place.act(&lab.host, &format!("ask {NAME}:7 x")), Ok("x".to_owned()), "{link:?}");
            let after = fs::read_link(file).ok();
            assert_eq!(after.as_deref(), link.map(Path::new), "{link:?}");
            assert!(!file.exists(), "{link:?}");
            for folder in ["/run/there", "/run/systemd/resolve"] {
                assert_eq!(fs::read_dir(folder).unwrap().count(), 0, "{link:?}: {folder}");
            }
            let _ = fs::remove_file(file);
        }
        for text in ["nameserver 192.0.2.1\n", ""] {
            fs::write(file, text).unwrap();
            let said = place.exec(&lab.host, "cat", &["/etc/resolv.conf"]);
            assert!(said.stdout.contains("nameserver 198.18.0.2"), "{said:?}");
            assert_eq!(fs::read_to_string(file).unwrap(), text);
        }
    });
}

/// Moves the whole test to a root of its own with the same entries, so that files may be made in `/`.
fn own_root() {
    let script = "mkdir /run/root; mount -t tmpfs none /run/root; cd /run/root; mkdir old
        for entry in /* /.[!.]*; do
          name=${entry#/}
          if [ -L $entry ]; then cp -P $entry $name
          elif [ -d $entry ]; then mkdir $name; mount --rbind $entry $name
          fi
        done
        pivot_root . old";
    let said = Said::of(Command::new("sh").args(["-euc", script]));
    assert!(said.succeeded(), "{said:?}");
    std::env::set_current_dir("/").expect("the root");
}

#[test]
fn resolver_settings_in_the_root_are_covered_and_never_written() {
    run(&["pivot_root"], || {
        let lab = Topology::desktop();
        let place = Place::new(PROFILE);
        own_etc("");
        own_root();
        let (file, link) = (Path::new("/resolv.conf"), Path::new("/etc/resolv.conf"));
        let text = "nameserver 192.0.2.1\n";
        fs::remove_file(link).unwrap();
        symlink(file, link).unwrap();
        fs::write(file, text).unwrap();
        let said = place.exec(&lab.host, "cat", &["/etc/resolv.conf", "/etc/passwd"]);
        assert!(said.stdout.contains("\nnameserver 198.18.0.2\n"), "{said:?}");
        assert!(said.stdout.ends_with(&fs::read_to_string("/etc/passwd").unwrap()), "{said:?}");
        assert_eq!(fs::read_to_string(file).unwrap(), text);
    });
}

#[test]
fn an_mtu_that_ipv6_cannot_live_on_is_raised_with_a_warning() {
    run(&[], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let place = Place::new(&PROFILE.replace("ipv6: true", "ipv6: false\ntun: { mtu: 900 }"));
        assert!(place.check(&lab.host).succeeded());
        let shown = place.exec(&lab.host, "ip", &["link", "show", "tun0"]);
        assert!(shown.stdout.contains(" mtu 1280 "), "{shown:?}");
        assert!(shown.stderr.contains("900") && shown.stderr.contains("1280"), "{shown:?}");
        assert_eq!(place.act(&lab.host, &format!("ask {V4}:7 x")), Ok("x".to_owned()));
    });
}

/// What is left in the background has lost its way out: it hears of that at once, and nothing of it gets out.
#[test]
fn what_a_command_leaves_in_the_background_is_cut_off_and_hears_of_it() {
    run(&["curl", "setsid", "/dev/net/tun"], || leave_in_the_background(&Topology::desktop()));
}

#[test]
fn so_is_what_it_leaves_behind_a_stand_in_of_the_device() {
    run(&["curl", "setsid"], || {
        // Without its node no device can be opened.
        assert!(Said::of(Command::new("mount").args(["-t", "tmpfs", "none", "/dev/net"])).succeeded());
        leave_in_the_background(&Topology::desktop());
    });
}

#[test]
fn what_a_command_has_in_the_background_is_refused_when_exec_is_killed() {
    run(&["curl", "setsid", "/dev/net/tun"], || kill_with_a_background(&Topology::desktop()));
}

#[test]
fn so_is_what_it_has_behind_a_stand_in_of_the_device() {
    run(&["curl", "setsid"], || {
        assert!(Said::of(Command::new("mount").args(["-t", "tmpfs", "none", "/dev/net"])).succeeded());
        kill_with_a_background(&Topology::desktop());
    });
}

fn kill_with_a_background(lab: &Topology) {
    let _sites = Sites::open(lab);
    let desk = world::fresh_dir("background");
    let later = format!(
        "curl -sS -o /dev/null -m 20 http://{V4}:80/; echo first $? >>out
         while ip link show tun0 >/dev/null 2>&1; do sleep 0.02; done
         curl -sS -m 20 http://{V4}:80/; echo new $? >>out
         curl -sS -m 20 http://{NAME}:80/; echo name $? >>out\n"
    );
    fs::write(desk.join("later"), later).expect("a file on the lab's desk");
    let script = format!(
        "cd {}; setsid sh later >/dev/null 2>&1 & until [ -s {}/out ]; do sleep 0.02; done; echo left; exec sleep 1000",
        desk.display(),
        desk.display()
    );
    let mut command = Place::new(PROFILE).exec_command(&lab.host, &[]);
    command.args(["sh", "-c", &script]);
    let mut program = Program::start("exec", command);
    program.wait_for(|line| line == "left").unwrap_or_else(|said| panic!("{said}"));
    program.signal(Signal::SIGKILL);
    program.wait();
    let told = || fs::read_to_string(desk.join("out")).unwrap_or_default();
    let all = world::poll_until(PATIENCE, || (told().lines().count() == 3).then_some(()));
    assert!(all.is_some(), "the device stays, or nothing is refused: {}", told());
    // 7: no connection. 6: no such name. Neither is 28, the end of patience.
    assert_eq!(told(), "first 0\nnew 7\nname 6\n");
}

fn leave_in_the_background(lab: &Topology) {
    let _sites = Sites::open(lab);
    let mut capture = Capture::start(&lab.host, "eth0");
    capture.prove(|mark| assert_eq!(act_in(&lab.host, &format!("datagram {V4}:7 {mark}")), Ok(mark.to_owned())));
    let desk = world::fresh_dir("background");
    let open = format!("curl -sSv -m 60 telnet://{V4}:7 <said 2>log; echo open $? >>out\n");
    let later = format!(
        "until [ -e ended ]; do sleep 0.02; done
         curl -sS -m 20 http://{V4}:80/; echo new $? >>out
         curl -sS -m 20 http://{NAME}:80/; echo name $? >>out\n"
    );
    fs::write(desk.join("open"), open).expect("a file on the lab's desk");
    fs::write(desk.join("later"), later).expect("a file on the lab's desk");
    // In sessions of their own, as daemons are.
    let script = format!(
        "cd {}; exec 9>&1 >/dev/null 2>&1; mkfifo said
         setsid sh open 9>&- & setsid sh later 9>&- &
         exec 8>said; until grep -q Connected log; do sleep 0.02; done
         echo left >&9",
        desk.display()
    );
    let said = Place::new(PROFILE).exec(&lab.host, "sh", &["-c", &script]);
    assert!(said.succeeded() && said.stdout == "left\n", "{said:?}");
    fs::write(desk.join("ended"), "").expect("a file on the lab's desk");
    let told = || fs::read_to_string(desk.join("out")).unwrap_or_default();
    let all = world::poll_until(PATIENCE, || (told().lines().count() == 3).then_some(()));
    let told = told();
    assert!(all.is_some(), "{told}");
    // 56: reset. 7: no connection. 6: no such name. None of them is 28, the end of patience.
    for words in ["open 56\n", "new 7\n", "name 6\n"] {
        assert!(told.contains(words), "{told}");
    }
    capture.assert_nothing("of what is left behind", |packet| packet.ip.is_some_and(|ip| ip.destination.port() == 80));
}

#[test]
fn what_a_profile_says_of_the_hosts_interfaces_is_no_matter_in_a_namespace_of_its_own() {
    run(&[], || {
        let lab = Topology::desktop();
        let tun = "tun: { enable: true, include-interface: [lan0], kill-switch: true, iproute2-rule-index: 40000 }\n";
        let place = Place::new(&format!("{tun}{PROFILE}"));
        assert!(place.check(&lab.host).stdout.contains("include-interface"));
        let said = place.exec(&lab.host, "true", &[]);
        assert!(said.succeeded() && said.stderr.is_empty(), "{said:?}");
    });
}
