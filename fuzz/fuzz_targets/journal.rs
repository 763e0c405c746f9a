//! The journal: see `journal::run`.

#![no_main]

#[path = "../held/journal.rs"]
mod journal;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| journal::run(data));
