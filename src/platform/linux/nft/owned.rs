//! A table that is owned by the netlink socket of a child of ours, so that nobody else can change it. It vanishes with the
//! child, which goes when our end of its input closes, however we die.

use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStderr, ChildStdin, Stdio};
use std::time::Instant;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::super::bounded::{self, Deadline};
use super::super::program::{NFT, first_line};
use super::{loaded, seen_loaded};
use crate::platform::firewall::Nft;

/// A child that owns what it loads.
#[derive(Debug)]
pub(in crate::platform) struct Owner {
    child: Child,
    input: ChildStdin,
    errors: ChildStderr,
}

/// A loaded table and the child that owns it.
#[derive(Debug)]
pub(in crate::platform) struct OwnedTable {
    nft: Nft,
    /// Of the tables, one of each family.
    handles: Vec<u64>,
    owner: Owner,
}

impl OwnedTable {
    /// Loads the table as one batch: all of it, or nothing.
    ///
    /// # Errors
    /// nft's own words.
    pub(in crate::platform) fn load(nft: &Nft) -> io::Result<Self> {
        Owner::begin()?.load(nft)
    }

    /// Whether the table is in force, with every chain. Where nobody can say, it is as long as its owner lives.
    pub(in crate::platform) fn is_loaded(&self) -> bool {
        let mut owner = [PollFd::new(self.owner.errors.as_fd(), PollFlags::empty())];
        let gone = poll(&mut owner, PollTimeout::ZERO).is_ok_and(|ready| ready > 0);
        !gone && loaded(&self.nft).map_or(true, |found| found.as_ref() == Some(&self.handles))
    }

    /// By these its tables are told from those of others that come to have the same name.
    pub(in crate::platform) fn handles(&self) -> &[u64] {
        &self.handles
    }

    /// Makes the table that of `nft`, as one batch; what is the same in both is not touched.
    ///
    /// # Errors
    /// nft's own words, or there is no way but to load it anew. The table is then what it was.
    pub(in crate::platform) fn change_to(&mut self, nft: &Nft) -> io::Result<()> {
        let text = self.nft.change_to(nft).ok_or_else(|| io::Error::other("it has to be loaded anew"))?;
        if !text.is_empty() {
            self.owner.feed(&self.nft.table, &text)?;
        }
        self.nft = nft.clone();
        Ok(())
    }

    /// Hangs up when the child has ended, and the table with it.
    pub(in crate::platform) fn lifeline(&self) -> BorrowedFd<'_> {
        self.owner.errors.as_fd()
    }

    /// What was loaded.
    pub(in crate::platform) fn nft(&self) -> &Nft {
        &self.nft
    }

    /// Empties a chain of the table; nothing to do where there is none of that name.
    ///
    /// # Errors
    /// nft's own words.
    pub(in crate::platform) fn flush(&mut self, chain: &str) -> io::Result<()> {
        if !self.nft.chains().any(|name| name == chain) {
            return Ok(());
        }
        // Only the owner may.
        self.owner.feed(&self.nft.table, &format!("flush chain inet {} {chain}", self.nft.table))
    }
}

impl Owner {
    /// Starts it.
    ///
    /// # Errors
    /// nft is not installed.
    pub(super) fn begin() -> io::Result<Self> {
        let mut child = NFT.spawn(|command| {
            // Ctrl-C goes to the whole foreground group; the table must outlast the drain. It ends with its input, whichever
            // thread has that.
            command.arg("--interactive").stdout(Stdio::null()).process_group(0);
        })?;
        match (child.stdin.take(), child.stderr.take()) {
            (Some(input), Some(errors)) => Ok(Self { child, input, errors }),
            _ => Err(io::Error::other("nft was started without pipes")),
        }
    }

    /// Loads the table as one batch: all of it, or nothing.
    ///
    /// # Errors
    /// nft's own words.
    pub(super) fn load(mut self, nft: &Nft) -> io::Result<OwnedTable> {
        self.feed(&nft.table, &nft.text)?;
        Ok(OwnedTable { nft: nft.clone(), handles: seen_loaded(nft)?, owner: self })
    }

    /// Has the child carry out `text`, which is about `table`, as one batch.
    fn feed(&mut self, table: &str, text: &str) -> io::Result<()> {
        let begun = Instant::now();
        let outcome = self.speak(table, text);
        NFT.note(begun, &outcome);
        outcome
    }

    fn speak(&mut self, table: &str, text: &str) -> io::Result<()> {
        // Interactive nft takes one line at a time, and one line is one transaction. It says nothing about success, so
        // a second line says what it does not understand: its complaint tells that the first is through.
        let sentinel = format!("{table}-is-through");
        let line = text.replace('\n', " ");
        let deadline = NFT.deadline();
        let lines = format!("{line}\n{sentinel}\n");
        match bounded::write_all(&mut self.input, lines.as_bytes(), deadline) {
            // It reads no more. Why, it has told before it ended.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
            written => written.map_err(silent)?,
        }
        let said = self.hear(&sentinel, deadline)?;
        // What points at the words of an earlier complaint may come as late as this: "    ^^^^".
        match said.lines().find(|line| line.contains(char::is_alphanumeric)) {
            None => Ok(()),
            Some(complaint) => Err(io::Error::other(complaint.trim().to_owned())),
        }
    }

    /// What the child complains of before it complains of `sentinel`.
    fn hear(&mut self, sentinel: &str, deadline: Deadline) -> io::Result<String> {
        let (mut heard, mut buffer) = (Vec::new(), [0; 4096]);
        loop {
            bounded::wait_for(&mut [PollFd::new(self.errors.as_fd(), PollFlags::POLLIN)], deadline).map_err(silent)?;
            let length = self.errors.read(&mut buffer)?;
            heard.extend_from_slice(&buffer[..length]);
            let text = String::from_utf8_lossy(&heard);
            if length == 0 {
                let said = format!("nft has ended: {}", first_line(&heard));
                return Err(io::Error::new(io::ErrorKind::BrokenPipe, said));
            }
            // The complaint is "Error: syntax error" and more, then the line it is about.
            if let Some((before, _)) = text.split_once(sentinel) {
                let before = before.rsplit_once("Error:").map_or(before, |(before, _)| before);
                return Ok(before.to_owned());
            }
        }
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        // The kernel takes an owned table down before the owner's exit is seen. One that is held up keeps it: then nobody
        // can load another of that name, and a look finds it still there.
        NFT.give_up(&mut self.child);
    }
}

/// The child that holds the table is there and says nothing.
fn silent(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::TimedOut => io::Error::new(error.kind(), "nft does not answer"),
        _ => error,
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    fn owner(script: &str) -> Owner {
        let mut command = Command::new("sh");
        command.args(["-c", script]).stdin(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let (input, errors) = (child.stdin.take().unwrap(), child.stderr.take().unwrap());
        Owner { child, input, errors }
    }

    #[test]
    fn one_that_has_ended_before_it_was_told_anything_is_heard_all_the_same() {
        for (script, words) in [
            ("echo 'Error: Could not process rule: Device or resource busy' >&2; exit 1", "Device or resource busy"),
            ("exit 1", "said nothing"),
        ] {
            let mut owner = owner(script);
            // Nobody reads any more what it is told.
            owner.child.wait().unwrap();
            let error = owner.speak("tunproxy", "add table inet tunproxy").unwrap_err();
            assert!(error.to_string().contains(words), "{error}");
            assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
        }
    }

    #[test]
    fn a_complaint_is_the_answer_and_what_comes_after_it_is_not() {
        let mut silent = owner("read line; read line; echo \"Error: syntax error $line\" >&2; read line");
        silent.speak("tunproxy", "add table inet tunproxy").unwrap();
        let mut complains =
            owner("read line; echo 'Error: No such file' >&2; read line; echo \"Error: $line\" >&2; read line");
        let error = complains.speak("tunproxy", "add table inet tunproxy").unwrap_err();
        assert_eq!(error.to_string(), "Error: No such file");
    }
}
