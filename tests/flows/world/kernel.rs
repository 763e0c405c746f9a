//! What the kernel does around a TUN device: it finishes checksums and cuts super-packets, by the virtio header alone.

use std::num::NonZeroU16;

use tunproxy::stack::{Transmit, VirtioHeader};

use super::MTU;
use super::packet;

/// The device as the stack's writer sees it.
pub(super) struct Device {
    offload: bool,
    /// Packets that it still takes in this turn.
    pub(super) room: usize,
    written: Vec<Vec<u8>>,
    /// Packets that it was asked to cut.
    pub(super) super_packets: usize,
}

impl Device {
    pub(super) fn new(offload: bool) -> Self {
        Self { offload, room: usize::MAX, written: Vec::new(), super_packets: 0 }
    }

    pub(super) fn written(&self) -> usize {
        self.written.len()
    }

    /// What was written, as it stands on the wire.
    pub(super) fn take(&mut self) -> Vec<Vec<u8>> {
        std::mem::take(&mut self.written)
    }
}

impl Transmit for Device {
    fn ready(&mut self) -> bool {
        self.room > 0
    }

    fn transmit(&mut self, len: usize, gso: Option<NonZeroU16>, fill: &mut dyn FnMut(&mut [u8])) {
        assert!(self.room > 0, "written to a device that takes nothing");
        self.room -= 1;
        self.super_packets += usize::from(gso.is_some());
        // What lies in the buffer from before must not shine through.
        let mut bytes = vec![0xa5; len];
        fill(&mut bytes);
        if self.offload {
            let header = VirtioHeader::seal(&mut bytes, gso);
            self.written.extend(finish(bytes, header));
        } else {
            assert!(gso.is_none(), "a plain device cannot cut");
            assert!(len <= MTU || bytes[0] >> 4 == 4, "IPv6 packets beyond the MTU are lost");
            self.written.push(bytes);
        }
    }
}

/// Does what `header` asks for.
pub(super) fn finish(mut bytes: Vec<u8>, header: VirtioHeader) -> Vec<Vec<u8>> {
    let raw = header.bytes();
    let word = |at: usize| usize::from(u16::from_ne_bytes([raw[at], raw[at + 1]]));
    let (flags, kind, header_len, size, start, offset) = (raw[0], raw[1], word(2), word(4), word(6), word(8));
    if kind == 0 {
        if flags & 1 != 0 {
            complete(&mut bytes, start, offset);
        }
        return vec![bytes];
    }
    assert_eq!(flags, 1, "segmentation needs the checksum to be left to the kernel");
    let v6 = bytes[0] >> 4 == 6;
    assert_eq!(kind, if v6 { 4 } else { 1 }, "the kind of segmentation fits the packet");
    assert_eq!(header_len, start + usize::from(bytes[start + 12] >> 4) * 4);
    assert!(size <= MTU - header_len, "segments fit the MTU");
    let (head, payload) = bytes.split_at(header_len);
    let count = payload.chunks(size).count();
    payload.chunks(size).enumerate().map(|(n, part)| segment(head, part, start, n, n + 1 == count, size)).collect()
}

fn segment(head: &[u8], part: &[u8], start: usize, n: usize, last: bool, size: usize) -> Vec<u8> {
    let mut bytes = [head, part].concat();
    let total = bytes.len();
    let sequence = u32::from_be_bytes(bytes[start + 4..start + 8].try_into().unwrap());
    bytes[start + 4..start + 8].copy_from_slice(&sequence.wrapping_add((n * size) as u32).to_be_bytes());
    if !last {
        // FIN and PSH belong to the last one.
        bytes[start + 13] &= !9;
    }
    packet::set_length(&mut bytes, total);
    bytes[start + 16..start + 18].fill(0);
    let sum = packet::transport_checksum(&bytes, start);
    bytes[start + 16..start + 18].copy_from_slice(&sum.to_be_bytes());
    bytes
}

/// The kernel sums from `start` on, over the pseudo-header's sum that it finds in the field.
fn complete(bytes: &mut [u8], start: usize, offset: usize) {
    let sum = packet::sum(&bytes[start..]);
    let field = if sum == 0 { 0xffff } else { sum };
    bytes[start + offset..start + offset + 2].copy_from_slice(&field.to_be_bytes());
}
