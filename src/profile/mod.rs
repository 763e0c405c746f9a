//! YAML -> what was written ([`Node`]) -> what it means ([`Profile`]); every mistake with its place, key path and a
//! hint.
//!
//! Entries of `proxies` and `proxy-groups` are handed on as nodes: the kinds of outbound decode them with [`Fields`].

mod decode;
mod dns;
mod fields;
mod general;
mod groups;
mod known;
mod left_out;
mod nameserver;
mod nearest;
mod node;
mod parse;
mod ranges;
mod report;
mod routes;
mod rule_lines;
mod selection;
mod tun;

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

pub use decode::{Decode, mismatch, scalar};
pub use dns::{Dns, EnhancedMode, FilterMode};
pub use fields::Fields;
pub use general::{Credentials, Listen, LogLevel, Mode, Profile};
pub use nameserver::Nameserver;
pub use node::{Entry, Key, Node, Place, Position, Scalar, Value};
pub use parse::parse;
pub use report::{Block, Diagnostic, Report, Severity};
pub use routes::{BUILT_IN, Brought, Group, Proxy};
pub use rule_lines::PlacedRule;
pub use selection::Selection;
pub use tun::{DEVICE, Hijack, LAST_RULE_INDEX, Tun};

/// Files larger than this are no profiles.
const MAX_BYTES: u64 = 64 << 20;

/// Reads the profile at `path`. A file that cannot be read is an error in the report like any other mistake.
///
/// The profile may be run only if the report [has no errors](Report::has_errors). It comes back in spite of errors
/// where it can, so that the entries of `proxies` and `proxy-groups` can be checked in the same go.
#[must_use]
pub fn load(path: &Path) -> (Option<Profile>, Report) {
    let name = path.display().to_string();
    let bytes = open(path).and_then(bounded);
    match bytes {
        Ok(bytes) => read(&name, &bytes),
        Err(error) => {
            let mut report = Report::new(name, "");
            let denied = error.kind() == std::io::ErrorKind::PermissionDenied;
            let said = report.error(Position::default(), "", format!("the profile cannot be read: {error}"));
            if denied {
                said.hint("it is for other users (`ls -l` shows for whom): read it as one of them, or with sudo");
            }
            (None, report)
        }
    }
}

/// Opens what a profile may be: a regular file, standard input, or the pipe of a shell's `<(command)`. A device or a
/// FIFO that lies about could be read without end, or never say a word.
fn open(path: &Path) -> io::Result<File> {
    let kind = std::fs::metadata(path)?.file_type();
    // What has no name but that of a descriptor cannot be resolved to one.
    let is_descriptor = kind.is_fifo() && path.canonicalize().is_err();
    if kind.is_file() || is_descriptor || path == Path::new("/dev/stdin") {
        return File::open(path);
    }
    let found = match kind {
        kind if kind.is_dir() => "a directory",
        kind if kind.is_fifo() => "a FIFO",
        kind if kind.is_socket() => "a socket",
        _ => "a device",
    };
    Err(io::Error::other(format!("it is {found}; expected a regular file, or /dev/stdin")))
}

/// Reads it whole, unless it is too large to be a profile.
fn bounded(file: File) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.take(MAX_BYTES + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(io::Error::other("it is larger than 64 MiB"));
    }
    Ok(bytes)
}

/// Reads the text of a profile; `file` is the name that messages show. The rest is as in [`load`].
#[must_use]
pub fn read(file: &str, bytes: &[u8]) -> (Option<Profile>, Report) {
    let text = match std::str::from_utf8(bytes) {
        Ok(text) => text,
        Err(error) => return (None, not_text(file, bytes, error.valid_up_to())),
    };
    let mut report = Report::new(file, text);
    let profile = parse(&mut report).and_then(|root| Profile::decode(&root, &mut report));
    (profile, report)
}

fn not_text(file: &str, bytes: &[u8], valid: usize) -> Report {
    let text = String::from_utf8_lossy(&bytes[..valid]);
    let line = text.matches('\n').count() + 1;
    let column = text.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
    let narrow = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
    let at = Position { line: narrow(line), column: narrow(column), length: 1 };
    let mut report = Report::new(file, text);
    report.error(at, "", "the profile is not UTF-8 text").hint("save it as UTF-8");
    report
}

#[cfg(test)]
mod tests;
