//! The channel between the two halves: the device's descriptors one way, the word to go the other, and what went wrong.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recv, recvmsg, send, sendmsg};

use super::super::tun::{Framing, TunQueue};
use super::{RootlessError, step};

/// The longest message that says what went wrong, in bytes; more is cut.
const LONGEST: usize = 4096;

/// What the child half ended with before it became the command.
#[derive(Debug, thiserror::Error)]
pub enum ChildError {
    /// It said why.
    #[error("{said}")]
    Ended {
        /// In words.
        said: String,
        /// The exit code that fits: 127 for a command that was not found, 126 for one that cannot be run, else 1.
        code: u8,
    },
    /// It cannot be heard.
    #[error("the private namespace does not answer: {0}")]
    Io(#[from] io::Error),
}

impl ChildError {
    /// The exit code that a shell would give it.
    #[must_use]
    pub fn code(&self) -> u8 {
        match self {
            Self::Ended { code, .. } => *code,
            Self::Io(_) => 1,
        }
    }

    fn read(message: &[u8]) -> Self {
        match message.split_first() {
            Some((code, said)) => Self::Ended { said: String::from_utf8_lossy(said).into_owned(), code: *code },
            None => Self::Ended { said: "the private namespace could not be made".to_owned(), code: 1 },
        }
    }
}

/// Tells the parent what went wrong.
pub(super) fn tell(channel: &OwnedFd, error: &RootlessError) -> nix::Result<()> {
    let mut message = vec![error.code()];
    message.extend(error.to_string().bytes().take(LONGEST - 1));
    send(channel.as_raw_fd(), &message, MsgFlags::MSG_NOSIGNAL).map(drop)
}

/// Sends the framing and the descriptors of all queues.
pub(super) fn hand_over(channel: &OwnedFd, queues: &[TunQueue]) -> Result<(), RootlessError> {
    let packet = queues.iter().any(|queue| queue.framing() == Framing::Packet);
    let plain = queues.iter().any(|queue| queue.framing() == Framing::Plain);
    let word: &[u8] = if packet {
        b"P"
    } else if plain {
        b"-"
    } else {
        b"O"
    };
    let descriptors: Vec<RawFd> = queues.iter().flat_map(TunQueue::descriptors).collect();
    let rights = [ControlMessage::ScmRights(&descriptors)];
    sendmsg::<()>(channel.as_raw_fd(), &[IoSlice::new(word)], &rights, MsgFlags::MSG_NOSIGNAL, None)
        .map(drop)
        .map_err(step("hand the device over"))
}

/// Waits for the parent's word to go.
pub(super) fn wait_for_go(channel: &OwnedFd) -> Result<(), RootlessError> {
    let mut word = [0; 1];
    match nix::unistd::read(channel, &mut word) {
        Ok(1) => Ok(()),
        Ok(_) => Err(step("start: the proxy went away")(io::Error::from(io::ErrorKind::BrokenPipe))),
        Err(error) => Err(step("wait for the proxy")(error)),
    }
}

/// The device that the child has made.
///
/// # Errors
/// What went wrong in the child, in its words.
pub fn receive(channel: &OwnedFd) -> Result<Vec<TunQueue>, ChildError> {
    let mut text = [0; LONGEST];
    let mut space = nix::cmsg_space!([RawFd; 16]);
    let (length, descriptors) = {
        let mut parts = [IoSliceMut::new(&mut text)];
        let message = recvmsg::<()>(channel.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)
            .map_err(io::Error::from)?;
        let mut descriptors: Vec<OwnedFd> = Vec::new();
        for control in message.cmsgs().map_err(io::Error::from)? {
            if let ControlMessageOwned::ScmRights(received) = control {
                // SAFETY: the kernel has just made these descriptors for us.
                descriptors.extend(received.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
            }
        }
        (message.bytes, descriptors)
    };
    if descriptors.is_empty() {
        return Err(ChildError::read(&text[..length]));
    }
    let framing = match text[0] {
        b'P' => Framing::Packet,
        b'-' => Framing::Plain,
        _ => Framing::Offload,
    };
    let mut descriptors = descriptors.into_iter();
    let mut queues = Vec::new();
    while let Some(descriptor) = descriptors.next() {
        let queue = TunQueue::from_descriptor(descriptor, framing)?;
        let beside = if framing == Framing::Packet { descriptors.next() } else { None };
        queues.push(match beside {
            Some(socket) => queue.beside(socket),
            None => queue,
        });
    }
    Ok(queues)
}

/// Lets the child become the command, and waits until it has: its end of the channel closes by that.
///
/// # Errors
/// The command cannot be run, or the child is gone.
pub fn go(channel: &OwnedFd) -> Result<(), ChildError> {
    nix::unistd::write(channel, b"g").map_err(io::Error::from)?;
    let mut text = [0; LONGEST];
    loop {
        match recv(channel.as_raw_fd(), &mut text, MsgFlags::empty()) {
            Ok(0) => return Ok(()),
            Ok(length) => return Err(ChildError::read(&text[..length])),
            Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(io::Error::from(error).into()),
        }
    }
}
