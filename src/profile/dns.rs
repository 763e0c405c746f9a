//! `dns:`, the names that we answer and whom we ask.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::decode::{Decode, scalar};
use super::fields::Fields;
use super::known;
use super::nameserver::{Nameserver, nameservers};
use super::node::{Node, shortened};
use super::ranges::{Ranges, not_ours, overlap};
use super::report::Report;
use crate::rules::ascii;

/// `enhanced-mode`: what a program gets when it asks for an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum EnhancedMode {
    /// An address of our own that stands for the name.
    FakeIp,
    /// The real address; which name it was asked for is remembered.
    #[default]
    RedirHost,
    /// The real address, and nothing is remembered.
    Normal,
}

/// `fake-ip-filter-mode`: what the filter's names get.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum FilterMode {
    /// Real addresses; all others get fake ones.
    #[default]
    Blacklist,
    /// Fake addresses; all others get real ones.
    Whitelist,
}

/// `dns:`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dns {
    /// `enable`, default false: then the system's nameservers are asked.
    pub enable: bool,
    /// `listen`: where we answer over UDP and TCP; `None` when `enable` is false.
    pub listen: Option<SocketAddr>,
    /// Whether AAAA has answers: `dns.ipv6`, which follows the profile's `ipv6` when it is not written.
    pub ipv6: bool,
    /// `enhanced-mode`, default redir-host.
    pub enhanced_mode: EnhancedMode,
    /// `fake-ip-range`, default 198.18.0.1/16.
    pub fake_ip_range: Ipv4Net,
    /// `fake-ip-range6`, default fdfe:dcba:9877::/64; `None` when AAAA has no answers.
    pub fake_ip_range6: Option<Ipv6Net>,
    /// `fake-ip-filter`: lower-case patterns of clash.md's trie (`*.a.com`, `+.a.com`, `.a.com`).
    pub fake_ip_filter: Vec<String>,
    /// `fake-ip-filter-mode`.
    pub fake_ip_filter_mode: FilterMode,
    /// `fake-ip-ttl` in seconds, default 1, at most a day.
    pub fake_ip_ttl: u32,
    /// `nameserver`: those that can be used, never empty; the system's when the profile names none.
    pub nameserver: Vec<Nameserver>,
    /// Whether the profile has `nameserver`. Only where it has not may others be asked in place of the system's.
    pub nameserver_chosen: bool,
    /// `default-nameserver`: they find the addresses of nameservers that are written as names.
    pub default_nameserver: Vec<Nameserver>,
}

impl Dns {
    /// `device` are the prefixes on the TUN, which the fake ranges must leave alone.
    pub(super) fn decode(profile: &mut Fields<'_>, ipv6: bool, device: &[Ipv6Net]) -> Self {
        let Some(mut fields) = profile.nested("dns") else { return Self::empty(ipv6) };
        let enable = fields.or("enable", false);
        let ipv6 = fields.or("ipv6", ipv6) && ipv6;
        let enhanced_mode = fields.choice("enhanced-mode", MODES).unwrap_or_default();
        let fake_ip_range = fake_ip_range(&mut fields);
        let fake_ip_range6 = fake_ip_range6(&mut fields, device).filter(|_| ipv6);
        let filter_mode = filter_mode(&mut fields);
        let filter = filter(&mut fields, filter_mode.is_none());
        let listen = listen(&mut fields, enable);
        let ours = Ranges::new(fake_ip_range, fake_ip_range6, device, listen);
        // Those that are written and cannot be used are not replaced by others.
        let default_nameserver =
            nameservers(&mut fields, "default-nameserver", false, &ours).unwrap_or_else(default_nameservers);
        let nameserver = nameservers(&mut fields, "nameserver", enable, &ours).filter(|servers| !servers.is_empty());
        let nameserver = nameserver.unwrap_or_else(|| vec![Nameserver::System]);
        let nameserver_chosen = fields.has("nameserver");
        let named = nameserver.iter().any(Nameserver::is_named);
        if enable && named && !default_nameserver.iter().any(|server| !server.is_named()) {
            fields.error("default-nameserver", "nobody is left who could find the addresses of the nameservers");
        }
        let dns = Self {
            enable,
            listen,
            ipv6,
            enhanced_mode,
            fake_ip_range,
            fake_ip_range6,
            fake_ip_filter: filter,
            fake_ip_filter_mode: filter_mode.unwrap_or_default(),
            fake_ip_ttl: fields.within("fake-ip-ttl", "seconds", 0..=LONGEST_TTL, 1),
            nameserver,
            nameserver_chosen,
            default_nameserver,
        };
        fields.without_effect(known::DNS);
        fields.finish();
        dns
    }

    /// What holds when nothing is written.
    fn empty(ipv6: bool) -> Self {
        Self {
            enable: false,
            listen: None,
            ipv6,
            enhanced_mode: EnhancedMode::default(),
            fake_ip_range: default_range(),
            fake_ip_range6: ipv6.then(default_range6),
            fake_ip_filter: DEFAULT_FILTER.iter().map(ToString::to_string).collect(),
            fake_ip_filter_mode: FilterMode::default(),
            fake_ip_ttl: 1,
            nameserver: vec![Nameserver::System],
            nameserver_chosen: false,
            default_nameserver: default_nameservers(),
        }
    }
}

const MODES: &[(&str, EnhancedMode)] =
    &[("fake-ip", EnhancedMode::FakeIp), ("redir-host", EnhancedMode::RedirHost), ("normal", EnhancedMode::Normal)];

/// A name whose fake address programs may keep for longer would outlive the address.
const LONGEST_TTL: u32 = 24 * 60 * 60;

/// Names by which Windows decides whether it is online; a fake address would make it say no. mihomo has the first two
/// misspelt, and profiles copy them.
const DEFAULT_FILTER: [&str; 6] = [
    "dns.msftnsci.com",
    "www.msftnsci.com",
    "www.msftconnecttest.com",
    "dns.msftncsi.com",
    "www.msftncsi.com",
    "ipv6.msftconnecttest.com",
];

fn default_nameservers() -> Vec<Nameserver> {
    [[114, 114, 114, 114], [223, 5, 5, 5], [8, 8, 8, 8], [1, 0, 0, 1]]
        .map(|ip| Nameserver::Udp(SocketAddr::from((ip, 53)).into()))
        .into()
}

fn default_range() -> Ipv4Net {
    Ipv4Net::new_assert(Ipv4Addr::new(198, 18, 0, 1), 16)
}

fn default_range6() -> Ipv6Net {
    Ipv6Net::new_assert(Ipv6Addr::new(0xfdfe, 0xdcba, 0x9877, 0, 0, 0, 0, 0), 64)
}

fn fake_ip_range(fields: &mut Fields<'_>) -> Ipv4Net {
    let range = fields.or("fake-ip-range", default_range());
    if range.prefix_len() > 28 {
        fields
            .error("fake-ip-range", format!("{range} is too small to give every name an address of its own"))
            .hint("use a prefix of at most /28; the default is 198.18.0.1/16");
        return default_range();
    }
    if let Some(why) = not_ours(IpNet::V4(range)) {
        fields
            .error("fake-ip-range", format!("{range} cannot be fake addresses: {why}"))
            .hint("take a range that nobody uses; the default is 198.18.0.1/16");
        return default_range();
    }
    range
}

fn fake_ip_range6(fields: &mut Fields<'_>, device: &[Ipv6Net]) -> Option<Ipv6Net> {
    let range = fields.or("fake-ip-range6", default_range6());
    if range.prefix_len() > 112 {
        fields
            .error("fake-ip-range6", format!("{range} is too small to give every name an address of its own"))
            .hint("use a prefix of at most /112; the default is fdfe:dcba:9877::/64");
        return None;
    }
    let on_device = device.iter().find(|net| overlap(IpNet::V6(**net), IpNet::V6(range)));
    let why = not_ours(IpNet::V6(range)).map(ToOwned::to_owned);
    if let Some(why) = why.or_else(|| on_device.map(|net| format!("it overlaps with tun.inet6-address {net}"))) {
        fields
            .error("fake-ip-range6", format!("{range} cannot be fake addresses: {why}"))
            .hint("take a range that nobody uses; the default is fdfe:dcba:9877::/64");
        return None;
    }
    Some(range)
}

/// `None`: the mode `rule`, which is not built.
fn filter_mode(fields: &mut Fields<'_>) -> Option<FilterMode> {
    let modes =
        [("blacklist", Some(FilterMode::Blacklist)), ("whitelist", Some(FilterMode::Whitelist)), ("rule", None)];
    let mode = fields.choice("fake-ip-filter-mode", &modes).unwrap_or(Some(FilterMode::Blacklist));
    if mode.is_none() {
        fields.warn("fake-ip-filter-mode", "`rule` has no effect yet: every name gets a fake address");
    }
    mode
}

/// The patterns that can be used; lists from geosite and rule providers are left out with a warning.
fn filter(fields: &mut Fields<'_>, ignored: bool) -> Vec<String> {
    let Some(node) = fields.node("fake-ip-filter") else {
        return DEFAULT_FILTER.iter().map(ToString::to_string).collect();
    };
    if ignored {
        return Vec::new();
    }
    let path = fields.path_of("fake-ip-filter");
    let mut patterns = Vec::with_capacity(node.items().len());
    for (index, item) in node.items().iter().enumerate() {
        let path = format!("{path}[{index}]");
        let list = item.text().and_then(|text| text.split_once(':')).map(|(kind, _)| kind.trim().to_ascii_lowercase());
        if let Some(list @ ("geosite" | "rule-set")) = list.as_deref() {
            fields.report().warn_once(item, path, format!("`{list}:` has no effect here yet"));
            continue;
        }
        let expected = "a name or a pattern such as +.example.com";
        let Some(pattern) = scalar(item, &path, fields.report(), expected, pattern) else { continue };
        if pattern.split('.').any(|label| label.len() > 1 && label.contains(['*', '+'])) {
            fields
                .report()
                .warn(item, path, format!("`{}` matches no name: `*` stands for one whole label", shortened(&pattern)))
                .hint("write `*.example.com`, `x.*.com` or `+.example.com`");
            continue;
        }
        patterns.push(pattern);
    }
    patterns
}

/// A pattern in the form that names are compared in, if no inner label is empty and it does not end in a dot.
fn pattern(text: &str) -> Option<String> {
    let labels = text.strip_prefix('.').unwrap_or(text);
    let fine =
        !labels.is_empty() && labels.split('.').all(|label| !label.is_empty() && !label.contains(char::is_whitespace));
    // Label by label: the wildcards are no part of a name.
    fine.then(|| text.split('.').map(ascii).collect::<Vec<_>>().join("."))
}

fn listen(fields: &mut Fields<'_>, enable: bool) -> Option<SocketAddr> {
    let text: String = fields.optional::<String>("listen").filter(|text| !text.is_empty())?;
    let address = match text.strip_prefix(':') {
        // As in mihomo a port alone means every address of both families.
        Some(port) => port.parse().ok().map(|port| SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), port)),
        None => text.parse().ok(),
    };
    if address.is_none() {
        let message = format!("expected an address and a port such as 0.0.0.0:1053, found `{}`", shortened(&text));
        fields.error("listen", message);
    } else if !enable {
        fields.warn("listen", "nobody is answered there while `dns.enable` is false").hint("write `enable: true`");
    }
    address.filter(|_| enable)
}

impl Decode for Ipv4Net {
    fn decode(node: &Node, path: &str, report: &mut Report) -> Option<Self> {
        scalar(node, path, report, "an IPv4 prefix such as 198.18.0.1/16", |text| text.parse().ok())
    }
}
