//! The keys of `type: http`.

use std::sync::Arc;

use super::{Http, base64};
use crate::outbound::Outbound;
use crate::outbound::kind::{Context, upstream};
use crate::profile::Fields;

pub(super) const KEYS: &[&str] = &[
    "server",
    "port",
    "username",
    "password",
    "headers",
    "tls",
    "sni",
    "skip-cert-verify",
    "fingerprint",
    "ip-version",
    "interface-name",
];

pub(super) fn build(fields: &mut Fields<'_>, name: &str, context: &Context) -> Option<Arc<dyn Outbound>> {
    let upstream = upstream(fields, name, context);
    let username = fields.or("username", String::new());
    let password = fields.or("password", String::new());
    if username.contains(':') {
        // RFC 7617 section 2: the first colon ends the user name.
        fields.error("username", "expected a user name without a colon");
    }
    let own = headers(fields);
    if fields.or("udp", false) {
        fields.warn("udp", "an HTTP proxy does not carry UDP");
    }
    let mut headers = own?;
    if !username.is_empty() || !password.is_empty() {
        let token = base64(format!("{username}:{password}").as_bytes());
        headers.push_str(&format!("Proxy-Authorization: Basic {token}\r\n"));
    }
    Some(Arc::new(Http { upstream: upstream?, headers }))
}

/// The lines of `headers:`; a value that would end its line early is an error.
fn headers(fields: &mut Fields<'_>) -> Option<String> {
    let Some(node) = fields.node("headers") else { return Some(String::new()) };
    let Some(entries) = node.entries() else {
        fields.error("headers", "expected a mapping from header names to values");
        return None;
    };
    let mut lines = String::new();
    for entry in entries {
        let path = format!("{}.{}", fields.path_of("headers"), entry.key.text);
        let name_is_token = !entry.key.text.is_empty()
            && entry.key.text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte));
        match entry.value.text().filter(|value| name_is_token && !value.chars().any(char::is_control)) {
            Some(value) => lines.push_str(&format!("{}: {value}\r\n", entry.key.text)),
            None => {
                let place = entry.value.place;
                fields.report().error(place, path, "expected an HTTP header: a name, and a value of one line");
                return None;
            }
        }
    }
    Some(lines)
}
