//! The keys of `type: socks5`.

use std::sync::Arc;

use super::{Credentials, Drops, Socks5};
use crate::outbound::Outbound;
use crate::outbound::kind::{Context, networks, upstream};
use crate::profile::Fields;

pub(super) const KEYS: &[&str] = &[
    "server",
    "port",
    "username",
    "password",
    "udp",
    "tls",
    "sni",
    "skip-cert-verify",
    "fingerprint",
    "ip-version",
    "interface-name",
];

pub(super) fn build(fields: &mut Fields<'_>, name: &str, context: &Context) -> Option<Arc<dyn Outbound>> {
    let upstream = upstream(fields, name, context);
    let networks = networks(fields, false);
    let username = fields.or("username", String::new());
    let password = fields.or("password", String::new());
    let credentials = match (username.is_empty(), password.is_empty()) {
        (true, true) => None,
        _ => {
            let mut good = true;
            for (key, value) in [("username", &username), ("password", &password)] {
                if !(1..=255).contains(&value.len()) {
                    fields.error(key, "expected 1 to 255 bytes: SOCKS5 carries no other user names and passwords");
                    good = false;
                }
            }
            good.then_some(())?;
            Some(Credentials { username, password })
        }
    };
    Some(Arc::new(Socks5 {
        upstream: Arc::new(upstream?),
        credentials,
        udp: networks.udp,
        drops: Arc::new(Drops::default()),
    }))
}
