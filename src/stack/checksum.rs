//! The Internet checksum (RFC 1071).

/// The one's complement sum of `bytes`, added to `sum`, not yet folded.
fn add(mut sum: u64, bytes: &[u8]) -> u64 {
    let (words, rest) = bytes.as_chunks::<4>();
    for word in words {
        sum += u64::from(u32::from_be_bytes(*word));
    }
    for (at, byte) in rest.iter().enumerate() {
        sum += u64::from(*byte) << (if at % 2 == 0 { 8 } else { 0 });
    }
    sum
}

fn fold(mut sum: u64) -> u16 {
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    // The loop ends with at most 16 bits set.
    u16::try_from(sum).unwrap_or_default()
}

/// The checksum field for `bytes`, in which the field itself is zero.
#[must_use]
pub(super) fn of(bytes: &[u8]) -> u16 {
    !fold(add(0, bytes))
}

/// The same for bytes that stand in two places; `head` has an even length.
#[must_use]
pub fn of_both(head: &[u8], rest: &[u8]) -> u16 {
    !fold(add(add(0, head), rest))
}

/// The folded sum of the pseudo-header (RFC 9293 section 3.1, RFC 8200 section 8.1) of the IP packet `packet`, whose
/// transport header begins at `start`. Not inverted: what offloading devices expect in the checksum field.
#[must_use]
pub(super) fn pseudo(packet: &[u8], start: usize, protocol: u8) -> u16 {
    let addresses = if packet[0] >> 4 == 6 { &packet[8..40] } else { &packet[12..20] };
    let length = (packet.len() - start) as u64;
    fold(add(length + u64::from(protocol), addresses))
}

/// The transport checksum of the IP packet `packet`, whose transport header begins at `start`: for a field of zero the
/// value to put there, for a filled field zero if it is right.
#[must_use]
pub(super) fn transport(packet: &[u8], start: usize, protocol: u8) -> u16 {
    !fold(add(u64::from(pseudo(packet, start, protocol)), &packet[start..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_example_of_rfc_1071_sums_to_ddf2() {
        assert_eq!(of(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]), !0xddf2);
    }

    #[test]
    fn an_odd_last_byte_counts_as_the_high_half_of_a_word() {
        assert_eq!(of(&[0x12, 0x34, 0x56]), !(0x1234 + 0x5600));
        assert_eq!(of(&[0x12]), !0x1200);
        assert_eq!(of(&[0x12, 0x34, 0x56, 0x78, 0x9a]), !fold(0x1234 + 0x5678 + 0x9a00));
    }
}
