//! The condition on the transport.

use std::sync::Arc;

use super::{BadPayload, Built, Match, Matcher, Params};
use crate::session::{Network, Session};

struct Transport(Network);

pub(super) fn build(payload: &str, _: Params) -> Built {
    let network = match payload.to_ascii_lowercase().as_str() {
        "tcp" => Network::Tcp,
        "udp" => Network::Udp,
        "icmp" => Network::Icmp,
        _ => return Err(BadPayload { expected: "tcp, udp or icmp", hint: None, harmless: false }),
    };
    Ok(Arc::new(Transport(network)))
}

impl Matcher for Transport {
    fn matches(&self, session: &Session) -> Match {
        (session.network == self.0).into()
    }
}
