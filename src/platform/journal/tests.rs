//! Journals whole, torn, edited and foreign.

use super::format::{MAGIC, OLDEST, VERSION};
use super::*;
use crate::platform::routing::{Family, Rule, RuleAction};
use proptest::prelude::*;

fn undo(priority: u32) -> Undo {
    Undo::Rule(Rule::new(Family::V4, priority, RuleAction::Nop))
}

/// The same records, as a run in `place` writes them, in any version.
fn at(place: &Place, version: u32, bytes: &[u8]) -> Vec<u8> {
    let (first, mut end) = End::first(place).unwrap();
    let mut text = first;
    if version != VERSION {
        text = format!("{MAGIC} {version} {}\n", serde_json::to_string(place).unwrap());
        end.version = version;
    }
    let lines = std::str::from_utf8(bytes).unwrap().lines().skip(1);
    let records: Vec<Record> =
        lines.map(|line| serde_json::from_str(&line[line.find('{').unwrap()..]).unwrap()).collect();
    text.push_str(&end.add(&records));
    text.into_bytes()
}

fn written(undos: u32) -> (tempfile::TempDir, Vec<u8>) {
    let dir = tempfile::tempdir().unwrap();
    let mut journal = Journal::open(dir.path()).unwrap();
    journal.record(&(0..undos).map(undo).collect::<Vec<_>>()).unwrap();
    let bytes = fs::read(dir.path().join("journal")).unwrap();
    (dir, bytes)
}

#[test]
fn what_is_recorded_is_there_after_a_crash() {
    let (dir, _) = written(3);
    let journal = Journal::open(dir.path()).unwrap();
    assert!(!journal.is_clean() && journal.leftovers.origin == Origin::Here);
    assert_eq!(journal.leftovers.undos, (0..3).map(|n| (u64::from(n), undo(n))).collect::<Vec<_>>());
}

#[test]
fn a_voided_record_and_a_cleared_journal_leave_nothing() {
    let (dir, _) = written(3);
    let mut journal = Journal::open(dir.path()).unwrap();
    journal.void(&[0, 2]).unwrap();
    drop(journal);
    let mut journal = Journal::open(dir.path()).unwrap();
    assert_eq!(journal.leftovers.undos, [(1, undo(1))]);
    journal.clear().unwrap();
    drop(journal);
    assert!(Journal::open(dir.path()).unwrap().is_clean());
    assert!(!dir.path().join("journal").exists());
}

/// Makes a journal of `many` records of which the last is in force, so that it is worth writing anew.
fn overgrown(many: u32) -> (tempfile::TempDir, Journal) {
    let dir = tempfile::tempdir().unwrap();
    let mut journal = Journal::open(dir.path()).unwrap();
    let undos: Vec<Undo> = (0..many).map(undo).collect();
    let ids = journal.record(&undos).unwrap();
    journal.void(&ids[..ids.len() - 1]).unwrap();
    (dir, journal)
}

fn lost(_: &Path) -> io::Result<()> {
    Err(io::Error::from_raw_os_error(libc::EIO))
}

#[test]
fn a_journal_that_was_written_anew_is_gone_on_with_although_its_directory_cannot_be_synced() {
    let (dir, mut journal) = overgrown(2000);
    let (sync, last) = (journal.sync, undo(1999));
    journal.sync = lost;
    assert!(journal.compact([(1999, &last)].into_iter()).is_err());
    // Until the disk has the new file under its name, a record in it would be none after a power loss.
    assert!(journal.record(&[undo(7)]).is_err());
    journal.sync = sync;
    let ids = journal.record(&[undo(8)]).unwrap();
    drop(journal);
    let read = Journal::open(dir.path()).unwrap();
    assert_eq!(read.leftovers.undos, [(1999, last), (ids[0], undo(8))]);
}

#[test]
fn a_journal_that_cannot_get_its_name_for_good_records_nothing_until_it_can() {
    let dir = tempfile::tempdir().unwrap();
    let mut journal = Journal::open(dir.path()).unwrap();
    let sync = std::mem::replace(&mut journal.sync, lost);
    assert!(journal.record(&[undo(1)]).is_err());
    journal.sync = sync;
    let ids = journal.record(&[undo(2)]).unwrap();
    drop(journal);
    assert_eq!(Journal::open(dir.path()).unwrap().leftovers.undos, [(ids[0], undo(2))]);
}

#[test]
fn a_state_directory_serves_one_run_at_a_time() {
    let (dir, _) = written(1);
    let first = Journal::open(dir.path()).unwrap();
    let Err(JournalError::Locked { pid, .. }) = Journal::open(dir.path()) else { panic!("not locked") };
    assert_eq!(pid, std::process::id().to_string());
    drop(first);
    Journal::open(dir.path()).unwrap();
}

#[test]
fn a_journal_of_an_unknown_version_is_refused_with_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("journal"), "tunproxy-journal 4 {}\n").unwrap();
    let error = Journal::open(dir.path()).unwrap_err().to_string();
    assert!(error.contains("version 4") && error.contains("reboot"), "{error}");
}

#[test]
fn what_another_boot_left_is_known_as_such() {
    let (dir, bytes) = written(1);
    let earlier = Place { boot: "an earlier one".to_owned(), ..Place::here() };
    for version in OLDEST..=VERSION {
        fs::write(dir.path().join("journal"), at(&earlier, version, &bytes)).unwrap();
        assert_eq!(Journal::open(dir.path()).unwrap().leftovers.origin, Origin::Gone, "version {version}");
    }
}

#[test]
fn what_another_network_namespace_of_this_boot_holds_is_not_taken_for_dead() {
    let (dir, bytes) = written(1);
    let path = dir.path().join("journal");
    let other = Place { namespace: 9, ..Place::here() };
    for version in OLDEST..=VERSION {
        fs::write(&path, at(&other, version, &bytes)).unwrap();
        assert_eq!(
            Journal::open(dir.path()).unwrap().leftovers.origin,
            Origin::Elsewhere(Some(9)),
            "version {version}"
        );
    }
    let old = String::from_utf8(at(&other, 2, &bytes)).unwrap();
    let (_, records) = old.split_once('\n').unwrap();
    fs::write(&path, format!("{MAGIC} 2 garbled\n{records}")).unwrap();
    assert_eq!(Journal::open(dir.path()).unwrap().leftovers.origin, Origin::Elsewhere(None));
    fs::write(&path, format!("{MAGIC} {VERSION} garbled\n{records}")).unwrap();
    assert!(matches!(Journal::open(dir.path()), Err(JournalError::Damaged { line: 1, .. })));
}

#[test]
fn records_after_a_torn_line_are_read() {
    let (dir, bytes) = written(2);
    fs::write(dir.path().join("journal"), &bytes[..bytes.len() - 5]).unwrap();
    let mut journal = Journal::open(dir.path()).unwrap();
    journal.record([&undo(7)]).unwrap();
    drop(journal);
    let journal = Journal::open(dir.path()).unwrap();
    assert_eq!(journal.leftovers.undos, [(0, undo(0)), (1, undo(7))]);
    assert_eq!(journal.leftovers.unreadable, 0, "the torn line has made room");
}

#[test]
fn what_is_recorded_behind_a_tear_at_any_byte_is_read_like_the_rest() {
    let (dir, bytes) = written(4);
    let path = dir.path().join("journal");
    let header = bytes.iter().position(|byte| *byte == b'\n').unwrap();
    for cut in 1..=bytes.len() {
        fs::write(&path, &bytes[..cut]).unwrap();
        let opened = Journal::open(dir.path());
        if cut <= header {
            assert!(matches!(opened, Err(JournalError::Foreign { .. })), "{cut}: {opened:?}");
            continue;
        }
        let mut journal = opened.unwrap();
        let before = journal.leftovers.undos.clone();
        assert!(journal.leftovers.unreadable <= 1, "{cut}");
        // What is written behind a tear is read like the rest.
        journal.record([&undo(77)]).unwrap();
        drop(journal);
        let undos = Journal::open(dir.path()).unwrap().leftovers.undos;
        let last = (before.len() as u64, undo(77));
        assert_eq!(undos, [before, vec![last]].concat(), "{cut}");
    }
}

#[test]
fn a_journal_of_an_earlier_version_is_read_and_goes_on_in_its_own() {
    for version in [1, 2] {
        let (dir, bytes) = written(2);
        let path = dir.path().join("journal");
        let old = at(&Place::here(), version, &bytes);
        // Whole, without its last line break, and torn.
        for (less, left) in [(0, 2), (1, 2), (5, 1)] {
            fs::write(&path, &old[..old.len() - less]).unwrap();
            let mut journal = Journal::open(dir.path()).unwrap();
            let unreadable = journal.leftovers.unreadable;
            assert_eq!((journal.leftovers.undos.len(), unreadable + left), (left, 2), "version {version}, less {less}");
            assert_eq!(journal.leftovers.origin, Origin::Here);
            let ids = journal.record([&undo(8), &undo(9)]).unwrap();
            journal.void(&ids[..1]).unwrap();
            drop(journal);
            assert!(fs::read(&path).unwrap().starts_with(format!("{MAGIC} {version} {{").as_bytes()));
            let leftovers = Journal::open(dir.path()).unwrap().leftovers;
            assert_eq!((leftovers.undos.len(), leftovers.unreadable), (left + 1, 0), "version {version}, less {less}");
            assert_eq!(leftovers.undos.last(), Some(&(ids[1], undo(9))));
        }
    }
}

#[test]
fn the_lines_of_an_earlier_version_are_what_its_runs_wrote() {
    let mut end = End { version: 2, ..End::default() };
    let json = r#"{"Void":{"id":7}}"#;
    assert_eq!(end.add(&[Record::Void { id: 7 }]), format!("{:016x} {json}\n", format::checksum(json.as_bytes())));
}

#[test]
fn the_chain_goes_on_whenever_the_file_is_opened_again() {
    let (dir, bytes) = written(1);
    let path = dir.path().join("journal");
    // As it was written, without its last line break, and with a torn line behind it.
    let torn = [&bytes[..], b"0123"].concat();
    for left in [&bytes[..], &bytes[..bytes.len() - 1], &torn] {
        fs::write(&path, left).unwrap();
        for round in 0..3 {
            let mut journal = Journal::open(dir.path()).unwrap();
            let ids = journal.record([&undo(5 + round), &undo(20 + round)]).unwrap();
            journal.void(&ids[..1]).unwrap();
            journal.record([&undo(40 + round)]).unwrap();
        }
        let leftovers = Journal::open(dir.path()).unwrap().leftovers;
        assert_eq!((leftovers.undos.len(), leftovers.unreadable), (7, 0));
        assert_eq!(leftovers.end.whole, fs::metadata(&path).unwrap().len());
    }
}

#[test]
fn a_write_that_failed_half_way_leaves_the_chain_whole() {
    let (dir, _) = written(2);
    let path = dir.path().join("journal");
    let mut journal = Journal::open(dir.path()).unwrap();
    journal.record([&undo(3)]).unwrap();
    // As after a full disk: some bytes are there, and what failed has closed the file.
    let mut file = OpenOptions::new().append(true).open(&path).unwrap();
    file.write_all(b"0123456789abcdef 01").unwrap();
    journal.file = None;
    journal.record([&undo(4)]).unwrap();
    drop(journal);
    assert_eq!(Journal::open(dir.path()).unwrap().leftovers.undos.len(), 4);
}

#[test]
fn leftovers_that_are_forgotten_one_by_one_do_not_take_a_later_record_along() {
    let (dir, _) = written(2);
    let mut journal = Journal::open(dir.path()).unwrap();
    let later = journal.record([&undo(9)]).unwrap();
    journal.leftovers = Leftovers::default();
    journal.forget(&[0, 1]).unwrap();
    drop(journal);
    assert_eq!(Journal::open(dir.path()).unwrap().leftovers.undos, [(later[0], undo(9))]);
}

#[test]
fn a_journal_that_has_grown_long_is_written_anew_with_what_is_in_force() {
    let (dir, _) = written(2);
    let mut journal = Journal::open(dir.path()).unwrap();
    journal.clear().unwrap();
    let in_force = [undo(1), undo(2)];
    let mut live = journal.record(&in_force).unwrap();
    for _ in 0..LONG {
        let ids = journal.record([&undo(3)]).unwrap();
        journal.void(&ids).unwrap();
        journal.compact(live.iter().copied().zip(&in_force)).unwrap();
    }
    let size = fs::metadata(dir.path().join("journal")).unwrap().len();
    assert!(size < 1000 * LONG as u64, "{size}");
    live.extend(journal.record([&undo(9)]).unwrap());
    drop(journal);
    let left = Journal::open(dir.path()).unwrap();
    assert_eq!(left.leftovers.undos.iter().map(|(id, _)| *id).collect::<Vec<_>>(), live);
    assert_eq!(left.leftovers.unreadable, 0);
}

proptest! {
    #[test]
    fn no_bytes_make_the_reader_panic(bytes: Vec<u8>, version in 1..=VERSION) {
        let mut text = format!("{MAGIC} {version} {{}}\n").into_bytes();
        text.extend(bytes);
        let _ = reading::read(Path::new("journal"), &text, &Place::here());
    }
}

#[test]
fn a_directory_that_everybody_may_write_to_is_told_with_what_to_do() {
    use std::os::unix::fs::PermissionsExt;
    let (dir, _) = written(1);
    let mode = |mode| fs::set_permissions(dir.path(), fs::Permissions::from_mode(mode)).unwrap();
    for open in [0o777, 0o1777, 0o703] {
        mode(open);
        let (what, advice) = Journal::open_to_others(dir.path()).unwrap();
        assert!(what.contains(&format!("(mode {open:04o})")) && advice.contains("chmod go-w"), "{what}: {advice}");
    }
    for closed in [0o700, 0o755, 0o775] {
        mode(closed);
        assert_eq!(Journal::open_to_others(dir.path()), None);
    }
    assert_eq!(Journal::open_to_others(&dir.path().join("none")), None);
}

#[test]
fn a_directory_that_others_may_take_away_is_told_with_who_they_are() {
    use std::os::unix::fs::{PermissionsExt, symlink};
    let base = tempfile::tempdir().unwrap();
    let (above, link) = (base.path().join("above"), base.path().join("link"));
    let dir = above.join("tunproxy");
    fs::create_dir_all(&dir).unwrap();
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o700)).unwrap();
    symlink(&above, &link).unwrap();
    let mode = |mode| fs::set_permissions(&above, fs::Permissions::from_mode(mode)).unwrap();
    mode(0o777);
    for way in [&dir, &link.join("tunproxy")] {
        let (what, _) = Journal::open_to_others(way).unwrap();
        assert!(what.contains(", in which it is, may be written by everybody (mode 0777)"), "{what}");
    }
    for closed in [0o1777, 0o755] {
        mode(closed);
        assert_eq!(Journal::open_to_others(&dir), None);
    }
    if std::os::unix::fs::chown(&above, Some(12345), None).is_ok() {
        let (what, _) = Journal::open_to_others(&dir).unwrap();
        assert!(what.contains("above, in which it is, belongs to another user (uid 12345)"), "{what}");
    }
}

#[test]
fn what_somebody_has_put_where_a_journal_is_written_is_not_written_to() {
    let dir = tempfile::tempdir().unwrap();
    let (theirs, victim) = (dir.path().join("journal.new"), dir.path().join("victim"));
    fs::write(&victim, "precious").unwrap();
    let theirs_open = File::create(&theirs).unwrap();
    let mut journal = Journal::open(dir.path()).unwrap();
    journal.record(&[undo(1)]).unwrap();
    assert_eq!(theirs_open.metadata().unwrap().len(), 0, "written to their file");
    journal.clear().unwrap();
    std::os::unix::fs::symlink(&victim, &theirs).unwrap();
    journal.record(&[undo(1)]).unwrap();
    assert_eq!(fs::read_to_string(&victim).unwrap(), "precious");
    assert!(!dir.path().join("journal").is_symlink());
}

#[test]
fn what_helps_with_a_journal_depends_on_what_is_wrong_with_it() {
    use std::os::unix::fs::PermissionsExt;
    let (dir, _) = written(1);
    let path = dir.path().join("journal");
    let advice = || Journal::peek(dir.path()).unwrap_err().advice();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
    assert!(advice().contains("chmod go-w"), "{}", advice());
    fs::remove_file(&path).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", &path).unwrap();
    assert!(advice().contains("delete the link") && !advice().contains("chown"), "{}", advice());
}
