//! A private network namespace whose only way out is a device that somebody else serves; no root needed.
//!
//! The child half runs single-threaded, between a fresh start and `exec`: it makes the namespace, opens the device
//! there, hands the descriptors to its parent and becomes the command.

use std::ffi::{CString, OsStr, OsString};
use std::fs;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use ipnet::IpNet;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::{SigHandler, Signal, signal};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use serde::{Deserialize, Serialize};

pub use channel::{ChildError, go, receive};
use namespaces::{forbidden, kept_from_netlink};
pub use namespaces::{kept, make_namespaces, refused, who_forbids};

use super::netlink::Netlink;
use super::tun::{TunQueue, open_packet, open_tun};
use crate::platform::{Family, QUEUE_LENGTH};

mod channel;
mod cover;
mod namespaces;
mod reception;

/// The name of the device inside.
const DEVICE: &str = "tun0";
/// Its far end where /dev/net/tun is closed.
const FAR_END: &str = "tun0-far";

/// What the inside looks like.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Inside {
    /// The device's addresses.
    pub addresses: Vec<IpNet>,
    /// The device's MTU in bytes.
    pub mtu: u32,
    /// What /etc/resolv.conf names.
    pub nameserver: IpAddr,
    /// Queues to open.
    pub queues: usize,
    /// Nobody is left in the namespace when the command has ended. Else the device goes when we close it, so that whoever
    /// is left has no route and hears of that, and does not send to a device that nobody reads.
    pub dies_with_command: bool,
}

/// A step of the way inside that the system refused.
#[derive(Debug, thiserror::Error)]
pub enum RootlessError {
    /// User or network namespaces are not allowed here.
    #[error("this system does not let you make a private network namespace: {source}.\n{advice}")]
    Refused {
        /// The system's word.
        source: io::Error,
        /// What to do about it.
        advice: String,
    },
    /// The command cannot be run.
    #[error("cannot run {program}: {source}")]
    Command {
        /// The command.
        program: String,
        /// The system's word.
        source: io::Error,
    },
    /// Any other step.
    #[error("cannot {act}: {source}")]
    Step {
        /// The step.
        act: String,
        /// The system's word.
        source: io::Error,
    },
}

impl RootlessError {
    /// The exit code that a shell would give it.
    fn code(&self) -> u8 {
        match self {
            Self::Command { source, .. } if source.kind() == io::ErrorKind::NotFound => 127,
            Self::Command { .. } => 126,
            Self::Refused { .. } | Self::Step { .. } => 1,
        }
    }
}

fn step<E: Into<io::Error>>(act: &str) -> impl FnOnce(E) -> RootlessError + use<E> {
    let act = act.to_owned();
    move |source| RootlessError::Step { act, source: source.into() }
}

nix::ioctl_write_ptr_bad!(
    /// netdevice(7): the flags of an interface.
    set_interface_flags,
    libc::SIOCSIFFLAGS,
    libc::ifreq
);

/// Makes the namespace, hands its device to whoever holds the other end of `channel`, waits for the word to go, and
/// becomes `command`. Returns only if something went wrong: the exit code, once the other end was told what.
///
/// The process must have a single thread.
///
/// # Errors
/// What went wrong, if there is nobody at the other end.
pub fn enter(inside: &Inside, channel: RawFd, command: Vec<OsString>) -> Result<u8, RootlessError> {
    // SAFETY: the parent made this descriptor for us and nobody else here uses it.
    let channel = unsafe { OwnedFd::from_raw_fd(channel) };
    match prepare(inside, &channel, command) {
        Ok(never) => match never {},
        Err(error) => match channel::tell(&channel, &error) {
            Ok(()) => Ok(error.code()),
            Err(_) => Err(error),
        },
    }
}

fn prepare(
    inside: &Inside,
    channel: &OwnedFd,
    command: Vec<OsString>,
) -> Result<std::convert::Infallible, RootlessError> {
    // The command does not get the channel, and by its closing the parent knows that the command runs.
    fcntl(channel, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).map_err(step("keep the channel to ourselves"))?;
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).map_err(step("tie the command to us"))?;
    make_namespaces()?;
    let queues = open_device(inside)?;
    configure(inside)?;
    let covered = cover::hide_side_doors()?;
    cover::write_resolv_conf(inside.nameserver, &covered)?;
    channel::hand_over(channel, &queues)?;
    drop(queues);
    channel::wait_for_go(channel)?;
    if has_ipv6() {
        reception::wait_for(&inside.addresses);
    }
    drop_capabilities()?;
    take_the_place_of_our_parent();
    run(command)
}

/// Becomes `command`.
fn run(command: Vec<OsString>) -> Result<std::convert::Infallible, RootlessError> {
    let program = command.first().cloned().unwrap_or_default();
    let arguments: Result<Vec<CString>, _> =
        command.into_iter().map(|argument| CString::new(argument.into_vec())).collect();
    let arguments = arguments.map_err(|_| step("run a command with a zero byte in it")(invalid()))?;
    let Some(path) = arguments.first() else { return Err(step("run nothing")(invalid())) };
    // Our own runtime ignores it; the command expects the default (signal(7)).
    // SAFETY: no handler of ours is involved.
    unsafe { signal(Signal::SIGPIPE, SigHandler::SigDfl) }.map_err(step("reset SIGPIPE"))?;
    let error = match nix::unistd::execvp(path, &arguments).unwrap_err() {
        // A folder of PATH that this user may not enter is no sign of the command (execvp(3) says EACCES for both).
        Errno::EACCES if !is_found(&program) => Errno::ENOENT,
        error => error,
    };
    Err(RootlessError::Command { program: program.display().to_string(), source: error.into() })
}

/// What a service manager gave to the parent is meant for the command: sockets that it listens on and the watchdog name
/// the process that they are for (sd_listen_fds(3), sd_watchdog_enabled(3)). `NOTIFY_SOCKET` names none.
fn take_the_place_of_our_parent() {
    let parent = nix::unistd::getppid().to_string();
    for variable in ["LISTEN_PID", "WATCHDOG_PID"] {
        if std::env::var(variable).is_ok_and(|pid| pid == parent) {
            // SAFETY: this process has a single thread.
            unsafe { std::env::set_var(variable, std::process::id().to_string()) };
        }
    }
}

/// Whether there is such a file, where commands are looked for.
fn is_found(program: &OsStr) -> bool {
    if program.as_bytes().contains(&b'/') {
        return true;
    }
    let folders = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&folders).any(|folder| folder.join(program).is_file())
}

fn invalid() -> io::Error {
    io::ErrorKind::InvalidInput.into()
}

/// The TUN, or a veth with a packet socket where /dev/net/tun is closed to us.
fn open_device(inside: &Inside) -> Result<Vec<TunQueue>, RootlessError> {
    match open_tun(DEVICE, inside.queues) {
        Ok(queues) => {
            queues.iter().take(usize::from(inside.dies_with_command)).for_each(TunQueue::leave_end_to_namespace);
            Ok(queues)
        }
        Err(_closed) => Ok(vec![open_stand_in(inside)?]),
    }
}

/// The far end of the veth gets a namespace of its own, which has nobody but our packet socket: when that is closed, however we
/// die, the kernel takes the pair apart, and whoever is left behind the device has no route.
fn open_stand_in(inside: &Inside) -> Result<TunQueue, RootlessError> {
    let act = "make a namespace for the far end of the device";
    let here = fs::File::open("/proc/self/ns/net").map_err(step(act))?;
    let beside = socket(AddressFamily::Unix, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None).map_err(kept(act))?;
    unshare(CloneFlags::CLONE_NEWNET).map_err(forbidden(act))?;
    let opened = far_end(inside, &here);
    setns(&here, CloneFlags::CLONE_NEWNET).map_err(step(act))?;
    Ok(opened?.beside(beside))
}

/// Makes the pair, with its near end in the namespace `near`.
fn far_end(inside: &Inside, near: &fs::File) -> Result<TunQueue, RootlessError> {
    let wrong = |error| kept_from_netlink("make a veth in place of the TUN")(error);
    let mut netlink = Netlink::open().map_err(wrong)?;
    netlink.create_veth(DEVICE, FAR_END).map_err(wrong)?;
    netlink.set_noarp(DEVICE).map_err(wrong)?;
    netlink.move_to_netns(DEVICE, near).map_err(wrong)?;
    if switch_on_ipv6() {
        netlink.set_no_link_local(FAR_END).map_err(wrong)?;
    }
    netlink.set_mtu(FAR_END, inside.mtu).map_err(wrong)?;
    // It must not answer for the addresses that it sees.
    let _ = fs::write(format!("/proc/sys/net/ipv4/conf/{FAR_END}/arp_ignore"), "8");
    netlink.link_up(FAR_END).map_err(wrong)?;
    open_packet(FAR_END).map_err(kept("open a packet socket"))
}

/// Takes the device down beside which the socket is ([`TunQueue::stand_in`]), so that whoever is left in the namespace has no
/// route. Who made a user namespace may do that in it (user_namespaces(7)).
///
/// # Errors
/// The kernel's word.
pub fn take_down(beside: &OwnedFd) -> io::Result<()> {
    // SAFETY: all-zero bytes are a valid `ifreq`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(DEVICE.bytes()) {
        *to = from.cast_signed();
    }
    // No other flag of it can be changed in this way.
    request.ifr_ifru.ifru_flags = 0;
    // SAFETY: `request` outlives the call, which reads one `ifreq`.
    unsafe { set_interface_flags(beside.as_raw_fd(), &raw const request) }?;
    Ok(())
}

fn configure(inside: &Inside) -> Result<(), RootlessError> {
    let wrong = |error| kept_from_netlink("configure the private namespace")(error);
    let mut netlink = Netlink::open().map_err(wrong)?;
    netlink.link_up("lo").map_err(wrong)?;
    let v6 = switch_on_ipv6();
    if v6 {
        netlink.set_no_link_local(DEVICE).map_err(wrong)?;
    }
    netlink.set_mtu(DEVICE, inside.mtu).map_err(wrong)?;
    netlink.set_queue_length(DEVICE, QUEUE_LENGTH).map_err(wrong)?;
    netlink.link_up(DEVICE).map_err(wrong)?;
    for address in inside.addresses.iter().filter(|address| v6 || address.addr().is_ipv4()) {
        netlink.add_address(DEVICE, *address).map_err(wrong)?;
    }
    for family in [Family::V4, Family::V6].into_iter().filter(|family| v6 || *family == Family::V4) {
        netlink.add_default_route(DEVICE, family).map_err(wrong)?;
    }
    let group = nix::unistd::getegid();
    // `ping` without privileges; without it only `ping` is the poorer.
    let _ = fs::write("/proc/sys/net/ipv4/ping_group_range", format!("{group} {group}"));
    Ok(())
}

/// Switches IPv6 on in this namespace, which must be ours, and says whether that worked.
///
/// A host with `ipv6.disable_ipv6=1` passes that on to new namespaces, where it can be undone; with `ipv6.disable=1`
/// there is no IPv6 at all, and no setting for it.
#[must_use]
pub fn switch_on_ipv6() -> bool {
    for which in ["default", "all"] {
        let _ = fs::write(format!("/proc/sys/net/ipv6/conf/{which}/disable_ipv6"), "0");
    }
    has_ipv6()
}

/// Whether this namespace carries IPv6.
#[must_use]
pub fn has_ipv6() -> bool {
    fs::read_to_string("/proc/sys/net/ipv6/conf/all/disable_ipv6").is_ok_and(|value| value.trim() == "0")
}

/// The command starts with none of the capabilities that the way here needed, unless its user is root inside.
fn drop_capabilities() -> Result<(), RootlessError> {
    // SAFETY: plain numbers; clears the ambient set, which alone would survive `exec` for an ordinary user.
    let result = unsafe { libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) };
    Errno::result(result).map(drop).map_err(step("drop capabilities"))
}
