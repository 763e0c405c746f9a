//! What a stack counts.

use super::Malformed;

/// What the stack counted since its start. Dropped packets are counted once each, by reason.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct Counters {
    /// Packets read, and those that pieces have made up.
    pub packets: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Dropped: lengths that contradict each other.
    pub bad_length: u64,
    /// Dropped: no IP packet, or a wrong checksum.
    pub bad_header: u64,
    /// Dropped: source routes and senseless extension headers.
    pub bad_options: u64,
    /// Dropped: a source that no packet may carry, or one that is ours.
    pub spoofed: u64,
    /// Pieces of packets.
    pub fragments: u64,
    /// Ignored: multicast, broadcast, and messages of ICMP that are for nobody here.
    pub ignored: u64,
    /// SYNs dropped because too many flows are being opened.
    pub flooded: u64,
    /// Dropped: SYNs and data for which there was no memory.
    pub no_memory: u64,
    /// TCP flows that were ended to make room for others.
    pub evicted: u64,
    /// TCP flows begun.
    pub flows: u64,
}

impl Counters {
    /// The sums of both.
    #[must_use]
    pub fn plus(&self, other: &Self) -> Self {
        Self {
            packets: self.packets + other.packets,
            bytes: self.bytes + other.bytes,
            bad_length: self.bad_length + other.bad_length,
            bad_header: self.bad_header + other.bad_header,
            bad_options: self.bad_options + other.bad_options,
            spoofed: self.spoofed + other.spoofed,
            fragments: self.fragments + other.fragments,
            ignored: self.ignored + other.ignored,
            flooded: self.flooded + other.flooded,
            no_memory: self.no_memory + other.no_memory,
            evicted: self.evicted + other.evicted,
            flows: self.flows + other.flows,
        }
    }

    pub(super) fn drop(&mut self, why: Malformed) {
        match why {
            Malformed::Length => self.bad_length += 1,
            Malformed::Header => self.bad_header += 1,
            Malformed::Options => self.bad_options += 1,
            Malformed::Martian => self.spoofed += 1,
        }
    }
}
