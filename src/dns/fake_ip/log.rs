//! The file that outlives us: one record per address given out, appended before the answer leaves, and another when it
//! has been in use for some minutes more.
//!
//! ```text
//! header   "tunproxy fake-ip 2\n"
//! record   family (4 | 6), length of the name, second of all runs together (4 bytes, little-endian),
//!          address (4 | 16 bytes), name, checksum (4 bytes, little-endian)
//! ```
//! Version 1 had no seconds. A later record of an address or a name overrides an earlier one. Reading stops at the first record that is not
//! whole: a tail torn by a crash. What it held is given out again alike, because addresses follow from the names.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use super::stable_hash;
use crate::net::Name;

const HEADER: &[u8] = b"tunproxy fake-ip 2\n";
const HEADER_1: &[u8] = b"tunproxy fake-ip 1\n";
/// A larger file is not ours: 2^18 names of two families never need half of it between compactions.
const MAX_SIZE: u64 = 1 << 29;

/// The open log. Threads append to memory; whoever must send an answer flushes for all.
pub(super) struct Log {
    path: PathBuf,
    pending: Mutex<Vec<u8>>,
    file: Mutex<Sink>,
    /// Records ever appended, and ever written: equal means that nothing waits.
    appended: AtomicU64,
    written: AtomicU64,
}

struct Sink {
    /// None once a write failed: the run goes on without the log.
    file: Option<File>,
    /// Bytes of whole records in the file.
    length: u64,
    /// Emptied buffer that takes the place of the pending one.
    spare: Vec<u8>,
    /// While a compaction runs: what was appended since it began.
    since: Option<Vec<u8>>,
}

/// An address in use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) name: Name,
    pub(super) ip: IpAddr,
    /// The second of all runs together.
    pub(super) at: u32,
}

/// What a log file held.
pub(super) struct Contents {
    /// Every whole record, in the order of writing.
    pub(super) records: Vec<Record>,
    /// The file is absent, of another version, or torn: it must be written anew before anything is appended.
    pub(super) unsound: bool,
}

/// Reads the log at `path`. A missing file is an empty one, and so is a link, which is then replaced: nothing of ours is read
/// or written behind it.
pub(super) fn read(path: &Path) -> io::Result<Contents> {
    let nothing = Contents { records: Vec::new(), unsound: true };
    let mut file = match OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(nothing),
        Err(error) if error.raw_os_error() == Some(libc::ELOOP) => return Ok(nothing),
        Err(error) => return Err(error),
    };
    // A pipe that somebody has put there must not hold us up.
    if !file.metadata()?.is_file() {
        return Ok(nothing);
    }
    if file.metadata()?.len() > MAX_SIZE {
        return Err(io::Error::other("larger than any log of ours"));
    }
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    let old = bytes.strip_prefix(HEADER_1);
    let Some(mut rest) = old.or_else(|| bytes.strip_prefix(HEADER)) else {
        if !bytes.is_empty() {
            tracing::warn!(path = %path.display(), "the fake-IP log is of another version and is started anew");
        }
        return Ok(nothing);
    };
    let mut records = Vec::new();
    while let Some((record, after)) = decode(rest, old.is_none()) {
        records.push(record);
        rest = after;
    }
    Ok(Contents { records, unsound: old.is_some() || !rest.is_empty() })
}

impl Log {
    /// Opens the log at `path` for appending. It was read, and if unsound, replaced, before.
    pub(super) fn append_to(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new().append(true).custom_flags(libc::O_NOFOLLOW).open(path)?;
        let length = file.metadata()?.len();
        let sink = Sink { file: Some(file), length, spare: Vec::new(), since: None };
        Ok(Self {
            path: path.to_owned(),
            pending: Mutex::default(),
            file: Mutex::new(sink),
            appended: AtomicU64::new(0),
            written: AtomicU64::new(0),
        })
    }

    /// Notes that `name` has `ip`, and uses it in the second `at`. Nothing is written before the next [`Log::flush`].
    pub(super) fn append(&self, name: &Name, ip: IpAddr, at: u32) {
        let mut pending = self.pending.lock();
        encode(&mut pending, name, ip, at);
        self.appended.fetch_add(1, Ordering::Release);
    }

    /// Returns once every record appended before the call is in the file, with one write(2) for all of them.
    /// Returns the file's length in bytes if it wrote.
    pub(super) fn flush(&self) -> Option<u64> {
        if self.written.load(Ordering::Acquire) >= self.appended.load(Ordering::Acquire) {
            return None;
        }
        // Whoever holds this lock may be writing our records: waiting for it is waiting for them.
        let mut sink = self.file.lock();
        let mut bytes = std::mem::take(&mut sink.spare);
        let upto = {
            let mut pending = self.pending.lock();
            std::mem::swap(&mut *pending, &mut bytes);
            self.appended.load(Ordering::Acquire)
        };
        sink.write(&bytes, &self.path);
        bytes.clear();
        bytes.shrink_to(1 << 16);
        sink.spare = bytes;
        self.written.store(upto, Ordering::Release);
        Some(sink.length)
    }

    /// Whether what is written can be found by its name; so it counts where nothing is written any more.
    pub(super) fn is_in_place(&self) -> bool {
        let inode = |found: io::Result<fs::Metadata>| found.ok().map(|found| found.ino());
        let open = self.file.lock().file.as_ref().map(|file| inode(file.metadata()));
        // Answers wait for the lock, and need not wait for the disk.
        open.is_none_or(|open| open == inode(fs::symlink_metadata(&self.path)))
    }

    /// Replaces the file by what `snapshot` writes plus whatever is appended meanwhile; appending never waits for it.
    pub(super) fn compact(&self, snapshot: impl FnOnce(&mut Vec<u8>)) -> io::Result<()> {
        self.file.lock().since = Some(Vec::new());
        let mut bytes = Vec::new();
        snapshot(&mut bytes);
        let written = write_beside(&self.path, &bytes);
        let mut sink = self.file.lock();
        let since = sink.since.take().unwrap_or_default();
        let (mut file, new) = written?;
        file.write_all(&since)?;
        fs::rename(&new, &self.path)?;
        sink.length = (HEADER.len() + bytes.len() + since.len()) as u64;
        sink.file = Some(file);
        // Answers wait for this lock, and need not wait for the disk.
        drop(sink);
        sync_folder(&self.path)
    }
}

/// What was used last is known after an orderly end, too.
impl Drop for Log {
    fn drop(&mut self) {
        self.flush();
    }
}

impl Sink {
    fn write(&mut self, bytes: &[u8], path: &Path) {
        if let Some(since) = &mut self.since {
            since.extend_from_slice(bytes);
        }
        let Some(file) = &mut self.file else { return };
        match file.write_all(bytes) {
            Ok(()) => self.length += bytes.len() as u64,
            Err(error) => {
                tracing::warn!(
                    path = %path.display(), %error,
                    "the fake-IP log cannot be written; names asked for the first time from now on may get another address after a restart"
                );
                // Half a record would hide later ones; if even this fails, reading stops there, which is safe.
                let _ = file.set_len(self.length);
                self.file = None;
            }
        }
    }
}

/// Writes a whole log of these records in place of the one at `path`, in such a way that a crash leaves one of both.
pub(super) fn replace(path: &Path, records: &[u8]) -> io::Result<()> {
    let (_, new) = write_beside(path, records)?;
    fs::rename(&new, path)?;
    sync_folder(path)
}

/// A synced file beside `path`, open for appending; readable by us alone, because it tells which sites were visited.
fn write_beside(path: &Path, records: &[u8]) -> io::Result<(File, PathBuf)> {
    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    let new = PathBuf::from(name);
    match fs::remove_file(&new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new().append(true).create_new(true).mode(0o600).open(&new)?;
    file.write_all(HEADER)?;
    file.write_all(records)?;
    file.sync_all()?;
    Ok((file, new))
}

fn sync_folder(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => File::open(folder)?.sync_all(),
        _ => File::open(".")?.sync_all(),
    }
}

/// Appends one record.
pub(super) fn encode(out: &mut Vec<u8>, name: &Name, ip: IpAddr, at: u32) {
    let start = out.len();
    let name = name.as_str().as_bytes();
    let (family, v4, v6);
    let address: &[u8] = match ip {
        IpAddr::V4(ip) => {
            (family, v4) = (4, ip.octets());
            &v4
        }
        IpAddr::V6(ip) => {
            (family, v6) = (6, ip.octets());
            &v6
        }
    };
    // A `Name` has at most 253 bytes.
    out.extend_from_slice(&[family, name.len() as u8]);
    out.extend_from_slice(&at.to_le_bytes());
    out.extend_from_slice(address);
    out.extend_from_slice(name);
    out.extend_from_slice(&checksum(&out[start..]));
}

/// Reads one record, which may have its second, and what follows it. None if it is not whole.
fn decode(bytes: &[u8], timed: bool) -> Option<(Record, &[u8])> {
    let (&[family, length], mut rest) = bytes.split_first_chunk()?;
    let mut at = 0;
    if timed {
        let (seconds, behind) = rest.split_first_chunk()?;
        (at, rest) = (u32::from_le_bytes(*seconds), behind);
    }
    let (ip, rest): (IpAddr, &[u8]) = match family {
        4 => rest.split_first_chunk::<4>().map(|(ip, rest)| (Ipv4Addr::from(*ip).into(), rest))?,
        6 => rest.split_first_chunk::<16>().map(|(ip, rest)| (Ipv6Addr::from(*ip).into(), rest))?,
        _ => return None,
    };
    let (name, rest) = rest.split_at_checked(usize::from(length))?;
    let (sum, after) = rest.split_first_chunk::<4>()?;
    if checksum(&bytes[..bytes.len() - rest.len()]) != *sum {
        return None;
    }
    let name = Name::new(std::str::from_utf8(name).ok()?).ok()?;
    Some((Record { name, ip, at }, after))
}

fn checksum(record: &[u8]) -> [u8; 4] {
    // The lower half; a torn write or a stray byte changes it all the same.
    (stable_hash(record) as u32).to_le_bytes()
}

#[cfg(test)]
#[path = "log_tests.rs"]
mod tests;
