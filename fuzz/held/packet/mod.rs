//! Bytes as packets into the stack, and as what the tasks of its flows do meanwhile.
//!
//! Byte 0 chooses the device and who its clients are; then come acts, each a byte and its arguments ([`Act`]). Held to
//! be true: nothing panics (smoltcp included, whose panics are contained elsewhere), every packet is counted, every
//! packet that leaves is well-formed and goes where one may go, a turn ends, and when all is over nothing is left.

mod bytes;
mod device;
mod segment;
mod world;

use bytes::Bytes;
use world::World;

/// More acts teach nothing that fewer do not.
const MOST_ACTS: usize = 400;

/// One input, from beginning to end.
pub(crate) fn run(data: &[u8]) {
    let mut bytes = Bytes(data);
    let mut world = World::new(bytes.byte());
    for _ in 0..MOST_ACTS {
        if bytes.is_empty() {
            break;
        }
        world.act(&mut bytes);
    }
    world.end();
}
