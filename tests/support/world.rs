//! The way into the lab: a test runs itself again as root of namespaces of its own.

use std::ffi::OsString;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::Duration;
use std::{env, fs, io, thread};

use nix::mount::{MsFlags, mount};
use nix::sys::signal::{SigHandler, Signal, signal};

use super::lengths::seconds;
use super::{client, needs, program};

/// Set in the environment of the process that is inside.
const INSIDE: &str = "TUNPROXY_LAB";

/// Holds the path of a node of the TUN driver that every user may open.
const TUN_NODE: &str = "TUNPROXY_LAB_TUN";

/// A test that has not ended by then hangs: it is ended with everything it started, and fails. `TUNPROXY_PATIENCE`, in
/// seconds, is for those that are told to do more than usual.
const PATIENCE: Duration = Duration::from_secs(300);

/// Where a test keeps its files: on a tmpfs that goes with it.
pub(crate) const DESK: &str = "/run/lab";

static TEST: OnceLock<String> = OnceLock::new();

/// Runs `test` as root of fresh user, mount, network and pid namespaces, or says aloud why it cannot.
///
/// Call it as the only statement of a `#[test]` function with a closure written there: the closure's type names the
/// test that is to be run again. `needs` are programs, and devices by path, beside `ip` and `nft`.
///
/// # Panics
/// When the test inside fails, hangs, or did not run at all; under `CI=true` also when something it needs is missing.
pub(crate) fn run<F: FnOnce()>(needs: &[&str], test: F) {
    if let Some(Err(output)) = attempt(needs, test) {
        panic!("in the lab:\n{output}");
    }
}

/// Like [`run`], with what became of it: `None` inside, and where it was skipped; the output of a failure as error.
pub(crate) fn attempt<F: FnOnce()>(needs: &[&str], test: F) -> Option<Result<(), String>> {
    let name = test_name(std::any::type_name::<F>());
    if env::var_os(INSIDE).is_some() {
        client::act_if_asked();
        TEST.set(name).expect("one test a process");
        settle().expect("mounts of the lab");
        test();
        return None;
    }
    let skip = |why: &str| -> Option<Result<(), String>> {
        needs::skip(&name, why);
        None
    };
    if let Some(why) = needs::missing(&["ip", "nft"]).or_else(|| needs::missing(needs)) {
        return skip(&why);
    }
    let mut again = Command::new(env::current_exe().expect("our own path"));
    again.args([&name, "--exact", "--nocapture", "--test-threads=1"]);
    // Inside nobody may make one. It goes when the test has ended.
    let node = needs.contains(&needs::OPEN_TUN).then(needs::open_node).transpose().ok().flatten().flatten();
    if let Some(node) = &node {
        again.env(TUN_NODE, node.path());
    }
    let child = match enter(&mut again).stdout(Stdio::piped()).stderr(Stdio::piped()).stdin(Stdio::null()).spawn() {
        Ok(child) => child,
        Err(refused) => return skip(&refusal(&refused)),
    };
    let (status, output) = program::finish(child, patience());
    // The harness exits 0 for a filter that finds nothing: only "1 passed" says that the test was there and ran.
    let passed = status.is_some_and(|status| status.success()) && output.contains("1 passed");
    output.lines().filter_map(|line| line.strip_prefix(MEASURED)).for_each(measured);
    Some(if passed { Ok(()) } else { Err(format!("{status:?}\n{output}")) })
}

/// [`run`] for a program with a `main` of its own, a benchmark: call it first. Outside, it runs the program again with
/// the same arguments and ends as that ends; inside, it returns after `main`.
pub(crate) fn within<F: FnOnce()>(main: F) {
    if env::var_os(INSIDE).is_some() {
        client::act_if_asked();
        settle().expect("mounts of the lab");
        return main();
    }
    let mut again = Command::new(env::current_exe().expect("our own path"));
    let ended = enter(again.args(env::args_os().skip(1))).status();
    let status = ended.unwrap_or_else(|refused| panic!("{}", refusal(&refused)));
    std::process::exit(status.code().unwrap_or(1));
}

/// What [`measured`] puts before its words.
const MEASURED: &str = "measured: ";

/// Tells a number that somebody may want to see, of a test that passes too (with `--nocapture`).
pub(crate) fn measured(words: &str) {
    let _ = writeln!(io::stdout(), "{MEASURED}{words}");
}

fn patience() -> Duration {
    seconds("TUNPROXY_PATIENCE", PATIENCE.as_secs())
}

/// The command line and environment that make this binary act as a client program: see [`client`].
pub(crate) fn client_command(act: &str) -> (PathBuf, Vec<String>, [(&'static str, String); 2]) {
    let again = |test: &String| [test, "--exact", "--nocapture", "--test-threads=1"].map(str::to_owned).to_vec();
    let environment = [(INSIDE, "1".to_owned()), (client::ACT, act.to_owned())];
    (env::current_exe().expect("our own path"), TEST.get().map(again).unwrap_or_default(), environment)
}

/// `host::direct::refused_is_fast::{{closure}}` is the test `direct::refused_is_fast` of the binary `host`.
fn test_name(closure: &str) -> String {
    let path = closure.split("::{{closure}}").next().unwrap_or(closure);
    path.split_once("::").map_or(path, |(_binary, test)| test).to_owned()
}

fn refusal(error: &io::Error) -> String {
    format!(
        "namespaces are refused: {error}. A kernel or container has to allow them: user.max_user_namespaces above 0, \
         kernel.unprivileged_userns_clone=1, kernel.apparmor_restrict_unprivileged_userns=0 where these sysctls exist"
    )
}

/// Prepares `command` to run as process 1 and root of fresh user, mount, network and pid namespaces.
///
/// Root outside keeps 65536 users inside; anybody else is the one user root. Spawning fails if namespaces are refused.
pub(crate) fn enter(command: &mut Command) -> &mut Command {
    let maps = IdMaps::of_this_process();
    command.env(INSIDE, "1");
    // SAFETY: between fork and exec only system calls are made, on memory prepared before the fork.
    unsafe { command.pre_exec(move || clone_into_namespaces(&maps)) }
}

/// What is written to `uid_map` and `gid_map`, made before the fork because nothing may be allocated after it.
struct IdMaps {
    uid: Vec<u8>,
    gid: Vec<u8>,
    /// An ordinary user may map only themselves, and only after giving up `setgroups`.
    deny_setgroups: bool,
}

impl IdMaps {
    fn of_this_process() -> Self {
        let (uid, gid) = (nix::unistd::geteuid(), nix::unistd::getegid());
        let range = |file| {
            let map = fs::read_to_string(file).unwrap_or_default();
            let mut first = map.lines().next().unwrap_or_default().split_whitespace();
            (first.next() == Some("0")).then(|| first.nth(1)?.parse::<u64>().ok()).flatten()
        };
        match (uid.is_root(), range("/proc/self/uid_map"), range("/proc/self/gid_map")) {
            (true, Some(uids), Some(gids)) => Self {
                uid: format!("0 0 {}", uids.min(65536)).into_bytes(),
                gid: format!("0 0 {}", gids.min(65536)).into_bytes(),
                deny_setgroups: false,
            },
            _ => Self {
                uid: format!("0 {uid} 1").into_bytes(),
                gid: format!("0 {gid} 1").into_bytes(),
                deny_setgroups: true,
            },
        }
    }
}

/// A job in the background of a shell ignores these two, `nohup` the third, and all that we start would do so too.
fn hear_signals() -> io::Result<()> {
    for ignored in [Signal::SIGINT, Signal::SIGQUIT, Signal::SIGHUP] {
        // SAFETY: the default action runs no code of ours.
        unsafe { signal(ignored, SigHandler::SigDfl) }?;
    }
    Ok(())
}

/// Runs in the forked child. Clones once more: the clone is in the new namespaces and goes on to exec, as process 1
/// of the new pid namespace; the caller stays outside to write the clone's maps and to hand on its exit status.
fn clone_into_namespaces(maps: &IdMaps) -> io::Result<()> {
    die_with_parent()?;
    hear_signals()?;
    let (wait, go) = nix::unistd::pipe()?;
    let flags = libc::CLONE_NEWUSER | libc::CLONE_NEWNS | libc::CLONE_NEWNET | libc::CLONE_NEWPID | libc::CLONE_NEWIPC;
    // SAFETY: a clone without a stack and without CLONE_VM is a fork; this process has one thread.
    let pid = unsafe { libc::syscall(libc::SYS_clone, libc::c_long::from(flags | libc::SIGCHLD), 0, 0, 0, 0) };
    match pid {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            drop(go);
            die_with_parent()?;
            // Without the byte the maps could not be written: nothing to go on with.
            if nix::unistd::read(&wait, &mut [0])? == 1 {
                Ok(())
            } else {
                Err(io::Error::from_raw_os_error(libc::EPERM))
            }
        }
        pid => {
            drop(wait);
            let written = write_maps(pid, maps);
            if written.is_ok() {
                let _ = nix::unistd::write(&go, b"!");
            }
            drop(go);
            written.and_then(|()| outlive(pid))
        }
    }
}

fn die_with_parent() -> io::Result<()> {
    Ok(nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)?)
}

fn write_maps(pid: libc::c_long, maps: &IdMaps) -> io::Result<()> {
    if maps.deny_setgroups {
        write_proc(pid, b"setgroups", b"deny")?;
    }
    write_proc(pid, b"gid_map", &maps.gid)?;
    write_proc(pid, b"uid_map", &maps.uid)
}

/// Writes `/proc/PID/NAME` without allocating.
fn write_proc(pid: libc::c_long, name: &[u8], content: &[u8]) -> io::Result<()> {
    let mut path = [0_u8; 64];
    let mut rest = &mut path[..63];
    io::Write::write_fmt(&mut rest, format_args!("/proc/{pid}/"))?;
    io::Write::write_all(&mut rest, name)?;
    let path = std::ffi::CStr::from_bytes_until_nul(&path).map_err(|_| io::ErrorKind::InvalidInput)?;
    let file = nix::fcntl::open(path, nix::fcntl::OFlag::O_WRONLY, nix::sys::stat::Mode::empty())?;
    let written = nix::unistd::write(&file, content)?;
    if written == content.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}

/// Waits for the clone and ends as it ended. Never returns to exec.
fn outlive(pid: libc::c_long) -> io::Result<()> {
    // The spawner waits for the end of a pipe whose other end is among these.
    // SAFETY: closes descriptors of this process, which uses none of them any more.
    unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, 0) };
    let pid = libc::pid_t::try_from(pid).map_err(|_| io::ErrorKind::InvalidData)?;
    let mut status = 0;
    // SAFETY: waits for our own child and leaves without running anything of the copied address space.
    unsafe {
        while libc::waitpid(pid, &raw mut status, 0) == -1 && *libc::__errno_location() == libc::EINTR {}
        libc::_exit(if libc::WIFEXITED(status) { libc::WEXITSTATUS(status) } else { 128 + libc::WTERMSIG(status) })
    }
}

/// Gives the namespaces their own mounts: nothing written to `/run` or `/etc/resolv.conf` reaches the machine.
fn settle() -> io::Result<()> {
    const NONE: Option<&str> = None;
    let resolv_conf = fs::canonicalize("/etc/resolv.conf").map_err(|error| {
        io::Error::other(format!("/etc/resolv.conf must exist, if only empty, to be covered: {error}"))
    })?;
    mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE)?;
    mount(Some("lab"), "/run", Some("tmpfs"), MsFlags::MS_NOSUID | MsFlags::MS_NODEV, Some("mode=0755"))?;
    fs::create_dir_all(DESK)?;
    if resolv_conf.starts_with("/run") {
        fs::create_dir_all(resolv_conf.parent().unwrap_or(Path::new("/run")))?;
        fs::write(&resolv_conf, "")?;
    } else {
        cover(&resolv_conf, "", "resolv.conf")?;
    }
    // The old /proc shows the pids of outside. Some containers refuse a new one; what needs inner pids then says so.
    let _ = mount(Some("proc"), "/proc", Some("proc"), MsFlags::MS_NOSUID | MsFlags::MS_NODEV, NONE);
    fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "0").or_else(ignore_absent)
}

fn ignore_absent(error: io::Error) -> io::Result<()> {
    if error.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(error) }
}

/// Binds a file of the lab's tmpfs with `content` over `path`, for this mount namespace.
pub(crate) fn cover(path: &Path, content: &str, name: &str) -> io::Result<()> {
    let file = Path::new(DESK).join(name);
    fs::write(&file, content)?;
    Ok(mount(Some(&file), path, None::<&str>, MsFlags::MS_BIND, None::<&str>)?)
}

/// What the resolvers of the host under test are: writes `/etc/resolv.conf` in place, as seen inside.
pub(crate) fn set_resolv_conf(content: &str) {
    fs::write("/etc/resolv.conf", content).expect("our own /etc/resolv.conf");
}

/// Gives the lab its own `/etc`, with copies of what name resolution and tools read there, so that a test may do with
/// its files what it likes. Nothing of an earlier `/etc/resolv.conf` of the lab remains.
///
/// # Panics
/// If the kernel refuses the mounts.
pub(crate) fn own_etc(resolv_conf: &str) {
    const NONE: Option<&str> = None;
    let etc = fresh_dir("etc");
    for file in ["passwd", "group", "nsswitch.conf", "services", "protocols", "hosts", "iproute2", "ld.so.cache", "ssl"]
    {
        let _ = Command::new("cp").arg("-a").arg(Path::new("/etc").join(file)).arg(&etc).output();
    }
    fs::write(etc.join("resolv.conf"), resolv_conf).expect("write resolv.conf");
    mount(Some(&etc), "/etc", NONE, MsFlags::MS_BIND, NONE).expect("bind /etc");
}

/// A fresh directory on the lab's tmpfs.
pub(crate) fn fresh_dir(name: &str) -> PathBuf {
    (0..)
        .map(|n| Path::new(DESK).join(format!("{name}.{n}")))
        .find(|dir| match fs::create_dir(dir) {
            Ok(()) => true,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => false,
            Err(error) => panic!("{}: {error}", dir.display()),
        })
        .expect("a free number")
}

/// Calls `look` until it answers, for what has no event to wait for; gives up after `limit`.
pub(crate) fn poll_until<T>(limit: Duration, mut look: impl FnMut() -> Option<T>) -> Option<T> {
    let end = std::time::Instant::now() + limit;
    loop {
        if let Some(found) = look() {
            return Some(found);
        }
        if std::time::Instant::now() >= end {
            return None;
        }
        thread::sleep(Duration::from_millis(2));
    }
}

/// The node that the test was given for [`needs::OPEN_TUN`]; `None` where the machine's own is open to all.
pub(crate) fn tun_node() -> Option<PathBuf> {
    env::var_os(TUN_NODE).map(PathBuf::from)
}

/// The environment that programs of the lab must not inherit.
pub(crate) fn private_environment() -> [OsString; 3] {
    [INSIDE.into(), client::ACT.into(), TUN_NODE.into()]
}
