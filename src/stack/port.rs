//! The device that smoltcp sees: at most one packet in, any number out.

use std::num::{NonZeroU16, NonZeroUsize};

use smoltcp::phy::{self, Checksum, ChecksumCapabilities, DeviceCapabilities, Medium, PacketMeta};
use smoltcp::time::Instant;

use super::frame::Transmit;

/// The largest packet given to the device in one piece. The kernel cuts what exceeds a device's `gso_max_size` with
/// its link header in software, which halves the speed of forwarded downloads; 64 000 stays below.
const SUPER_PACKET: usize = 64_000;

/// What the interface of one family may leave to the device.
///
/// smoltcp 0.14 makes super-packets of either family, but drops those of IPv6 as longer than the MTU and never says
/// into what they are to be cut. So its IPv6 interface believes in an MTU that fits them, and [`Cut`] does the rest.
pub(super) fn capabilities(mtu: usize, offload: bool, v6: bool) -> DeviceCapabilities {
    let mut capabilities = DeviceCapabilities::default();
    capabilities.medium = Medium::Ip;
    capabilities.max_transmission_unit = if offload && v6 { SUPER_PACKET } else { mtu };
    // Incoming checksums are checked before smoltcp sees a packet, and only where the kernel did not vouch for them.
    let mut checksum = ChecksumCapabilities::ignored();
    checksum.ipv4 = Checksum::Tx;
    checksum.icmpv4 = Checksum::Tx;
    checksum.icmpv6 = Checksum::Tx;
    if offload {
        capabilities.segmentation.tcpv4 = NonZeroUsize::new(SUPER_PACKET);
        capabilities.segmentation.tcpv6 = NonZeroUsize::new(SUPER_PACKET);
    } else {
        checksum.tcp = Checksum::Tx;
    }
    capabilities.checksum = checksum;
    capabilities
}

/// How the segments of an IPv6 flow are cut on a device with offloads.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cut {
    /// Payload bytes of each: what the client takes, and the MTU allows.
    pub(super) segment: NonZeroU16,
    /// The MSS to announce in the SYN-ACK.
    pub(super) announced: u16,
}

/// One visit of smoltcp to the device.
pub(super) struct Port<'a> {
    pub(super) incoming: Option<&'a [u8]>,
    pub(super) transmit: &'a mut dyn Transmit,
    pub(super) capabilities: &'a DeviceCapabilities,
    pub(super) cut: Option<Cut>,
    /// Sequence and acknowledgement number of the last TCP segment sent.
    pub(super) last: Option<(u32, u32)>,
}

impl Port<'_> {
    fn outgoing(&mut self) -> Outgoing<'_> {
        Outgoing { transmit: &mut *self.transmit, last: &mut self.last, cut: self.cut, gso: None }
    }
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
        Some((incoming, self.outgoing()))
    }

    fn transmit(&mut self, _now: Instant) -> Option<Self::TxToken<'_>> {
        if self.transmit.ready() { Some(self.outgoing()) } else { None }
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
    cut: Option<Cut>,
    gso: Option<NonZeroU16>,
}

impl phy::TxToken for Outgoing<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, write: F) -> R {
        let mut write = Some(write);
        let mut result = None;
        let (last, cut) = (self.last, self.cut);
        // A TCP header of ours has no options behind the handshake.
        let long = cut.filter(|cut| len > HEADERS_V6 + usize::from(cut.segment.get()));
        let gso = self.gso.or(long.map(|cut| cut.segment));
        let mut fill = |packet: &mut [u8]| {
            if let Some(write) = write.take() {
                result = Some(write(packet));
                *last = numbers(packet);
                if let Some(cut) = cut {
                    announce(packet, cut.announced);
                }
            }
        };
        if self.transmit.ready() {
            self.transmit.transmit(len, gso, &mut fill);
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

/// An IPv6 header and a TCP header without options.
const HEADERS_V6: usize = 40 + 20;

/// Puts the real MSS into an IPv6 SYN-ACK, whose checksum the device completes.
fn announce(packet: &mut [u8], mss: u16) {
    const SYN: u8 = 2;
    if packet.len() <= HEADERS_V6 || packet[40 + 13] & SYN == 0 {
        return;
    }
    if let Some(at) = super::tcp::mss_option(&packet[HEADERS_V6..]) {
        packet[HEADERS_V6 + at..HEADERS_V6 + at + 2].copy_from_slice(&mss.to_be_bytes());
    }
}

/// Sequence and acknowledgement number of a TCP segment without extension headers.
fn numbers(packet: &[u8]) -> Option<(u32, u32)> {
    let start = if packet.first()? >> 4 == 6 { 40 } else { usize::from(packet[0] & 15) * 4 };
    let word = |at: usize| Some(u32::from_be_bytes(packet.get(at..at + 4)?.try_into().ok()?));
    Some((word(start + 4)?, word(start + 8)?))
}
