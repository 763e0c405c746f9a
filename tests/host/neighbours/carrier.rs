//! A tunnel of somebody else's, as WireGuard, Tailscale and OpenVPN look to a host: a device, and a UDP socket that
//! carries its packets, with a mark or without.

use std::fs::{File, OpenOptions};
use std::io::{self, PipeWriter, Read, Write};
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::thread::JoinHandle;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use socket2::SockRef;

use super::super::support::Netns;

/// What fits into a datagram on a link of 1500 bytes, as WireGuard's devices have it.
const MTU: u32 = 1420;
/// The address of the host's end inside of the tunnel.
pub(crate) const NEAR_V4: &str = "10.66.0.2";
/// The same for IPv6.
pub(crate) const NEAR_V6: &str = "fd66::2";

/// Both ends of a tunnel, until it is dropped.
pub(crate) struct Carrier {
    ends: Vec<(PipeWriter, JoinHandle<()>)>,
}

impl Carrier {
    /// Makes `device` on `host`, with addresses inside of the tunnel and no routes, and its other end on `far`, which
    /// listens at `outer`. The near end's socket carries `mark`, and has no address before its first packet.
    ///
    /// # Panics
    /// If the kernel refuses any of that.
    pub(crate) fn start(host: &Netns, device: &str, mark: Option<u32>, far: &Netns, outer: &str) -> Self {
        let outer: SocketAddr = outer.parse().expect("an address");
        let near_device = tun(host, device);
        let far_device = tun(far, device);
        host.address(device, &[&format!("{NEAR_V4}/32"), &format!("{NEAR_V6}/128")]);
        far.address(device, &["10.66.0.1/32", "fd66::1/128"]);
        far.routes(&[&format!("{NEAR_V4}/32 dev {device}"), &format!("{NEAR_V6}/128 dev {device}")]);
        let any: SocketAddr = if outer.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }.parse().expect("an address");
        let near = host.enter(move || -> io::Result<UdpSocket> {
            let socket = UdpSocket::bind(any)?;
            if let Some(mark) = mark {
                SockRef::from(&socket).set_mark(mark)?;
            }
            Ok(socket)
        });
        let near = near.expect("a marked socket");
        let listening = far.enter(move || UdpSocket::bind(outer)).expect("the far end's port");
        Self { ends: vec![end(near_device, near, Some(outer)), end(far_device, listening, None)] }
    }
}

impl Drop for Carrier {
    fn drop(&mut self) {
        for (stop, thread) in self.ends.drain(..) {
            drop(stop);
            let _ = thread.join();
        }
    }
}

/// A TUN device that is up and vanishes with the file.
fn tun(ns: &Netns, name: &str) -> File {
    let owned = name.to_owned();
    let file = ns.enter(move || {
        let file =
            OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun").expect("TUN");
        // struct ifreq: a name of 16 bytes, then the flags IFF_TUN | IFF_NO_PI.
        let mut request = [0_u8; 40];
        request[..owned.len()].copy_from_slice(owned.as_bytes());
        request[16..18].copy_from_slice(&0x1001_u16.to_ne_bytes());
        // SAFETY: TUNSETIFF reads and writes one struct ifreq, which the buffer has room for.
        let made = unsafe { libc::ioctl(file.as_raw_fd(), 0x4004_54ca, request.as_mut_ptr()) };
        assert_eq!(made, 0, "TUNSETIFF: {}", io::Error::last_os_error());
        file
    });
    ns.ip(&format!("link set {name} mtu {MTU} addrgenmode none up"));
    file
}

/// Carries packets between `device` and `socket`, to `peer` or to whoever sent last, until the pipe is dropped.
fn end(device: File, socket: UdpSocket, peer: Option<SocketAddr>) -> (PipeWriter, JoinHandle<()>) {
    let (stopped, stop) = io::pipe().expect("a pipe");
    socket.set_nonblocking(true).expect("our own socket");
    SockRef::from(&socket).set_recv_buffer_size(4 << 20).expect("our own socket");
    let thread = std::thread::spawn(move || {
        let (mut peer, mut packet) = (peer, vec![0; 65_536]);
        loop {
            let mut ready =
                [device.as_fd(), socket.as_fd(), stopped.as_fd()].map(|it| PollFd::new(it, PollFlags::POLLIN));
            let _ = poll(&mut ready, PollTimeout::NONE);
            if ready[2].revents().is_some_and(|events| !events.is_empty()) {
                return;
            }
            // What cannot be carried is lost, as on any link.
            while let Ok(length) = (&device).read(&mut packet) {
                let _ = peer.map(|peer| socket.send_to(&packet[..length], peer));
            }
            while let Ok((length, from)) = socket.recv_from(&mut packet) {
                peer = Some(from);
                let _ = (&device).write(&packet[..length]);
            }
        }
    });
    (stop, thread)
}
