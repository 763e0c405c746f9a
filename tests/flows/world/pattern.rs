//! The bytes that travel.

use super::Random;

/// Bytes whose place in a stream can be told from them: no two places less than 65 521 apart begin the same eight.
pub(crate) fn pattern(from: usize, length: usize) -> Vec<u8> {
    thread_local!(static TABLE: Vec<u8> = {
        let mut random = Random::new(0x7e57);
        (0..65_521).map(|_| (random.next() & 0xff) as u8).collect()
    });
    TABLE.with(|table| {
        let mut bytes = Vec::with_capacity(length);
        let mut at = from % table.len();
        while bytes.len() < length {
            let take = (table.len() - at).min(length - bytes.len());
            bytes.extend_from_slice(&table[at..at + take]);
            at = 0;
        }
        bytes
    })
}
