//! The registry of proxy kinds, and what their decoders share.

use std::num::NonZeroU16;
use std::sync::Arc;

use super::egress::{Egress, IpVersion};
use super::tls::{self, Fingerprint, Roots, Tls, Trust};
use super::upstream::Upstream;
use super::{Networks, Outbound};
use crate::net::{Address, Host};
use crate::profile::Fields;
use crate::rules::ascii;

/// A kind of proxy that is built.
pub struct Kind {
    /// What `type:` says.
    pub name: &'static str,
    /// The keys that work, besides `name` and `type`.
    pub keys: &'static [&'static str],
    /// Reads the entry's fields and builds the outbound; whoever returns None has said why in the report.
    pub(super) build: fn(&mut Fields<'_>, &str, &Context) -> Option<Arc<dyn Outbound>>,
}

/// Every kind that is built.
pub const KINDS: &[Kind] = &[super::direct::KIND, super::http::KIND, super::reject::KIND, super::socks5::KIND];

/// Kinds that mihomo has and this program does not yet: they load and refuse.
pub(super) const PLANNED: &[&str] = &[
    "anytls",
    "dns",
    "hysteria",
    "hysteria2",
    "masque",
    "mieru",
    "openvpn",
    "rematch",
    "shadowquic",
    "snell",
    "ss",
    "ssh",
    "ssr",
    "sudoku",
    "tailscale",
    "trojan",
    "trusttunnel",
    "tuic",
    "vless",
    "vmess",
    "wireguard",
    "zerotier",
];

/// What outbounds are built with.
#[derive(Clone)]
pub struct Context {
    /// The way to servers and destinations.
    pub egress: Egress,
    /// The certificates that TLS believes.
    pub roots: Roots,
}

/// The keys that say how an outbound reaches the network.
pub(super) fn egress(fields: &mut Fields<'_>, context: &Context) -> Egress {
    const VERSIONS: &[(&str, IpVersion)] = &[
        ("dual", IpVersion::Dual),
        ("ipv4", IpVersion::Ipv4),
        ("ipv6", IpVersion::Ipv6),
        ("ipv4-prefer", IpVersion::Ipv4Prefer),
        ("ipv6-prefer", IpVersion::Ipv6Prefer),
    ];
    fields.without_effect(&["tfo", "mptcp", "routing-mark", "smux"]);
    let version = fields.choice("ip-version", VERSIONS).unwrap_or_default();
    let egress = context.egress.clone().with_version(version);
    match fields.optional::<String>("interface-name").filter(|name| !name.is_empty()) {
        Some(interface) => egress.with_interface(interface),
        None => egress,
    }
}

/// The keys that say where a proxy is and how it is reached.
pub(super) fn upstream(fields: &mut Fields<'_>, name: &str, context: &Context) -> Option<Upstream> {
    let host = fields.required::<Host>("server");
    let port = fields.required::<NonZeroU16>("port");
    let egress = egress(fields, context);
    let secure = fields.or("tls", false);
    let options = tls_options(fields);
    let server = Address { host: host?, port: port?.get() };
    let tls = match (secure, options?) {
        (false, _) => None,
        (true, options) => match Tls::new(&options, &server.host, &context.roots) {
            Ok(tls) => Some(tls),
            Err(_) => {
                let key = if options.sni.is_some() { "sni" } else { "server" };
                fields.error(key, "expected a name that a TLS certificate can carry");
                return None;
            }
        },
    };
    Some(Upstream { name: name.to_owned(), server, egress: Arc::new(egress), tls })
}

fn tls_options(fields: &mut Fields<'_>) -> Option<tls::Options> {
    let sni = fields.optional::<String>("sni").filter(|sni| !sni.is_empty()).map(|sni| ascii(&sni));
    let anyone = fields.or("skip-cert-verify", false);
    let trust = match fields.optional::<String>("fingerprint").filter(|pin| !pin.is_empty()) {
        Some(pin) => match Fingerprint::parse(&pin) {
            Some(pin) => Trust::Pinned(pin),
            None => {
                fields.error("fingerprint", "expected the SHA-256 of a certificate: 64 hexadecimal digits");
                return None;
            }
        },
        None if anyone => Trust::Anyone,
        None => Trust::Roots,
    };
    Some(tls::Options { sni, trust })
}

/// `udp:` of kinds that carry datagrams, with the default of the kind.
pub(super) fn networks(fields: &mut Fields<'_>, udp: bool) -> Networks {
    Networks { tcp: true, udp: fields.or("udp", udp), icmp: false }
}
