//! Packets out: straight into the device, or kept back for the moment that it is full.

use std::io;
use std::num::NonZeroU16;
use std::rc::Rc;

use tokio::io::unix::AsyncFd;

use crate::platform::{Framing, HEADROOM, TunQueue};
use crate::stack::{Transmit, VirtioHeader};

/// The largest packet that a device takes.
const LARGEST: usize = 65_536;

/// The write side of one queue. Holds at most one packet that the device did not take.
pub(super) struct Writer {
    queue: Rc<AsyncFd<TunQueue>>,
    buffer: Box<[u8]>,
    offload: bool,
    cuts_datagrams: bool,
    takes_any_length: bool,
    pending: Option<([u8; VirtioHeader::LEN], usize)>,
    /// Packets that the device refused for good.
    pub(super) lost: u64,
}

impl Writer {
    pub(super) fn new(queue: Rc<AsyncFd<TunQueue>>) -> Self {
        let offload = queue.get_ref().framing() != Framing::Plain;
        let cuts_datagrams = queue.get_ref().cuts_datagrams();
        let takes_any_length = queue.get_ref().framing() != Framing::Packet;
        let buffer = vec![0; HEADROOM + LARGEST].into_boxed_slice();
        Self { queue, buffer, offload, cuts_datagrams, takes_any_length, pending: None, lost: 0 }
    }

    /// Whether a packet waits for the device.
    pub(super) fn is_blocked(&self) -> bool {
        self.pending.is_some()
    }

    fn write(&mut self, header: [u8; VirtioHeader::LEN], len: usize) {
        match self.queue.get_ref().write(header, &mut self.buffer[..HEADROOM + len]) {
            Ok(()) => self.pending = None,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.pending = Some((header, len)),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) && cut_by_device(header) => {
                self.cuts_datagrams = false;
                self.pending = None;
                self.lost += 1;
            }
            // ENOBUFS, or a device that is down: this packet is lost, the next may not be.
            Err(_) => {
                self.pending = None;
                self.lost += 1;
            }
        }
    }
}

/// Whether the header asks for datagrams to be cut.
fn cut_by_device(header: [u8; VirtioHeader::LEN]) -> bool {
    VirtioHeader::parse(header).datagram_size().is_some()
}

impl Transmit for Writer {
    fn cuts_datagrams(&self) -> bool {
        self.cuts_datagrams
    }

    fn takes_any_length(&self) -> bool {
        self.takes_any_length
    }

    fn ready(&mut self) -> bool {
        if let Some((header, len)) = self.pending {
            self.write(header, len);
        }
        self.pending.is_none()
    }

    fn transmit(&mut self, len: usize, gso: Option<NonZeroU16>, fill: &mut dyn FnMut(&mut [u8])) {
        let packet = &mut self.buffer[HEADROOM..HEADROOM + len];
        fill(packet);
        let header = if self.offload { VirtioHeader::seal(packet, gso) } else { VirtioHeader::PLAIN };
        self.write(header.bytes(), len);
    }
}
