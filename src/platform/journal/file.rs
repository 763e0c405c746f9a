//! The file of a journal: what is read as one, and what is not.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use nix::unistd::geteuid;

use super::JournalError;

/// More than any run of ours writes: a hundred thousand routes. In bytes.
pub(super) const LARGEST: u64 = 64 << 20;

/// The bytes of the journal at `path`; none if there is no journal.
pub(super) fn load(path: &Path) -> Result<Vec<u8>, JournalError> {
    let shown = path.display();
    let untrusted =
        |why: &str, remedy: String| JournalError::Untrusted { path: path.to_owned(), why: why.to_owned(), remedy };
    let not_a_file = || format!("Look what it is (`ls -l {shown}`): no run of ours made it");
    let io = |source| JournalError::Io { act: "read", path: path.to_owned(), source };
    // A pipe must not hold us up, and a link must not lead us elsewhere.
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let file = match OpenOptions::new().read(true).custom_flags(flags).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) if error.raw_os_error() == Some(libc::ELOOP) => {
            let remedy = format!("Look where it leads (`ls -l {shown}`), and delete the link: no run of ours made it");
            return Err(untrusted("is a symbolic link", remedy));
        }
        // What a socket says.
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => {
            return Err(untrusted("is not a file", not_a_file()));
        }
        Err(error) => return Err(io(error)),
    };
    if let Some((why, remedy)) = distrust(path, &file).map_err(io)? {
        return Err(untrusted(&why, remedy.unwrap_or_else(not_a_file)));
    }
    let mut bytes = Vec::new();
    file.take(LARGEST + 1).read_to_end(&mut bytes).map_err(io)?;
    match bytes.len() as u64 > LARGEST {
        true => Err(untrusted("is larger than any journal of ours", not_a_file())),
        false => Ok(bytes),
    }
}

/// What is wrong with a state directory that others may write to, or take away, and what to do: they can take our files out of
/// it. Containers often have such directories and one user, so that this is no reason to refuse it. Links, and what others
/// have put in place of a file of ours, are refused one by one.
pub(super) fn open_to_others(dir: &Path) -> Option<(String, String)> {
    let mode = fs::metadata(dir).ok()?.mode() & 0o7777;
    let shown = dir.display();
    if mode & 0o002 != 0 {
        let what = format!(
            "everybody may write to the state directory {shown} (mode {mode:04o}): any user of this host can keep it from being \
             put back, by taking the journal away"
        );
        return Some((what, format!("`chmod go-w {shown}`; or name another with --state-dir")));
    }
    let named = std::path::absolute(dir).ok();
    let ways = named.into_iter().chain(fs::canonicalize(dir).ok());
    let (path, why) =
        ways.flat_map(|way| way.ancestors().map(Path::to_owned).collect::<Vec<_>>()).find_map(|path| {
            let why = why_others_own(&path)?;
            Some((path, why))
        })?;
    let in_the_way = if path == dir { String::new() } else { format!(" {}, in which it is,", path.display()) };
    let what = format!(
        "the state directory {shown} can be taken away by others:{in_the_way} {why}. They can keep this host from being put \
         back, and put a socket of theirs in the place of ours"
    );
    Some((what, "name another with --state-dir, in a directory of this user's or of root's".to_owned()))
}

/// Why others than this user and root may move what is in the directory `path`.
fn why_others_own(path: &Path) -> Option<String> {
    let found = fs::metadata(path).ok()?;
    let (owner, mode) = (found.uid(), found.mode() & 0o7777);
    if owner != geteuid().as_raw() && is_ordinary(owner) {
        return Some(format!("belongs to another user (uid {owner})"));
    }
    // In a sticky directory everybody may move what is his own, and nothing else.
    (mode & 0o1002 == 0o002).then(|| format!("may be written by everybody (mode {mode:04o})"))
}

/// Whether `uid` is a person's: what a service of the system has is as root wants it. (The numbers are those of useradd(8) and
/// of systemd; 65534 stands for whoever has no number in this namespace.)
fn is_ordinary(uid: u32) -> bool {
    const FIRST_PERSON: u32 = 1000;
    const DYNAMIC: std::ops::RangeInclusive<u32> = 61_184..=65_519;
    const NOBODY: u32 = 65_534;
    uid >= FIRST_PERSON && !DYNAMIC.contains(&uid) && uid != NOBODY
}

/// Why nobody should write to `file`, which is the lock at `path`: it may be another file, by a second name.
pub(super) fn distrust_lock(path: &Path, file: &File) -> io::Result<Option<JournalError>> {
    let found = file.metadata()?;
    let why = match (found.is_file(), found.nlink()) {
        (true, 0 | 1) => return Ok(None),
        (true, _) => "has another name, too",
        (false, _) => "is not a file",
    };
    let remedy = format!("Look what it is (`ls -li {}`), and delete it: no run of ours made it so", path.display());
    Ok(Some(JournalError::Untrusted { path: path.to_owned(), why: why.to_owned(), remedy }))
}

/// Why nobody should act on what stands in `file`: whoever wrote it has the rights of this process then. And what to do, if
/// somebody may be sure of it all the same.
fn distrust(path: &Path, file: &File) -> io::Result<Option<(String, Option<String>)>> {
    let found = file.metadata()?;
    if !found.is_file() {
        return Ok(Some(("is not a file".to_owned(), None)));
    }
    // Root may clean up after a service's run, in that service's directory. In a person's it would do what that person writes.
    let folder = path.parent().map_or(Ok(0), |folder| Ok::<_, io::Error>(fs::metadata(folder)?.uid()))?;
    let folder = if is_ordinary(folder) { 0 } else { folder };
    if ![geteuid().as_raw(), 0, folder].contains(&found.uid()) {
        let remedy = format!(
            "Clean up as that user, whose run it was and with whose rights (`sudo -u '#{}' tunproxy cleanup --state-dir {}`). If \
             that run wrote it and nobody else, `sudo chown {} {}` makes it count",
            found.uid(),
            path.parent().unwrap_or(path).display(),
            geteuid(),
            path.display()
        );
        return Ok(Some((format!("belongs to another user (uid {})", found.uid()), Some(remedy))));
    }
    let mode = found.mode() & 0o7777;
    let remedy = || format!("If surely nobody else has written to it, `chmod go-w {}` makes it count", path.display());
    Ok((mode & 0o022 != 0).then(|| (format!("may be written by others (mode {mode:04o})"), Some(remedy()))))
}

/// Whose run has left a journal in `state`, if it was a person's: nobody else's rights undo it. As far as this user may look.
#[must_use]
pub fn person_of(state: &Path) -> Option<u32> {
    let owner = |path: &Path| Some(fs::symlink_metadata(path).ok()?.uid());
    owner(&state.join("journal")).or_else(|| owner(state)).filter(|uid| is_ordinary(*uid))
}

/// What a person can do about `error` at `path`, a state directory that cannot be made (`act` is "create") or a file in one.
/// Empty where nothing comes to mind.
pub(super) fn advice(act: &str, path: &Path, error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::PermissionDenied if act != "create" => of_another(path),
        io::ErrorKind::PermissionDenied => ELSEWHERE.to_owned(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "make room there; a new run may have another directory (--state-dir)".to_owned()
        }
        io::ErrorKind::ReadOnlyFilesystem => {
            "make it writable again (`mount -o remount,rw`); a new run may have another directory (--state-dir)"
                .to_owned()
        }
        // What has the name of a directory that is to be made.
        io::ErrorKind::NotADirectory | io::ErrorKind::AlreadyExists => "name a directory with --state-dir".to_owned(),
        _ => String::new(),
    }
}

/// What to do where this user may not write.
const ELSEWHERE: &str = "name a directory that this user may write to with --state-dir, or run it with sudo";

/// What to do where this user may not touch a file of the state directory: it or the directory tells whose it is.
fn of_another(path: &Path) -> String {
    let folder = path.parent().unwrap_or(path);
    let owner = [path, folder].into_iter().find_map(|at| Some(fs::symlink_metadata(at).ok()?.uid()));
    let us = geteuid().as_raw();
    match owner {
        // Its mode is somebody's wish.
        Some(owner) if owner == us => String::new(),
        Some(owner) => {
            let run = if owner == 0 {
                "Run it with sudo".to_owned()
            } else {
                format!("Run it as that user (sudo -u '#{owner}')")
            };
            format!(
                "it belongs to uid {owner}, by whom another run was. {run}; or, if that is over and undone, give all of the \
                 directory to this user: sudo chown -R {us} {}",
                folder.display()
            )
        }
        None => ELSEWHERE.to_owned(),
    }
}
