//! What a test needs of the machine, found before it starts, and how to get what is missing.

use std::fs::{OpenOptions, Permissions};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::{env, io};

/// Which package of the distribution brings a program.
const PACKAGES: &[(&str, &str)] = &[
    ("ip", "iproute2"),
    ("nft", "nftables"),
    ("iptables-legacy", "iptables"),
    ("iptables-nft", "iptables"),
    ("curl", "curl"),
    ("dig", "dnsutils"),
    ("dnsmasq", "dnsmasq-base"),
    ("unbound", "unbound"),
    ("iperf3", "iperf3"),
    ("danted", "dante-server"),
    ("microsocks", "microsocks"),
    ("tinyproxy", "tinyproxy"),
    ("setpriv", "util-linux"),
    ("unshare", "util-linux"),
    ("prlimit", "util-linux"),
    ("conntrack", "conntrack"),
    ("strace", "strace"),
    ("ping", "iputils-ping"),
    ("traceroute", "traceroute"),
    ("sysctl", "procps"),
    ("busybox", "busybox"),
    ("nmap", "nmap"),
];

/// A need: the TUN driver may be opened by every user of the lab. Where the machine's node is closed to them, whoever may
/// make another gives the lab one of its own ([`open_node`]).
pub(crate) const OPEN_TUN: &str = "/dev/net/tun for every user";

/// A node of the TUN driver for the lab, and the folder that goes with it.
pub(crate) struct Node(tempfile::TempDir);

impl Node {
    pub(crate) fn path(&self) -> PathBuf {
        self.0.path().join("tun")
    }
}

/// Makes a node that every user may open; `None` where the machine's own is that.
///
/// # Errors
/// Why it cannot be made.
pub(crate) fn open_node() -> io::Result<Option<Node>> {
    use nix::sys::stat::{Mode, SFlag, makedev, mknod};
    let open = std::fs::metadata("/dev/net/tun")?.permissions().mode() & 0o006 == 0o006;
    if open {
        return Ok(None);
    }
    let node = Node(tempfile::Builder::new().permissions(Permissions::from_mode(0o755)).tempdir()?);
    let mode = Mode::from_bits_truncate(0o666);
    mknod(&node.path(), SFlag::S_IFCHR, mode, makedev(10, 200))?;
    std::fs::set_permissions(node.path(), Permissions::from_mode(0o666))?;
    // The file system may be one without devices.
    OpenOptions::new().read(true).write(true).open(node.path())?;
    Ok(Some(node))
}

/// Finds `program` in `PATH` or where the distribution keeps what only root's `PATH` holds.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|dir| dir.join(program))
        .find(|file| file.is_file())
}

/// The first of `needs` that this machine does not have, in words, with the way to get it.
///
/// A need is the name of a program, or a path that must open for reading and writing.
pub(crate) fn missing(needs: &[&str]) -> Option<String> {
    needs.iter().find_map(|need| match *need {
        OPEN_TUN => open_node().err().map(|error| {
            format!("{OPEN_TUN}: {error} (run the tests as root, or open the node to all: chmod 0666 /dev/net/tun)")
        }),
        path if path.starts_with('/') => closed(Path::new(path)),
        program => absent(program),
    })
}

fn absent(program: &str) -> Option<String> {
    if find(program).is_some() {
        return None;
    }
    let package = PACKAGES.iter().find(|(name, _)| *name == program).map_or(program, |(_, package)| package);
    Some(format!("{program} is not installed (apt-get install {package})"))
}

fn closed(device: &Path) -> Option<String> {
    let error = OpenOptions::new().read(true).write(true).open(device).err()?;
    let hint = match error.kind() {
        io::ErrorKind::PermissionDenied => "run the tests as root, or give yourself access to it",
        _ => "load the kernel module that brings it, or run on a kernel that has it",
    };
    Some(format!("{} does not open: {error} ({hint})", device.display()))
}

/// Says aloud that `test` did not run and why. Where `CI` is set that is a failure: a suite that skips is not green.
///
/// # Panics
/// Under `CI=true`.
pub(crate) fn skip(test: &str, why: &str) {
    assert!(env::var_os("CI").is_none_or(|ci| ci != "true"), "{test} cannot run here: {why}");
    pass_over(test, why);
}

/// The same for what may be missing under `CI=true`, too.
pub(crate) fn pass_over(test: &str, why: &str) {
    // Written straight to the descriptor: the test harness would swallow what the print macros say of a passing test.
    let _ = writeln!(io::stderr(), "\n*** SKIPPED {test}: {why}\n");
}
