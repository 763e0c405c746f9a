//! Capabilities for children. A program that got CAP_NET_ADMIN from its file (`setcap`) does not pass it on by itself.

use std::ffi::CString;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// The capabilities that make a difference to a run. What is missing costs its part (docs/host-changes.md).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Capability {
    /// The TUN, routes, rules, marks and the firewall.
    NetAdmin,
    /// ICMP; sockets bound to an interface before Linux 5.7.
    NetRaw,
    /// Ports below 1024.
    NetBindService,
}

impl Capability {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::NetAdmin, Self::NetRaw, Self::NetBindService];

    /// Its name, as manuals have it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::NetAdmin => "CAP_NET_ADMIN",
            Self::NetRaw => "CAP_NET_RAW",
            Self::NetBindService => "CAP_NET_BIND_SERVICE",
        }
    }

    /// Whether this thread has it, in its own user namespace.
    #[must_use]
    pub fn is_held(self) -> bool {
        sets().is_some_and(|sets| sets[0].effective & self.bit() != 0)
    }

    /// Its place in the sets (`linux/capability.h`).
    fn bit(self) -> u32 {
        1 << match self {
            Self::NetBindService => 10,
            Self::NetAdmin => 12,
            Self::NetRaw => 13,
        }
    }
}

/// `_LINUX_CAPABILITY_VERSION_3`: two words of 32 bits for each set.
const VERSION: u32 = 0x2008_0522;

/// `struct __user_cap_header_struct`.
#[repr(C)]
struct Header {
    version: u32,
    pid: i32,
}

/// `struct __user_cap_data_struct`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Sets {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// Lets the child of `command` have CAP_NET_ADMIN if we have it.
pub(super) fn hand_down_net_admin(command: &mut Command) {
    // SAFETY: between fork and exec `raise_net_admin` only makes system calls, on memory of its own stack.
    unsafe {
        command.pre_exec(|| {
            raise_net_admin();
            Ok(())
        });
    }
}

/// Whether this thread has CAP_NET_ADMIN, in its own user namespace.
#[must_use]
pub fn may_administer_network() -> bool {
    Capability::NetAdmin.is_held()
}

/// Whether the file of this program gives CAP_NET_ADMIN to whoever starts it (`setcap`).
#[must_use]
pub fn program_may_administer_network() -> bool {
    let Ok(program) = std::env::current_exe().map(|path| CString::new(path.into_os_string().into_vec())) else {
        return false;
    };
    let Ok(program) = program else { return false };
    let mut value = [0_u8; 64];
    // SAFETY: both names end in a zero, and the buffer is as long as is said.
    let length = unsafe {
        libc::getxattr(program.as_ptr(), c"security.capability".as_ptr(), value.as_mut_ptr().cast(), value.len())
    };
    usize::try_from(length).is_ok_and(|length| gives_net_admin(&value[..length.min(64)]))
}

/// Reads a `struct vfs_cap_data`: a word whose lowest bit makes the rest effective, then the permitted set (little-endian).
fn gives_net_admin(value: &[u8]) -> bool {
    let word = |at: usize| Some(u32::from_le_bytes(value.get(at..at + 4)?.try_into().ok()?));
    word(0).is_some_and(|head| head & 1 != 0)
        && word(4).is_some_and(|permitted| permitted & Capability::NetAdmin.bit() != 0)
}

/// The sets of this thread.
fn sets() -> Option<[Sets; 2]> {
    let header = Header { version: VERSION, pid: 0 };
    let mut sets = [Sets::default(); 2];
    // SAFETY: both structures are those of the version named in the header; 0 means the calling thread.
    let read = unsafe { libc::syscall(libc::SYS_capget, &raw const header, sets.as_mut_ptr()) };
    (read == 0).then_some(sets)
}

/// Puts CAP_NET_ADMIN into the inheritable and the ambient set (capabilities(7)). Without it, the child's own words
/// about what it may not do are better than ours, so failures are passed over.
fn raise_net_admin() {
    let bit = Capability::NetAdmin.bit();
    let Some(mut sets) = sets().filter(|sets| sets[0].permitted & bit != 0) else { return };
    let header = Header { version: VERSION, pid: 0 };
    sets[0].inheritable |= bit;
    // SAFETY: as above; the kernel only reads.
    unsafe { libc::syscall(libc::SYS_capset, &raw const header, sets.as_ptr()) };
    // SAFETY: plain numbers.
    unsafe { libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_RAISE, bit.trailing_zeros(), 0, 0) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_capabilities_of_a_file_are_read_as_setcap_writes_them() {
        // cap_net_admin,cap_net_raw+ep, and the same without e.
        let effective = [1, 0, 0, 2, 0, 0x30, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        assert!(gives_net_admin(&effective));
        let mut other = effective;
        other[0] = 0;
        assert!(!gives_net_admin(&other));
        let raw = [1, 0, 0, 2, 0, 0x20, 0, 0];
        assert!(!gives_net_admin(&raw) && !gives_net_admin(&raw[..3]) && !gives_net_admin(&[]));
    }
}
