//! The fuzz targets without a fuzzer: their seeds, those seeds with a few bytes changed, and bytes at random. A fuzzer
//! finds more (docs/fuzzing.md); this keeps the targets whole while the code beneath them changes.

#[path = "../fuzz/held/journal.rs"]
mod journal;
#[path = "../fuzz/held/packet/mod.rs"]
mod packet;

use std::path::Path;

use proptest::prelude::*;
use proptest::sample::{Index, select};
use proptest::test_runner::{Config, TestRunner};

/// A second or two.
const CASES: u32 = 4096;

/// The seeds of a target.
fn seeds(target: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds").join(target);
    let files = std::fs::read_dir(folder).expect("seeds");
    let seeds: Vec<_> = files.map(|file| std::fs::read(file.expect("a file").path()).expect("bytes")).collect();
    assert!(!seeds.is_empty());
    seeds
}

/// A seed in which some bytes are others, which ends early, or which goes on with another seed.
fn changed(seeds: Vec<Vec<u8>>) -> impl Strategy<Value = Vec<u8>> {
    let changes = proptest::collection::vec((any::<Index>(), any::<u8>()), 0..8);
    let end = (any::<bool>(), any::<Index>(), select(seeds.clone()), any::<bool>());
    (select(seeds), changes, end).prop_map(|(mut seed, changes, (ends, at, other, goes_on))| {
        for (at, byte) in changes {
            if !seed.is_empty() {
                let at = at.index(seed.len());
                seed[at] = byte;
            }
        }
        if ends && !seed.is_empty() {
            seed.truncate(at.index(seed.len()));
        }
        if goes_on {
            seed.extend(other);
        }
        seed
    })
}

fn hold(target: &str, run: fn(&[u8])) {
    let seeds = seeds(target);
    seeds.iter().for_each(|seed| run(seed));
    let mut runner = TestRunner::new(Config::with_cases(CASES));
    let bytes = prop_oneof![4 => changed(seeds), 1 => proptest::collection::vec(any::<u8>(), 0..600)];
    let result = runner.run(&bytes, |bytes| {
        run(&bytes);
        Ok(())
    });
    assert_eq!(result, Ok(()), "{target}");
}

#[test]
fn whatever_packets_bring_each_is_counted_and_nothing_is_left_of_them() {
    hold("packet", packet::run);
}

#[test]
fn whatever_a_journal_says_it_is_understood_whole_or_refused() {
    hold("journal", journal::run);
}
