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
    let untrusted = |why: &str| JournalError::Untrusted { path: path.to_owned(), why: why.to_owned() };
    let io = |source| JournalError::Io { act: "read", path: path.to_owned(), source };
    // A pipe must not hold us up, and a link must not lead us elsewhere.
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let file = match OpenOptions::new().read(true).custom_flags(flags).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) if error.raw_os_error() == Some(libc::ELOOP) => return Err(untrusted("is a symbolic link")),
        // What a socket says.
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => return Err(untrusted("is not a file")),
        Err(error) => return Err(io(error)),
    };
    if let Some(why) = distrust(path, &file).map_err(io)? {
        return Err(untrusted(&why));
    }
    let mut bytes = Vec::new();
    file.take(LARGEST + 1).read_to_end(&mut bytes).map_err(io)?;
    match bytes.len() as u64 > LARGEST {
        true => Err(untrusted("is larger than any journal of ours")),
        false => Ok(bytes),
    }
}

/// Why nobody should act on what stands in `file`: whoever wrote it has the rights of this process then.
fn distrust(path: &Path, file: &File) -> io::Result<Option<String>> {
    let found = file.metadata()?;
    if !found.is_file() {
        return Ok(Some("is not a file".to_owned()));
    }
    // Root may clean up after another user's run, in that user's directory.
    let folder = path.parent().map_or(Ok(0), |folder| Ok::<_, io::Error>(fs::metadata(folder)?.uid()))?;
    if ![geteuid().as_raw(), 0, folder].contains(&found.uid()) {
        return Ok(Some(format!("belongs to another user (uid {})", found.uid())));
    }
    let mode = found.mode() & 0o7777;
    Ok((mode & 0o022 != 0).then(|| format!("may be written by others (mode {mode:04o})")))
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
