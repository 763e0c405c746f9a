use std::sync::Arc;

use proptest::prelude::*;

use super::*;

fn record(number: u32) -> Record {
    let ip = match number % 2 {
        0 => IpAddr::from([198, 18, (number >> 8) as u8, number as u8]),
        _ => IpAddr::from([0xfd, 0, 0, 0, 0, 0, 0, number as u16]),
    };
    Record { name: Name::new(&format!("host{number}.example")).unwrap(), ip, at: 1000 + number }
}

fn empty(folder: &tempfile::TempDir) -> (PathBuf, Log) {
    let path = folder.path().join("fake-ip");
    replace(&path, &[]).unwrap();
    let log = Log::append_to(&path).unwrap();
    (path, log)
}

#[test]
fn what_was_flushed_is_read_again_after_a_kill() {
    let folder = tempfile::tempdir().unwrap();
    let (path, log) = empty(&folder);
    let records: Vec<_> = (0..100).map(record).collect();
    for batch in records.chunks(7) {
        batch.iter().for_each(|Record { name, ip, at }| log.append(name, *ip, *at));
        assert!(log.flush().is_some());
        assert_eq!(log.flush(), None, "nothing is left to write");
    }
    // The log is still open: nothing was closed or synced in between.
    let contents = read(&path).unwrap();
    assert_eq!(contents.records, records);
    assert!(!contents.unsound);
    drop(log);
}

#[test]
fn a_tail_torn_anywhere_costs_no_record_before_it() {
    let mut bytes = HEADER.to_vec();
    let mut ends = vec![bytes.len()];
    for number in 0..4 {
        let Record { name, ip, at } = record(number);
        encode(&mut bytes, &name, ip, at);
        ends.push(bytes.len());
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("fake-ip");
    for length in 0..=bytes.len() {
        for tail in [&b""[..], &[0; 64], &[0xff; 3]] {
            fs::write(&path, [&bytes[..length], tail].concat()).unwrap();
            let contents = read(&path).unwrap();
            let whole = ends.iter().filter(|end| **end <= length).count().saturating_sub(1);
            assert_eq!(contents.records, (0..whole as u32).map(record).collect::<Vec<_>>(), "cut at {length}");
            let sound = ends.contains(&length) && tail.is_empty();
            assert_eq!(contents.unsound, !sound, "cut at {length}, {} bytes behind", tail.len());
        }
    }
}

#[test]
fn a_missing_file_and_one_of_another_version_are_empty_logs() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("fake-ip");
    assert!(read(&path).unwrap().unsound);
    fs::write(&path, b"tunproxy fake-ip 3\nsomething newer").unwrap();
    let contents = read(&path).unwrap();
    assert!(contents.unsound && contents.records.is_empty());
}

#[test]
fn a_file_of_the_first_version_is_read_and_to_be_written_anew() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("fake-ip");
    let mut record = [&[4, 9, 198, 18, 0, 7][..], b"a.example"].concat();
    record.extend_from_slice(&checksum(&record));
    fs::write(&path, [HEADER_1, &record].concat()).unwrap();
    let contents = read(&path).unwrap();
    let expected = Record { name: Name::new("a.example").unwrap(), ip: [198, 18, 0, 7].into(), at: 0 };
    assert_eq!(contents.records, [expected]);
    assert!(contents.unsound);
}

#[test]
fn records_appended_during_a_compaction_are_in_the_new_file() {
    let folder = tempfile::tempdir().unwrap();
    let (path, log) = empty(&folder);
    for number in 0..10 {
        let Record { name, ip, at } = record(number);
        log.append(&name, ip, at);
    }
    log.flush();
    log.compact(|out| {
        let Record { name, ip, at } = record(1);
        encode(out, &name, ip, at);
        let Record { name, ip, at } = record(100);
        log.append(&name, ip, at);
        log.flush();
    })
    .unwrap();
    let Record { name, ip, at } = record(101);
    log.append(&name, ip, at);
    log.flush();
    let contents = read(&path).unwrap();
    assert_eq!(contents.records, [record(1), record(100), record(101)]);
    assert!(!contents.unsound);
}

#[test]
fn a_flush_returns_only_when_every_earlier_record_is_in_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let (path, log) = empty(&folder);
    let log = Arc::new(log);
    let threads: Vec<_> = (0..4)
        .map(|thread| {
            let (log, path) = (Arc::clone(&log), path.clone());
            std::thread::spawn(move || {
                for number in 0..50 {
                    let Record { name, ip, at } = record(thread * 1000 + number);
                    log.append(&name, ip, at);
                    log.flush();
                    // Another thread may have torn nothing: writes go out whole, one after the other.
                    assert!(read(&path).unwrap().records.contains(&Record { name, ip, at }));
                }
            })
        })
        .collect();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    assert_eq!(read(&path).unwrap().records.len(), 200);
}

#[test]
fn a_full_disk_ends_the_log_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let (path, log) = empty(&folder);
    // Every write to this device fails with ENOSPC.
    log.file.lock().file = Some(OpenOptions::new().write(true).open("/dev/full").unwrap());
    for number in 0..3 {
        let Record { name, ip, at } = record(number);
        log.append(&name, ip, at);
        log.flush();
        assert_eq!(log.flush(), None);
    }
    assert!(read(&path).unwrap().records.is_empty());
}

#[test]
fn the_file_is_readable_by_its_owner_alone() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    let (path, _log) = empty(&folder);
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
}

proptest! {
    #[test]
    fn no_bytes_make_reading_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("fake-ip");
        fs::write(&path, [HEADER, &bytes].concat()).unwrap();
        let _ = read(&path).unwrap();
    }
}
