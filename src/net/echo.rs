//! Echo requests and what comes back for them (RFC 792, RFC 4443 section 4).

use std::net::IpAddr;
use std::ops::Range;
use std::task::{Context, Poll};

use super::DialError;

/// An echo request or a reply, without its addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Echo<'a> {
    /// Tells the requests of one host apart.
    pub id: u16,
    /// Tells the requests with one id apart.
    pub sequence: u16,
    /// What the reply repeats.
    pub payload: &'a [u8],
    /// Time to live, or hop limit.
    pub ttl: u8,
    /// Type of service, or traffic class.
    pub tos: u8,
    /// Routers must not cut it.
    pub dont_fragment: bool,
}

/// What came back. The bytes that belong to it are in the caller's buffer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EchoArrival {
    /// A reply of this host.
    Reply {
        /// The host.
        from: IpAddr,
        /// As sent.
        id: u16,
        /// As sent.
        sequence: u16,
        /// As it arrived.
        ttl: u8,
        /// As it arrived.
        tos: u8,
        /// The payload.
        payload: Range<usize>,
    },
    /// An ICMP error that quotes a request of ours.
    Error(EchoError),
}

/// An ICMP error about an echo request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EchoError {
    /// Who says so; None: this host itself.
    pub router: Option<IpAddr>,
    /// Where the request went.
    pub to: IpAddr,
    /// Its id on the wire.
    pub id: u16,
    /// Its sequence number.
    pub sequence: u16,
    /// Its time to live when the error was made, where that is known.
    pub ttl: Option<u8>,
    /// The message itself.
    pub message: EchoFailure,
    /// As much of the request's payload as is quoted.
    pub payload: Range<usize>,
}

/// The first eight bytes of an ICMP error, without the checksum.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EchoFailure {
    /// The type, by the numbers of the family.
    pub kind: u8,
    /// The code.
    pub code: u8,
    /// What follows the checksum: an MTU, a pointer, or nothing.
    pub word: u32,
}

/// A socket that sends echo requests of one family.
pub trait EchoSocket {
    /// The one id that it sends with and hears of, where the system has chosen that; None: any.
    fn own_id(&self) -> Option<u16>;

    /// Sends one request now. Where there is no room for it the error's kind is `WouldBlock`.
    ///
    /// # Errors
    /// Why it cannot leave: what a router in this place would say of it.
    fn send(&mut self, to: IpAddr, request: &Echo<'_>) -> Result<(), DialError>;

    /// Whether nothing can be sent or heard by it any more, since the device that it was bound to is gone.
    fn is_stranded(&self) -> bool;

    /// Receives one reply or error. `buffer` has to hold the largest packet there is.
    ///
    /// # Errors
    /// The socket cannot be used any longer.
    fn poll_recv(&mut self, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<std::io::Result<EchoArrival>>;
}

/// An [`EchoSocket`] of any kind.
pub type BoxEchoSocket = Box<dyn EchoSocket>;
