//! The shipped unit and what belongs to it, held against the program.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use clap::Parser;
use nix::sys::signal::Signal;
use tunproxy::cli::{self, Cli};
use tunproxy::platform::Capability;

use super::support::client::act_in;
use super::support::needs;
use super::support::program::Program;
use super::support::service::{OPEN_TUN, open_tun, service};
use super::support::sites::NAME;
use super::support::topology::HOST_LAN_V4;
use super::support::tunproxy::Said;
use super::support::unit::{Unit, packaging};
use super::support::world::fresh_dir;
use super::support::{Sites, Topology, run};

/// The arguments of the one command of `key`, as the program reads them.
fn command_line(unit: &Unit, key: &str) -> Cli {
    let line = unit.one(key);
    let program = line.split_whitespace().next().unwrap_or_default();
    assert_eq!(program, "/usr/bin/tunproxy", "{key}");
    Cli::try_parse_from(line.split_whitespace()).unwrap_or_else(|error| panic!("{key}: {error}"))
}

#[test]
fn its_commands_are_such_that_the_program_knows_and_use_one_state_directory() {
    let unit = Unit::shipped();
    let start = command_line(&unit, "ExecStart");
    assert!(start.command.is_none(), "it runs the profile");
    let profile = start.common.profile.expect("a profile");
    assert_eq!(profile.to_str(), Some("/etc/tunproxy/rules.yaml"));
    assert_eq!(unit.one("ConditionPathExists"), "/etc/tunproxy/rules.yaml");
    let clean_up = command_line(&unit, "ExecStopPost");
    assert!(matches!(clean_up.command, Some(cli::Command::Cleanup { namespace_gone: false })));
    let state = start.common.state_dir.expect("a state directory");
    assert_eq!(Some(&state), clean_up.common.state_dir.as_ref());
    assert_eq!(state.to_str(), Some(format!("/var/lib/{}", unit.one("StateDirectory")).as_str()));
    assert_eq!(unit.one("StateDirectoryMode"), "0700");
}

#[test]
fn it_gives_the_capabilities_that_the_program_knows_a_use_for_and_no_others() {
    let unit = Unit::shipped();
    let used = Capability::ALL.map(Capability::name);
    assert_eq!(unit.words("AmbientCapabilities"), used);
    assert_eq!(unit.words("CapabilityBoundingSet"), used);
    assert_eq!(unit.one("NoNewPrivileges"), "yes");
}

#[test]
fn its_user_is_made_by_what_comes_with_it() {
    let unit = Unit::shipped();
    let (user, group) = (unit.one("User"), unit.one("Group"));
    let sysusers = fs::read_to_string(packaging("sysusers.d/tunproxy.conf")).unwrap();
    let line = sysusers.lines().find(|line| line.starts_with("u ")).expect("a user");
    assert_eq!(line.split_whitespace().nth(1), Some(user));
    // `u` makes a group of the same name.
    assert_eq!(user, group);
    assert!(line.ends_with(&format!("/var/lib/{}", unit.one("StateDirectory"))), "{line}");
    let polkit = fs::read_to_string(packaging("polkit-1/rules.d/50-tunproxy.rules")).unwrap();
    assert!(polkit.contains(&format!("subject.user == \"{user}\"")));
}

#[test]
fn it_leaves_open_what_the_program_needs() {
    let unit = Unit::shipped();
    assert_eq!(unit.one("DeviceAllow"), "/dev/net/tun rw");
    // Each of these would take away what the program cannot do without: see the comments there.
    for closed in [
        "PrivateDevices",
        "ProtectKernelTunables",
        "ProcSubset",
        "PrivateNetwork",
        "PrivateUsers",
        "DynamicUser",
        "RootDirectory",
        "IPAddressDeny",
        "ReadOnlyPaths",
        "InaccessiblePaths",
    ] {
        assert_eq!(unit.all(closed), Vec::<&str>::new(), "{closed}=");
    }
    let families = unit.words("RestrictAddressFamilies");
    for family in ["AF_INET", "AF_INET6", "AF_NETLINK", "AF_UNIX"] {
        assert!(families.contains(&family), "{family}");
    }
    // nft gets its capability by capset(2), after what is taken away.
    let filters = unit.all("SystemCallFilter");
    assert_eq!(filters.first(), Some(&"@system-service"));
    assert_eq!(filters.last(), Some(&"capset"));
    assert_eq!(unit.one("SystemCallErrorNumber"), "EPERM", "a call that is refused is an error, and no death");
}

#[test]
fn its_times_fit_those_of_the_program() {
    let unit = Unit::shipped();
    let seconds = |key: &str| unit.one(key).parse::<u64>().unwrap_or_else(|error| panic!("{key}: {error}"));
    assert_eq!(unit.one("Type"), "notify");
    assert_eq!(unit.one("NotifyAccess"), "main");
    // A stop takes up to three seconds for the flows, and ten for a busy firewall, twice.
    assert!(seconds("TimeoutStopSec") >= 3 + 20 && seconds("TimeoutStartSec") >= 30);
    assert!(seconds("WatchdogSec") > 20, "a busy firewall holds the main thread for ten seconds, twice");
    assert_eq!(unit.one("Restart"), "on-failure");
    let (burst, within) = (seconds("StartLimitBurst"), seconds("StartLimitIntervalSec"));
    assert!(burst * seconds("RestartSec") < within, "else a start that fails at once is tried for ever");
}

#[test]
fn every_directive_stands_in_its_section_and_only_lists_stand_there_twice() {
    let unit = Unit::shipped();
    let keys: Vec<(&str, &str)> = unit.keys().collect();
    assert!(keys.len() > 30, "{} directives: was the file read?", keys.len());
    for (section, key) in &keys {
        let wanted = match *key {
            "Description"
            | "Documentation"
            | "After"
            | "ConditionPathExists"
            | "StartLimitIntervalSec"
            | "StartLimitBurst" => "Unit",
            "WantedBy" => "Install",
            _ => "Service",
        };
        assert_eq!(*section, wanted, "{key}=");
        let times = keys.iter().filter(|(_, other)| other == key).count();
        assert!(times == 1 || *key == "SystemCallFilter", "{key}= stands there {times} times");
    }
}

/// The calls that the unit's filter lets pass, as systemd has its groups.
fn allowed(analyze: &Path, unit: &Unit) -> BTreeSet<String> {
    let mut allowed = calls(analyze, "@default");
    for filter in unit.all("SystemCallFilter") {
        let (taken, words) = filter.strip_prefix('~').map_or((false, filter), |words| (true, words));
        for call in words.split_whitespace().flat_map(|word| calls(analyze, word)) {
            if taken {
                allowed.remove(&call);
            } else {
                allowed.insert(call);
            }
        }
    }
    allowed
}

/// The calls of a group, those of groups in it too; or the call itself.
fn calls(analyze: &Path, word: &str) -> BTreeSet<String> {
    if !word.starts_with('@') {
        return [word.to_owned()].into();
    }
    let output = Command::new(analyze).args(["syscall-filter", "--no-pager", word]).output().expect("systemd-analyze");
    assert!(output.status.success(), "{word}: {output:?}");
    let listed = String::from_utf8_lossy(&output.stdout).into_owned();
    let words = listed.lines().skip(1).map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    words.flat_map(|word| calls(analyze, word)).collect()
}

/// The calls of the program and its children in a log of strace: all that comes after the program has been started.
fn used(log: &str, program: &Path) -> BTreeSet<String> {
    let start = format!("execve(\"{}\"", program.display());
    let lines = log.lines().skip_while(|line| !line.contains(&start));
    let name = |line: &str| {
        let what = line.split_once(' ')?.1.trim_start();
        let what = what.strip_prefix("<... ").map_or(what, |resumed| resumed);
        let end = what.find(|c: char| !c.is_ascii_alphanumeric() && c != '_')?;
        (end > 0 && !what.starts_with(['+', '-'])).then(|| what[..end].to_owned())
    };
    lines.filter_map(name).collect()
}

#[test]
fn no_call_of_a_start_a_run_a_stop_and_a_clean_up_is_one_that_the_unit_forbids() {
    run(&["strace", "setpriv", OPEN_TUN], || {
        let Some(analyze) = needs::find("systemd-analyze") else {
            return needs::pass_over("the unit's filter", "systemd-analyze is not installed (apt-get install systemd)");
        };
        let lab = Topology::with_lan();
        let _sites = Sites::open(&lab);
        open_tun();
        let place = service(&format!(
            "
ipv6: true
log-level: info
mixed-port: 7890
tun: {{ enable: true, auto-route: true, auto-forward: true, dns-hijack: ['any:53'] }}
dns: {{ enable: true, listen: '{HOST_LAN_V4}:53', enhanced-mode: fake-ip, nameserver: [192.168.1.1] }}
rules: ['MATCH,DIRECT']
"
        ));
        let logs = fresh_dir("strace");
        let traced = |name: &str, command: Command| {
            let mut traced = lab.host.command("strace");
            traced.args(["-f", "-qq", "-o"]).arg(logs.join(name)).arg(command.get_program()).args(command.get_args());
            traced
        };
        for signal in [Signal::SIGTERM, Signal::SIGKILL] {
            let mut program = Program::start("tunproxy", traced(signal.as_str(), place.run_command(&lab.host)));
            program.wait_for(|line| line.starts_with("tunproxy ready")).unwrap();
            for act in [format!("ask {NAME}:7 x"), format!("datagram {NAME}:7 x"), "connect 127.0.0.1:7890".to_owned()]
            {
                assert!(act_in(&lab.host, &act).is_ok(), "{act}");
            }
            assert!(place.ask(&lab.host, "status").succeeded());
            // To the program itself: strace is what was started, and what ends with it.
            let pid = fs::read_to_string(place.state.join("lock")).unwrap().trim().parse().unwrap();
            nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), signal).unwrap();
            program.wait();
        }
        let words = ["cleanup", "--state-dir", place.state.to_str().unwrap()];
        let said = Said::of(traced("cleanup", place.rights.as_ref().unwrap().command(&lab.host, &place)).args(words));
        assert!(said.succeeded() && said.stdout.contains("undone: "), "{said:?}");
        let program = place.rights.as_ref().unwrap().program();
        let logs = fs::read_dir(&logs).unwrap().flatten().map(|log| fs::read_to_string(log.path()).unwrap());
        let used: BTreeSet<String> = logs.flat_map(|log| used(&log, program)).collect();
        assert!(used.contains("epoll_wait") && used.contains("sendmsg"), "was it traced? {used:?}");
        let allowed = allowed(&analyze, &Unit::shipped());
        assert!(allowed.len() > 200 && !allowed.contains("mount"), "{} calls", allowed.len());
        let forbidden: Vec<&String> = used.difference(&allowed).collect();
        assert!(forbidden.is_empty(), "{forbidden:?} are forbidden by the unit");
    });
}

/// Where systemd is installed, it has the last word.
#[test]
fn systemd_finds_nothing_to_say_about_it() {
    let Some(analyze) = needs::find("systemd-analyze") else {
        return needs::pass_over("the unit, by systemd", "systemd-analyze is not installed (apt-get install systemd)");
    };
    let dir = tempfile::tempdir().unwrap();
    let unit = dir.path().join("tunproxy.service");
    // What it names need not be installed here.
    let text = fs::read_to_string(packaging("systemd/tunproxy.service")).unwrap();
    fs::write(&unit, text.replace("/usr/bin/tunproxy", "/bin/true").replace("man:tunproxy(1)", "man:true(1)")).unwrap();
    let output = Command::new(&analyze).args(["verify", "--man=no"]).arg(&unit).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    let about_it: Vec<&str> = said.lines().filter(|line| line.contains("tunproxy.service")).collect();
    assert!(output.status.success() && about_it.is_empty(), "{said}");
    let mut security = Command::new(&analyze);
    let output =
        security.args(["security", "--offline=true", "--no-pager", "--threshold=30"]).arg(&unit).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "it is less closed than it was (3.0 of 10 at most):\n{said}");
}
