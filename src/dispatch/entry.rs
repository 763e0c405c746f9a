//! What the dispatcher offers to inbounds whose flows are streams and datagrams already, and how answers find back.

use std::future::Future;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU16;
use std::rc::Rc;

use crate::net::{Address, BoxStream, DialError, Echo, EchoFailure, Reach};
use crate::session::Session;

/// The way into the dispatcher; used inside one worker.
pub trait Entry: Clone + 'static {
    /// A dialled flow; dropping it closes it and writes its log line.
    type Upstream: 'static;

    /// Decides and dials. The error is what to tell the client.
    fn dial(&self, session: Session) -> impl Future<Output = Result<Self::Upstream, DialError>>;

    /// Copies both ways until both ends are done, and writes the flow's log line.
    fn relay(&self, upstream: Self::Upstream, client: BoxStream) -> impl Future<Output = ()>;

    /// Carries one datagram of `session.source` to `session.destination`; answers come back through `back`.
    fn datagram(&self, session: Session, payload: &[u8], dont_fragment: bool, back: &Rc<dyn Back>);

    /// The client `source` behind `back` is gone: all that it has going in datagrams ends at once, here and upstream.
    fn leave(&self, source: SocketAddr, back: &Rc<dyn Back>);
}

/// Where the answers of an association go. A client is a source address behind one of these: the same address behind
/// another is another client.
pub trait Back {
    /// Hands a payload to the client `to`, as if `from` had sent it; `from` is written as the client wrote it.
    fn deliver(&self, from: &Address, to: SocketAddr, payload: &[u8]);

    /// Hands over several payloads, `size` bytes each but for the last, as if `from` had sent them.
    fn deliver_train(&self, from: &Address, to: SocketAddr, train: &[u8], size: NonZeroU16) {
        for payload in train.chunks(usize::from(size.get())) {
            self.deliver(from, to, payload);
        }
    }

    /// Tells the client `to` that its packet to `from`, which began with `quoted`, did not arrive.
    fn unreachable(&self, from: &Address, to: SocketAddr, quoted: &[u8], why: Reach);

    /// Whether `client` is one of many and may open only so many ways a second. This host itself is not: its address stands
    /// for all its programs.
    fn is_paced(&self, _client: IpAddr) -> bool {
        false
    }
}

/// An echo request of a client, as it came.
#[derive(Debug, Clone, Copy)]
pub struct Ping<'a> {
    /// The client.
    pub source: IpAddr,
    /// Whom it asks, perhaps by a fake address.
    pub destination: IpAddr,
    /// The request.
    pub echo: Echo<'a>,
    /// Its packet up to where the payload begins.
    pub head: &'a [u8],
    /// Its whole packet.
    pub packet: &'a [u8],
}

/// As much of a client's request as an ICMP error quotes.
#[derive(Debug, Clone, Copy)]
pub struct Quote<'a> {
    /// The client's own packet up to where the payload begins.
    pub head: &'a [u8],
    /// What its time to live was where the error was made, if that is known.
    pub ttl: Option<u8>,
    /// What is quoted of the payload.
    pub payload: &'a [u8],
}

/// Where goes what comes back for echo requests.
pub trait EchoBack {
    /// Hands a reply to the client `to`, as if `from` had sent it.
    fn reply(&self, from: IpAddr, to: IpAddr, reply: &Echo<'_>);

    /// Tells the client `to` what `router` says of its request; without a router the word is this host's.
    fn error(&self, router: Option<IpAddr>, to: IpAddr, message: EchoFailure, quote: &Quote<'_>);

    /// Tells a client that its packet, which began with `quoted`, goes nowhere.
    fn unreachable(&self, quoted: &[u8], why: Reach);
}
