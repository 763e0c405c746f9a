//! `exec` in the places that programs are started in: without a TUN driver, without a terminal, under a service
//! manager, beside and inside of each other; and where it is refused.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use super::support::client::Outcome;
use super::support::sites::{NAME, V4, V6};
use super::support::tunproxy::{Place, Said, binary};
use super::support::world::{DESK, client_command, fresh_dir, own_etc};
use super::support::{Sites, Topology, program, run};

const PROFILE: &str = "
mode: rule
ipv6: true
log-level: info
dns: { enable: true, enhanced-mode: fake-ip, nameserver: [192.168.1.1] }
rules: ['DST-PORT,81,REJECT', 'MATCH,DIRECT']
";

/// What a program may want of the network: both families, both protocols, by name and by address, much and little.
fn reaches_everything(lab: &Topology, place: &Place) {
    for site in [NAME, V4, V6] {
        assert_eq!(place.act(&lab.host, &format!("ask {site}:7 x")), Ok("x".to_owned()), "{site}");
        assert_eq!(place.act(&lab.host, &format!("datagram {site}:7 x")), Ok("x".to_owned()), "{site}");
        assert_eq!(place.act(&lab.host, &format!("connect {site}:81")), Err("ECONNREFUSED".to_owned()), "{site}");
    }
}

/// Runs a shell script as root of the lab, which must succeed.
fn shell(script: &str) {
    let said = Said::of(Command::new("sh").args(["-euc", script]));
    assert!(said.succeeded(), "{script}: {said:?}");
}

#[test]
fn without_the_tun_driver_a_packet_socket_takes_its_place() {
    run(&["ip"], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let place = Place::new(PROFILE);
        // Closed to everybody, as it is to a user where its mode is 0600; then not there at all.
        for hide in [
            format!("touch {DESK}/no-tun; mount --bind {DESK}/no-tun /dev/net/tun"),
            "mount -t tmpfs none /dev/net".to_owned(),
        ] {
            shell(&hide);
            place.assert_encloses(&lab.host);
            let shown = place.exec(&lab.host, "ip", &["-d", "link", "show", "tun0"]);
            assert!(shown.stdout.contains("veth"), "it is the stand-in: {shown:?}");
            reaches_everything(&lab, &place);
            for act in ["up", "down", "both"] {
                let done = place.act(&lab.host, &format!("{act} {V4}:9000 20000000"));
                assert!(done.is_ok(), "{act}: {done:?}");
            }
            for length in [1472, 1473, 3000, 60_000] {
                let long = "x".repeat(length);
                assert_eq!(place.act(&lab.host, &format!("datagram {V4}:7 {long}")), Ok(long), "{length} bytes");
            }
        }
    });
}

#[test]
fn a_user_to_whom_the_driver_and_their_home_are_closed_gets_everything() {
    run(&["setpriv"], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        shell(&format!("touch {DESK}/no-tun; chmod 600 {DESK}/no-tun; mount --bind {DESK}/no-tun /dev/net/tun"));
        let place = Place::new(PROFILE);
        let closed = fresh_dir("home");
        fs::set_permissions(&closed, fs::Permissions::from_mode(0o700)).unwrap();
        let program = fresh_dir("bin").join("tunproxy");
        shell(&format!("touch {0}; mount --bind {1} {0}", program.display(), binary().display()));
        let mut command = lab.host.command("setpriv");
        command.args(["--reuid=12345", "--regid=12345", "--clear-groups", "--no-new-privs"]).arg(&program);
        command.args(["exec", "--profile"]).arg(&place.profile).arg("--");
        command.args(["sh", "-c", "id -u; grep CapEff /proc/self/status; getent ahosts www.example.test; pwd"]);
        // A folder that was entered before it was closed.
        command.env("HOME", &closed).env_remove("XDG_STATE_HOME").current_dir(&closed);
        let said = Said::of(&mut command);
        assert!(said.succeeded(), "{said:?}");
        assert!(said.stdout.starts_with("12345\nCapEff:\t0000000000000000\n"), "{said:?}");
        assert!(said.stdout.contains("\n198.18.") && said.stdout.contains(&closed.display().to_string()), "{said:?}");
    });
}

/// Who waits on a path socket outside, and answers whoever comes.
fn door(path: &str) -> UnixListener {
    let path = Path::new(path);
    fs::create_dir_all(path.parent().expect("a folder")).expect("the lab's own folder");
    let listener = UnixListener::bind(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    fs::set_permissions(path, fs::Permissions::from_mode(0o777)).expect("our own socket");
    let server = listener.try_clone().expect("a descriptor");
    thread::spawn(move || {
        for client in server.incoming() {
            let _ = client.and_then(|mut client| client.write_all(b"a way out"));
        }
    });
    listener
}

/// What a command sees behind each of these paths.
fn knock(lab: &Topology, place: &Place, doors: &[&str]) -> Vec<Outcome> {
    doors.iter().map(|door| place.act(&lab.host, &format!("knock {door}"))).collect()
}

const DOORS: [&str; 6] = [
    "/run/systemd/resolve/io.systemd.Resolve",
    "/run/systemd/resolve/io.systemd.Resolve.Monitor",
    "/run/nscd/socket",
    "/run/avahi-daemon/socket",
    "/run/dbus/system_bus_socket",
    "/var/run/dbus/system_bus_socket",
];

#[test]
fn sockets_by_which_names_and_calls_go_around_us_are_out_of_reach_and_all_else_is_there() {
    run(&[], || {
        let lab = Topology::desktop();
        let place = Place::new(PROFILE);
        // As on a system where /var/run is a link, and where it is a folder of its own.
        for apart in [false, true] {
            if apart {
                shell("mount -t tmpfs none /var; mkdir /var/run");
            }
            let through_link = fs::canonicalize("/var/run").unwrap() == Path::new("/run");
            let ours: Vec<&str> =
                DOORS.into_iter().filter(|path| !(path.starts_with("/var") && through_link)).collect();
            let _doors: Vec<_> = ours.iter().filter(|path| !Path::new(path).exists()).map(|path| door(path)).collect();
            let others = ["/run/user/1000/bus", "/run/systemd/notify", "/run/dbus-1/socket"];
            let _others: Vec<_> =
                others.iter().filter(|path| !Path::new(path).exists()).map(|path| door(path)).collect();
            for path in ours.iter().chain(&others) {
                let mut answer = String::new();
                UnixStream::connect(path).unwrap().read_to_string(&mut answer).unwrap();
                assert_eq!(answer, "a way out", "{path} is open to those who are not in here");
            }
            let nothing = Err::<String, _>("ENOENT".to_owned());
            assert_eq!(knock(&lab, &place, &DOORS), vec![nothing; 6]);
            let open = Ok("a way out".to_owned());
            assert_eq!(knock(&lab, &place, &others), vec![open; 3], "what is nobody's way around us stays");
            // One that is made anew while the command runs is behind the same cover.
            let mut command = place.exec_command(&lab.host, &[]);
            command.args([
                "sh",
                "-c",
                "echo there; read line; ls -A /run/dbus /run/nscd; echo; cat /run/user/1000/late",
            ]);
            command.stdin(Stdio::piped()).stdout(Stdio::piped());
            let mut running = command.spawn().unwrap();
            let mut said = [0; 6];
            running.stdout.as_mut().unwrap().read_exact(&mut said).unwrap();
            fs::remove_file("/run/dbus/system_bus_socket").unwrap();
            fs::write("/run/dbus/system_bus_socket", "anew").unwrap();
            fs::write("/run/user/1000/late", "seen").unwrap();
            running.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
            let output = running.wait_with_output().unwrap();
            assert_eq!(String::from_utf8_lossy(&output.stdout), "/run/dbus:\n\n/run/nscd:\n\nseen");
            fs::remove_file("/run/dbus/system_bus_socket").unwrap();
            fs::remove_file("/run/user/1000/late").unwrap();
        }
    });
}

#[test]
fn ten_at_once_with_ten_profiles_do_not_meet() {
    run(&[], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        // Each profile lets one port through.
        let profile = |port: u16| {
            PROFILE
                .replace("DST-PORT,81,REJECT", &format!("DST-PORT,{port},DIRECT"))
                .replace("MATCH,DIRECT", "MATCH,REJECT")
        };
        let state = fresh_dir("state");
        thread::scope(|scope| {
            for number in 0..10_u16 {
                let (lab, state) = (&lab, state.clone());
                scope.spawn(move || {
                    let open = 7001 + number % 8;
                    let place = Place { state, ..Place::new(&profile(open)) };
                    for port in 7001..=7008 {
                        let outcome = place.act(&lab.host, &format!("ask {NAME}:{port} x"));
                        let expected = if port == open { Ok("x") } else { Err("ECONNREFUSED") };
                        let expected = expected.map(str::to_owned).map_err(str::to_owned);
                        assert_eq!(outcome, expected, "{number}: {port}");
                    }
                });
            }
        });
        assert_eq!(fs::read_dir(&state).unwrap().count(), 0, "it writes no file of the host");
    });
}

#[test]
fn one_inside_another_goes_by_the_rules_of_both() {
    run(&["curl"], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let (outer, inner) = (Place::new(PROFILE), Place::new(&PROFILE.replace("DST-PORT,81", "DST-PORT,7001")));
        let inside = |url: &str| {
            let mut command = outer.exec_command(&lab.host, &[]);
            command.arg(binary()).args(["exec", "--profile"]).arg(&inner.profile).arg("--");
            Said::of(command.args(["curl", "-sSg", "--max-time", "60", url]))
        };
        for site in [NAME, V4, V6] {
            let said = inside(&format!("http://{site}/"));
            assert!(said.succeeded() && said.stdout.contains("path=/"), "{said:?}");
            for port in [81, 7001] {
                let said = inside(&format!("http://{site}:{port}/"));
                assert_eq!(said.code, Some(7), "curl's word for a refusal: {said:?}");
                assert!(said.stderr.contains(&format!("rule=\"DST-PORT,{port},REJECT")), "by one of the two: {said:?}");
            }
        }
    });
}

#[test]
fn on_a_host_that_is_behind_another_run_it_goes_by_the_rules_of_both() {
    run(&["/dev/net/tun"], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        // Both with the usual fake range; the host's resolver settings name the run on the host.
        own_etc("nameserver fe80::1%eth0\n");
        let of_host = "
ipv6: true
log-level: info
tun: { enable: true, auto-route: true, dns-hijack: ['any:53'] }
dns: { enable: true, enhanced-mode: fake-ip, nameserver: [192.168.1.1] }
rules: ['DST-PORT,7001,REJECT', 'MATCH,DIRECT']
";
        let tunproxy = Place::new(of_host).start(&lab.host);
        assert!(fs::read_to_string("/etc/resolv.conf").unwrap().contains("198.18.0.2"));
        for nameserver in ["192.168.1.1", "system"] {
            let place =
                Place::new(&PROFILE.replace("nameserver: [192.168.1.1]", &format!("nameserver: [{nameserver}]")));
            reaches_everything(&lab, &place);
            for site in [NAME, V4, V6] {
                let outcome = place.act(&lab.host, &format!("connect {site}:7001"));
                assert_eq!(outcome, Err("ECONNREFUSED".to_owned()), "by the rule of the host: {site}");
            }
        }
        assert!(tunproxy.stop().success());
    });
}

#[test]
fn a_read_only_system_with_private_folders_is_no_obstacle() {
    run(&[], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let place = Place::new(PROFILE);
        // As ProtectSystem=strict, PrivateTmp= and ReadOnlyPaths= have it.
        shell(
            "mount --bind /tmp /tmp; mount --bind /etc /etc; for at in /etc /run /tmp /; do mount -o remount,bind,ro $at; done",
        );
        assert!(fs::write("/etc/probe", "").is_err() && fs::write("/run/probe", "").is_err());
        reaches_everything(&lab, &place);
        let said = place.exec(&lab.host, "cat", &["/etc/resolv.conf"]);
        assert!(said.stdout.contains("nameserver 198.18.0.2"), "{said:?}");
    });
}

#[test]
fn a_read_only_folder_with_a_link_to_nothing_is_no_obstacle() {
    run(&[], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let place = Place::new(PROFILE);
        own_etc("");
        fs::remove_file("/etc/resolv.conf").unwrap();
        for link in [None, Some("/run/nowhere/resolv.conf")] {
            if let Some(link) = link {
                shell("mount -o remount,bind,rw /etc");
                symlink(link, "/etc/resolv.conf").unwrap();
            }
            shell("mount -o remount,bind,ro /etc");
            assert_eq!(place.act(&lab.host, &format!("ask {NAME}:7 x")), Ok("x".to_owned()), "{link:?}");
            let said = place.exec(&lab.host, "cat", &["/etc/passwd", "/etc/resolv.conf"]);
            assert!(
                said.stdout.contains("root:") && said.stdout.contains("nameserver 198.18.0.2"),
                "{link:?}: {said:?}"
            );
        }
    });
}

#[test]
fn what_a_service_manager_gives_to_the_command_reaches_it() {
    run(&[], || {
        let lab = Topology::desktop();
        let place = Place::new(PROFILE);
        let path = fresh_dir("notify").join("socket");
        let manager = UnixDatagram::bind(&path).unwrap();
        manager.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = socket.local_addr().unwrap().port();
        // The process that is started is told of its own number, and becomes `exec`; the command has another one.
        let start = "LISTEN_PID=$$ LISTEN_FDS=1 WATCHDOG_PID=$$ WATCHDOG_USEC=1000000 exec \"$@\" 0<&-";
        let exec = place.exec_command(&lab.host, &[]);
        let mut command = lab.host.command("sh");
        command.args(["-c", start, "sh"]).arg(exec.get_program()).args(exec.get_args());
        let (program, args, environment) = client_command("report");
        command.arg(program).args(args).envs(environment).env("NOTIFY_SOCKET", &path);
        let given = socket.as_raw_fd();
        // SAFETY: two system calls, between fork and exec.
        unsafe {
            command.pre_exec(move || {
                nix::unistd::setsid()?;
                nix::errno::Errno::result(libc::dup2(given, 3)).map(drop).map_err(Into::into)
            });
        }
        // Not in a group of ours: it has a session of its own.
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let (status, said) = program::finish(command.spawn().unwrap(), Duration::from_secs(60));
        assert!(status.is_some_and(|status| status.success()), "{said}");
        let mut message = [0; 256];
        let length = manager.recv(&mut message).unwrap();
        let first = String::from_utf8_lossy(&message[..length]).into_owned();
        let expected =
            format!("READY=1\nSTATUS=listen true, watchdog true, socket 127.0.0.1:{port}, input 0, terminal ENXIO");
        assert_eq!(first, expected, "and nobody has spoken before the command");
        manager.set_nonblocking(true).unwrap();
        assert!(manager.recv(&mut message).is_err(), "nor after it");
    });
}

/// Runs `exec -- true`, under a filter of system calls if asked for, and holds that it ends with these words.
fn refused(place: &Place, lab: &Topology, filter: bool, words: &[&str]) {
    let mut command = place.exec_command(&lab.host, &[]);
    command.arg("true");
    if filter {
        // SAFETY: two system calls, on memory of the closure.
        unsafe { command.pre_exec(forbid_unshare) };
    }
    let said = Said::of(&mut command);
    assert_eq!(said.code, Some(1), "{said:?}");
    assert!(said.stderr.contains("does not let you make a private network namespace"), "{said:?}");
    for word in words {
        assert!(said.stderr.contains(word), "`{word}` is missing: {said:?}");
    }
}

/// Has the kernel answer unshare(2) with EPERM, as Docker's profile does.
fn forbid_unshare() -> std::io::Result<()> {
    forbid(&[(libc::SYS_unshare, 0, libc::EPERM)])
}

/// The number of a system call, bits of its first argument of which one must be set (0: whatever it is), and an error.
type Forbidden = (libc::c_long, u32, i32);

/// Has the kernel answer system calls with errors.
fn forbid(calls: &[Forbidden]) -> std::io::Result<()> {
    let step = |code: u32, jt: u8, jf: u8, k: u32| libc::sock_filter { code: code as u16, jt, jf, k };
    let load = |at| step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, at);
    let mut filter = Vec::new();
    for (call, bits, error) in calls {
        // `struct seccomp_data`: the number of the call is the first word, the first argument begins with the fifth.
        filter.push(load(0));
        let equal = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
        filter.push(step(equal, 0, if *bits == 0 { 1 } else { 3 }, *call as u32));
        if *bits != 0 {
            filter.push(load(16));
            filter.push(step(libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K, 0, 1, *bits));
        }
        filter.push(step(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ERRNO | *error as u32));
    }
    filter.push(step(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW));
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    nix::sys::prctl::set_no_new_privs()?;
    // SAFETY: the program outlives the call, which copies it.
    let result = unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) };
    nix::errno::Errno::result(result).map(drop).map_err(Into::into)
}

#[test]
fn where_a_filter_refuses_what_every_program_does_that_is_said() {
    run(&[], || {
        let lab = Topology::desktop();
        let place = Place::new(PROFILE);
        let under = |calls: &'static [Forbidden]| {
            let mut command = place.exec_command(&lab.host, &[]);
            command.arg("true");
            // SAFETY: two system calls, on memory of the closure.
            unsafe { command.pre_exec(move || forbid(calls)) };
            Said::of(&mut command)
        };
        // What older profiles of containers do: programs do without.
        let older = under(&[(libc::SYS_clone3, 0, libc::ENOSYS)]);
        assert!(older.succeeded(), "{older:?}");
        let refused: [(&'static [Forbidden], &str); 5] = [
            (
                &[(libc::SYS_clone, 0, libc::EPERM), (libc::SYS_clone3, 0, libc::EPERM)],
                "cannot start the private namespace: ",
            ),
            (
                &[(libc::SYS_clone3, 0, libc::ENOSYS), (libc::SYS_clone, libc::CLONE_THREAD as u32, libc::EPERM)],
                "cannot start the thread of a worker: ",
            ),
            (&[(libc::SYS_socketpair, 0, libc::EACCES)], "cannot open a channel to the private namespace: "),
            (&[(libc::SYS_socket, 0, libc::EPERM)], "does not let you make a private network namespace: cannot "),
            (&[(libc::SYS_unshare, 0, libc::ENOSYS)], "does not let you make a private network namespace"),
        ];
        for (calls, words) in refused {
            let said = under(calls);
            assert_eq!(said.code, Some(1), "{words}: {said:?}");
            for words in [words, "seccomp=unconfined", "SystemCallFilter="] {
                assert!(said.stderr.contains(words), "`{words}` is missing: {said:?}");
            }
        }
    });
}

#[test]
fn where_namespaces_are_refused_it_names_what_forbids_them() {
    run(&[], || {
        let lab = Topology::desktop();
        let place = Place::new(PROFILE);
        assert!(place.exec(&lab.host, "true", &[]).succeeded(), "they are not, without what follows");
        // A container that forbids the call.
        refused(&place, &lab, true, &["seccomp=unconfined", "Operation not permitted"]);
        // The other switches, as systems that have them show them.
        for (name, forbids, allows) in
            [("unprivileged_userns_clone", 0, 1), ("apparmor_restrict_unprivileged_userns", 1, 0)]
        {
            let file = format!("/proc/sys/kernel/{name}");
            shell(&format!("mount -t tmpfs none /proc/sys/kernel; echo {forbids} > {file}"));
            refused(&place, &lab, true, &[&format!("sysctl kernel.{name}={allows}")]);
            shell(&format!("echo {allows} > {file}"));
            refused(&place, &lab, true, &["seccomp=unconfined"]);
            shell("umount /proc/sys/kernel");
        }
        // Of a namespace that the lab has for itself.
        for kind in ["user", "net", "mnt"] {
            let limit = format!("max_{kind}_namespaces");
            let file = format!("/proc/sys/user/{limit}");
            let before = std::fs::read_to_string(&file).expect("the limit");
            std::fs::write(&file, "0").expect("another limit");
            refused(&place, &lab, false, &[&format!("user.{limit} is 0"), &format!("sysctl user.{limit}=15000")]);
            std::fs::write(&file, before).expect("the limit of before");
        }
    });
}
