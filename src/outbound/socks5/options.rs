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
    let credentials = credentials(fields, username, password);
    Some(Arc::new(Socks5 {
        upstream: Arc::new(upstream?),
        credentials: credentials?,
        udp: networks.udp,
        drops: Arc::new(Drops::default()),
    }))
}

/// As in mihomo a user name turns authentication on, and its password may be empty. Outer `None`: the report has why.
fn credentials(fields: &mut Fields<'_>, username: String, password: String) -> Option<Option<Credentials>> {
    if username.is_empty() {
        if !password.is_empty() {
            fields.warn("password", "without `username` the password is not sent");
        }
        return Some(None);
    }
    let mut good = true;
    for (key, value) in [("username", &username), ("password", &password)] {
        if value.len() > 255 {
            fields.error(key, "expected at most 255 bytes: SOCKS5 carries no longer user names and passwords");
            good = false;
        }
    }
    if password.is_empty() {
        // RFC 1929 has at least one byte; servers take none all the same.
        fields.warn("username", "there is no `password`: an empty one is sent");
    }
    good.then_some(Some(Credentials { username, password }))
}
