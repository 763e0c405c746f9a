//! The device that smoltcp sees: at most one packet in, any number out.

use std::num::{NonZeroU16, NonZeroUsize};

use smoltcp::phy::{self, Checksum, ChecksumCapabilities, DeviceCapabilities, Medium, PacketMeta};
use smoltcp::time::Instant;

use super::frame::Transmit;
use super::progress::is_ahead;
use super::tcp::{clamp_segment_size, pieces, without_fin};

/// The largest packet given to the device in one piece. The kernel cuts what exceeds a device's `gso_max_size` with
/// its link header in software, which halves the speed of forwarded downloads; 64 000 stays below.
const SUPER_PACKET: usize = 64_000;

/// The size of a flow's segments where smoltcp does not know it.
///
/// IPv6 super-packets: smoltcp 0.14 makes them, and then drops them as longer than the MTU
/// (`InterfaceInner::dispatch_ip`, which also forgets their segment size). So its IPv6 interface believes in an MTU as
/// large as they are, and what would follow from that is put right here.
///
/// Paths with a smaller MTU than the device: smoltcp takes the segment size from the SYN and never changes it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cut {
    /// The largest payload of a segment of this flow.
    pub(super) segment: NonZeroU16,
    /// The largest payload that the real MTU allows, which SYN-ACKs announce.
    pub(super) most: u16,
    /// Bytes of the headers in front of it.
    headers: usize,
}

impl Cut {
    /// For super-packets over IPv6, on a device with this MTU, to a client that announced `size`.
    pub(super) fn of_device(mtu: usize, size: Option<u16>) -> Option<Self> {
        let most = u16::try_from(mtu.saturating_sub(60)).unwrap_or(u16::MAX);
        // As smoltcp reads it: 536 where nothing is said, and at least 48.
        let size = size.filter(|size| *size > 0).unwrap_or(536).max(48).min(most);
        NonZeroU16::new(size).map(|segment| Self { segment, most, headers: 60 })
    }

    /// The same as `known`, on a path with this MTU; larger segments than before never come of it.
    pub(super) fn for_path(known: Option<Self>, v6: bool, mtu: u16) -> Option<Self> {
        let headers = if v6 { 60 } else { 40 };
        let segment = NonZeroU16::new(mtu.saturating_sub(headers))?;
        Some(match known {
            Some(cut) => Self { segment: cut.segment.min(segment), ..cut },
            None => Self { segment, most: u16::MAX, headers: usize::from(headers) },
        })
    }
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
    /// Set where packets are cut by [`Cut`]'s measure.
    pub(super) cut: Option<Cut>,
    /// The sequence number of bare acknowledgements.
    pub(super) end: Option<u32>,
    /// What is sent again is not smoltcp's affair: see [`Known`].
    pub(super) known: Option<Known>,
    /// Bare acknowledgements are kept back, because there is more to tell than smoltcp does.
    pub(super) keep: bool,
    /// The last TCP segment sent, or kept back.
    pub(super) last: Option<Sent>,
}

/// Longer than any bare acknowledgement.
const SHORT: usize = 128;

/// What the client has not acknowledged. smoltcp sends all of that again when its own timer fires; such segments go no
/// further than this, because [`Recovery`](super::recovery::Recovery) knows what of it is missing.
#[derive(Debug, Clone, Copy)]
pub(super) struct Known {
    pub(super) start: u32,
    pub(super) end: u32,
    /// What was acknowledged to the client last, and the window of that.
    pub(super) said: (u32, u16),
}

impl Known {
    fn covers(&self, sent: &Sent) -> bool {
        let start = sent.end.wrapping_sub(sent.length);
        sent.speaks && !sent.syn && sent.length > 0 && is_ahead(start, self.start) && is_ahead(self.end, sent.end)
    }
}

/// What a segment said.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sent {
    /// The sequence number behind it, SYN and FIN counted.
    pub(super) end: u32,
    pub(super) acknowledgement: u32,
    /// The window as it stands there.
    pub(super) window: u16,
    /// Sequence numbers that it takes, and bytes of payload.
    pub(super) length: u32,
    pub(super) payload: usize,
    pub(super) syn: bool,
    /// It has an acknowledgement and is no reset, so that its numbers are the flow's own.
    pub(super) speaks: bool,
    /// It is a bare acknowledgement, and did not go out.
    pub(super) kept: bool,
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
        let sums = matches!(self.capabilities.checksum.tcp, Checksum::Tx);
        let (cut, end, known, keep) = (self.cut, self.end, self.known, self.keep);
        Outgoing { transmit: &mut *self.transmit, last: &mut self.last, cut, end, known, keep, sums, gso: None }
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
    end: Option<u32>,
    known: Option<Known>,
    keep: bool,
    /// The checksum is ours to compute.
    sums: bool,
    gso: Option<NonZeroU16>,
}

impl phy::TxToken for Outgoing<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(mut self, len: usize, write: F) -> R {
        let keep = self.keep && len < SHORT;
        if self.known.is_none() && !keep {
            return self.pass(len, write);
        }
        let mut packet = vec![0; len];
        let result = write(&mut packet);
        if let Some(sent) = numbers(&packet).filter(|sent| keep && sent.speaks && sent.length == 0) {
            *self.last = Some(Sent { kept: true, ..sent });
            return result;
        }
        let Some(known) = self.known.take() else {
            self.pass(len, |space| space.copy_from_slice(&packet));
            return result;
        };
        let Some(sent) = numbers(&packet).filter(|sent| known.covers(sent)) else {
            self.pass(len, |space| space.copy_from_slice(&packet));
            return result;
        };
        if (sent.acknowledgement, sent.window) != known.said {
            // What it says beside the data is news.
            let bare = without_fin(&packet, 0);
            let alone = Outgoing { transmit: self.transmit, last: &mut None, gso: None, ..self };
            alone.pass(bare.len(), |space| space.copy_from_slice(&bare));
        }
        *self.last = Some(sent);
        result
    }

    fn set_meta(&mut self, meta: PacketMeta) {
        self.gso = meta.segmentation_offload_size;
    }
}

impl Outgoing<'_> {
    fn pass<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, write: F) -> R {
        let mut write = Some(write);
        let mut result = None;
        let last = self.last;
        let (cut, end, sums) = (self.cut, self.end, self.sums);
        let over = cut.filter(|cut| len > cut.headers + usize::from(cut.segment.get()));
        let mut fill = |packet: &mut [u8]| {
            if let Some(write) = write.take() {
                result = Some(write(packet));
                if let Some(cut) = cut {
                    clamp_segment_size(packet, cut.most);
                }
                if let Some(end) = end {
                    advance(packet, end, sums);
                }
                *last = numbers(packet);
            }
        };
        // Only bare acknowledgements have options, and those never reach beyond one segment.
        match over.map(|cut| cut.segment) {
            _ if !self.transmit.ready() => {}
            // A device that completes no checksums cuts nothing either. What it does not take is sent again.
            Some(segment) if sums => {
                let mut whole = vec![0; len];
                fill(&mut whole);
                for piece in pieces(&whole, usize::from(segment.get())) {
                    if self.transmit.ready() {
                        self.transmit.transmit(piece.len(), None, &mut |packet| packet.copy_from_slice(&piece));
                    }
                }
            }
            segment => self.transmit.transmit(len, self.gso.into_iter().chain(segment).min(), &mut fill),
        }
        match (result, write) {
            (Some(result), _) => result,
            // An answer straight from ingest while the device is full: TCP repeats what matters.
            (None, Some(write)) => write(&mut vec![0; len]),
            (None, None) => unreachable!("the closure ran and left a result"),
        }
    }
}

/// Gives a bare acknowledgement the sequence number `end`: behind everything that was sent (SND.NXT, RFC 9293 section
/// 3.10.7.4), as far as the client's window goes.
/// smoltcp takes the one to which a retransmission has gone back. The client has that behind it and so must drop the
/// acknowledgement unread; if it does the same, the two repeat themselves for ever.
fn advance(packet: &mut [u8], end: u32, sums: bool) {
    let start = super::ip::header_length(packet);
    let Some(header) = packet.get(start..start + 20) else { return };
    let length = start + usize::from(header[12] >> 4) * 4;
    // SYN, FIN and RST have a place of their own.
    let bare = header[13] & 0b1_0111 == 0b1_0000 && length == packet.len();
    let sequence = u32::from_be_bytes([header[4], header[5], header[6], header[7]]);
    if !bare || sequence == end || !is_ahead(end, sequence) {
        return;
    }
    packet[start + 4..start + 8].copy_from_slice(&end.to_be_bytes());
    if sums {
        packet[start + 16..start + 18].fill(0);
        let sum = super::checksum::transport(packet, start, super::ip::TCP);
        packet[start + 16..start + 18].copy_from_slice(&sum.to_be_bytes());
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
        window: u16::from_be_bytes([*packet.get(start + 14)?, *packet.get(start + 15)?]),
        length: super::flow::low_bits(payload).wrapping_add(control),
        payload,
        syn: flags & 2 != 0,
        speaks: flags & 16 != 0 && flags & 4 == 0,
        kept: false,
    })
}
