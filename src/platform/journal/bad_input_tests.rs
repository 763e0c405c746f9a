//! Journals that are not as a run of ours left them: understood as a whole, or refused with what to do.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::PathBuf;

use proptest::prelude::*;
use tempfile::TempDir;

use super::format::checksum;
use super::*;
use crate::platform::HostError;
use crate::platform::routing::{Family, Rule, RuleAction};
use crate::platform::undo::OldFile;

fn undo(priority: u32) -> Undo {
    Undo::Rule(Rule::new(Family::V4, priority, RuleAction::Nop))
}

/// The journal of a run that was killed after `undos` changes.
fn killed(undos: u32) -> (TempDir, PathBuf, Vec<u8>) {
    let dir = tempfile::tempdir().unwrap();
    let mut journal = Journal::open(dir.path()).unwrap();
    journal.record(&(0..undos).map(undo).collect::<Vec<_>>()).unwrap();
    let path = dir.path().join("journal");
    let bytes = fs::read(&path).unwrap();
    (dir, path, bytes)
}

/// What opening a journal of these bytes comes to, in words; the bytes stay as they are.
fn refusal(bytes: &[u8]) -> String {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("journal");
    fs::write(&path, bytes).unwrap();
    let said = Journal::open(dir.path()).expect_err("a journal that must be refused").to_string();
    assert!(said.contains(&path.display().to_string()), "it names the file: {said}");
    assert_eq!(fs::read(&path).unwrap(), bytes, "a journal that is refused stays as it is");
    said
}

/// The lines of a journal, to be edited.
fn edited(bytes: &[u8], edit: impl FnOnce(&mut Vec<String>)) -> Vec<u8> {
    let mut lines: Vec<String> = std::str::from_utf8(bytes).unwrap().lines().map(str::to_owned).collect();
    edit(&mut lines);
    (lines.join("\n") + "\n").into_bytes()
}

/// With a line behind the others that says `json` and has the checksums that belong to it.
fn with_more(bytes: &[u8], json: &str) -> Vec<u8> {
    edited(bytes, |lines| {
        let before = reading::read(Path::new("journal"), bytes, &Place::here()).unwrap().end.sum;
        let said = format!("{before:016x} {json}");
        lines.push(format!("{:016x} {said}", checksum(said.as_bytes())));
    })
}

/// The journal of a run that was killed in an earlier boot.
fn rebooted(records: &[Record]) -> Vec<u8> {
    let place = Place { boot: "an earlier one".to_owned(), ..Place::here() };
    let (mut text, mut end) = End::first(&place).unwrap();
    text.push_str(&end.add(records));
    text.into_bytes()
}

#[test]
fn a_journal_torn_at_any_byte_loses_its_last_line_or_is_refused() {
    let (_dir, path, bytes) = killed(4);
    let header = bytes.iter().position(|byte| *byte == b'\n').unwrap();
    for cut in 0..bytes.len() {
        fs::write(&path, &bytes[..cut]).unwrap();
        let opened = Journal::open(path.parent().unwrap());
        if cut == 0 {
            assert!(opened.unwrap().is_clean(), "nothing was recorded");
            continue;
        }
        if cut <= header {
            assert!(matches!(opened, Err(JournalError::Foreign { .. })), "{cut}: the first line is written whole");
            continue;
        }
        let leftovers = opened.unwrap().leftovers;
        // A line without its line break says all that it has to say.
        let whole = bytes[header + 1..].split(|byte| *byte == b'\n').scan(header, |end, line| {
            *end += line.len() + 1;
            Some(*end)
        });
        let expected = whole.filter(|end| *end <= cut && *end < bytes.len()).count() as u32;
        assert_eq!(leftovers.undos, (0..expected).map(|n| (u64::from(n), undo(n))).collect::<Vec<_>>(), "{cut}");
    }
}

#[test]
fn a_line_that_was_edited_refuses_all_of_the_journal() {
    let (_dir, _, bytes) = killed(3);
    for line in 1..=3 {
        let said = refusal(&edited(&bytes, |lines| lines[line] = lines[line].replace("\"id\"", "\"Id\"")));
        assert!(said.contains(&format!("line {} ", line + 1)) && said.contains("checksum"), "{said}");
        assert!(said.contains("reboot") && said.contains("delete the file"), "it says what to do: {said}");
        let said = refusal(&edited(&bytes, |lines| lines[line].truncate(20)));
        assert!(said.contains("cannot be read"), "{said}");
    }
    let said = refusal(&edited(&bytes, |lines| lines[2] = "# a comment".to_owned()));
    assert!(said.contains("line 3 "), "{said}");
}

#[test]
fn a_record_that_this_version_does_not_know_refuses_all_of_the_journal() {
    let (_dir, _, bytes) = killed(2);
    for json in [r#"{"Undo":{"id":7,"undo":{"Tomorrow":"x"}}}"#, r#"{"Mark":{"id":7}}"#, "7", "null"] {
        let said = refusal(&with_more(&bytes, json));
        assert!(said.contains("line 4 ") && said.contains("nothing that this version knows"), "{json}: {said}");
    }
}

#[test]
fn numbers_that_come_twice_refuse_all_of_the_journal() {
    let (_dir, _, bytes) = killed(3);
    for line in 1..=3 {
        let text = std::str::from_utf8(&bytes).unwrap().lines().nth(line).unwrap();
        let said = refusal(&with_more(&bytes, &text[text.find('{').unwrap()..]));
        assert!(said.contains("line 5 ") && said.contains("has a number that an earlier one has"), "{said}");
    }
}

#[test]
fn any_one_byte_that_was_changed_refuses_all_of_the_journal() {
    let (_dir, _, bytes) = killed(3);
    let here = Place::here();
    for at in 0..bytes.len() {
        let old = bytes[at];
        let odd = [old ^ 1, old ^ 0x20, old ^ 0x80, 0, b'\n', b'\r', b' ', b'0', b'1', b'2', b'+', b'}'];
        for byte in odd.into_iter().filter(|byte| *byte != old) {
            let mut changed = bytes.clone();
            changed[at] = byte;
            let read = reading::read(Path::new("journal"), &changed, &here);
            assert!(read.is_err(), "byte {at}, {:?} to {:?}: {read:?}", char::from(old), char::from(byte));
        }
    }
}

#[test]
fn a_first_line_that_names_another_boot_than_it_was_written_with_is_no_earlier_boot() {
    let (_dir, _, bytes) = killed(1);
    let text = String::from_utf8(bytes).unwrap();
    for (was, is) in [("\"boot\":\"", "\"boot\":\"x"), ("\"namespace\":", "\"namespace\":9")] {
        let said = refusal(text.replacen(was, is, 1).as_bytes());
        assert!(said.contains("line 1 ") && said.contains("checksum"), "{said}");
    }
}

#[test]
fn lines_that_are_missing_doubled_or_in_another_order_refuse_all_of_the_journal() {
    let dir = tempfile::tempdir().unwrap();
    let mut journal = Journal::open(dir.path()).unwrap();
    let ids = journal.record(&[undo(1), undo(2), undo(3)]).unwrap();
    journal.void(&ids[1..2]).unwrap();
    journal.record([&undo(4)]).unwrap();
    let bytes = fs::read(dir.path().join("journal")).unwrap();
    for line in 0..5 {
        let said = refusal(&edited(&bytes, |lines| drop(lines.remove(line))));
        assert!(
            line == 0 || said.contains(&format!("line {} of", line + 1)) && said.contains("does not follow"),
            "{said}"
        );
        refusal(&edited(&bytes, |lines| lines.insert(line, lines[line].clone())));
        refusal(&edited(&bytes, |lines| lines.insert(line, String::new())));
        for other in line + 1..=5 {
            refusal(&edited(&bytes, |lines| lines.swap(line, other)));
        }
    }
    // What is missing at the end is as if it had never been written: a crash may have come before.
    let shorter = edited(&bytes, |lines| drop(lines.pop()));
    let leftovers = reading::read(Path::new("journal"), &shorter, &Place::here()).unwrap();
    assert_eq!((leftovers.undos.len(), leftovers.unreadable), (2, 0));
}

#[test]
fn a_line_of_another_journal_refuses_all_of_this_one() {
    let (_dir, _, bytes) = killed(3);
    let other = rebooted(&(0..3).map(|id| Record::Undo { id, undo: undo(id as u32) }).collect::<Vec<_>>());
    let other: Vec<&str> = std::str::from_utf8(&other).unwrap().lines().collect();
    for line in 0..=3 {
        refusal(&edited(&bytes, |lines| lines[line] = other[line].to_owned()));
    }
}

#[test]
fn an_end_that_no_crash_leaves_refuses_all_of_the_journal() {
    let (_dir, _, bytes) = killed(1);
    let whole = &bytes[..bytes.len() - 1];
    for end in ["x", " ", "\r", "\0", "}", "\n\n", "\nx", "\n0123 ", "\n# a note", "\n\0\0\0"] {
        refusal(&[whole, end.as_bytes()].concat());
    }
}

#[test]
fn a_first_line_that_has_swallowed_the_second_refuses_all_of_the_journal() {
    let (_dir, _, bytes) = killed(2);
    for joint in ["x", " ", "\r", "}", "\0"] {
        let said = refusal(String::from_utf8(bytes.clone()).unwrap().replacen('\n', joint, 1).as_bytes());
        assert!(said.contains("line 1 "), "{joint:?}: {said}");
    }
}

#[test]
fn a_number_that_leaves_none_to_come_refuses_all_of_the_journal() {
    let (_dir, _, bytes) = killed(1);
    let last = serde_json::to_string(&Record::Undo { id: u64::MAX, undo: undo(1) }).unwrap();
    let said = refusal(&with_more(&bytes, &last));
    assert!(said.contains("line 3 ") && said.contains("no run comes to"), "{said}");
}

#[test]
fn what_no_run_of_ours_changes_is_not_changed_back() {
    let (_dir, _, bytes) = killed(1);
    let sysctl = Undo::Sysctl { path: "kernel/core_pattern".to_owned(), ours: None, old: "|/tmp/x".to_owned() };
    let file = Undo::ResolvConf { path: "/etc/shadow".into(), ours: String::new(), old: OldFile::Missing };
    for undo in [sysctl, file] {
        let said = refusal(&with_more(&bytes, &serde_json::to_string(&Record::Undo { id: 9, undo }).unwrap()));
        assert!(said.contains("line 3 ") && said.contains("names what no run of ours changes"), "{said}");
    }
}

#[test]
fn the_line_ends_of_another_system_refuse_all_of_the_journal() {
    let (_dir, _, bytes) = killed(3);
    let text = String::from_utf8(bytes).unwrap();
    let said = refusal(text.replace('\n', "\r\n").as_bytes());
    assert!(said.contains("line 1 ") && said.contains("has edited it"), "{said}");
    let (header, rest) = text.split_once('\n').unwrap();
    let said = refusal(format!("{header}\n{}", rest.replace('\n', "\r\n")).as_bytes());
    assert!(said.contains("line 2 "), "{said}");
}

#[test]
fn bytes_that_are_no_journal_are_refused() {
    let elf = [b"\x7fELF\x02\x01\x01\0".to_vec(), vec![0; 500]].concat();
    for bytes in
        [&elf[..], b"\0", b"\n", b"nameserver 192.0.2.1\n", b"tunproxy-journal", b"tunproxy-journal \n", &[0; 9000]]
    {
        let said = refusal(bytes);
        assert!(said.contains("no journal of tunproxy"), "{said}");
    }
    assert!(refusal(b"tunproxy-journal 18446744073709551616 {}\n").contains("run `cleanup` with the version"));
}

#[test]
fn a_line_without_end_costs_no_memory_and_is_refused() {
    let (dir, path, bytes) = killed(1);
    // A file with a hole: it takes no room on the disk.
    fs::write(&path, &bytes).unwrap();
    OpenOptions::new().write(true).open(&path).unwrap().set_len(1 << 40).unwrap();
    let said = Journal::open(dir.path()).unwrap_err().to_string();
    assert!(said.contains("larger than any journal of ours"), "{said}");
    // A long one that is still read: a name of ten megabytes.
    let json = format!(r#"{{"Undo":{{"id":5,"undo":{{"Tomorrow":"{}"}}}}}}"#, "x".repeat(10 << 20));
    let said = refusal(&with_more(&bytes, &json));
    assert!(said.contains("line 3 ") && said.len() < 2000, "{} bytes", said.len());
}

#[test]
fn a_hole_that_a_power_failure_left_is_a_torn_line_and_in_this_boot_it_is_damage() {
    let (dir, path, here) = killed(4);
    let records: Vec<Record> = (0..4).map(|id| Record::Undo { id, undo: undo(id as u32) }).collect();
    let end_of =
        |bytes: &[u8], line: usize| bytes.iter().enumerate().filter(|(_, byte)| **byte == b'\n').nth(line).unwrap().0;
    let holed = |mut bytes: Vec<u8>| {
        let hole = end_of(&bytes, 0) + 50..end_of(&bytes, 1) - 5;
        bytes[hole].fill(0);
        bytes
    };
    assert!(refusal(&holed(here)).contains("line 2 "));
    let earlier = holed(rebooted(&records));
    fs::write(&path, &earlier).unwrap();
    let leftovers = Journal::open(dir.path()).unwrap().leftovers;
    assert_eq!((leftovers.origin, leftovers.undos.len(), leftovers.unreadable), (Origin::Gone, 3, 1));
    // Behind the hole the chain goes on, and each line there has its own checksum still.
    assert!(refusal(&edited(&earlier, |lines| drop(lines.remove(3)))).contains("does not follow"));
    refusal(&edited(&earlier, |lines| lines[2] = lines[2].replace("\"id\":1", "\"id\":7")));
    // A hole may be all that is left of the end, and what is recorded then is read.
    for end in [&b"\0\0\0\0"[..], b"0123456789abcdef\0\0\0", b"\0\0\0\n"] {
        fs::write(&path, [&rebooted(&records[..2]), end].concat()).unwrap();
        let mut journal = Journal::open(dir.path()).unwrap();
        assert_eq!((journal.leftovers.undos.len(), journal.leftovers.unreadable), (2, 1));
        journal.record([&undo(9)]).unwrap();
        drop(journal);
        assert_eq!(Journal::open(dir.path()).unwrap().leftovers.undos.len(), 3);
    }
}

#[test]
fn what_is_no_plain_file_of_ours_is_refused_and_nothing_behind_it_is_read_or_written() {
    let (dir, path, bytes) = killed(1);
    let opened = || Journal::open(dir.path()).unwrap_err().to_string();
    let target = dir.path().join("elsewhere");
    fs::rename(&path, &target).unwrap();
    symlink(&target, &path).unwrap();
    assert!(opened().contains("symbolic link"));
    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    assert!(opened().contains("is not a file"));
    fs::remove_dir(&path).unwrap();
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRUSR).unwrap();
    assert!(opened().contains("is not a file"), "and nobody waits for a writer");
    fs::remove_file(&path).unwrap();
    let socket = std::os::unix::net::UnixListener::bind(&path).unwrap();
    assert!(opened().contains("is not a file"));
    drop(socket);
    fs::remove_file(&path).unwrap();
    // The lock and a new journal are not written through links either.
    let lock = dir.path().join("lock");
    fs::remove_file(&lock).unwrap();
    symlink(&target, &lock).unwrap();
    Journal::open(dir.path()).unwrap_err();
    fs::remove_file(&lock).unwrap();
    symlink(&target, dir.path().join("journal.new")).unwrap();
    Journal::open(dir.path()).unwrap().record([&undo(1)]).unwrap();
    assert_eq!(fs::read(&target).unwrap(), bytes);
    assert!(!path.is_symlink() && !Journal::open(dir.path()).unwrap().is_clean());
}

#[test]
fn a_journal_that_others_may_write_is_refused() {
    let (dir, path, _) = killed(1);
    for mode in [0o620, 0o602, 0o666] {
        fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
        let said = Journal::open(dir.path()).unwrap_err().to_string();
        assert!(said.contains("may be written by others") && said.contains(&format!("{mode:o}")), "{said}");
    }
    fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
    assert!(!Journal::open(dir.path()).unwrap().is_clean());
}

#[test]
fn a_journal_of_another_user_is_refused_unless_it_is_a_service_and_the_directory_is_its_own() {
    const SERVICE: u32 = 712;
    const PERSON: u32 = 12345;
    let (dir, path, _) = killed(1);
    if chown(&path, Some(SERVICE), None).is_err() {
        // Only root may give files away; `.ci/run` runs as root.
        return;
    }
    let refusal = || Journal::open(dir.path()).unwrap_err().to_string();
    assert!(refusal().contains("another user (uid 712)"), "{}", refusal());
    chown(dir.path(), Some(SERVICE), None).unwrap();
    assert!(!Journal::open(dir.path()).unwrap().is_clean(), "root cleans up after that service");
    assert_eq!(Journal::open_to_others(dir.path()), None);
    // What a person writes in his own directory is no order to root.
    chown(&path, Some(PERSON), None).unwrap();
    chown(dir.path(), Some(PERSON), None).unwrap();
    let said = refusal();
    assert!(said.contains("uid 12345") && said.contains("sudo -u '#12345' tunproxy cleanup"), "{said}");
    // Root's own counts there as well, with a warning.
    chown(&path, Some(0), None).unwrap();
    assert!(!Journal::open(dir.path()).unwrap().is_clean());
    let (what, advice) = Journal::open_to_others(dir.path()).unwrap();
    assert!(what.contains("belongs to another user (uid 12345)") && advice.contains("--state-dir"), "{what}: {advice}");
}

#[test]
fn a_lock_that_is_another_file_by_a_second_name_is_not_written_to() {
    let dir = tempfile::tempdir().unwrap();
    let victim = dir.path().join("victim");
    fs::write(&victim, "precious").unwrap();
    fs::hard_link(&victim, dir.path().join("lock")).unwrap();
    let said = Journal::open(dir.path()).unwrap_err().to_string();
    assert!(said.contains("lock has another name, too") && said.contains("ls -li"), "{said}");
    assert_eq!(fs::read_to_string(&victim).unwrap(), "precious");
}

#[test]
fn a_refusal_says_whose_file_it_is_and_how_to_give_it_away() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("lock");
    fs::write(&path, "").unwrap();
    let [refused, missing] = [io::ErrorKind::PermissionDenied, io::ErrorKind::NotFound].map(io::Error::from);
    assert_eq!(file::advice("read", &path, &refused), "", "it is our own");
    let others = if chown(&path, Some(12345), None).is_ok() { path } else { "/etc/passwd".into() };
    assert_eq!(file::advice("read", &others, &missing), "");
    let said = file::advice("read", &others, &refused);
    let us = nix::unistd::geteuid();
    let folder = others.parent().unwrap().display();
    assert!(said.contains("belongs to uid") && said.contains(&format!("sudo chown -R {us} {folder}")), "{said}");
}

#[test]
fn a_replay_elsewhere_or_after_a_reboot_is_decided_before_anything_is_done() {
    let here = Place { boot: "this".to_owned(), namespace: 7 };
    let resolver = Undo::ResolvConf { path: "/etc/resolv.conf".into(), ours: "x".to_owned(), old: OldFile::Missing };
    let due = |boot: &str, namespace: u64, undos: &[Undo]| {
        let place = Place { boot: boot.to_owned(), namespace };
        let (mut text, mut end) = End::first(&place).unwrap();
        let records = (0..).zip(undos).map(|(id, undo)| Record::Undo { id, undo: undo.clone() });
        text.push_str(&end.add(&records.collect::<Vec<_>>()));
        let due = reading::read(Path::new("journal"), text.as_bytes(), &here).unwrap().due();
        due.map(|due| (due.undos.into_iter().map(|(id, _)| id).collect::<Vec<_>>(), due.died.len()))
    };
    let both = [undo(1), resolver.clone(), undo(2)];
    assert_eq!(due("this", 7, &both), Ok((vec![2, 1, 0], 0)), "last change first");
    assert_eq!(due("that", 7, &both), Ok((vec![1], 2)), "the rest died with its kernel");
    assert_eq!(due("this", 8, &both), Err(Some(8)));
    assert_eq!(due("this", 8, &[resolver]), Ok((vec![0], 0)), "a file belongs to no network namespace");
}

#[test]
fn a_refused_journal_is_not_replayed_and_a_cleanup_says_why() {
    let (dir, path, bytes) = killed(3);
    fs::write(&path, edited(&bytes, |lines| lines[2] = lines[2].replace("\"id\"", "\"Id\""))).unwrap();
    let error = crate::platform::cleanup(dir.path(), true).unwrap_err();
    assert!(matches!(error, HostError::Journal(JournalError::Damaged { line: 3, .. })), "{error}");
}

proptest! {
    #[test]
    fn no_bytes_make_the_reader_panic(bytes: Vec<u8>, headed: bool) {
        let mut text = if headed { b"tunproxy-journal 1 {}\n".to_vec() } else { Vec::new() };
        text.extend(bytes);
        let _ = Rehearsal::of(&text);
    }

    /// Whatever one byte becomes.
    #[test]
    fn one_changed_byte_refuses_a_journal(at in 0usize..2000, byte: u8) {
        let (_dir, _, bytes) = killed(4);
        let mut changed = bytes.clone();
        let at = at % bytes.len();
        changed[at] = byte;
        let read = reading::read(Path::new("journal"), &changed, &Place::here());
        prop_assert_eq!(read.is_ok(), changed == bytes);
    }
}
