//! Why the device could not be opened, and what to do.

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::anyhow;

use crate::platform::may_administer_network;
use crate::platform::rootless::who_forbids;

/// The TUN driver's node.
pub(super) const NODE: &str = "/dev/net/tun";

/// What a person can do about `error`, which opening the TUN `name` came to.
pub(super) fn explain_tun(name: &str, error: &io::Error) -> anyhow::Error {
    match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => {
            let granting = nix::sys::prctl::get_no_new_privs().unwrap_or(false);
            let granting = if granting { Granting::Unit } else { Granting::File };
            let obstacles = obstacles(may_administer_network(), granting, closed(Path::new(NODE)).as_deref(), error);
            anyhow!("no permission to make the TUN {name}: {obstacles}")
        }
        Some(libc::EBUSY) => anyhow!("the TUN {name} is in use by another program; choose another tun.device"),
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => {
            anyhow!("{NODE} is missing: the kernel's TUN driver is not loaded (sudo modprobe tun)")
        }
        // With its cause, of which more may be said.
        Some(number) => anyhow!(io::Error::from_raw_os_error(number)).context(format!("cannot make the TUN {name}")),
        None => anyhow!("cannot make the TUN {name}: {error}"),
    }
}

/// Why there is no thread for `what`.
pub(super) fn explain_thread(what: &str, error: &io::Error) -> anyhow::Error {
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::ENOMEM) => anyhow!(
            "cannot start the thread {what}: there may be no more threads of this user (`ulimit -u`), of this service \
             (TasksMax=) or container (pids.max), or no memory is left"
        ),
        Some(libc::EPERM | libc::EACCES | libc::ENOSYS) => {
            anyhow!("cannot start the thread {what}: {error}.\n{}", who_forbids())
        }
        _ => anyhow!("cannot start the thread {what}: {error}"),
    }
}

/// How a process like this one gets a capability.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Granting {
    /// From its file.
    File,
    /// From whoever starts it: what files give counts for nothing under no_new_privs.
    Unit,
}

/// Everything that is in the way: who removes the first obstacle must not stumble over the second.
fn obstacles(capable: bool, granting: Granting, closed: Option<&str>, error: &io::Error) -> String {
    let program = std::env::current_exe().unwrap_or_else(|_| "tunproxy".into());
    let give = match granting {
        Granting::File => {
            format!("sudo setcap cap_net_admin,cap_net_raw,cap_net_bind_service+ep {}", program.display())
        }
        Granting::Unit => "in its systemd unit, by AmbientCapabilities= and CapabilityBoundingSet= (setcap counts for \
                           nothing under NoNewPrivileges=)"
            .to_owned(),
    };
    match (capable, closed) {
        (false, None) => {
            format!("the capability CAP_NET_ADMIN is missing. Run it with sudo, or give it the right once: {give}")
        }
        (false, Some(node)) => format!(
            "the capability CAP_NET_ADMIN is missing, and {node}. Run it with sudo; or give it the right once: {give}, \
             and open the node: sudo chmod 0666 {NODE}"
        ),
        (true, Some(node)) => format!(
            "{node}, although the capability CAP_NET_ADMIN is there. Run it with sudo, or open the node: sudo chmod \
             0666 {NODE}; in a container, pass the device in (for Docker: --device {NODE})"
        ),
        (true, None) => format!(
            "{error}, although the capability CAP_NET_ADMIN is there: a container's settings or a security module \
             forbid it"
        ),
    }
}

/// How the node is closed to us, in words; `None` if it opens.
pub(super) fn closed(node: &Path) -> Option<String> {
    let error = OpenOptions::new().read(true).write(true).open(node).err()?;
    let mode = std::fs::metadata(node)
        .map_or_else(|_| String::new(), |it| format!(" (mode {:04o}, user {})", it.mode() & 0o7777, it.uid()));
    Some(format!("{}{mode} does not open: {error}", node.display()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn told(capable: bool, closed: Option<&str>) -> String {
        obstacles(capable, Granting::File, closed, &io::Error::from_raw_os_error(libc::EPERM))
    }

    #[test]
    fn who_cannot_get_it_from_a_file_is_not_told_to_try() {
        let told = obstacles(false, Granting::Unit, None, &io::Error::from_raw_os_error(libc::EPERM));
        assert!(told.contains("AmbientCapabilities=") && !told.contains("sudo setcap"), "{told}");
    }

    #[test]
    fn the_capability_is_asked_for_only_where_it_is_missing() {
        assert!(told(false, None).contains("setcap") && !told(false, None).contains("chmod"));
        assert!(told(false, Some("it is closed")).contains("setcap"));
        for closed in [None, Some("it is closed")] {
            assert!(!told(true, closed).contains("setcap"), "{closed:?}");
        }
        assert!(told(true, Some("it is closed")).contains("chmod"));
    }

    #[test]
    fn a_node_that_is_closed_is_told_with_its_mode() {
        let dir = tempfile::tempdir().unwrap();
        let node = dir.path().join("tun");
        std::fs::create_dir(&node).unwrap();
        std::fs::set_permissions(&node, std::fs::Permissions::from_mode(0o700)).unwrap();
        // A folder opens for writing to nobody, not even root.
        let said = closed(&node).unwrap();
        assert!(said.contains("(mode 0700, user "), "{said}");
        let open = dir.path().join("open");
        std::fs::write(&open, "").unwrap();
        assert_eq!(closed(&open), None);
    }
}
