//! What an association has at its ends: answers that are handed over together, and the transport that is no more.

use std::io;
use std::net::IpAddr;
use std::task::{Context, Poll};

use tokio::io::ReadBuf;

use super::train::LONGEST;
use crate::net::{Address, Datagram, Received};

/// Answers of one peer that came one by one and stand together at the scratch's beginning, all of one size but for the
/// last: the client gets them at once.
#[derive(Default)]
pub(super) struct Answers {
    pub(super) from: Option<Address>,
    /// The address of this host that they came to.
    pub(super) at: Option<IpAddr>,
    pub(super) size: usize,
    pub(super) length: usize,
}

impl Answers {
    /// Adds `length` bytes that stand behind the others. False: they have to begin another train.
    pub(super) fn add(&mut self, from: &Address, at: Option<IpAddr>, length: usize) -> bool {
        let alike = self.from.as_ref() == Some(from) && self.at == at && (1..=self.size).contains(&length);
        // A shorter one is the last.
        let fits = alike && self.length.is_multiple_of(self.size) && self.length + length <= LONGEST;
        if fits {
            self.length += length;
        }
        fits
    }
}

/// The transport of an association that has ended.
pub(super) struct Closed;

pub(super) fn ended() -> io::Error {
    io::Error::new(io::ErrorKind::BrokenPipe, "the association has ended")
}

impl Datagram for Closed {
    fn poll_send_to(&mut self, _: &mut Context<'_>, _: &[u8], _: &Address, _: bool) -> Poll<io::Result<()>> {
        Poll::Ready(Err(ended()))
    }

    fn poll_recv_from(&mut self, _: &mut Context<'_>, _: &mut ReadBuf<'_>) -> Poll<io::Result<Received>> {
        Poll::Ready(Err(ended()))
    }
}
