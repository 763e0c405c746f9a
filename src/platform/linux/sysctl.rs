//! Kernel parameters, by the files below /proc/sys.

use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};

use crate::platform::undo::Undone;

const ROOT: &str = "/proc/sys";

/// Reads a parameter; `path` is relative to /proc/sys.
///
/// # Errors
/// There is none of that name, or it may not be read.
pub fn read(path: &str) -> io::Result<String> {
    Ok(fs::read_to_string(file(path)?)?.trim_end().to_owned())
}

/// Writes a parameter, unless it has that value already.
pub(in crate::platform) fn write(path: &str, value: &str) -> io::Result<()> {
    if read(path)? == value {
        return Ok(());
    }
    fs::write(file(path)?, value)
}

/// Whether the parameter lies on a file system that takes writing, whoever may do it.
pub(in crate::platform) fn is_writable(path: &str) -> bool {
    let Ok(file) = file(path) else { return false };
    nix::sys::statvfs::statvfs(&file).is_ok_and(|it| !it.flags().contains(nix::sys::statvfs::FsFlags::ST_RDONLY))
}

/// Whether /proc/sys takes no writing, whoever it is: so in most containers.
#[must_use]
pub fn are_read_only() -> bool {
    !is_writable("net/ipv4/ip_forward")
}

/// The first port that anybody may listen on; those below take CAP_NET_BIND_SERVICE (ip-sysctl.rst).
#[must_use]
pub fn first_open_port() -> u16 {
    read("net/ipv4/ip_unprivileged_port_start").ok().and_then(|value| value.parse().ok()).unwrap_or(1024)
}

/// The ports that the kernel gives to those who ask for any, first and last (ip-sysctl.rst).
pub const PORT_RANGE: &str = "net/ipv4/ip_local_port_range";

/// How many ports the kernel has for those who ask for any; as many as it has by default where it does not say.
#[must_use]
pub fn local_ports() -> usize {
    let reserved = read("net/ipv4/ip_local_reserved_ports").unwrap_or_default();
    read(PORT_RANGE).ok().and_then(|range| ports_in(&range, &reserved)).unwrap_or(28_232)
}

/// Two numbers with a tab between them, less those of a list like `40000,50000-50009`.
fn ports_in(range: &str, reserved: &str) -> Option<usize> {
    let (first, last) = range.split_once(char::is_whitespace)?;
    let (first, last): (u16, u16) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
    let taken = reserved.split(',').filter_map(|part| {
        let (from, to) = part.split_once('-').unwrap_or((part, part));
        let (from, to): (u16, u16) = (from.trim().parse().ok()?, to.trim().parse().ok()?);
        Some((from.max(first)..=to.min(last)).len())
    });
    Some((first..=last).len().saturating_sub(taken.sum()))
}

/// Puts a parameter back to `old`, if it still has the value `ours`; with `None` in any case.
pub(in crate::platform) fn restore(path: &str, ours: Option<&str>, old: &str) -> io::Result<Undone> {
    let now = match read(path) {
        // The interface that it belonged to is gone.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Undone::AlreadyGone),
        now => now?,
    };
    if now == old {
        return Ok(Undone::AlreadyGone);
    }
    if ours.is_some_and(|ours| ours != now) {
        return Ok(Undone::LeftAlone);
    }
    fs::write(file(path)?, old)?;
    Ok(Undone::Restored)
}

/// Parameters that the kernel changes as well when the forwarding switch at `path` is thrown (ip-sysctl.rst).
pub(in crate::platform) fn dragged_along(path: &str) -> Vec<String> {
    let (family, extra) = match path {
        "net/ipv4/ip_forward" => ("ipv4", Some("net/ipv4/conf/all/accept_redirects")),
        "net/ipv6/conf/all/forwarding" => ("ipv6", None),
        _ => return Vec::new(),
    };
    let mut paths: Vec<String> = interfaces(family)
        .into_iter()
        .filter(|name| name != "all")
        .map(|name| format!("net/{family}/conf/{name}/forwarding"))
        .collect();
    paths.extend(extra.map(str::to_owned));
    paths
}

/// The names below net/FAMILY/conf: every interface, and `all` and `default`.
pub(in crate::platform) fn interfaces(family: &str) -> Vec<String> {
    let entries = fs::read_dir(format!("{ROOT}/net/{family}/conf")).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
}

/// The file of a parameter. A path out of a journal must not lead anywhere else.
fn file(path: &str) -> io::Result<PathBuf> {
    let relative = Path::new(path);
    match relative.components().all(|part| matches!(part, Component::Normal(_))) {
        true => Ok(Path::new(ROOT).join(relative)),
        false => Err(io::Error::new(io::ErrorKind::InvalidInput, "not below /proc/sys")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_cannot_leave_proc_sys() {
        for path in ["../../etc/passwd", "/etc/passwd", "net/../../x"] {
            assert!(read(path).is_err() && write(path, "1").is_err(), "{path}");
        }
    }

    #[test]
    fn ports_that_are_reserved_are_given_to_nobody() {
        let range = "32768\t60999";
        for (reserved, left) in [("", 28_232), ("8080", 28_232), ("40000,50000-50009", 28_221), ("1-65535", 0)] {
            assert_eq!(ports_in(range, reserved), Some(left), "{reserved}");
        }
        assert_eq!(ports_in("nothing", ""), None);
    }

    #[test]
    fn a_parameter_of_an_interface_that_is_gone_needs_no_undoing() {
        let path = "net/ipv4/conf/no-such-device/src_valid_mark";
        assert_eq!(restore(path, Some("1"), "0").unwrap(), Undone::AlreadyGone);
    }
}
