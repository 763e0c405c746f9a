//! What a profile means: plain typed data with every default filled in.

use std::net::IpAddr;
use std::num::NonZeroU16;

use ipnet::IpNet;

use super::decode::{Decode, mismatch, scalar};
use super::dns::Dns;
use super::fields::Fields;
use super::known;
use super::node::{Node, Place, shortened};
use super::ranges::Ranges;
use super::report::Report;
use super::routes::{Group, Proxy, Routes, routes};
use super::rule_lines::PlacedRule;
use super::tun::Tun;

/// `mode`: who decides where a flow goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mode {
    /// The rules.
    #[default]
    Rule,
    /// Everything goes to the group GLOBAL.
    Global,
    /// Everything goes DIRECT.
    Direct,
}

impl std::fmt::Display for Mode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Rule => "rule",
            Self::Global => "global",
            Self::Direct => "direct",
        })
    }
}

/// `log-level`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LogLevel {
    /// Nothing at all.
    Silent,
    /// Errors.
    Error,
    /// Errors and warnings.
    Warning,
    /// Also what happens to each flow.
    #[default]
    Info,
    /// Also why.
    Debug,
}

/// A name and a password of `authentication`.
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials {
    /// The name.
    pub user: String,
    /// The password.
    pub password: String,
}

impl std::fmt::Debug for Credentials {
    /// Leaves the password out, so that it stays out of logs.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Credentials").field("user", &self.user).finish_non_exhaustive()
    }
}

/// The listening proxies and who may use them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listen {
    /// `port`: HTTP proxy.
    pub port: Option<NonZeroU16>,
    /// `socks-port`: SOCKS proxy.
    pub socks_port: Option<NonZeroU16>,
    /// `mixed-port`: both on one port.
    pub mixed_port: Option<NonZeroU16>,
    /// `allow-lan`: listen on `bind_address` instead of loopback alone.
    pub allow_lan: bool,
    /// `bind-address`; `None` is `*`, every address.
    pub bind_address: Option<IpAddr>,
    /// `authentication`: empty means that nobody is asked.
    pub authentication: Vec<Credentials>,
    /// `skip-auth-prefixes`: sources that are not asked.
    pub skip_auth_prefixes: Vec<IpNet>,
    /// `lan-allowed-ips`: sources that may connect while `allow_lan` is on.
    pub lan_allowed_ips: Vec<IpNet>,
    /// `lan-disallowed-ips`: sources that may not; stronger than `lan_allowed_ips`.
    pub lan_disallowed_ips: Vec<IpNet>,
}

/// What a profile means.
#[derive(Debug, Clone)]
pub struct Profile {
    /// `mode`.
    pub mode: Mode,
    /// `log-level`.
    pub log_level: LogLevel,
    /// `ipv6`, default true.
    pub ipv6: bool,
    /// The listening proxies.
    pub listen: Listen,
    /// `interface-name`: every socket of ours is bound to it.
    pub interface_name: Option<String>,
    /// `routing-mark`: our own firewall mark, if the profile wishes one.
    pub routing_mark: Option<u32>,
    /// `memory-limit` in bytes; `None` leaves it to the machine's memory.
    pub memory_limit: Option<u64>,
    /// `tun`.
    pub tun: Tun,
    /// `dns`.
    pub dns: Dns,
    /// `proxies`, in order.
    pub proxies: Vec<Proxy>,
    /// `proxy-groups`, in order.
    pub groups: Vec<Group>,
    /// `rules`, in order, without those of types that are not built yet.
    pub rules: Vec<PlacedRule>,
    /// Where the key `rules` stands, or would.
    pub rules_place: Place,
}

impl Profile {
    /// Reads a parsed document. Everything wrong goes to `report`; a profile with errors there must not be run, and
    /// is returned only so that `proxies` and `proxy-groups` can be checked in the same go.
    pub fn decode(root: &Node, report: &mut Report) -> Option<Self> {
        let mut fields = Fields::new(root, "", report)?;
        let mode = [("rule", Mode::Rule), ("global", Mode::Global), ("direct", Mode::Direct)];
        let mode = fields.choice("mode", &mode).unwrap_or_default();
        let log_level = fields.choice("log-level", LOG_LEVELS).unwrap_or_default();
        let ipv6 = fields.or("ipv6", true);
        let listen = listen(&mut fields);
        let interface_name = fields.optional::<String>("interface-name").filter(|name| !name.is_empty());
        let routing_mark = fields.optional("routing-mark").filter(|&mark| mark != 0);
        let memory_limit = memory_limit(&mut fields);
        let tun = Tun::decode(&mut fields, ipv6);
        let dns = Dns::decode(&mut fields, ipv6, &tun.inet6_address);
        for &(old, new) in OLD_KEYS {
            fields.renamed(old, new);
        }
        let Routes { proxies, groups, rules } = routes(&mut fields);
        let rules_place = fields.place("rules");
        let ours = Ranges::new(dns.fake_ip_range, dns.fake_ip_range6, &tun.inet6_address, None);
        ours.check_servers(&proxies, fields.report());
        fields.without_effect(known::TOP_LEVEL);
        known::subtrees(&mut fields);
        fields.finish();
        Some(Self {
            mode,
            log_level,
            ipv6,
            listen,
            interface_name,
            routing_mark,
            memory_limit,
            tun,
            dns,
            proxies,
            groups,
            rules,
            rules_place,
        })
    }
}

/// Without these a profile of old Clash would load as one without rules, and everything would go DIRECT.
const OLD_KEYS: &[(&str, &str)] = &[
    ("Proxy", "proxies"),
    ("Proxy Group", "proxy-groups"),
    ("Rule", "rules"),
    ("proxy-provider", "proxy-providers"),
    ("rule-provider", "rule-providers"),
];

const LOG_LEVELS: &[(&str, LogLevel)] = &[
    ("silent", LogLevel::Silent),
    ("error", LogLevel::Error),
    ("warning", LogLevel::Warning),
    ("info", LogLevel::Info),
    ("debug", LogLevel::Debug),
];

fn listen(fields: &mut Fields<'_>) -> Listen {
    let any = || vec![IpNet::V4(ipnet::Ipv4Net::default()), IpNet::V6(ipnet::Ipv6Net::default())];
    let listen = Listen {
        port: port(fields, "port"),
        socks_port: port(fields, "socks-port"),
        mixed_port: port(fields, "mixed-port"),
        allow_lan: fields.or("allow-lan", false),
        bind_address: bind_address(fields),
        authentication: fields.or("authentication", Vec::new()),
        skip_auth_prefixes: fields.or("skip-auth-prefixes", Vec::new()),
        lan_allowed_ips: fields.optional("lan-allowed-ips").unwrap_or_else(any),
        lan_disallowed_ips: fields.or("lan-disallowed-ips", Vec::new()),
    };
    let ports = [("port", listen.port), ("socks-port", listen.socks_port), ("mixed-port", listen.mixed_port)];
    for (index, (key, port)) in ports.iter().enumerate() {
        if let Some((other, _)) = ports[..index].iter().find(|(_, earlier)| port.is_some() && earlier == port) {
            fields
                .error(key, format!("`{key}` and `{other}` have the same port"))
                .hint("give each its own port, or use `mixed-port` alone: it speaks HTTP and SOCKS");
        }
    }
    warn_of_an_open_proxy(&listen, fields);
    listen
}

/// Of one that serves whoever can reach this host.
fn warn_of_an_open_proxy(listen: &Listen, fields: &mut Fields<'_>) {
    let opens = [listen.port, listen.socks_port, listen.mixed_port].iter().any(Option::is_some);
    let everywhere = listen.bind_address.is_none_or(|at| at.is_unspecified());
    let everybody = listen.lan_allowed_ips.iter().any(|net| net.prefix_len() == 0);
    let nobody_is_asked = listen.authentication.is_empty();
    if opens && listen.allow_lan && everywhere && everybody && nobody_is_asked && listen.lan_disallowed_ips.is_empty() {
        fields
            .warn("allow-lan", "the proxy ports are open to whoever can reach this host, from the internet too")
            .hint("name the clients under `lan-allowed-ips`, as in [192.168.1.0/24], or users under `authentication`");
    }
}

/// A listening port; 0 turns it off.
fn port(fields: &mut Fields<'_>, key: &'static str) -> Option<NonZeroU16> {
    fields.optional::<u16>(key).and_then(NonZeroU16::new)
}

/// `memory-limit`: ours, not mihomo's. 0 is the default.
fn memory_limit(fields: &mut Fields<'_>) -> Option<u64> {
    let ByteSize(bytes) = fields.optional("memory-limit")?;
    if bytes > 0 && bytes < LEAST_MEMORY {
        fields
            .error("memory-limit", format!("{bytes} bytes are too few for flows; 16MB is the least"))
            .hint("leave it out: the default is a quarter of the memory there is");
        return None;
    }
    Some(bytes).filter(|bytes| *bytes > 0)
}

/// With less, hardly a flow at a time would move.
const LEAST_MEMORY: u64 = 16 << 20;

/// A number of bytes, as people write it: `64MB`, `64 MiB`, `67108864`. Units are powers of 1024.
struct ByteSize(u64);

impl Decode for ByteSize {
    fn decode(node: &Node, path: &str, report: &mut Report) -> Option<Self> {
        scalar(node, path, report, "a size such as 64MB or 1GB", |text| {
            let text = text.trim().to_ascii_lowercase();
            let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
            let scale = match text[digits.len()..].trim() {
                "" | "b" => 1,
                "k" | "kb" | "kib" => 1 << 10,
                "m" | "mb" | "mib" => 1 << 20,
                "g" | "gb" | "gib" => 1 << 30,
                _ => return None,
            };
            digits.parse::<u64>().ok()?.checked_mul(scale).map(Self)
        })
    }
}

fn bind_address(fields: &mut Fields<'_>) -> Option<IpAddr> {
    let text: String = fields.optional("bind-address")?;
    let bare = text.trim().trim_start_matches('[').trim_end_matches(']');
    if matches!(bare, "*" | "") {
        return None;
    }
    let address = bare.parse().ok();
    if address.is_none() {
        fields.error("bind-address", format!("expected an IP address or `*`, found `{}`", shortened(&text)));
    }
    address
}

impl Decode for Credentials {
    fn decode(node: &Node, path: &str, report: &mut Report) -> Option<Self> {
        // Not trimmed: a password may begin or end with a space.
        let pair = node.text().and_then(|text| text.split_once(':'));
        if pair.is_none() {
            mismatch(node, path, report, "user:password");
        }
        pair.map(|(user, password)| Self { user: user.to_owned(), password: password.to_owned() })
    }
}
