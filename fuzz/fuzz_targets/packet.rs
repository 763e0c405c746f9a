//! The packet path: see `packet::run`.

#![no_main]

#[path = "../held/packet/mod.rs"]
mod packet;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| packet::run(data));
