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

/// What a person can do about `error` at `path`, a file of the state directory.
pub(super) fn advice(path: &Path, error: &io::Error) -> String {
    let owner = match error.kind() {
        io::ErrorKind::PermissionDenied => fs::symlink_metadata(path).ok().map(|found| found.uid()),
        _ => None,
    };
    let us = geteuid().as_raw();
    match (owner.filter(|owner| *owner != us), path.parent()) {
        (Some(owner), Some(folder)) => format!(
            "; it belongs to uid {owner}, by whom another run was. Run it as that user, or give all of the directory \
             to this one: sudo chown -R {us} {}",
            folder.display()
        ),
        _ => String::new(),
    }
}
