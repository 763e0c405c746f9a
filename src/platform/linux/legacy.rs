//! The rules of iptables where they are not nftables' (x_tables), for the marks in them. Asked of the kernel itself: the
//! program that made them may be in somebody's container.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use super::netlink::marks::of_extension;

/// More than any firewall has. In bytes.
const LARGEST: usize = 64 << 20;
/// So often a table that is being replaced is asked for anew.
const ATTEMPTS: usize = 20;
/// A table's name with its zero (`XT_TABLE_MAXNAMELEN`).
const NAME: usize = 32;
/// `struct ipt_getinfo`: the name, which hooks, where they begin and end, how many entries, and of how many bytes.
const INFO: usize = NAME + 4 + 20 + 20 + 4 + 4;
/// `struct ipt_get_entries` before its entries: the name, the size, and room up to a multiple of eight.
const ENTRIES: usize = NAME + 8;
/// A match or target before its data (`struct xt_entry_match`): its size, its name, its revision.
const EXTENSION: usize = 32;
/// `IPT_SO_GET_INFO` and `IPT_SO_GET_ENTRIES`, the same for IPv6.
const GET_INFO: libc::c_int = 64;
const GET_ENTRIES: libc::c_int = 65;

/// What differs between the families.
#[derive(Debug, Clone, Copy)]
struct Kind {
    family: AddressFamily,
    level: libc::c_int,
    /// The names of the tables that somebody uses. To ask for another would make it.
    tables: &'static str,
    /// Where in an entry it says how far away its target is; how long it is follows.
    offsets: usize,
    /// Where the matches begin: the size of `struct ipt_entry`.
    matches: usize,
}

const KINDS: [Kind; 2] = [
    Kind {
        family: AddressFamily::Inet,
        level: libc::SOL_IP,
        tables: "/proc/thread-self/net/ip_tables_names",
        offsets: 88,
        matches: 112,
    },
    Kind {
        family: AddressFamily::Inet6,
        level: libc::SOL_IPV6,
        tables: "/proc/thread-self/net/ip6_tables_names",
        offsets: 140,
        matches: 168,
    },
];

/// Every bit of a mark that some rule reads or writes; none where they may not be looked at.
pub(super) fn mark_bits() -> u32 {
    KINDS.iter().fold(0, |bits, kind| {
        let names = fs::read_to_string(kind.tables).unwrap_or_default();
        names.lines().fold(bits, |bits, table| match entries(*kind, table) {
            Ok(entries) => bits | marks_in(*kind, &entries),
            Err(error) => {
                tracing::debug!("the marks in the iptables table {table} are not known: {error}");
                bits
            }
        })
    })
}

/// The entries of a table that is there.
fn entries(kind: Kind, table: &str) -> io::Result<Vec<u8>> {
    let socket = socket(kind.family, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    entries_by(|option, question| ask(socket.as_fd(), kind.level, option, question), table)
}

/// The same by `ask`, which has the kernel answer. It says EAGAIN where somebody has replaced the table since it told how
/// large it is.
fn entries_by(mut ask: impl FnMut(libc::c_int, &mut [u8]) -> io::Result<()>, table: &str) -> io::Result<Vec<u8>> {
    let mut attempts = 1..ATTEMPTS;
    loop {
        match entries_once(&mut ask, table) {
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) && attempts.next().is_some() => {}
            outcome => return outcome,
        }
    }
}

fn entries_once(ask: &mut impl FnMut(libc::c_int, &mut [u8]) -> io::Result<()>, table: &str) -> io::Result<Vec<u8>> {
    let named = |size: usize| {
        let mut request = vec![0; size];
        request.iter_mut().zip(table.bytes().take(NAME - 1)).for_each(|(to, from)| *to = from);
        request
    };
    let mut info = named(INFO);
    ask(GET_INFO, &mut info)?;
    let size = word(&info, INFO - 4).and_then(|size| usize::try_from(size).ok()).unwrap_or_default();
    if size > LARGEST {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "it is larger than any"));
    }
    let mut request = named(ENTRIES + size);
    let length = u32::try_from(size).unwrap_or_default().to_ne_bytes();
    request[NAME..NAME + 4].copy_from_slice(&length);
    ask(GET_ENTRIES, &mut request)?;
    Ok(request.split_off(ENTRIES))
}

/// Has the kernel answer in place of the question.
fn ask(socket: BorrowedFd<'_>, level: libc::c_int, option: libc::c_int, question: &mut [u8]) -> io::Result<()> {
    let mut length = libc::socklen_t::try_from(question.len()).map_err(io::Error::other)?;
    // SAFETY: the kernel writes at most `length` bytes, and there are as many.
    let outcome =
        unsafe { libc::getsockopt(socket.as_raw_fd(), level, option, question.as_mut_ptr().cast(), &raw mut length) };
    if outcome == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn marks_in(kind: Kind, mut entries: &[u8]) -> u32 {
    let mut bits = 0;
    while let (Some(target), Some(length)) = (half(entries, kind.offsets), half(entries, kind.offsets + 2)) {
        // An entry without a length would be looked at for ever.
        let Some((entry, rest)) = entries.split_at_checked(length).filter(|_| length >= kind.matches) else { break };
        bits |= extensions(entry.get(kind.matches..target).unwrap_or_default());
        bits |= extensions(entry.get(target..).unwrap_or_default());
        entries = rest;
    }
    bits
}

/// The bits of matches that stand one behind the other, or of a target.
fn extensions(mut list: &[u8]) -> u32 {
    let mut bits = 0;
    while let Some(size) = half(list, 0).filter(|size| *size >= EXTENSION) {
        let Some((extension, rest)) = list.split_at_checked(size) else { break };
        let name = &extension[2..EXTENSION - 1];
        let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
        bits |= of_extension(&String::from_utf8_lossy(name), &extension[EXTENSION..]);
        list = rest;
    }
    bits
}

fn half(bytes: &[u8], at: usize) -> Option<usize> {
    Some(usize::from(u16::from_ne_bytes(*bytes.get(at..)?.first_chunk()?)))
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extension(name: &str, words: &[u32]) -> Vec<u8> {
        let data: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let size = (EXTENSION + data.len()).next_multiple_of(8);
        let mut bytes = u16::try_from(size).unwrap().to_ne_bytes().to_vec();
        bytes.extend(name.bytes());
        bytes.resize(EXTENSION, 0);
        bytes.extend(data);
        bytes.resize(size, 0);
        bytes
    }

    fn entry(kind: Kind, matches: &[Vec<u8>], target: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; kind.matches];
        bytes.extend(matches.concat());
        let (at, length) = (bytes.len(), bytes.len() + target.len());
        for (offset, value) in [(kind.offsets, at), (kind.offsets + 2, length)] {
            bytes[offset..offset + 2].copy_from_slice(&u16::try_from(value).unwrap().to_ne_bytes());
        }
        bytes.extend(target);
        bytes
    }

    #[test]
    fn a_table_that_is_replaced_while_it_is_read_is_read_again_and_not_for_ever() {
        let mut sizes = [8_u32, 16, 24].into_iter();
        let mut now = 0;
        let read = entries_by(
            |option, question| {
                if option == GET_INFO {
                    now = sizes.next().unwrap_or(now);
                    question[INFO - 4..].copy_from_slice(&now.to_ne_bytes());
                } else if now < 24 {
                    return Err(io::Error::from_raw_os_error(libc::EAGAIN));
                }
                Ok(())
            },
            "mangle",
        );
        assert_eq!(read.unwrap().len(), 24);
        let mut asked = 0;
        let never = entries_by(
            |option, _| {
                asked += usize::from(option == GET_ENTRIES);
                if option == GET_INFO { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::EAGAIN)) }
            },
            "mangle",
        );
        assert_eq!((never.unwrap_err().raw_os_error(), asked), (Some(libc::EAGAIN), ATTEMPTS));
    }

    #[test]
    fn marks_stand_in_matches_and_in_targets() {
        for kind in KINDS {
            let marked = [extension("tcp", &[80, 81]), extension("mark", &[0x100, 0x100, 0])];
            let set = extension("CONNMARK", &[0x2000_0000, 0x2000_0000, u32::MAX, 0]);
            let entries = [entry(kind, &marked, &extension("", &[1])), entry(kind, &[], &set)].concat();
            assert_eq!(marks_in(kind, &entries), 0x2000_0100);
            for length in 0..entries.len() {
                let _ = marks_in(kind, &entries[..length]);
            }
            assert_eq!(marks_in(kind, &vec![0xff; 500]), 0);
        }
    }
}
