//! What a profile names and this program cannot do yet. It refuses: a flow that was meant for a proxy must never
//! leave the host another way.

use super::{Networks, Outbound};
use crate::net::{BoxDatagram, BoxEchoSocket, BoxFuture, BoxStream, DialError};
use crate::session::Session;

/// Refuses every flow, with the reason.
pub struct Unsupported {
    name: String,
    reason: String,
}

impl Unsupported {
    /// An outbound called `name`; `reason` goes to the flow's log line.
    #[must_use]
    pub fn new(name: &str, reason: String) -> Self {
        Self { name: name.to_owned(), reason }
    }

    fn refusal(&self) -> DialError {
        DialError::Unsupported(self.reason.clone())
    }
}

impl Outbound for Unsupported {
    fn name(&self) -> &str {
        &self.name
    }

    /// All: a network that it did not carry would fall through to a later rule, perhaps to DIRECT.
    fn networks(&self) -> Networks {
        Networks::ALL
    }

    fn connect<'a>(&'a self, _: &'a Session) -> BoxFuture<'a, Result<BoxStream, DialError>> {
        Box::pin(async { Err(self.refusal()) })
    }

    fn associate<'a>(&'a self, _: &'a Session) -> BoxFuture<'a, Result<BoxDatagram, DialError>> {
        Box::pin(async { Err(self.refusal()) })
    }

    fn echo(&self, _: bool) -> Result<BoxEchoSocket, DialError> {
        Err(self.refusal())
    }
}
