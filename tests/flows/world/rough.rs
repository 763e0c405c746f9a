//! Clients that lack what modern ones have, and say more than they must: what such a one would send is made of the
//! segments of the client that is there.

use super::Random;
use super::packet::{self, ACK, FIN, RST, SYN};

const URG: u8 = 32;

/// What becomes of a client's segments. Shares are per million.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Rough {
    /// It does not permit SACK.
    pub(crate) no_sack: bool,
    /// Its windows are not scaled, and it takes no scaled ones.
    pub(crate) no_scale: bool,
    /// It takes segments of this size.
    pub(crate) segment_size: Option<u16>,
    /// Segments with an urgent pointer.
    pub(crate) urgent: u32,
    /// Acknowledgements that are followed by a keep-alive.
    pub(crate) keepalives: u32,
    /// Acknowledgements whose window is smaller than the client's, or shut.
    pub(crate) shrunk: u32,
}

impl Rough {
    /// Changes a packet of the client. Returns what is sent behind it.
    pub(super) fn change(&self, bytes: &mut [u8], random: &mut Random) -> Option<Vec<u8>> {
        if packet::protocol(bytes) != packet::TCP {
            return None;
        }
        let start = packet::header_length(bytes);
        let header = start + usize::from(bytes[start + 12] >> 4) * 4;
        let flags = bytes[start + 13];
        if flags & SYN != 0 {
            self.change_options(&mut bytes[start + 20..header]);
        } else if flags & RST == 0 {
            if random.happens(self.urgent) && header < bytes.len() {
                bytes[start + 13] |= URG;
                bytes[start + 18..start + 20].copy_from_slice(&1_u16.to_be_bytes());
            }
            if random.happens(self.shrunk) {
                let window = u16::from_be_bytes([bytes[start + 14], bytes[start + 15]]);
                let less = [0, 1, window / 2][random.below(3)].min(window);
                bytes[start + 14..start + 16].copy_from_slice(&less.to_be_bytes());
            }
        }
        packet::seal(bytes);
        let bare = flags & (SYN | RST | FIN | ACK) == ACK && header == bytes.len();
        (bare && random.happens(self.keepalives)).then(|| keepalive(bytes, start))
    }

    /// Options that it does not have become padding.
    fn change_options(&self, options: &mut [u8]) {
        let mut at = 0;
        while at < options.len() && options[at] != 0 {
            let length = if options[at] == 1 { 1 } else { usize::from(options[at + 1]) };
            match (options[at], self.segment_size) {
                (2, Some(size)) => options[at + 2..at + 4].copy_from_slice(&size.to_be_bytes()),
                (3, _) if self.no_scale => options[at..at + length].fill(1),
                (4, _) if self.no_sack => options[at..at + length].fill(1),
                _ => {}
            }
            at += length;
        }
    }
}

/// A bare acknowledgement as a keep-alive (RFC 9293 section 3.8.4).
fn keepalive(bare: &[u8], start: usize) -> Vec<u8> {
    let mut asks = bare.to_vec();
    let sequence = u32::from_be_bytes(asks[start + 4..start + 8].try_into().expect("four bytes"));
    asks[start + 4..start + 8].copy_from_slice(&sequence.wrapping_sub(1).to_be_bytes());
    packet::seal(&mut asks);
    asks
}
