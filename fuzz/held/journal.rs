//! Bytes as the journal of a run that was killed.
//!
//! Byte 0 says what is done to the rest before it is read: whether a right first line is put before it, whether it names
//! this host, in which version it is written, whether each line gets the checksums that belong to it, and whether one byte of
//! all that is changed (two bytes of where, one of what). Held to be true: nothing panics, and a journal
//! is understood as a whole or refused as a whole. What "as a whole" means is worked out here once more, by other means:
//! every record that was not taken back is due or died with its kernel, last one first, and only the end of the last
//! line may be missing.

use std::collections::HashSet;

use serde_json::Value;
use tunproxy::platform::Rehearsal;

/// One input: whatever it is, what was promised holds.
pub(crate) fn run(data: &[u8]) {
    let Some((choice, data)) = data.split_first() else { return };
    let changing = choice & 64 != 0 && data.len() > 3;
    let (change, data) = if changing { data.split_at(3) } else { data.split_at(0) };
    let mut text = journal(*choice, data);
    if let [high, low, byte] = *change {
        let at = usize::from(u16::from_be_bytes([high, low])) % text.len().max(1);
        if let Some(old) = text.get_mut(at) {
            let old = std::mem::replace(old, byte);
            // In an earlier boot it may be in a hole, or be one.
            let noticed = old != byte && choice & 41 == 41 && (choice & 2 != 0 || !text.contains(&0));
            assert!(!noticed || Rehearsal::of(&text).is_err(), "byte {at} was changed, and nobody noticed");
        }
    }
    let Ok(rehearsal) = Rehearsal::of(&text) else { return };
    if text.is_empty() {
        assert!(rehearsal.undone.is_empty() && rehearsal.died == 0 && rehearsal.torn == 0);
        return;
    }
    let known = [&b"tunproxy-journal 1"[..], b"tunproxy-journal 2", b"tunproxy-journal 3 "];
    assert!(known.iter().any(|known| text.starts_with(known)), "it was read although nothing says that it is known");
    let chained = text.starts_with(known[2]);
    let records: Vec<&[u8]> = text.split(|byte| *byte == b'\n').skip(1).collect();
    let first = text.split(|byte| *byte == b'\n').next().unwrap_or_default();
    // The checksum of the line before, in a chain; none behind a hole.
    let mut before = chained.then(|| first_sum(first).expect("it was read although its first line is not right"));
    let (mut left, mut seen, mut broken) = (Vec::new(), HashSet::new(), 0);
    for (number, line) in records.iter().enumerate() {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        let (line, sum) = match chained.then(|| line.split_at_checked(17)).flatten() {
            Some((_, said)) if record(line, chained).is_some() => {
                assert!(before.is_none_or(|sum| said.starts_with(format!("{sum:016x} ").as_bytes())), "out of order");
                (line, Some(fnv(said)))
            }
            _ => (line, None),
        };
        match record(line, chained) {
            _ if line.is_empty() => {}
            Some(Record::Undo(id)) => {
                assert!(seen.insert(id), "each number comes once");
                left.push(id);
            }
            Some(Record::Void(id)) => left.retain(|other| *other != id),
            None => {
                // A hole that a power failure left is a line of a kernel that is no more, which a change may say.
                let hole = line.contains(&0) && (choice & 3 == 1 || !change.is_empty());
                assert!(number + 1 == records.len() || hole || choice & 1 == 0, "a broken line was passed over");
                broken += 1;
            }
        }
        before = sum;
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
    let (mut text, mut sum, chained) = (Vec::new(), 0, choice & 32 != 0);
    if choice & 1 != 0 {
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let namespace =
            std::fs::metadata("/proc/thread-self/ns/net").map_or(0, |it| std::os::unix::fs::MetadataExt::ino(&it));
        let boot = if choice & 2 != 0 { boot.trim() } else { "an earlier one" };
        let namespace = if choice & 4 != 0 { namespace } else { 1 };
        let place = serde_json::json!({"boot": boot, "namespace": namespace});
        if chained {
            sum = fnv(format!("tunproxy-journal 3 {place}").as_bytes());
            text.extend(format!("tunproxy-journal 3 {sum:016x} {place}\n").bytes());
        } else {
            let version = if choice & 16 != 0 { 2 } else { 1 };
            text.extend(format!("tunproxy-journal {version} {place}\n").bytes());
        }
    }
    if choice & 8 == 0 {
        text.extend(data);
        return text;
    }
    let whole = data.split_last().map_or(data, |(last, rest)| if *last == b'\n' { rest } else { data });
    for line in whole.split(|byte| *byte == b'\n') {
        let said = if chained { [format!("{sum:016x} ").as_bytes(), line].concat() } else { line.to_vec() };
        sum = fnv(&said);
        text.extend(format!("{sum:016x} ").bytes());
        text.extend(said);
        text.push(b'\n');
    }
    text
}

enum Record {
    Undo(u64),
    Void(u64),
}

/// A line with its right checksum that holds a record; nothing is said of what the record asks for.
fn record(line: &[u8], chained: bool) -> Option<Record> {
    let line = std::str::from_utf8(line).ok()?;
    let (sum, said) = line.split_once(' ')?;
    (u64::from_str_radix(sum, 16) == Ok(fnv(said.as_bytes()))).then_some(())?;
    let json = if chained { said.split_once(' ')?.1 } else { said };
    let value: Value = serde_json::from_str(json).ok()?;
    let id = |name: &str| value.get(name)?.get("id")?.as_u64();
    id("Undo").map(Record::Undo).or_else(|| id("Void").map(Record::Void))
}

/// The checksum of the first line of a chain, if it is the right one.
fn first_sum(line: &[u8]) -> Option<u64> {
    let mut words = std::str::from_utf8(line).ok()?.trim_end_matches('\r').splitn(4, ' ');
    let (magic, version, sum, place) = (words.next()?, words.next()?, words.next()?, words.next()?);
    let right = fnv(format!("{magic} {version} {place}").as_bytes());
    (u64::from_str_radix(sum, 16) == Ok(right)).then_some(right)
}

fn fnv(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}
