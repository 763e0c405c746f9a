//! The entries of `nameserver` and `default-nameserver`.

use std::net::SocketAddr;

use super::decode::host;
use super::fields::Fields;
use super::node::Node;
use super::ranges::Ranges;
use super::report::Report;
use crate::net::{Address, Host};

/// A nameserver that can be used today.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Nameserver {
    /// Over UDP, and over TCP when an answer is truncated.
    Udp(Address),
    /// Over TCP.
    Tcp(Address),
    /// Those that the system uses.
    System,
}

impl Nameserver {
    /// Whether its own address must be looked up first.
    #[must_use]
    pub fn is_named(&self) -> bool {
        match self {
            Self::Udp(address) | Self::Tcp(address) => matches!(address.host, Host::Name(_)),
            Self::System => false,
        }
    }

    /// Its address, if that is written.
    fn address(&self) -> Option<SocketAddr> {
        match self {
            Self::Udp(address) | Self::Tcp(address) => address.socket(),
            Self::System => None,
        }
    }
}

/// What one entry is.
enum Entry {
    Usable(Nameserver),
    /// Known to mihomo, not built: the scheme.
    Later(String),
    Wrong,
}

/// The usable servers under `key`; `None` when nothing is written. Where servers are `needed` and none of those written
/// can be used, that is an error that names them.
pub(super) fn nameservers(
    fields: &mut Fields<'_>,
    key: &'static str,
    needed: bool,
    ours: &Ranges,
) -> Option<Vec<Nameserver>> {
    let node = fields.node(key)?;
    let path = fields.path_of(key);
    let mut usable = Vec::new();
    let mut wrong = false;
    for (index, item) in node.items().iter().enumerate() {
        match entry(item, &format!("{path}[{index}]"), ours, fields.report()) {
            Entry::Usable(server) => usable.push(server),
            Entry::Wrong => wrong = true,
            Entry::Later(scheme) => later(item, &format!("{path}[{index}]"), &scheme, fields.report()),
        }
    }
    if usable.is_empty() && needed && !wrong {
        let written: Vec<&str> = node.items().iter().filter_map(Node::text).collect();
        let message = match written.as_slice() {
            [] => "expected at least one nameserver".to_owned(),
            written => format!("none of the nameservers can be used yet: {}", written.join(", ")),
        };
        fields.error(key, message).hint("add one such as `udp://9.9.9.9`, `tcp://9.9.9.9` or `system`");
    }
    Some(usable)
}

fn later(item: &Node, path: &str, scheme: &str, report: &mut Report) {
    let message = match scheme {
        "tls" | "https" | "quic" | "h3" => format!("encrypted nameservers (`{scheme}://`) come later; it is not asked"),
        _ => format!("nameservers of the kind `{scheme}` come later; it is not asked"),
    };
    report.warn(item, path, message);
}

fn entry(item: &Node, path: &str, ours: &Ranges, report: &mut Report) -> Entry {
    let text = item.text().unwrap_or_default().trim();
    let (server, fragment) = text.split_once('#').map_or((text, None), |(server, rest)| (server, Some(rest)));
    let (scheme, rest) = server.split_once("://").unwrap_or(("udp", server));
    let scheme = scheme.to_ascii_lowercase();
    let found = match scheme.as_str() {
        _ if server.eq_ignore_ascii_case("system") => Some(Nameserver::System),
        "udp" => address(rest).map(Nameserver::Udp),
        "tcp" => address(rest).map(Nameserver::Tcp),
        "system" => Some(Nameserver::System),
        "tls" | "https" | "quic" | "h3" | "dhcp" | "rcode" | "tailscale" => return Entry::Later(scheme),
        _ => None,
    };
    let Some(found) = found else {
        report
            .error(item, path, format!("expected a nameserver, found {}", item.found()))
            .hint("write `9.9.9.9`, `9.9.9.9:53`, `[2620:fe::fe]:53`, `udp://host`, `tcp://host:53` or `system`");
        return Entry::Wrong;
    };
    if let Some(why) = found.address().and_then(|server| ours.no_nameserver_at(server)) {
        report.error(item, path, format!("nobody answers at {}: {why}", item.found()));
        return Entry::Wrong;
    }
    if let Some(fragment) = fragment {
        let message =
            format!("`#{fragment}` has no effect yet: this nameserver is asked directly, not through a proxy");
        report.warn(item, path, message);
    }
    Entry::Usable(found)
}

/// `host`, `host:port`, `[v6]:port` or a bare IPv6 address; the port is 53 when none is written.
fn address(text: &str) -> Option<Address> {
    let text = text.trim_end_matches('/');
    if let Ok(socket) = text.parse::<std::net::SocketAddr>() {
        return (socket.port() != 0).then(|| socket.into());
    }
    let (host, port) = match text.rsplit_once(':') {
        Some((host, port)) if !host.contains(':') || host.ends_with(']') => (host, port.parse().ok()?),
        _ => (text, 53),
    };
    let host = self::host(host)?;
    (port != 0).then_some(Address { host, port })
}
