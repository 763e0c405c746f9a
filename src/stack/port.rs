//! The device that smoltcp sees: at most one packet in, any number out.

use std::num::{NonZeroU16, NonZeroUsize};

use smoltcp::phy::{self, Checksum, ChecksumCapabilities, DeviceCapabilities, Medium, PacketMeta};
use smoltcp::time::Instant;

use super::frame::Transmit;

/// The largest packet given to the device in one piece. The kernel cuts what exceeds a device's `gso_max_size` with
/// its link header in software, which halves the speed of forwarded downloads; 64 000 stays below.
const SUPER_PACKET: usize = 64_000;

/// What the interface may leave to the device.
pub(super) fn capabilities(mtu: usize, offload: bool) -> DeviceCapabilities {
    let mut capabilities = DeviceCapabilities::default();
    capabilities.medium = Medium::Ip;
    capabilities.max_transmission_unit = mtu;
    // Incoming checksums are checked before smoltcp sees a packet, and only where the kernel did not vouch for them.
    let mut checksum = ChecksumCapabilities::ignored();
    checksum.ipv4 = Checksum::Tx;
    checksum.icmpv4 = Checksum::Tx;
    checksum.icmpv6 = Checksum::Tx;
    if offload {
        // IPv4 alone: smoltcp 0.14 makes IPv6 super-packets, and then drops them as longer than the MTU
        // (InterfaceInner::dispatch_ip), so that nothing beyond one segment ever reached the client.
        capabilities.segmentation.tcpv4 = NonZeroUsize::new(SUPER_PACKET);
    } else {
        checksum.tcp = Checksum::Tx;
    }
    capabilities.checksum = checksum;
    capabilities
}

/// One visit of smoltcp to the device.
pub(super) struct Port<'a> {
    pub(super) incoming: Option<&'a [u8]>,
    pub(super) transmit: &'a mut dyn Transmit,
    pub(super) capabilities: &'a DeviceCapabilities,
    /// Sequence and acknowledgement number of the last TCP segment sent.
    pub(super) last: Option<(u32, u32)>,
}

impl phy::Device for Port<'_> {
    type RxToken<'t>
        = Incoming<'t>
    where
        Self: 't;
    type TxToken<'t>
        = Outgoing<'t>
    where
        Self: 't;

    fn receive(&mut self, _now: Instant) -> Option<(Self::RxToken<'_>, Self::TxToken<'_>)> {
        let incoming = Incoming(self.incoming.take()?);
        Some((incoming, Outgoing { transmit: &mut *self.transmit, last: &mut self.last, gso: None }))
    }

    fn transmit(&mut self, _now: Instant) -> Option<Self::TxToken<'_>> {
        if self.transmit.ready() {
            Some(Outgoing { transmit: &mut *self.transmit, last: &mut self.last, gso: None })
        } else {
            None
        }
    }

    fn capabilities(&self) -> DeviceCapabilities {
        self.capabilities.clone()
    }
}

/// The packet being read.
pub(super) struct Incoming<'a>(&'a [u8]);

impl phy::RxToken for Incoming<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, read: F) -> R {
        read(self.0)
    }
}

/// A packet about to be written.
pub(super) struct Outgoing<'a> {
    transmit: &'a mut dyn Transmit,
    last: &'a mut Option<(u32, u32)>,
    gso: Option<NonZeroU16>,
}

impl phy::TxToken for Outgoing<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, write: F) -> R {
        let mut write = Some(write);
        let mut result = None;
        let last = self.last;
        let mut fill = |packet: &mut [u8]| {
            if let Some(write) = write.take() {
                result = Some(write(packet));
                *last = numbers(packet);
            }
        };
        if self.transmit.ready() {
            self.transmit.transmit(len, self.gso, &mut fill);
        }
        match (result, write) {
            (Some(result), _) => result,
            // An answer straight from ingest while the device is full: TCP repeats what matters.
            (None, Some(write)) => write(&mut vec![0; len]),
            (None, None) => unreachable!("the closure ran and left a result"),
        }
    }

    fn set_meta(&mut self, meta: PacketMeta) {
        self.gso = meta.segmentation_offload_size;
    }
}

/// Sequence and acknowledgement number of a TCP segment without extension headers.
fn numbers(packet: &[u8]) -> Option<(u32, u32)> {
    let start = if packet.first()? >> 4 == 6 { 40 } else { usize::from(packet[0] & 15) * 4 };
    let word = |at: usize| Some(u32::from_be_bytes(packet.get(at..at + 4)?.try_into().ok()?));
    Some((word(start + 4)?, word(start + 8)?))
}
