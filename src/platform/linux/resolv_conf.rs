//! /etc/resolv.conf in its many shapes, and systemd-resolved.

use std::fs::{self, OpenOptions, Permissions};
use std::io::{self, Write};
use std::net::IpAddr;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};

use super::program::RESOLVECTL;
use crate::platform::undo::{OldFile, Undo, Undone};

/// The file that the C library reads.
pub(in crate::platform) const PATH: &str = "/etc/resolv.conf";
/// Far more than any resolver reads.
const LARGEST: u64 = 64 * 1024;
/// fcntl(2): by which signal the end of a lease is told.
const F_SETSIG: libc::c_int = 10;
/// systemd-resolved keeps its files here while it runs.
const RESOLVED: &str = "/run/systemd/resolve";

/// The text, following links; `None` when there is nothing to read.
pub(in crate::platform) fn read(path: &Path) -> Option<String> {
    let size = fs::metadata(path).ok().filter(fs::Metadata::is_file)?.len();
    if size > LARGEST {
        return None;
    }
    fs::read(path).ok().map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
}

/// Whether somebody has the file open to write it: what is in it may be a beginning. False where nobody can tell.
pub(in crate::platform) fn is_being_written(path: &Path) -> bool {
    // A pipe would have us wait for its writer.
    let opened = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path);
    let Ok(file) = opened else { return false };
    let descriptor = file.as_raw_fd();
    // A lease for readers is not given while there is a writer (fcntl(2)). Who wants to write in the moment for which we have
    // it waits for that moment, and the signal by which we are told must be none that ends us.
    // SAFETY: numbers alone, and the descriptor is open until the end of this function.
    unsafe {
        if libc::fcntl(descriptor, F_SETSIG, libc::SIGURG) < 0 {
            return false;
        }
        let refused = libc::fcntl(descriptor, libc::F_SETLEASE, libc::F_RDLCK) < 0;
        let written = refused && io::Error::last_os_error().raw_os_error() == Some(libc::EAGAIN);
        libc::fcntl(descriptor, libc::F_SETLEASE, libc::F_UNLCK);
        written
    }
}

/// How to undo the rewriting of `path` with `ours`; `None` when it cannot even be looked at.
pub(in crate::platform) fn undo(path: &Path, ours: &str) -> Option<Undo> {
    let old = old_file(path).ok()?;
    Some(Undo::ResolvConf { path: path.to_owned(), ours: ours.to_owned(), old })
}

/// Whether `path` holds what we wrote, and nothing else.
pub(in crate::platform) fn is_ours(path: &Path, ours: &str) -> bool {
    matches!(old_file(path), Ok(OldFile::File { content, .. }) if content == ours.as_bytes())
}

/// The text that would stand at `path` if `old` were put back there.
pub(in crate::platform) fn text_of(path: &Path, old: &OldFile) -> Option<String> {
    match old {
        OldFile::Missing => None,
        OldFile::File { content, .. } => Some(String::from_utf8_lossy(content).into_owned()),
        OldFile::Link(target) => {
            let behind = path.parent()?.join(target);
            // A link that led back to its own place named nobody; what is in that place now is ours.
            let itself = fs::canonicalize(&behind).ok()? == fs::canonicalize(path).ok()?;
            if itself { None } else { read(&behind) }
        }
    }
}

/// The text that would stand at `path` once [`restore`] were done. What somebody has put there since stays.
pub(in crate::platform) fn once_restored(path: &Path, ours: &str, old: &OldFile) -> Option<String> {
    if is_begun(path, ours, old) { text_of(path, old) } else { read(path) }
}

fn old_file(path: &Path) -> io::Result<OldFile> {
    let metadata = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(OldFile::Missing),
        metadata => metadata?,
    };
    if metadata.is_symlink() {
        let target = fs::read_link(path)?.into_os_string().into_string();
        return target.map(OldFile::Link).map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "a link to no text"));
    }
    if !metadata.is_file() || metadata.len() > LARGEST {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "not a plain small file"));
    }
    let mode = metadata.permissions().mode() & 0o7777;
    Ok(OldFile::File { content: fs::read(path)?, mode, uid: metadata.uid(), gid: metadata.gid() })
}

/// Whether what is at `path` is what we wrote over `old`, or the beginning of it; or nobody can tell.
pub(in crate::platform) fn is_begun(path: &Path, ours: &str, old: &OldFile) -> bool {
    old_file(path).map_or(true, |now| now != *old && is_beginning(&now, ours))
}

/// A crash, or a full disk, may have cut short what was written in place: a beginning of it is ours too.
fn is_beginning(now: &OldFile, ours: &str) -> bool {
    matches!(now, OldFile::File { content, .. } if ours.as_bytes().starts_with(content))
}

/// Writes `text` to `path` and reads it back. A link is replaced by a file, never written through. What was there comes back
/// where that fails half way.
pub(in crate::platform) fn replace(path: &Path, text: &str) -> io::Result<()> {
    replace_and(path, text, sync_directory)
}

fn replace_and(path: &Path, text: &str, sync: impl Fn(&Path) -> io::Result<()>) -> io::Result<()> {
    let old = old_file(path)?;
    let (written, left) = match write_over(path, text, &old) {
        Ok(way) => {
            let reads_back = || match fs::read(path)? == text.as_bytes() {
                true => Ok(()),
                false => Err(io::Error::other("it was written, but reads back as something else")),
            };
            (sync(path).and_then(|()| reads_back()), Some(way))
        }
        Err(Unplaced { error, left }) => (Err(explained(error)), left),
    };
    let ours = match left {
        // Nothing of ours is there: a file that is empty is the beginning of somebody else's.
        None => false,
        Some(Way::Renamed) => is_ours(path, text),
        Some(Way::InPlace) => is_begun(path, text, &old),
    };
    if written.is_err()
        && ours
        && let Err(error) = restore(path, text, &old)
    {
        tracing::debug!("{} as it was: {error}", path.display());
    }
    written
}

fn write_over(path: &Path, text: &str, old: &OldFile) -> Result<Way, Unplaced> {
    let (mode, owner) = match old {
        OldFile::File { mode, uid, gid, .. } => (*mode, Some((*uid, *gid))),
        OldFile::Missing | OldFile::Link(_) => (0o644, None),
    };
    place(path, text.as_bytes(), mode, owner, old)
}

/// Puts `old` back, if `path` still holds what we wrote.
pub(in crate::platform) fn restore(path: &Path, ours: &str, old: &OldFile) -> io::Result<Undone> {
    remove_if_there(&new_name(path))?;
    let now = old_file(path)?;
    if now == *old {
        return Ok(Undone::AlreadyGone);
    }
    if !is_beginning(&now, ours) {
        return Ok(Undone::LeftAlone);
    }
    match old {
        OldFile::Missing => fs::remove_file(path),
        OldFile::Link(target) => {
            let new = new_name(path);
            symlink(target, &new).and_then(|()| fs::rename(&new, path))
        }
        OldFile::File { content, mode, uid, gid } => match place(path, content, *mode, Some((*uid, *gid)), &now) {
            Err(Unplaced { error, .. }) if is_overtaken(&error) => return Ok(Undone::LeftAlone),
            placed => placed.map(drop).map_err(|unplaced| unplaced.error),
        },
    }
    .map_err(explained)?;
    sync_directory(path)?;
    match old_file(path)? == *old {
        true => Ok(Undone::Restored),
        false => Err(io::Error::other("it was put back, but reads as something else")),
    }
}

/// How a file came to be where it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// Whole.
    Renamed,
    /// A crash, or a full disk, may leave a beginning of it.
    InPlace,
}

/// What was not put into its place, and in which way some of it may be there all the same.
#[derive(Debug)]
struct Unplaced {
    error: io::Error,
    left: Option<Way>,
}

impl From<io::Error> for Unplaced {
    fn from(error: io::Error) -> Self {
        Self { error, left: None }
    }
}

/// Whole or not at all, by renaming; in place where the file is a mount of its own, as in containers.
/// Not where somebody has replaced `over` meanwhile ([`is_overtaken`]): it takes its time to get a file to the disk.
fn place(path: &Path, content: &[u8], mode: u32, owner: Option<(u32, u32)>, over: &OldFile) -> Result<Way, Unplaced> {
    let new = new_name(path);
    remove_if_there(&new)?;
    let written = write_new(&new, content, mode, owner);
    let still = written.and_then(|()| match old_file(path)? == *over {
        true => Ok(()),
        false => Err(io::Error::new(io::ErrorKind::ResourceBusy, "somebody has replaced it at the same moment")),
    });
    let renamed = still.and_then(|()| fs::rename(&new, path));
    match renamed {
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
            remove_if_there(&new)?;
            let mut file = OpenOptions::new().write(true).truncate(true).open(path)?;
            let written = file.write_all(content).and_then(|()| file.sync_all());
            written.map(|()| Way::InPlace).map_err(|error| Unplaced { error, left: Some(Way::InPlace) })
        }
        Err(error) => {
            // The cause is what matters, not whether its traces could be removed.
            let _ = remove_if_there(&new);
            Err(error.into())
        }
        Ok(()) => Ok(Way::Renamed),
    }
}

/// Whether that was not the system's word, but ours.
pub(in crate::platform) fn is_overtaken(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::ResourceBusy && error.raw_os_error().is_none()
}

fn write_new(new: &Path, content: &[u8], mode: u32, owner: Option<(u32, u32)>) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(new)?;
    file.write_all(content)?;
    file.set_permissions(Permissions::from_mode(mode))?;
    if let Some((uid, gid)) = owner {
        let made = file.metadata()?;
        if (made.uid(), made.gid()) != (uid, gid) {
            chown(new, Some(uid), Some(gid))?;
        }
    }
    file.sync_all()
}

/// After a power loss the journal must not be gone while the file it was about is still the other one.
fn sync_directory(path: &Path) -> io::Result<()> {
    path.parent().map_or(Ok(()), |directory| fs::File::open(directory)?.sync_all())
}

/// Beside the file, under a name that a later run knows, so that a crash leaves nothing for good.
fn new_name(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".tunproxy-new");
    name.into()
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        // Where nothing can be written nothing of ours was.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EROFS | libc::EPERM | libc::EACCES)) => {
            Ok(())
        }
        other => other,
    }
}

/// Adds what a person can do to the refusals that one meets here.
fn explained(error: io::Error) -> io::Error {
    let advice = match error.raw_os_error() {
        Some(libc::EROFS) => "the file system is read-only",
        Some(libc::EPERM) => "it may be immutable (lsattr, chattr -i), or its directory",
        Some(libc::EACCES) => "only root may write it",
        _ => return error,
    };
    io::Error::new(error.kind(), format!("{error}; {advice}"))
}

/// Whether systemd-resolved runs.
pub(in crate::platform) fn resolved_runs() -> bool {
    Path::new(RESOLVED).is_dir()
}

/// Tells systemd-resolved that the link `tun` answers every name.
pub(in crate::platform) fn tell_resolved(tun: &str, servers: &[IpAddr]) -> io::Result<()> {
    let servers: Vec<String> = servers.iter().map(ToString::to_string).collect();
    let dns: Vec<&str> = ["dns", tun].into_iter().chain(servers.iter().map(String::as_str)).collect();
    for arguments in [&dns[..], &["domain", tun, "~."], &["default-route", tun, "yes"]] {
        resolvectl(arguments)?;
    }
    Ok(())
}

/// Whether systemd-resolved says that the link `tun` answers with `servers`.
pub(in crate::platform) fn resolved_knows(tun: &str, servers: &[IpAddr]) -> bool {
    RESOLVECTL.run(&["dns", tun], "").is_ok_and(|output| {
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        servers.iter().all(|server| said.split_whitespace().any(|word| word.parse() == Ok(*server)))
    })
}

/// Has systemd-resolved forget the link, should it still exist when we are done.
pub(in crate::platform) fn forget_resolved(tun: &str) {
    if let Err(error) = resolvectl(&["revert", tun]) {
        tracing::warn!("systemd-resolved keeps its settings for {tun} until the link is gone: {error}");
    }
}

fn resolvectl(arguments: &[&str]) -> io::Result<()> {
    let output = RESOLVECTL.run(arguments, "")?;
    match output.status.success() {
        true => Ok(()),
        false => {
            let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            Err(io::Error::other(format!("resolvectl {}: {said}", arguments.join(" "))))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::HostError;

    const OURS: &str = "# ours\nnameserver 198.18.0.2\n";

    fn replaced(path: &Path) -> OldFile {
        let Some(Undo::ResolvConf { old, .. }) = undo(path, OURS) else { panic!("no way back") };
        replace(path, OURS).unwrap();
        assert_eq!(fs::read_to_string(path).unwrap(), OURS);
        old
    }

    #[test]
    fn a_file_comes_back_with_its_content_and_mode() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("resolv.conf");
        fs::write(&path, b"nameserver fe80::1%eth0\n# caf\xe9\n").unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o640)).unwrap();
        let old = replaced(&path);
        assert_eq!(restore(&path, OURS, &old).unwrap(), Undone::Restored);
        assert_eq!(fs::read(&path).unwrap(), b"nameserver fe80::1%eth0\n# caf\xe9\n");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o640);
        assert_eq!(restore(&path, OURS, &old).unwrap(), Undone::AlreadyGone);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_link_comes_back_as_a_link_and_its_target_is_never_written() {
        let dir = tempfile::tempdir().unwrap();
        let (path, target) = (dir.path().join("resolv.conf"), dir.path().join("stub"));
        fs::write(&target, "# empty\n").unwrap();
        symlink("stub", &path).unwrap();
        let old = replaced(&path);
        assert_eq!(fs::read_to_string(&target).unwrap(), "# empty\n");
        assert_eq!(restore(&path, OURS, &old).unwrap(), Undone::Restored);
        assert_eq!(fs::read_link(&path).unwrap(), Path::new("stub"));
    }

    #[test]
    fn a_file_that_was_not_there_is_gone_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("resolv.conf");
        let old = replaced(&path);
        assert_eq!(restore(&path, OURS, &old).unwrap(), Undone::Restored);
        assert!(!path.exists());
    }

    #[test]
    fn what_somebody_wrote_later_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("resolv.conf");
        fs::write(&path, "").unwrap();
        let old = replaced(&path);
        fs::write(&path, "nameserver 9.9.9.9\n").unwrap();
        assert_eq!(restore(&path, OURS, &old).unwrap(), Undone::LeftAlone);
        assert_eq!(fs::read_to_string(&path).unwrap(), "nameserver 9.9.9.9\n");
    }

    #[test]
    fn a_write_that_fails_when_it_is_all_but_done_is_taken_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("resolv.conf");
        for old in ["nameserver 192.0.2.53\n", ""] {
            fs::write(&path, old).unwrap();
            let failing = |at: &Path| {
                assert_eq!(fs::read_to_string(at).unwrap(), OURS, "it was there");
                Err(io::Error::from_raw_os_error(libc::EIO))
            };
            assert_eq!(replace_and(&path, OURS, failing).unwrap_err().raw_os_error(), Some(libc::EIO));
            assert_eq!(fs::read_to_string(&path).unwrap(), old);
        }
        fs::remove_file(&path).unwrap();
        symlink("stub", &path).unwrap();
        replace_and(&path, OURS, |_| Err(io::ErrorKind::Other.into())).unwrap_err();
        assert_eq!(fs::read_link(&path).unwrap(), Path::new("stub"));
    }

    #[test]
    fn what_somebody_has_begun_to_write_over_ours_is_not_taken_for_the_beginning_of_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("resolv.conf");
        fs::write(&path, "nameserver 192.0.2.53\n").unwrap();
        let mut theirs = None;
        let truncated = std::cell::RefCell::new(&mut theirs);
        let meanwhile = |at: &Path| {
            **truncated.borrow_mut() = Some(fs::File::create(at)?);
            Ok(())
        };
        replace_and(&path, OURS, meanwhile).unwrap_err();
        theirs.unwrap().write_all(b"nameserver 192.0.2.77\n").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "nameserver 192.0.2.77\n");
    }

    #[test]
    fn a_file_that_somebody_writes_is_told_from_one_that_is_empty() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("resolv.conf");
        assert!(!is_being_written(&path), "there is none");
        let theirs = fs::File::create(&path).unwrap();
        assert!(is_being_written(&path));
        drop(theirs);
        let _reader = fs::File::open(&path).unwrap();
        assert!(!is_being_written(&path));
    }

    #[test]
    fn a_link_that_leads_back_to_its_own_place_holds_nothing_of_others_when_ours_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("resolv.conf");
        symlink("resolv.conf", dir.path().join("round")).unwrap();
        fs::write(dir.path().join("stub"), "nameserver 9.9.9.9\n").unwrap();
        for (target, text) in [("resolv.conf", None), ("round", None), ("stub", Some("nameserver 9.9.9.9\n"))] {
            let _ = fs::remove_file(&path);
            symlink(target, &path).unwrap();
            let old = old_file(&path).unwrap();
            replace(&path, OURS).unwrap();
            assert_eq!(text_of(&path, &old).as_deref(), text, "{target}");
            assert_eq!(once_restored(&path, OURS, &old).as_deref(), text, "{target}");
            let theirs = "nameserver 192.0.2.99\n";
            fs::write(&path, theirs).unwrap();
            assert_eq!(once_restored(&path, OURS, &old).as_deref(), Some(theirs), "{target}: it stays");
        }
    }

    #[test]
    fn what_somebody_has_put_there_at_the_same_moment_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("resolv.conf");
        fs::write(&path, "nameserver 192.0.2.53\n").unwrap();
        let seen = old_file(&path).unwrap();
        fs::write(&path, "nameserver 9.9.9.9\n").unwrap();
        let unplaced = place(&path, OURS.as_bytes(), 0o644, None, &seen).unwrap_err();
        assert!(is_overtaken(&unplaced.error) && unplaced.left.is_none());
        assert_eq!(fs::read_to_string(&path).unwrap(), "nameserver 9.9.9.9\n");
        assert!(!new_name(&path).exists());
    }

    #[test]
    fn what_is_there_of_a_write_that_failed_tells_whether_there_is_something_to_undo() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("resolv.conf");
        fs::write(&path, "nameserver 192.0.2.53\n").unwrap();
        let Some(made @ Undo::ResolvConf { .. }) = undo(&path, OURS) else { panic!("no way back") };
        let full = HostError::io("", io::Error::from_raw_os_error(libc::ENOSPC));
        assert!(!made.may_be_in_place(&full), "nothing has been written");
        for (text, begun) in [("", true), (&OURS[..9], true), (OURS, true), ("nameserver 9.9.9.9\n", false)] {
            fs::write(&path, text).unwrap();
            assert_eq!(made.may_be_in_place(&full), begun, "{text:?}");
        }
        // Somebody else has begun to write.
        fs::write(&path, "").unwrap();
        let overtaken = HostError::io("", io::Error::new(io::ErrorKind::ResourceBusy, "somebody was faster"));
        assert!(!made.may_be_in_place(&overtaken));
    }

    #[test]
    fn a_write_that_a_crash_cut_short_is_known_as_ours() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("resolv.conf");
        fs::write(&path, "nameserver fe80::1%eth0\n").unwrap();
        let old = replaced(&path);
        fs::write(&path, &OURS[..9]).unwrap();
        assert_eq!(restore(&path, OURS, &old).unwrap(), Undone::Restored);
    }
}
