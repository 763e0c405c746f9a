//! What the dispatcher really decided, noted while it happens.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use parking_lot::Mutex;

use crate::dispatch::{Account, Listener, Outcome};
use crate::session::Network;

/// One decided flow.
#[derive(Debug, Clone)]
pub(super) struct Decided {
    network: Network,
    source: SocketAddr,
    /// The address the client wrote to.
    written: Option<SocketAddr>,
    /// The fake address, if that was one.
    pub(super) fake: Option<IpAddr>,
    /// The rule with its line, as the log has it.
    pub(super) rule: String,
    /// The outbounds.
    pub(super) way: String,
}

/// Notes every flow.
#[derive(Debug, Default)]
pub(super) struct Recorder {
    flows: Mutex<Vec<Decided>>,
}

impl Recorder {
    /// What became of the client's flow from port `from` to `to`.
    pub(super) fn find(&self, network: Network, from: u16, to: SocketAddr) -> Option<Decided> {
        let flows = self.flows.lock();
        // The kernel may give a port twice, but never while the flow to the same place lives: the latest is meant.
        let same = |flow: &&Decided| flow.network == network && flow.source.port() == from && flow.written == Some(to);
        flows.iter().rev().find(same).cloned()
    }
}

impl Listener for Recorder {
    fn decided(&self, flow: &Account) {
        let Some(verdict) = flow.verdict() else { return };
        let session = flow.session();
        let port = session.destination.port;
        let fake = flow.fake();
        let written = fake.map(|ip| SocketAddr::new(ip, port)).or_else(|| session.destination.socket());
        self.flows.lock().push(Decided {
            network: session.network,
            source: session.source,
            written,
            fake,
            rule: verdict.rule.to_string(),
            way: verdict.chain.to_string(),
        });
    }

    fn ended(&self, _flow: &Account, _outcome: Outcome, _reason: &dyn fmt::Display) {}
}
