//! What the bytes of a journal say, and what is to be done about it. Nothing here touches the host: a journal is
//! understood as a whole, or nothing of it is acted on.

use std::collections::HashSet;
use std::path::Path;

use super::format::{End, Line, MAGIC, OLDEST, VERSION, digits, first_sum, is_beginning};
use super::{JournalError, Place, Record};
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
    /// Where the file goes on.
    pub(super) end: End,
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
    let first = header(path, std::str::from_utf8(&bytes[..end]).map_err(|_| foreign())?)?;
    let mut leftovers = Leftovers {
        origin: Origin::of(first.place.as_ref(), here),
        end: End {
            version: first.version,
            sum: first.sum,
            whole: bytes.len() as u64,
            broken: bytes.last() == Some(&b'\n'),
        },
        ..Leftovers::default()
    };
    let chained = leftovers.end.is_chained();
    // What the next line has to follow, if that can be told.
    let mut before = Some(first.sum);
    let mut numbers = HashSet::new();
    let mut at = end + 1;
    for (number, line) in bytes[at..].split(|byte| *byte == b'\n').enumerate() {
        let (start, after) = (at, at + line.len() + 1);
        at = after;
        let damaged = |why| JournalError::Damaged { path: path.to_owned(), line: number + 2, why };
        let last = after > bytes.len();
        // In a chain every sign counts.
        let line = line.strip_suffix(b"\r").filter(|_| !chained).unwrap_or(line);
        // Of a kernel that is no more: a power failure may lose one page of what was written last, and keep the next.
        let hole = leftovers.origin == Origin::Gone && line.contains(&0);
        match Line::of(line, chained) {
            Line::Empty if last || !chained => {}
            Line::Empty => return Err(damaged("is empty")),
            Line::Whole(record, link) => {
                if before.zip(link.follows).is_some_and(|(before, follows)| before != follows) {
                    return Err(damaged("does not follow the line before it: lines are missing, or in another order"));
                }
                before = Some(link.sum);
                leftovers.end.sum = link.sum;
                leftovers.take(record, &mut numbers).map_err(damaged)?;
            }
            // A crash leaves the last line without its end; a power failure, in its place, a hole in the file.
            Line::Broken if last && (!chained || hole || is_beginning(line)) => {
                leftovers.unreadable += 1;
                (leftovers.end.whole, leftovers.end.broken) = (start as u64, true);
            }
            Line::Broken if hole => {
                leftovers.unreadable += 1;
                before = None;
            }
            Line::Broken => return Err(damaged("cannot be read")),
            Line::Changed(why) => return Err(damaged(why)),
        }
    }
    Ok(leftovers)
}

impl Leftovers {
    /// Takes in what one line says; `numbers` are those of the lines before. The error says what is wrong with it.
    fn take(&mut self, record: Record, numbers: &mut HashSet<u64>) -> Result<(), &'static str> {
        match record {
            Record::Undo { id, .. } if !numbers.insert(id) => Err("has a number that an earlier one has"),
            Record::Undo { id, .. } if id > HIGHEST => Err("has a number that no run comes to"),
            Record::Undo { undo, .. } if !is_ours(&undo) => Err("names what no run of ours changes"),
            Record::Undo { id, undo } => {
                self.undos.push((id, undo));
                Ok(())
            }
            Record::Void { id } => {
                self.undos.retain(|(other, _)| *other != id);
                Ok(())
            }
        }
    }
}

/// What the first line says.
struct Header {
    version: u32,
    /// Its checksum; 0 in a version in which it has none.
    sum: u64,
    /// Where the journal was written; `None` if that cannot be read.
    place: Option<Place>,
}

fn header(path: &Path, line: &str) -> Result<Header, JournalError> {
    let damaged = |why| JournalError::Damaged { path: path.to_owned(), line: 1, why };
    let mut words = line.trim_end_matches('\r').splitn(3, ' ');
    let (magic, version) = (words.next(), words.next().unwrap_or_default());
    if magic != Some(MAGIC) || version.is_empty() || !version.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(JournalError::Foreign { path: path.to_owned() });
    }
    let found = || JournalError::Version { path: path.to_owned(), found: version.chars().take(20).collect() };
    let known = (OLDEST..=VERSION).find(|known| known.to_string() == version).ok_or_else(found)?;
    let rest = words.next().unwrap_or_default();
    let chained = End { version: known, ..End::default() }.is_chained();
    if chained && line.ends_with('\r') {
        return Err(damaged("ends as lines of another system do: somebody has edited it"));
    }
    let (sum, place) = if chained { rest.split_once(' ').unwrap_or_default() } else { ("", rest) };
    let mut values = serde_json::Deserializer::from_str(place).into_iter::<Place>();
    let value = values.next();
    // Where its line break was changed, a record hides in it.
    if matches!(value, Some(Ok(_))) && values.byte_offset() < place.len() {
        return Err(damaged("goes on behind its end"));
    }
    let place_read = value.and_then(Result::ok);
    if !chained {
        return Ok(Header { version: known, sum: 0, place: place_read });
    }
    match digits(sum).filter(|sum| *sum == first_sum(known, place)) {
        Some(sum) if place_read.is_some() => Ok(Header { version: known, sum, place: place_read }),
        Some(_) => Err(damaged("is nothing that this version knows")),
        None => Err(damaged("does not have the checksum that it was written with")),
    }
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
