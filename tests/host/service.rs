//! The program as the shipped unit runs it: its user, its capabilities, no new privileges, a read-only system.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use super::support::client::act_in;
use super::support::program::Program;
use super::support::service::{OPEN_TUN, USER, open_tun, service, under};
use super::support::sites::{NAME, V4, V6};
use super::support::topology::{GATEWAY_V4, HOST_LAN_V4};
use super::support::tunproxy::{Place, Said};
use super::support::unit::Unit;
use super::support::world::{fresh_dir, own_etc};
use super::support::{Dump, Netns, Sites, Topology, run};

const NEEDS: &[&str] = &["curl", "dig", "setpriv", "unshare", OPEN_TUN];

fn profile(more: &str) -> Place {
    open_tun();
    service(&format!(
        "
mode: rule
ipv6: true
log-level: info
tun: {{ enable: true, auto-route: true, auto-forward: true, dns-hijack: ['any:53'] }}
dns: {{ enable: true, {more} enhanced-mode: fake-ip, nameserver: [192.168.1.1] }}
rules: ['DST-PORT,81,REJECT', 'MATCH,DIRECT']
"
    ))
}

/// The place, without one of the unit's capabilities.
fn without(place: &Place, capability: &str) -> Place {
    let rights = place.rights.clone().map(|rights| rights.without(capability));
    Place { rights, ..place.clone() }
}

/// What programs of the host do reaches us, in both families, by name and by address.
fn carries(lab: &Topology) {
    for site in [V4, V6, NAME] {
        assert_eq!(act_in(&lab.host, &format!("ask {site}:7 x")), Ok("x".to_owned()), "{site}");
        assert_eq!(act_in(&lab.host, &format!("datagram {site}:7 x")), Ok("x".to_owned()), "{site}");
        // Only we refuse it.
        assert_eq!(act_in(&lab.host, &format!("connect {site}:81")), Err("ECONNREFUSED".to_owned()), "{site}");
    }
    assert!(lab.host.run("dig", &["+short", &format!("@{GATEWAY_V4}"), NAME, "A"]).starts_with("198.18."));
}

fn warnings(said: &str) -> Vec<&str> {
    said.lines().filter(|line| line.contains("WARN")).collect()
}

#[test]
fn the_rights_of_the_tests_are_those_of_the_unit_and_no_others() {
    run(NEEDS, || {
        let lab = Topology::desktop();
        let place = profile("");
        let look = "id -u; id -G; grep -E '^(Cap|NoNewPrivs)' /proc/self/status
            touch /etc/x /run/x /usr/x 2>/dev/null && echo writable; exit 0";
        let said = under(place.rights.as_ref().unwrap(), &lab.host, &place, look);
        let mask = Unit::shipped().words("AmbientCapabilities").into_iter().fold(0_u64, |mask, name| {
            mask | 1
                << match name {
                    "CAP_NET_BIND_SERVICE" => 10,
                    "CAP_NET_ADMIN" => 12,
                    "CAP_NET_RAW" => 13,
                    other => panic!("{other} is new: give it its number here"),
                }
        });
        let sets = ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"].map(|set| format!("{set}:\t{mask:016x}\n"));
        let expected = format!("{USER}\n{USER}\n{}NoNewPrivs:\t1\n", sets.concat());
        assert_eq!(said.stdout, expected, "{said:?}");
    });
}

#[test]
fn a_service_carries_the_traffic_and_leaves_the_host_as_it_was() {
    run(NEEDS, || {
        for rp_filter in ["0", "1"] {
            let lab = Topology::with_lan().rp_filter(rp_filter);
            let _sites = Sites::open(&lab);
            // Switched off, so that there is something to put back.
            lab.host.sysctl("net.ipv4.ip_forward", "0");
            lab.host.sysctl("net.ipv6.conf.all.forwarding", "0");
            let before = Dump::take(&lab.host);
            let tunproxy = profile(&format!("listen: '{HOST_LAN_V4}:53',")).start(&lab.host);
            assert_eq!(warnings(&tunproxy.output()), Vec::<&str>::new(), "everything is there that it needs");
            carries(&lab);
            assert_eq!(act_in(lab.client(), &format!("ask {NAME}:7 x")), Ok("x".to_owned()), "a LAN client");
            assert!(lab.host.nft("list tables").contains("inet tunproxy"), "nft has what it needs");
            let status = tunproxy.place().ask(&lab.host, "status");
            assert!(status.succeeded(), "{status:?}");
            assert!(tunproxy.stop().success());
            before.assert_same(&Dump::take(&lab.host));
        }
    });
}

#[test]
fn after_a_kill_the_units_clean_up_has_the_rights_for_all_that_is_left() {
    run(NEEDS, || {
        for rp_filter in ["0", "1"] {
            let lab = Topology::with_lan().rp_filter(rp_filter);
            let _sites = Sites::open(&lab);
            lab.host.sysctl("net.ipv4.ip_forward", "0");
            lab.host.sysctl("net.ipv6.conf.all.forwarding", "0");
            let before = Dump::take(&lab.host);
            let place = profile("").start(&lab.host).kill();
            assert_ne!(before.diff(&Dump::take(&lab.host)), "", "something is left to clean up");
            place.clean_up(&lab.host);
            before.assert_same(&Dump::take(&lab.host));
            // As the next start of the service would, where nobody cleaned up.
            let place = place.start(&lab.host).kill();
            let tunproxy = place.start(&lab.host);
            carries(&lab);
            assert!(tunproxy.stop().success());
            before.assert_same(&Dump::take(&lab.host));
        }
    });
}

#[test]
fn root_cleans_up_after_a_service_in_its_directory() {
    run(NEEDS, || {
        let lab = Topology::desktop();
        let before = Dump::take(&lab.host);
        let place = profile("").start(&lab.host).kill();
        let root = Place { rights: None, ..place.clone() };
        root.clean_up(&lab.host);
        before.assert_same(&Dump::take(&lab.host));
        assert!(place.start(&lab.host).stop().success(), "and the service starts again");
        before.assert_same(&Dump::take(&lab.host));
    });
}

#[test]
fn a_directory_that_a_run_by_root_has_used_is_refused_with_the_command_that_gives_it_back() {
    run(NEEDS, || {
        let lab = Topology::desktop();
        let place = profile("");
        let before = Dump::take(&lab.host);
        let root = Place { rights: None, ..place.clone() };
        assert!(root.start(&lab.host).stop().success());
        let said = Said::of(&mut place.run_command(&lab.host));
        assert_eq!(said.code, Some(1), "{said:?}");
        let state = place.state.display();
        assert!(said.stderr.contains(&format!("sudo chown -R {USER} {state}")), "{said:?}");
        for entry in fs::read_dir(&place.state).unwrap().flatten() {
            chown(entry.path(), Some(USER), Some(USER)).unwrap();
        }
        assert!(place.start(&lab.host).stop().success());
        before.assert_same(&Dump::take(&lab.host));
    });
}

#[test]
fn without_the_right_to_low_ports_only_these_are_missing() {
    run(NEEDS, || {
        let lab = Topology::with_lan();
        let _sites = Sites::open(&lab);
        let before = Dump::take(&lab.host);
        let all = profile(&format!("listen: '{HOST_LAN_V4}:53',"));
        all.rewrite(&(fs::read_to_string(&all.profile).unwrap() + "port: 80\nmixed-port: 7890\n"));
        let place = without(&all, "CAP_NET_BIND_SERVICE");
        let tunproxy = place.start(&lab.host);
        let line = tunproxy.line("CAP_NET_BIND_SERVICE");
        assert!(line.contains("port: 80") && line.contains(&format!("dns.listen: {HOST_LAN_V4}:53")), "{line}");
        assert_eq!(warnings(&tunproxy.output()).len(), 1, "{}", tunproxy.output());
        carries(&lab);
        assert_eq!(act_in(&lab.host, "connect 127.0.0.1:80"), Err("ECONNREFUSED".to_owned()), "nobody listens there");
        assert_eq!(act_in(&lab.host, "connect 127.0.0.1:7890"), Ok(String::new()), "the other port is open");
        assert!(tunproxy.stop().success());
        // With it, both are there.
        let tunproxy = all.start(&lab.host);
        assert_eq!(warnings(&tunproxy.output()), Vec::<&str>::new());
        assert_eq!(act_in(&lab.host, "connect 127.0.0.1:80"), Ok(String::new()));
        assert!(tunproxy.stop().success());
        before.assert_same(&Dump::take(&lab.host));
    });
}

#[test]
fn a_profile_that_needs_low_ports_alone_does_not_start_without_the_right() {
    run(NEEDS, || {
        let lab = Topology::desktop();
        let place = without(&service("port: 80\nrules: ['MATCH,DIRECT']\n"), "CAP_NET_BIND_SERVICE");
        let said = Said::of(&mut place.run_command(&lab.host));
        assert_eq!(said.code, Some(1), "{said:?}");
        assert!(said.stderr.contains("CAP_NET_BIND_SERVICE") && said.stderr.contains("opens nothing"), "{said:?}");
    });
}

#[test]
fn without_raw_sockets_tcp_udp_and_names_are_all_there() {
    run(NEEDS, || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let before = Dump::take(&lab.host);
        let tunproxy = without(&profile(""), "CAP_NET_RAW").start(&lab.host);
        carries(&lab);
        assert!(tunproxy.stop().success());
        before.assert_same(&Dump::take(&lab.host));
    });
}

/// A start that must fail with each of `words`, and without having changed anything.
fn refused(host: &Netns, place: &Place, words: &[&str]) {
    let before = Dump::take(host);
    let said = Said::of(&mut place.run_command(host));
    assert_eq!(said.code, Some(1), "{said:?}");
    for word in words {
        assert!(said.stderr.contains(word), "`{word}` is missing: {said:?}");
    }
    before.assert_same(&Dump::take(host));
}

#[test]
fn without_the_right_to_the_network_it_says_what_a_unit_has_to_give() {
    run(NEEDS, || {
        let lab = Topology::desktop();
        let place = without(&profile(""), "CAP_NET_ADMIN");
        refused(&lab.host, &place, &["CAP_NET_ADMIN is missing", "AmbientCapabilities="]);
        let marked = service("mixed-port: 7890\nrouting-mark: 7\nrules: ['MATCH,DIRECT']\n");
        refused(&lab.host, &without(&marked, "CAP_NET_ADMIN"), &["routing-mark", "CAP_NET_ADMIN"]);
        let tunproxy = marked.start(&lab.host);
        assert!(tunproxy.stop().success());
        // Ports alone take no right at all.
        let ports = service("mixed-port: 7890\nrules: ['MATCH,DIRECT']\n");
        let none = ["CAP_NET_ADMIN", "CAP_NET_RAW", "CAP_NET_BIND_SERVICE"];
        let tunproxy = none.iter().fold(ports, |place, name| without(&place, name)).start(&lab.host);
        assert_eq!(warnings(&tunproxy.output()), Vec::<&str>::new());
        assert!(tunproxy.stop().success());
    });
}

#[test]
fn where_the_tun_driver_is_closed_to_the_service_it_says_so() {
    run(NEEDS, || {
        let lab = Topology::desktop();
        let place = profile("");
        // Of the node that this lab has for itself; the machine's own may be the one that is open to all.
        let closed = fresh_dir("node").join("tun");
        fs::write(&closed, "").unwrap();
        fs::set_permissions(&closed, fs::Permissions::from_mode(0o600)).unwrap();
        let bind = "mount --bind \"$0\" /dev/net/tun";
        assert!(Said::of(std::process::Command::new("sh").args(["-euc", bind]).arg(&closed)).succeeded());
        refused(&lab.host, &place, &["/dev/net/tun (mode 0600, user 0) does not open", "CAP_NET_ADMIN is there"]);
    });
}

#[test]
fn a_resolver_that_only_root_could_change_costs_a_warning() {
    run(NEEDS, || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let text = "nameserver fe80::1%eth0\n";
        own_etc(text);
        let before = Dump::take(&lab.host);
        let tunproxy = profile("").start(&lab.host);
        let line = tunproxy.line("rewrite /etc/resolv.conf");
        assert_eq!(warnings(&tunproxy.output()).len(), 1, "{}", tunproxy.output());
        assert!(line.contains("read-only") || line.contains("only root"), "{line}");
        assert_eq!(fs::read_to_string("/etc/resolv.conf").unwrap(), text);
        for site in [V4, V6] {
            assert_eq!(act_in(&lab.host, &format!("ask {site}:7 x")), Ok("x".to_owned()), "the rest works");
        }
        assert!(tunproxy.stop().success());
        before.assert_same(&Dump::take(&lab.host));
    });
}

/// The service manager's end of the notification socket.
struct Supervisor {
    socket: UnixDatagram,
    path: PathBuf,
}

impl Supervisor {
    fn new() -> Self {
        let path = fresh_dir("notify").join("socket");
        let socket = UnixDatagram::bind(&path).expect("a free path");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o777)).expect("our own socket");
        socket.set_read_timeout(Some(Duration::from_secs(30))).expect("our own socket");
        Self { socket, path }
    }

    /// The next message that holds `line`.
    fn hears(&self, line: &str) -> String {
        let mut message = [0; 4096];
        loop {
            let length = self.socket.recv(&mut message).unwrap_or_else(|error| panic!("no {line}: {error}"));
            let text = String::from_utf8_lossy(&message[..length]).into_owned();
            if text.lines().any(|said| said == line) {
                return text;
            }
        }
    }
}

#[test]
fn a_manager_is_told_of_the_start_of_life_and_of_the_stop() {
    run(NEEDS, || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let supervisor = Supervisor::new();
        let mut command = profile("").run_command(&lab.host);
        command.env("NOTIFY_SOCKET", &supervisor.path).env("WATCHDOG_USEC", "300000");
        let mut program = Program::start("tunproxy", command);
        let ready = supervisor.hears("READY=1");
        assert!(ready.contains("STATUS=2 rules, TUN tunproxy0"), "{ready}");
        carries(&lab);
        for _ in 0..5 {
            supervisor.hears("WATCHDOG=1");
        }
        program.signal(Signal::SIGTERM);
        supervisor.hears("STOPPING=1");
        assert!(program.wait().success());
    });
}

fn trace(request: libc::c_uint, thread: libc::pid_t) {
    let none = std::ptr::null_mut::<libc::c_void>();
    // SAFETY: these requests take no address and no data.
    let done = unsafe { libc::ptrace(request, thread, none, none) };
    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
}

#[test]
fn a_program_whose_threads_hang_gives_no_sign_of_life() {
    run(NEEDS, || {
        let lab = Topology::desktop();
        let supervisor = Supervisor::new();
        let mut command = profile("").run_command(&lab.host);
        command.env("NOTIFY_SOCKET", &supervisor.path).env("WATCHDOG_USEC", "90000");
        let mut program = Program::start("tunproxy", command);
        supervisor.hears("WATCHDOG=1");
        // One thread alone: a thread that is traced stands still while the others run.
        let worker = fs::read_dir(format!("/proc/{}/task", program.pid()))
            .unwrap()
            .flatten()
            .find(|task| fs::read_to_string(task.path().join("comm")).is_ok_and(|name| name.starts_with("worker-")));
        let thread: libc::pid_t = worker.expect("a worker").file_name().to_string_lossy().parse().unwrap();
        trace(libc::PTRACE_SEIZE, thread);
        trace(libc::PTRACE_INTERRUPT, thread);
        // SAFETY: the status is not wanted.
        assert_eq!(unsafe { libc::waitpid(thread, std::ptr::null_mut(), libc::__WALL) }, thread);
        // What was said before lies in the socket still; then there is silence, far beyond the time it is given.
        let silent = Duration::from_secs(1);
        supervisor.socket.set_read_timeout(Some(silent)).unwrap();
        let start = Instant::now();
        while supervisor.socket.recv(&mut [0; 4096]).is_ok() {
            assert!(start.elapsed() < Duration::from_secs(30), "it goes on although a worker stands still");
        }
        trace(libc::PTRACE_DETACH, thread);
        supervisor.socket.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        supervisor.hears("WATCHDOG=1");
        program.signal(Signal::SIGTERM);
        assert!(program.wait().success());
    });
}
