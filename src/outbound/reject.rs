//! REJECT and REJECT-DROP: the profile's own refusals.

use std::sync::Arc;

use super::kind::{Context, Kind};
use super::{Networks, Outbound};
use crate::net::{BoxDatagram, BoxEchoSocket, BoxFuture, BoxStream, DialError, Reject as Manner};
use crate::profile::Fields;
use crate::session::Session;

/// The registry's entry.
pub(super) const KIND: Kind = Kind { name: "reject", keys: &[], build };

fn build(_: &mut Fields<'_>, name: &str, _: &Context) -> Option<Arc<dyn Outbound>> {
    Some(Arc::new(Reject::new(name, Manner::Answer)))
}

/// Turns every flow away.
pub struct Reject {
    name: String,
    manner: Manner,
}

impl Reject {
    /// An outbound called `name` that refuses in this manner.
    #[must_use]
    pub fn new(name: &str, manner: Manner) -> Self {
        Self { name: name.to_owned(), manner }
    }
}

impl Outbound for Reject {
    fn name(&self) -> &str {
        &self.name
    }

    fn networks(&self) -> Networks {
        Networks::ALL
    }

    fn connect<'a>(&'a self, _: &'a Session) -> BoxFuture<'a, Result<BoxStream, DialError>> {
        Box::pin(async { Err(DialError::Rejected(self.manner)) })
    }

    fn associate<'a>(&'a self, _: &'a Session) -> BoxFuture<'a, Result<BoxDatagram, DialError>> {
        Box::pin(async { Err(DialError::Rejected(self.manner)) })
    }

    fn echo(&self, _: bool) -> Result<BoxEchoSocket, DialError> {
        Err(DialError::Rejected(self.manner))
    }
}
