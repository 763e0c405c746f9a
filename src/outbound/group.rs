//! Groups: outbounds made of outbounds.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use super::table::Index;
use super::{Networks, Outbound};
use crate::net::{Address, BoxDatagram, BoxEchoSocket, BoxFuture, BoxStream, DialError};
use crate::session::{Network, Session};

/// An outbound that is, at any time, one of its members.
pub struct Select {
    name: String,
    members: Vec<Member>,
    now: AtomicUsize,
    disable_udp: bool,
}

/// A member of a group: its place in the table, and itself.
pub struct Member {
    /// The index in the table of outbounds.
    pub index: Index,
    /// The outbound.
    pub outbound: Arc<dyn Outbound>,
}

impl Select {
    /// A group that begins with the member at `now`; None if there are no members.
    #[must_use]
    pub fn new(name: &str, members: Vec<Member>, now: usize, disable_udp: bool) -> Option<Self> {
        let now = AtomicUsize::new(now.min(members.len().checked_sub(1)?));
        Some(Self { name: name.to_owned(), members, now, disable_udp })
    }

    /// Makes `member` the one that new flows take. False: there is no such member.
    pub fn select(&self, member: &str) -> bool {
        let found = self.members.iter().position(|candidate| candidate.outbound.name() == member);
        if let Some(at) = found {
            self.now.store(at, Relaxed);
        }
        found.is_some()
    }

    /// The present member.
    #[must_use]
    pub fn now(&self) -> &Member {
        &self.members[self.now.load(Relaxed)]
    }

    /// All members, in the order of the profile.
    #[must_use]
    pub fn members(&self) -> &[Member] {
        &self.members
    }
}

impl Outbound for Select {
    fn name(&self) -> &str {
        &self.name
    }

    fn networks(&self) -> Networks {
        let networks = self.now().outbound.networks();
        Networks { udp: networks.carries(Network::Udp) && !self.disable_udp, ..networks }
    }

    fn chain(&self) -> Vec<String> {
        let mut chain = vec![self.name.clone()];
        chain.extend(self.now().outbound.chain());
        chain
    }

    fn connect<'a>(&'a self, session: &'a Session) -> BoxFuture<'a, Result<BoxStream, DialError>> {
        self.now().outbound.connect(session)
    }

    fn peer<'a>(&'a self, session: &'a Session) -> BoxFuture<'a, Result<Address, DialError>> {
        self.now().outbound.peer(session)
    }

    fn associate<'a>(&'a self, session: &'a Session) -> BoxFuture<'a, Result<BoxDatagram, DialError>> {
        if self.disable_udp {
            let words = format!("group {} has `disable-udp: true`", self.name);
            return Box::pin(async { Err(DialError::Unsupported(words)) });
        }
        self.now().outbound.associate(session)
    }

    fn echo(&self, ipv6: bool) -> Result<BoxEchoSocket, DialError> {
        self.now().outbound.echo(ipv6)
    }
}
