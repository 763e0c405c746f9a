//! Sockets that carry our mark.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use nix::sys::resource::{Resource, getrlimit};
use nix::sys::socket::{getsockopt, setsockopt, sockopt};
use nix::{getsockopt_impl, sockopt_impl};

use crate::platform::Fwmark;

sockopt_impl!(
    /// The path's MTU, IPv6.
    Ipv6Mtu,
    GetOnly,
    libc::IPPROTO_IPV6,
    libc::IPV6_MTU,
    libc::c_int
);

/// Bytes of datagrams that may wait for us: a burst at 10 Gbit/s while another task has the core.
const RECEIVE_BUFFER: usize = 4 << 20;

/// Makes room for bursts of datagrams; beyond `net.core.rmem_max` that takes CAP_NET_ADMIN, else as much as allowed.
pub(in crate::platform) fn deepen(socket: impl AsFd) {
    if setsockopt(&socket, sockopt::RcvBufForce, &RECEIVE_BUFFER).is_err() {
        // A smaller buffer loses more of a burst, nothing else.
        let _ = setsockopt(&socket, sockopt::RcvBuf, &RECEIVE_BUFFER);
    }
}

/// Sets `SO_MARK`, so that our own rules let the socket's packets pass (CAP_NET_ADMIN).
pub(in crate::platform) fn set_mark(socket: impl AsFd, mark: Fwmark) -> io::Result<()> {
    setsockopt(&socket, sockopt::Mark, &mark.0).map_err(io::Error::from)
}

/// The MTU of the path to where the socket is connected (`IP_MTU`, ip(7)).
pub(in crate::platform) fn path_mtu(socket: impl AsFd, ipv6: bool) -> Option<u32> {
    let mtu = if ipv6 { getsockopt(&socket, Ipv6Mtu) } else { getsockopt(&socket, sockopt::IpMtu) };
    mtu.ok().and_then(|mtu| u32::try_from(mtu).ok())
}

/// Where `tcpi_retransmits` and `tcpi_retrans` stand in it: how often the kernel's timer wanted to send again what is
/// unacknowledged, and how much of it has been.
const RETRANSMITS: usize = 2;
const RETRANS: usize = 36;
/// Where `tcpi_bytes_acked` stands in the kernel's `struct tcp_info` (linux/tcp.h, since Linux 4.1).
const BYTES_ACKED: usize = 120;

/// Whether the peer of a TCP socket has acknowledged anything, be it the SYN alone: then there has been a connection, whatever
/// has become of it. False where the kernel does not tell.
pub(in crate::platform) fn is_acknowledged(socket: impl AsFd) -> bool {
    tcp_info(socket).is_some_and(|info| info[BYTES_ACKED..].iter().any(|byte| *byte != 0))
}

/// Whether what a TCP socket has unacknowledged was to be sent again and was dropped on this host, by its firewall. The kernel
/// tells nobody but by that.
pub(in crate::platform) fn is_kept_in(socket: impl AsFd) -> bool {
    tcp_info(socket).is_some_and(|info| info[RETRANSMITS] > 0 && info[RETRANS..RETRANS + 4] == [0; 4])
}

/// The beginning of `struct tcp_info`; `None` where the kernel does not tell that much.
fn tcp_info(socket: impl AsFd) -> Option<[u8; BYTES_ACKED + 8]> {
    let mut info = [0; BYTES_ACKED + 8];
    let mut length = libc::socklen_t::try_from(info.len()).unwrap_or_default();
    let descriptor = socket.as_fd().as_raw_fd();
    // SAFETY: the kernel writes at most `length` bytes, which `info` has.
    let told = unsafe {
        libc::getsockopt(descriptor, libc::IPPROTO_TCP, libc::TCP_INFO, info.as_mut_ptr().cast(), &raw mut length)
    };
    (told == 0 && length as usize == info.len()).then_some(info)
}

/// How many descriptors this process may have: their numbers stay below that (`RLIMIT_NOFILE`).
pub(in crate::platform) fn descriptors() -> u64 {
    getrlimit(Resource::RLIMIT_NOFILE).map_or(u64::MAX, |(soft, _)| soft)
}
