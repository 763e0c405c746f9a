//! A place that looks like a host of its own: fresh user, mount and network namespaces around one test.
//!
//! The test binary is multi-threaded and `unshare(CLONE_NEWUSER)` wants a single thread, so a test runs itself again:
//! the fork between `fork` and `exec` has one thread, makes the namespaces there, and the test finds itself inside.

use std::fs;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{Gid, Uid, getgid, getuid};

const INSIDE: &str = "TUNPROXY_TEST_INSIDE";

/// Runs `body` in namespaces of its own. `name` is the full name of the calling test.
pub(crate) fn inside(name: &str, body: impl FnOnce()) {
    if std::env::var(INSIDE).is_ok_and(|inside| inside == name) {
        return body();
    }
    let (uid, gid) = (getuid(), getgid());
    let mut command = Command::new(std::env::current_exe().expect("own path"));
    command.args([name, "--exact", "--nocapture", "--include-ignored"]).env(INSIDE, name);
    // SAFETY: the closure makes system calls and short-lived strings only; it takes no lock that the parent might hold.
    unsafe { command.pre_exec(move || enter(uid, gid)) };
    let output = match command.output() {
        Ok(output) => output,
        Err(error) => panic!("no namespaces for {name}: {error}; see max_user_namespaces and AppArmor's restriction"),
    };
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "inside the namespaces:\n{stdout}\n{stderr}");
    assert!(stdout.contains("1 passed"), "the inner run did not run {name}:\n{stdout}\n{stderr}");
}

/// Makes the namespaces, with root mapped inside, and gives them their own /run and /etc/resolv.conf.
fn enter(uid: Uid, gid: Gid) -> io::Result<()> {
    unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET)?;
    fs::write("/proc/self/setgroups", "deny")?;
    fs::write("/proc/self/uid_map", format!("0 {uid} 1"))?;
    fs::write("/proc/self/gid_map", format!("0 {gid} 1"))?;
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::empty(), none)?;
    Ok(())
}

/// Gives the sandbox its own /etc on a tmpfs, with copies of what name resolution and tools read there.
pub(crate) fn own_etc(resolv_conf: &str) {
    let none = None::<&str>;
    mount(Some("tmpfs"), "/mnt", Some("tmpfs"), MsFlags::empty(), none).expect("mount a tmpfs");
    for file in ["passwd", "group", "nsswitch.conf", "services", "protocols", "hosts", "iproute2", "ld.so.cache"] {
        let _ = Command::new("cp").args(["-a", &format!("/etc/{file}"), "/mnt/"]).output();
    }
    fs::write("/mnt/resolv.conf", resolv_conf).expect("write resolv.conf");
    mount(Some("/mnt"), "/etc", none, MsFlags::MS_BIND, none).expect("bind /etc");
}

/// Runs a shell script and returns what it printed; fails the test when the script fails.
pub(crate) fn sh(script: &str) -> String {
    let output = Command::new("sh").args(["-euc", script]).output().expect("run sh");
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{script}\n{stdout}{}", String::from_utf8_lossy(&output.stderr));
    stdout
}
