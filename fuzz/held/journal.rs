//! Bytes as the journal of a run that was killed.
//!
//! Byte 0 says what is done to the rest before it is read: whether a right first line is put before it, whether it names
//! this host, and whether each line gets the checksum that belongs to it. Held to be true: nothing panics, and a journal
//! is understood as a whole or refused as a whole. What "as a whole" means is worked out here once more, by other means:
//! every record that was not taken back is due or died with its kernel, last one first, and only the end of the last
//! line may be missing.

use std::collections::HashSet;

use serde_json::Value;
use tunproxy::platform::Rehearsal;

/// One input: whatever it is, what was promised holds.
pub(crate) fn run(data: &[u8]) {
    let Some((choice, data)) = data.split_first() else { return };
    let text = journal(*choice, data);
    let Ok(rehearsal) = Rehearsal::of(&text) else { return };
    if text.is_empty() {
        assert!(rehearsal.undone.is_empty() && rehearsal.died == 0 && rehearsal.torn == 0);
        return;
    }
    let known = [&b"tunproxy-journal 1"[..], b"tunproxy-journal 2"];
    assert!(known.iter().any(|known| text.starts_with(known)), "it was read although nothing says that it is known");
    let records: Vec<&[u8]> = text.split(|byte| *byte == b'\n').skip(1).collect();
    let (mut left, mut seen, mut broken) = (Vec::new(), HashSet::new(), 0);
    for (number, line) in records.iter().enumerate() {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        match record(line) {
            _ if line.is_empty() => {}
            Some(Record::Undo(id)) => {
                assert!(seen.insert(id), "each number comes once");
                left.push(id);
            }
            Some(Record::Void(id)) => left.retain(|other| *other != id),
            None => {
                // A hole that a power failure left is a line of a kernel that is no more.
                let hole = line.contains(&0) && choice & 3 == 1;
                assert!(number + 1 == records.len() || hole || choice & 1 == 0, "a broken line was passed over");
                broken += 1;
            }
        }
    }
    assert_eq!(rehearsal.torn, broken);
    let due: Vec<u64> = rehearsal.undone.iter().map(|(id, _)| *id).collect();
    if rehearsal.elsewhere {
        assert!(due.is_empty() && rehearsal.died == 0, "nothing is done for a namespace that may still be there");
        return;
    }
    assert_eq!(due.len() + rehearsal.died, left.len(), "each change is undone or died, none is forgotten");
    let mut later = left.iter().rev();
    assert!(due.iter().all(|id| later.any(|other| other == id)), "last change first");
}

/// The bytes of the journal.
fn journal(choice: u8, data: &[u8]) -> Vec<u8> {
    let mut text = Vec::new();
    if choice & 1 != 0 {
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let namespace =
            std::fs::metadata("/proc/thread-self/ns/net").map_or(0, |it| std::os::unix::fs::MetadataExt::ino(&it));
        let boot = if choice & 2 != 0 { boot.trim() } else { "an earlier one" };
        let namespace = if choice & 4 != 0 { namespace } else { 1 };
        let place = serde_json::json!({"boot": boot, "namespace": namespace});
        let version = if choice & 16 != 0 { 2 } else { 1 };
        text.extend(format!("tunproxy-journal {version} {place}\n").bytes());
    }
    if choice & 8 == 0 {
        text.extend(data);
        return text;
    }
    let whole = data.split_last().map_or(data, |(last, rest)| if *last == b'\n' { rest } else { data });
    for line in whole.split(|byte| *byte == b'\n') {
        text.extend(format!("{:016x} ", fnv(line)).bytes());
        text.extend(line);
        text.push(b'\n');
    }
    text
}

enum Record {
    Undo(u64),
    Void(u64),
}

/// A line with its right checksum that holds a record; nothing is said of what the record asks for.
fn record(line: &[u8]) -> Option<Record> {
    let line = std::str::from_utf8(line).ok()?;
    let (sum, json) = line.split_once(' ')?;
    (u64::from_str_radix(sum, 16) == Ok(fnv(json.as_bytes()))).then_some(())?;
    let value: Value = serde_json::from_str(json).ok()?;
    let id = |name: &str| value.get(name)?.get("id")?.as_u64();
    id("Undo").map(Record::Undo).or_else(|| id("Void").map(Record::Void))
}

fn fnv(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}
