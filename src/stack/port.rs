//! The device that smoltcp sees: at most one packet in, any number out.

use std::num::{NonZeroU16, NonZeroUsize};

use smoltcp::phy::{self, Checksum, ChecksumCapabilities, DeviceCapabilities, Medium, PacketMeta};
use smoltcp::time::Instant;

use super::frame::Transmit;
use super::tcp::clamp_segment_size;

/// The largest packet given to the device in one piece. The kernel cuts what exceeds a device's `gso_max_size` with
/// its link header in software, which halves the speed of forwarded downloads; 64 000 stays below.
const SUPER_PACKET: usize = 64_000;

/// How IPv6 super-packets come about: smoltcp 0.14 makes them, and then drops them as longer than the MTU
/// (`InterfaceInner::dispatch_ip`, which also forgets their segment size). So its IPv6 interface believes in an MTU as
/// large as they are, and what would follow from that is put right here.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cut {
    /// Payload of each segment of this flow.
    pub(super) segment: NonZeroU16,
    /// The largest payload that the real MTU allows, which SYN-ACKs announce.
    pub(super) most: u16,
}

/// What the interface for one IP version may leave to the device.
pub(super) fn capabilities(mtu: usize, offload: bool, v6: bool) -> DeviceCapabilities {
    let mut capabilities = DeviceCapabilities::default();
    capabilities.medium = Medium::Ip;
    capabilities.max_transmission_unit = mtu;
    // Incoming checksums are checked before smoltcp sees a packet, and only where the kernel did not vouch for them.
    let mut checksum = ChecksumCapabilities::ignored();
    checksum.ipv4 = Checksum::Tx;
    checksum.icmpv4 = Checksum::Tx;
    checksum.icmpv6 = Checksum::Tx;
    if offload && v6 {
        capabilities.max_transmission_unit = SUPER_PACKET;
        capabilities.segmentation.tcpv6 = NonZeroUsize::new(SUPER_PACKET);
    } else if offload {
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
    /// Set where super-packets are cut by [`Cut`]'s measure.
    pub(super) cut: Option<Cut>,
    /// The last TCP segment sent.
    pub(super) last: Option<Sent>,
}

/// What a segment said.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sent {
    /// The sequence number behind it, SYN and FIN counted.
    pub(super) end: u32,
    pub(super) acknowledgement: u32,
    pub(super) syn: bool,
    /// It has an acknowledgement and is no reset, so that its numbers are the flow's own.
    pub(super) speaks: bool,
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

impl Port<'_> {
    fn outgoing(&mut self) -> Outgoing<'_> {
        Outgoing { transmit: &mut *self.transmit, last: &mut self.last, cut: self.cut, gso: None }
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
    last: &'a mut Option<Sent>,
    cut: Option<Cut>,
    gso: Option<NonZeroU16>,
}

impl phy::TxToken for Outgoing<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, write: F) -> R {
        let mut write = Some(write);
        let mut result = None;
        let last = self.last;
        let cut = self.cut;
        let mut fill = |packet: &mut [u8]| {
            if let Some(write) = write.take() {
                result = Some(write(packet));
                if let Some(cut) = cut {
                    clamp_segment_size(packet, cut.most);
                }
                *last = numbers(packet);
            }
        };
        // Only bare acknowledgements have options, and those never reach beyond one segment.
        let cut = cut.map(|cut| cut.segment).filter(|segment| len > 60 + usize::from(segment.get()));
        if self.transmit.ready() {
            self.transmit.transmit(len, self.gso.or(cut), &mut fill);
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

/// What the TCP segment in `packet`, which has no extension headers, says.
fn numbers(packet: &[u8]) -> Option<Sent> {
    let start = super::ip::header_length(packet);
    let word = |at: usize| Some(u32::from_be_bytes(packet.get(at..at + 4)?.try_into().ok()?));
    let (sequence, acknowledgement) = (word(start + 4)?, word(start + 8)?);
    let payload = packet.len().checked_sub(start + usize::from(packet.get(start + 12)? >> 4) * 4)?;
    let flags = *packet.get(start + 13)?;
    let control = u32::from(flags & 1) + u32::from(flags >> 1 & 1);
    Some(Sent {
        end: sequence.wrapping_add(super::flow::low_bits(payload)).wrapping_add(control),
        acknowledgement,
        syn: flags & 2 != 0,
        speaks: flags & 16 != 0 && flags & 4 == 0,
    })
}
