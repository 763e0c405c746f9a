//! What a test needs of the machine, found before it starts, and how to get what is missing.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::{env, io};

/// Which package of the distribution brings a program.
const PACKAGES: &[(&str, &str)] = &[
    ("ip", "iproute2"),
    ("nft", "nftables"),
    ("curl", "curl"),
    ("dig", "dnsutils"),
    ("iperf3", "iperf3"),
    ("danted", "dante-server"),
    ("microsocks", "microsocks"),
    ("tinyproxy", "tinyproxy"),
    ("setpriv", "util-linux"),
    ("ping", "iputils-ping"),
    ("busybox", "busybox"),
];

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
    needs.iter().find_map(|need| if need.starts_with('/') { closed(Path::new(need)) } else { absent(need) })
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
    // Written straight to the descriptor: the test harness would swallow what the print macros say of a passing test.
    let _ = writeln!(io::stderr(), "\n*** SKIPPED {test}: {why}\n");
}
