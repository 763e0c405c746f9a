//! Conditions on addresses.

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use super::{BadPayload, Built, Match, Matcher, Params};
use crate::session::{Fact, FactKind, Session};

struct Destination {
    prefix: IpNet,
    no_resolve: bool,
}

struct Source(IpNet);

/// `IP-CIDR` and `IP-CIDR6`: as in mihomo each takes both families. With `src` it looks at the source.
pub(super) fn destination(payload: &str, params: Params) -> Built {
    let prefix = prefix(payload)?;
    Ok(if params.source {
        Arc::new(Source(prefix))
    } else {
        Arc::new(Destination { prefix, no_resolve: params.no_resolve })
    })
}

pub(super) fn source(payload: &str, _: Params) -> Built {
    Ok(Arc::new(Source(prefix(payload)?)))
}

impl Matcher for Destination {
    fn matches(&self, session: &Session) -> Match {
        match session.ip() {
            Fact::Known(ip) => self.prefix.contains(&ip.to_canonical()).into(),
            Fact::Unknown if !self.no_resolve => Match::Needs(FactKind::Ip),
            Fact::Unknown | Fact::Failed => Match::Miss,
        }
    }
}

impl Matcher for Source {
    fn matches(&self, session: &Session) -> Match {
        self.0.contains(&session.source.ip().to_canonical()).into()
    }
}

fn prefix(payload: &str) -> Result<IpNet, BadPayload> {
    payload.parse().map_err(|_| BadPayload {
        expected: "a prefix such as 192.168.0.0/16 or fd00::/8",
        hint: payload.parse::<IpAddr>().ok().map(|ip| match ip {
            IpAddr::V4(_) => "add /32 to mean this one address",
            IpAddr::V6(_) => "add /128 to mean this one address",
        }),
        harmless: false,
    })
}
