//! Making namespaces, and what forbids it.

use std::fs;
use std::io;

use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};

use super::RootlessError;
use crate::platform::NetlinkError;

/// Each kind, and the sysctl that says how many of them a user may have (namespaces(7)).
const KINDS: [(CloneFlags, &str); 3] = [
    (CloneFlags::CLONE_NEWUSER, "user.max_user_namespaces"),
    (CloneFlags::CLONE_NEWNET, "user.max_net_namespaces"),
    (CloneFlags::CLONE_NEWNS, "user.max_mnt_namespaces"),
];
/// Whole switches: the sysctl, the value that forbids, what is off then, and the value that allows.
const SWITCHES: [(&str, &str, &str, &str); 2] = [
    ("kernel.unprivileged_userns_clone", "0", "unprivileged user namespaces are switched off", "1"),
    ("kernel.apparmor_restrict_unprivileged_userns", "1", "AppArmor restricts user namespaces", "0"),
];
/// Where nobody can tell: a filter of system calls, or a profile of AppArmor, as containers have them.
const ELSEWHERE: &str = "inside a container, run it with namespaces and mounts allowed (for Docker: --security-opt \
                         seccomp=unconfined --security-opt apparmor=unconfined); elsewhere look at sysctl \
                         user.max_user_namespaces";
/// Where a filter of system calls is in force.
const FILTERED: &str = "a filter of system calls (seccomp) is in force here: inside a container, run it without (for Docker: \
                        --security-opt seccomp=unconfined --security-opt apparmor=unconfined); in a systemd unit look at \
                        RestrictNamespaces=, RestrictAddressFamilies= and SystemCallFilter=";
/// Where none is, and a call that asks for nothing special is refused all the same.
const CONFINED: &str = "a security module (AppArmor, SELinux) or an older filter of system calls forbids it: look at the kernel's \
                        log (`sudo dmesg`), or, inside a container, run it with --security-opt apparmor=unconfined and the like";

/// User, network and mount namespaces in which this user keeps its own ids.
///
/// # Errors
/// [`RootlessError::Refused`] says which switch of the system is off.
pub fn make_namespaces() -> Result<(), RootlessError> {
    let (user, group) = (nix::unistd::geteuid(), nix::unistd::getegid());
    // In one of its own a user sees limits of its own, and not those that it meets.
    let limits = KINDS.map(|(_, limit)| read(limit));
    // One by one, so that it can be told which is refused.
    for ((kind, limit), value) in KINDS.into_iter().zip(limits) {
        unshare(kind).map_err(|error| match error {
            // EUSERS before Linux 4.9.
            Errno::ENOSPC | Errno::EUSERS => {
                RootlessError::Refused { source: error.into(), advice: more(limit, value.as_deref()) }
            }
            error => refused(error.into()),
        })?;
    }
    let write = |file: &str, text: String| fs::write(file, text).map_err(refused);
    write("/proc/self/setgroups", "deny".into())?;
    write("/proc/self/uid_map", format!("{user} {user} 1"))?;
    write("/proc/self/gid_map", format!("{group} {group} 1"))
}

/// The refusal of something that only a private namespace allows, with what to do about it.
#[must_use]
pub fn refused(source: io::Error) -> RootlessError {
    RootlessError::Refused { source, advice: advice() }
}

/// A step inside that was refused; one that is not permitted there is forbidden by whoever forbids namespaces.
pub(super) fn forbidden<E: Into<io::Error>>(act: &str) -> impl FnOnce(E) -> RootlessError + use<E> {
    let act = act.to_owned();
    move |error| match error.into() {
        error if is_forbidden(&error) => refused(io::Error::new(error.kind(), format!("cannot {act}: {error}"))),
        source => RootlessError::Step { act, source },
    }
}

/// A step that asks for nothing special, as every program takes it: a process, a socket. One that is not permitted is kept from
/// us by a filter of system calls, mostly.
pub fn kept<E: Into<io::Error>>(act: &str) -> impl FnOnce(E) -> RootlessError + use<E> {
    let act = act.to_owned();
    move |error| match error.into() {
        error if is_forbidden(&error) => {
            let source = io::Error::new(error.kind(), format!("cannot {act}: {error}"));
            RootlessError::Refused { source, advice: who_forbids().to_owned() }
        }
        source => RootlessError::Step { act, source },
    }
}

/// The same of a conversation with the kernel about the network.
pub(super) fn kept_from_netlink(act: &str) -> impl FnOnce(NetlinkError) -> RootlessError + use<> {
    let act = act.to_owned();
    move |error| match is_forbidden(&error.source) {
        true => kept(&format!("{act}: {}", error.act))(error.source),
        false => RootlessError::Step { act, source: io::Error::other(error) },
    }
}

/// Whether somebody forbids it, and not its arguments. What systemd's RestrictAddressFamilies= leaves out looks as if the
/// kernel had none of it.
fn is_forbidden(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EPERM | libc::EACCES | libc::ENOSYS | libc::EAFNOSUPPORT))
}

/// Whether a filter of system calls is in force for this process (proc(5)).
fn is_filtered() -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    status.lines().filter_map(|line| line.strip_prefix("Seccomp:")).any(|mode| mode.trim() == "2")
}

/// What keeps a process like this one from what everybody may do.
#[must_use]
pub fn who_forbids() -> &'static str {
    if is_filtered() { FILTERED } else { CONFINED }
}

/// What to do where there may be no more of a kind.
fn more(limit: &str, value: Option<&str>) -> String {
    let why = match value {
        Some("0") => format!("{limit} is 0: none may be made"),
        Some(value) => {
            format!("as many as {limit} allows ({value}) are there already, or they lie too deep in each other")
        }
        None => format!("as many as {limit} allows are there already"),
    };
    format!("{why}; an administrator can allow more: sysctl {limit}=15000")
}

/// Which switch is off, as far as it can be seen.
fn advice() -> String {
    let off = SWITCHES.into_iter().filter(|(switch, forbids, ..)| read(switch).as_deref() == Some(*forbids));
    let lines: Vec<String> = off
        .map(|(switch, _, what, allows)| format!("{what}; an administrator can allow them: sysctl {switch}={allows}"))
        .collect();
    match (lines.is_empty(), is_filtered()) {
        (true, true) => FILTERED.to_owned(),
        (true, false) => ELSEWHERE.to_owned(),
        (false, _) => lines.join("\n"),
    }
}

fn read(sysctl: &str) -> Option<String> {
    let text = fs::read_to_string(format!("/proc/sys/{}", sysctl.replace('.', "/"))).ok()?;
    Some(text.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_that_is_reached_is_told_with_its_value() {
        let limit = "user.max_net_namespaces";
        assert!(more(limit, Some("0")).starts_with("user.max_net_namespaces is 0"));
        let told = more(limit, Some("7"));
        assert!(told.contains("(7)") && told.ends_with("sysctl user.max_net_namespaces=15000"), "{told}");
    }

    #[test]
    fn what_is_not_permitted_inside_is_told_with_what_allows_it_and_any_other_failure_as_it_is() {
        let told = forbidden("make mounts private")(Errno::EPERM).to_string();
        assert!(told.contains("cannot make mounts private: Operation not permitted"), "{told}");
        assert!(told.contains("sysctl") || is_filtered() && told.contains("seccomp"), "{told}");
        assert_eq!(
            forbidden("open it")(Errno::ENOENT).to_string(),
            "cannot open it: No such file or directory (os error 2)"
        );
    }

    #[test]
    fn what_everybody_may_do_and_we_may_not_is_told_with_who_forbids_it() {
        for error in [libc::EPERM, libc::EACCES, libc::ENOSYS, libc::EAFNOSUPPORT] {
            let told = kept("start a process")(io::Error::from_raw_os_error(error)).to_string();
            assert!(told.contains("cannot start a process: ") && told.contains("system calls"), "{told}");
        }
        let told = kept("start a process")(Errno::EAGAIN).to_string();
        assert!(!told.contains("system calls"), "{told}");
    }
}
