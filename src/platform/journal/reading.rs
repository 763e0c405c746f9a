//! What the bytes of a journal say, and what is to be done about it. Nothing here touches the host: a journal is
//! understood as a whole, or nothing of it is acted on.

use std::collections::HashSet;
use std::path::Path;

use super::{JournalError, MAGIC, OLDEST, Place, Record, VERSION, checksum};
use crate::platform::imp::resolv_conf;
use crate::platform::undo::Undo;

/// The highest number of a record: there is always a next one.
const HIGHEST: u64 = 1 << 48;

/// Where the changes of an earlier run were made, as seen from here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(in crate::platform) enum Origin {
    /// In this kernel and this network namespace.
    #[default]
    Here,
    /// In this kernel, but in another network namespace, which may still be there. Its inode, if it can be read.
    Elsewhere(Option<u64>),
    /// In a kernel that has been rebooted since, or in a namespace that somebody says is gone.
    Gone,
}

impl Origin {
    fn of(place: Option<&Place>, here: &Place) -> Self {
        match place {
            Some(place) if place == here => Self::Here,
            Some(place) if place.boot != here.boot => Self::Gone,
            Some(place) => Self::Elsewhere(Some(place.namespace)),
            // Nobody knows: the careful answer.
            None => Self::Elsewhere(None),
        }
    }
}

/// Changes of a run that has ended without undoing them.
#[derive(Debug, Default)]
pub(in crate::platform) struct Leftovers {
    /// In the order in which they were recorded.
    pub(in crate::platform) undos: Vec<(u64, Undo)>,
    /// Where they were made.
    pub(in crate::platform) origin: Origin,
    /// Lines that a crash tore while they were written: what they stand for had not been done.
    pub(in crate::platform) unreadable: usize,
    /// Bytes before the torn line, if there is one.
    pub(super) whole: u64,
}

/// What a replay has to do.
#[derive(Debug, Default)]
pub(in crate::platform) struct Due {
    /// To be undone, in this order.
    pub(in crate::platform) undos: Vec<(u64, Undo)>,
    /// The numbers of changes that are gone already, with their kernel or their namespace.
    pub(in crate::platform) died: Vec<u64>,
}

impl Leftovers {
    /// What a replay has to do, last change first.
    ///
    /// # Errors
    /// The network namespace, as far as it is known, in which it has to be done; not here.
    pub(in crate::platform) fn due(&self) -> Result<Due, Option<u64>> {
        let lasting = |undo: &Undo| undo.outlives_kernel();
        if let Origin::Elsewhere(namespace) = self.origin
            && self.undos.iter().any(|(_, undo)| !lasting(undo))
        {
            return Err(namespace);
        }
        let alive = |undo: &Undo| self.origin == Origin::Here || lasting(undo);
        let (undos, died): (Vec<_>, Vec<_>) = self.undos.iter().rev().cloned().partition(|(_, undo)| alive(undo));
        Ok(Due { undos, died: died.into_iter().map(|(id, _)| id).collect() })
    }
}

/// What a replay of a journal would come to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rehearsal {
    /// What it would undo, in this order, with the numbers of the records.
    pub undone: Vec<(u64, String)>,
    /// Changes that are gone already, with their kernel or their namespace.
    pub died: usize,
    /// Lines that a crash tore while they were written, and which stand for nothing.
    pub torn: usize,
    /// Nothing would be done, because it was written in another network namespace, which may still be there.
    pub elsewhere: bool,
}

impl Rehearsal {
    /// Reads `bytes` as a journal and says what a replay here would do. Does nothing of it.
    ///
    /// # Errors
    /// [`JournalError`], as a replay would end.
    pub fn of(bytes: &[u8]) -> Result<Self, JournalError> {
        let leftovers = read(Path::new("journal"), bytes, &Place::here())?;
        let due = leftovers.due();
        let (elsewhere, due) = (due.is_err(), due.unwrap_or_default());
        let undone = due.undos.iter().map(|(id, undo)| (*id, undo.to_string())).collect();
        Ok(Self { undone, died: due.died.len(), torn: leftovers.unreadable, elsewhere })
    }
}

/// One line of a journal.
enum Line {
    Whole(Record),
    /// A part of a line, or nothing of ours.
    Broken,
    /// A line from beginning to end, but not as it was written.
    Changed(&'static str),
}

/// Reads a journal. The last line may be torn, and is left out then.
///
/// # Errors
/// Anything else that is not as it was written: there is no telling what it stood for.
pub(super) fn read(path: &Path, bytes: &[u8], here: &Place) -> Result<Leftovers, JournalError> {
    let foreign = || JournalError::Foreign { path: path.to_owned() };
    if bytes.is_empty() {
        return Ok(Leftovers::default());
    }
    // The first line is written whole or not at all.
    let end = bytes.iter().position(|byte| *byte == b'\n').ok_or_else(foreign)?;
    let place = header(path, std::str::from_utf8(&bytes[..end]).map_err(|_| foreign())?)?;
    let mut leftovers =
        Leftovers { origin: Origin::of(place.as_ref(), here), whole: bytes.len() as u64, ..Leftovers::default() };
    let mut numbers = HashSet::new();
    let mut at = end + 1;
    for (number, line) in bytes[at..].split(|byte| *byte == b'\n').enumerate() {
        let (start, after) = (at, at + line.len() + 1);
        at = after;
        let damaged = |why| JournalError::Damaged { path: path.to_owned(), line: number + 2, why };
        match parse(line.strip_suffix(b"\r").unwrap_or(line)) {
            None => {}
            Some(Line::Whole(Record::Undo { id, undo })) => {
                if !numbers.insert(id) {
                    return Err(damaged("has a number that an earlier one has"));
                }
                if id > HIGHEST {
                    return Err(damaged("has a number that no run comes to"));
                }
                if !is_ours(&undo) {
                    return Err(damaged("names what no run of ours changes"));
                }
                leftovers.undos.push((id, undo));
            }
            Some(Line::Whole(Record::Void { id })) => leftovers.undos.retain(|(other, _)| *other != id),
            // A crash leaves the last line without its end; a power failure, in its place, a hole in the file.
            Some(Line::Broken) if after > bytes.len() => {
                leftovers.unreadable += 1;
                leftovers.whole = start as u64;
            }
            Some(Line::Broken) if leftovers.origin == Origin::Gone && line.contains(&0) => leftovers.unreadable += 1,
            Some(Line::Broken) => return Err(damaged("cannot be read")),
            Some(Line::Changed(why)) => return Err(damaged(why)),
        }
    }
    Ok(leftovers)
}

/// Where the journal was written; `None` if that cannot be read.
fn header(path: &Path, line: &str) -> Result<Option<Place>, JournalError> {
    let mut words = line.trim_end_matches('\r').splitn(3, ' ');
    let (magic, version) = (words.next(), words.next().unwrap_or_default());
    if magic != Some(MAGIC) || version.is_empty() || !version.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(JournalError::Foreign { path: path.to_owned() });
    }
    if [OLDEST, VERSION].iter().all(|known| known.to_string() != version) {
        return Err(JournalError::Version { path: path.to_owned(), found: version.chars().take(20).collect() });
    }
    let place = words.next().unwrap_or_default();
    let mut values = serde_json::Deserializer::from_str(place).into_iter::<Place>();
    match values.next() {
        // Where its line break was changed, a record hides in it.
        Some(Ok(_)) if values.byte_offset() < place.len() => {
            Err(JournalError::Damaged { path: path.to_owned(), line: 1, why: "goes on behind its end" })
        }
        value => Ok(value.and_then(Result::ok)),
    }
}

/// `None`: an empty line.
fn parse(line: &[u8]) -> Option<Line> {
    if line.is_empty() {
        return None;
    }
    let parts = std::str::from_utf8(line).ok().and_then(|line| line.split_once(' '));
    let parts = parts.and_then(|(sum, json)| Some((u64::from_str_radix(sum, 16).ok()?, json)));
    // No beginning of an object is an object: what is torn is no JSON.
    let Some((sum, json)) = parts.filter(|(_, json)| serde_json::from_str::<serde::de::IgnoredAny>(json).is_ok())
    else {
        return Some(Line::Broken);
    };
    Some(match serde_json::from_str(json) {
        _ if sum != checksum(json.as_bytes()) => Line::Changed("does not have the checksum that it was written with"),
        Ok(record) => Line::Whole(record),
        Err(_) => Line::Changed("is nothing that this version knows"),
    })
}

/// Whether a run of ours can have recorded it. A journal may be another user's, on whose behalf root cleans up.
fn is_ours(undo: &Undo) -> bool {
    match undo {
        Undo::Sysctl { path, .. } => path.starts_with("net/"),
        Undo::ResolvConf { path, .. } => path == Path::new(resolv_conf::PATH),
        Undo::Table(table) => table.is_ours(),
        _ => true,
    }
}
