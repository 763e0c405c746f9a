//! The door through which flows come that are byte streams and datagrams already.

use std::future::Future;
use std::net::SocketAddr;
use std::rc::Rc;

use crate::net::{Address, BoxStream, DialError, Reach};
use crate::session::Session;

/// What the dispatcher offers to inbounds without packets. It belongs to one worker and is used in its `LocalSet`.
pub trait Entry: Clone + 'static {
    /// An upstream that was dialled, with what it takes to count and to log the flow. Dropping it ends the flow.
    type Upstream: 'static;

    /// Decides where the flow goes, and dials.
    ///
    /// # Errors
    /// What the client is to be told.
    fn dial(&self, session: Session) -> impl Future<Output = Result<Self::Upstream, DialError>>;

    /// Copies both ways until both ends are done, and writes the flow's log line. Bytes that were read ahead of
    /// `client` come out of it first.
    fn relay(&self, upstream: Self::Upstream, client: BoxStream) -> impl Future<Output = ()>;

    /// Takes one datagram from `session.source` to `session.destination`; answers come back through `back`.
    fn datagram(&self, session: Session, payload: &[u8], dont_fragment: bool, back: &Rc<dyn Back>);
}

/// Where the answers of an association go.
pub trait Back {
    /// A datagram of the peer `from` for the client at `to`.
    fn deliver(&self, from: &Address, to: SocketAddr, payload: &[u8]);

    /// The datagram that the client at `to` sent to `from` did not arrive; `quoted` is its beginning.
    fn unreachable(&self, from: &Address, to: SocketAddr, quoted: &[u8], why: Reach);
}
