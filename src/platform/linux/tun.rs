//! The TUN device and its stand-in, each a descriptor that carries IP packets behind a virtio header.
//!
//! Why not a crate: see docs/decisions/0001-own-tun.md.

use std::cell::Cell;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

/// Bytes that a writer leaves free before a packet: an Ethernet header behind a virtio header.
pub const HEADROOM: usize = VNET + ETHERNET;
const VNET: usize = 10;
const ETHERNET: usize = 14;

/// `linux/if_tun.h`.
const IFF_TUN: libc::c_short = 0x0001;
const IFF_NO_PI: libc::c_short = 0x1000;
const IFF_VNET_HDR: libc::c_short = 0x4000;
const IFF_MULTI_QUEUE: libc::c_short = 0x0100;
const TUN_F_CSUM: libc::c_ulong = 0x01;
const TUN_F_TSO4: libc::c_ulong = 0x02;
const TUN_F_TSO6: libc::c_ulong = 0x04;
const TUN_F_USO4: libc::c_ulong = 0x20;
const TUN_F_USO6: libc::c_ulong = 0x40;
const TCP_OFFLOADS: libc::c_ulong = TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6;
const ALL_OFFLOADS: libc::c_ulong = TCP_OFFLOADS | TUN_F_USO4 | TUN_F_USO6;

nix::ioctl_write_ptr_bad!(tun_set_iff, nix::request_code_write!(b'T', 202, 4), libc::ifreq);
nix::ioctl_write_int_bad!(tun_set_persist, nix::request_code_write!(b'T', 203, 4));
nix::ioctl_write_int_bad!(tun_set_offload, nix::request_code_write!(b'T', 208, 4));
nix::ioctl_write_ptr_bad!(tun_set_vnet_hdr_size, nix::request_code_write!(b'T', 216, 4), libc::c_int);

/// How packets are framed on a descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Framing {
    /// A TUN with a virtio header and offloads.
    Offload,
    /// A TUN whose kernel refuses offloads: bare packets.
    Plain,
    /// A packet socket on a veth, with a virtio and an Ethernet header.
    Packet,
}

/// One queue of a device.
#[derive(Debug)]
pub struct TunQueue {
    descriptor: OwnedFd,
    framing: Framing,
    /// The far end's hardware address, learned from what it sends: the kernel takes TCP only from frames to itself.
    peer: Cell<[u8; 6]>,
    /// Packets of several UDP datagrams are cut by the kernel (Linux 6.2).
    cuts_datagrams: bool,
    /// Of a packet socket: a socket where the device is for which it stands in.
    beside_device: Option<OwnedFd>,
}

/// What was read: where the virtio header and where the packet is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// Offset of the virtio header, if there is one.
    pub header: Option<usize>,
    /// Offset of the packet.
    pub packet: usize,
}

/// Creates the TUN `name` with `queues` queues. It vanishes with its last descriptor.
///
/// # Errors
/// `EPERM` and `EACCES` without the right, `EBUSY` when the name is taken, `ENOENT` without the driver.
pub fn open_tun(name: &str, queues: usize) -> io::Result<Vec<TunQueue>> {
    let first = open_queue(name, IFF_VNET_HDR | IFF_MULTI_QUEUE);
    let (first, flags) = match first {
        Ok(queue) => (queue, IFF_VNET_HDR | IFF_MULTI_QUEUE),
        // Old or odd kernels refuse the flags, never the plain device.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => (open_queue(name, 0)?, 0),
        Err(error) => return Err(error),
    };
    let mut all = vec![first];
    if flags & IFF_MULTI_QUEUE != 0 {
        for _ in 1..queues {
            all.push(open_queue(name, flags)?);
        }
    }
    Ok(all)
}

fn open_queue(name: &str, flags: libc::c_short) -> io::Result<TunQueue> {
    let file = OpenOptions::new().read(true).write(true).open("/dev/net/tun")?;
    let descriptor = OwnedFd::from(file);
    // SAFETY: all-zero bytes are a valid `ifreq`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.is_empty() || name.len() >= libc::IFNAMSIZ {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "a device name has 1 to 15 bytes"));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = IFF_TUN | IFF_NO_PI | flags;
    // SAFETY: `request` outlives the call, which reads and writes one `ifreq`.
    unsafe { tun_set_iff(descriptor.as_raw_fd(), &raw const request) }?;
    let framing = if flags & IFF_VNET_HDR != 0 {
        set_offload(&descriptor)?;
        Framing::Offload
    } else {
        Framing::Plain
    };
    TunQueue::from_descriptor(descriptor, framing)
}

fn set_offload(descriptor: &OwnedFd) -> nix::Result<()> {
    let size: libc::c_int = VNET as libc::c_int;
    // SAFETY: the call reads one `int`.
    unsafe { tun_set_vnet_hdr_size(descriptor.as_raw_fd(), &raw const size) }?;
    if [ALL_OFFLOADS, TCP_OFFLOADS, 0].into_iter().any(|flags| takes_offloads(descriptor, flags)) {
        return Ok(());
    }
    Err(Errno::EINVAL)
}

fn takes_offloads(descriptor: &OwnedFd, flags: libc::c_ulong) -> bool {
    // SAFETY: the argument is a number.
    unsafe { tun_set_offload(descriptor.as_raw_fd(), flags as libc::c_int) }.is_ok()
}

/// A packet socket on `interface`, the near end of a veth whose far end programs use as their device. For places where
/// /dev/net/tun is closed but network namespaces are not.
///
/// # Errors
/// What the kernel reports; CAP_NET_RAW in the namespace is needed.
pub fn open_packet(interface: &str) -> io::Result<TunQueue> {
    const PACKET_VNET_HDR: libc::c_int = 15;
    let protocol = (libc::ETH_P_ALL as u16).to_be();
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let descriptor = socket(AddressFamily::Packet, SockType::Raw, flags, None)?;
    let index = nix::net::if_::if_nametoindex(interface)?;
    let on: libc::c_int = 1;
    // SAFETY: the option is one `int`, which outlives the call.
    let result = unsafe {
        libc::setsockopt(
            descriptor.as_raw_fd(),
            libc::SOL_PACKET,
            PACKET_VNET_HDR,
            (&raw const on).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    Errno::result(result)?;
    // SAFETY: all-zero bytes are a valid `sockaddr_ll`.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = protocol;
    address.sll_ifindex = index.cast_signed();
    // SAFETY: `address` is a `sockaddr_ll` of the length given.
    let result = unsafe {
        libc::bind(
            descriptor.as_raw_fd(),
            (&raw const address).cast(),
            size_of::<libc::sockaddr_ll>() as libc::socklen_t,
        )
    };
    Errno::result(result)?;
    let _ = socket2::SockRef::from(&descriptor).set_recv_buffer_size(4 << 20);
    TunQueue::from_descriptor(descriptor, Framing::Packet)
}

fn nonblocking(descriptor: &OwnedFd) -> nix::Result<()> {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    fcntl(descriptor, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).map(drop)
}

impl TunQueue {
    /// A queue around a descriptor that another process opened.
    ///
    /// # Errors
    /// The descriptor cannot be made non-blocking.
    pub fn from_descriptor(descriptor: OwnedFd, framing: Framing) -> io::Result<Self> {
        nonblocking(&descriptor)?;
        // Whoever opened it has asked the same, and may be another process: this changes nothing.
        let cuts_datagrams = framing == Framing::Offload && takes_offloads(&descriptor, ALL_OFFLOADS);
        Ok(Self { descriptor, framing, peer: Cell::new([0xff; 6]), cuts_datagrams, beside_device: None })
    }

    /// Whether a packet of several UDP datagrams may be written, which the kernel cuts (virtio 1.2, `GSO_UDP_L4`).
    #[must_use]
    pub fn cuts_datagrams(&self) -> bool {
        self.cuts_datagrams
    }

    /// Leaves the end of the device to the end of its network namespace, which must be private. Else whoever closes the last
    /// descriptor waits for the kernel to take the device apart, some 20 ms. A refusal costs that time alone.
    pub(super) fn leave_end_to_namespace(&self) {
        if self.framing != Framing::Packet {
            // SAFETY: the argument is a number.
            let _ = unsafe { tun_set_persist(self.descriptor.as_raw_fd(), 1) };
        }
    }

    /// The same with a socket of the network namespace that has the device for which it stands in.
    pub(super) fn beside(mut self, socket: OwnedFd) -> Self {
        self.beside_device = Some(socket);
        self
    }

    /// A socket of the namespace that has the device, where a packet socket stands in: by it the device is taken
    /// [down](super::rootless::take_down) at once. Else the kernel takes it apart some time after the last descriptor is closed.
    #[must_use]
    pub fn stand_in(&self) -> Option<OwnedFd> {
        self.beside_device.as_ref().and_then(|socket| socket.try_clone().ok())
    }

    /// All that has to be handed over to whoever is to serve it.
    pub(super) fn descriptors(&self) -> impl Iterator<Item = RawFd> {
        [Some(&self.descriptor), self.beside_device.as_ref()].into_iter().flatten().map(AsRawFd::as_raw_fd)
    }

    /// How its packets are framed.
    #[must_use]
    pub fn framing(&self) -> Framing {
        self.framing
    }

    /// Reads one packet into `buffer`. Returns its layout and the length of everything read.
    ///
    /// # Errors
    /// `WouldBlock` when none waits; `UnexpectedEof` when the device is gone.
    pub fn read(&self, buffer: &mut [u8]) -> io::Result<(Layout, usize)> {
        match self.framing {
            Framing::Offload => {
                let length = nix::unistd::read(&self.descriptor, buffer)?;
                Ok((Layout { header: Some(0), packet: VNET.min(length) }, length))
            }
            Framing::Plain => {
                let length = nix::unistd::read(&self.descriptor, buffer)?;
                Ok((Layout { header: None, packet: 0 }, length))
            }
            Framing::Packet => self.receive(buffer),
        }
    }

    fn receive(&self, buffer: &mut [u8]) -> io::Result<(Layout, usize)> {
        loop {
            // SAFETY: all-zero bytes are a valid `sockaddr_ll`.
            let mut from: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
            let mut length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
            // SAFETY: the buffer and the address are valid for the lengths given.
            let read = unsafe {
                libc::recvfrom(
                    self.descriptor.as_raw_fd(),
                    buffer.as_mut_ptr().cast(),
                    buffer.len(),
                    0,
                    (&raw mut from).cast(),
                    &raw mut length,
                )
            };
            let read = Errno::result(read)?;
            // What we sent ourselves comes by here too.
            if from.sll_pkttype == libc::PACKET_OUTGOING {
                continue;
            }
            // `result` has excluded negative values.
            let read = usize::try_from(read).unwrap_or(0);
            if let Some(source) = buffer.get(VNET + 6..VNET + 12).and_then(|bytes| bytes.try_into().ok()) {
                self.peer.set(source);
            }
            return Ok((Layout { header: Some(0), packet: HEADROOM.min(read) }, read));
        }
    }

    /// Writes a packet that begins at [`HEADROOM`] in `buffer`; the bytes before it are this method's to fill.
    ///
    /// # Errors
    /// `WouldBlock` when the device is full; anything else loses this packet alone.
    pub fn write(&self, header: [u8; VNET], buffer: &mut [u8]) -> io::Result<()> {
        let start = match self.framing {
            Framing::Offload => {
                buffer[ETHERNET..HEADROOM].copy_from_slice(&header);
                ETHERNET
            }
            Framing::Plain => HEADROOM,
            Framing::Packet => {
                buffer[..VNET].copy_from_slice(&behind_ethernet(header));
                let kind: u16 = if buffer[HEADROOM] >> 4 == 6 { 0x86dd } else { 0x0800 };
                buffer[VNET..VNET + 6].copy_from_slice(&self.peer.get());
                buffer[VNET + 6..VNET + 12].copy_from_slice(&[2, 0, 0, 0, 0, 1]);
                buffer[HEADROOM - 2..HEADROOM].copy_from_slice(&kind.to_be_bytes());
                0
            }
        };
        nix::unistd::write(&self.descriptor, &buffer[start..])?;
        Ok(())
    }
}

/// A virtio header's offsets count from the Ethernet header where there is one.
fn behind_ethernet(mut header: [u8; VNET]) -> [u8; VNET] {
    for at in [2, 6] {
        let word = u16::from_ne_bytes([header[at], header[at + 1]]);
        if word != 0 {
            header[at..at + 2].copy_from_slice(&(word + ETHERNET as u16).to_ne_bytes());
        }
    }
    header
}

impl AsFd for TunQueue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

impl AsRawFd for TunQueue {
    fn as_raw_fd(&self) -> RawFd {
        self.descriptor.as_raw_fd()
    }
}

impl From<TunQueue> for OwnedFd {
    fn from(queue: TunQueue) -> Self {
        queue.descriptor
    }
}
