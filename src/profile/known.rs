//! Keys of mihomo that load and are not heeded yet. docs/profile.md lists them; a test holds it to that. And in which section
//! which key belongs, for who writes one into another.

use super::fields::Fields;
use super::nearest::nearest;

/// Keys at the top level.
pub(super) const TOP_LEVEL: &[&str] = &[
    "clash-for-android",
    "disable-keep-alive",
    "etag-support",
    "external-controller",
    "external-controller-cors",
    "external-controller-pipe",
    "external-controller-routing-mark",
    "external-controller-tls",
    "external-controller-unix",
    "external-doh-server",
    "external-ui",
    "external-ui-name",
    "external-ui-url",
    "find-process-mode",
    "geo-auto-update",
    "geo-update-interval",
    "geodata-loader",
    "geodata-mode",
    "geosite-matcher",
    "global-client-fingerprint",
    "global-ua",
    "hosts",
    "inbound-mptcp",
    "inbound-tfo",
    "keep-alive-idle",
    "keep-alive-interval",
    "listeners",
    "proxy-providers",
    "redir-port",
    "rule-providers",
    "secret",
    "ss-config",
    "sub-rules",
    "tcp-concurrent",
    "tproxy-port",
    "tuic-server",
    "tunnels",
    "unified-delay",
    "vmess-config",
];

/// Sub-trees at the top level, each with the keys that it may have.
pub(super) const SUBTREES: &[(&str, &[&str])] = &[
    (
        "experimental",
        &["dialer-ip4p-convert", "fingerprints", "quic-go-disable-ecn", "quic-go-disable-gso", "sniff-tls-sni"],
    ),
    ("geox-url", &["asn", "geoip", "geosite", "mmdb"]),
    ("iptables", &["bypass", "dns-redirect", "enable", "inbound-interface"]),
    ("ntp", &["dialer-proxy", "enable", "interval", "port", "server", "write-to-system"]),
    ("profile", &["store-fake-ip", "store-selected", "tracing"]),
    (
        "sniffer",
        &[
            "enable",
            "force-dns-mapping",
            "force-domain",
            "override-destination",
            "parse-pure-ip",
            "port-whitelist",
            "skip-domain",
            "skip-dst-address",
            "skip-src-address",
            "sniff",
            "sniffing",
        ],
    ),
    (
        "tls",
        &[
            "certificate",
            "client-auth-cert",
            "client-auth-type",
            "custom-certifactes",
            "custom-certificates",
            "ech-key",
            "private-key",
        ],
    ),
];

/// Keys of `tun`.
pub(super) const TUN: &[&str] = &[
    "auto-redirect",
    "auto-redirect-input-mark",
    "auto-redirect-iproute2-fallback-rule-index",
    "auto-redirect-output-mark",
    "exclude-dst-port",
    "exclude-dst-port-range",
    "exclude-src-port",
    "exclude-src-port-range",
    "file-descriptor",
    "gso",
    "gso-max-size",
    "inet4-address",
    "loopback-address",
    "recvmsgx",
    "route-address-set",
    "route-exclude-address-set",
    "sendmsgx",
];

/// More keys of `tun`, with the reason why they can have no effect.
pub(super) const TUN_WITH_REASON: &[(&[&str], &str)] = &[
    (
        &["exclude-mac-address", "include-mac-address"],
        "routing rules do not know hardware addresses; a rule SRC-IP-CIDR tells the devices of a LAN apart",
    ),
    (
        &["exclude-package", "include-android-user", "include-package"],
        "packages and users of Android do not exist here; include-uid and exclude-uid tell users apart",
    ),
];

/// Keys of `dns`.
pub(super) const DNS: &[&str] = &[
    "cache-algorithm",
    "cache-max-size",
    "direct-nameserver",
    "direct-nameserver-follow-policy",
    "fallback",
    "fallback-filter",
    "fallback-lazy-query",
    "ipv6-timeout",
    "listen-routing-mark",
    "nameserver-policy",
    "prefer-h3",
    "proxy-server-nameserver",
    "proxy-server-nameserver-policy",
    "respect-rules",
    "use-hosts",
    "use-system-hosts",
];

/// Keys that are heeded, by their section; a test holds them to what is asked for. The top level has no name.
pub(super) const HEEDED: &[(&str, &[&str])] = &[
    (
        "",
        &[
            "allow-lan",
            "authentication",
            "bind-address",
            "dns",
            "interface-name",
            "ipv6",
            "lan-allowed-ips",
            "lan-disallowed-ips",
            "log-level",
            "memory-limit",
            "mixed-port",
            "mode",
            "port",
            "proxies",
            "proxy-groups",
            "routing-mark",
            "rules",
            "skip-auth-prefixes",
            "socks-port",
            "tun",
        ],
    ),
    (
        "tun",
        &[
            "auto-detect-interface",
            "auto-forward",
            "auto-route",
            "device",
            "disable-icmp-forwarding",
            "dns-hijack",
            "enable",
            "endpoint-independent-nat",
            "exclude-interface",
            "exclude-uid",
            "exclude-uid-range",
            "icmp-timeout",
            "include-interface",
            "include-uid",
            "include-uid-range",
            "inet4-route-address",
            "inet4-route-exclude-address",
            "inet6-address",
            "inet6-route-address",
            "inet6-route-exclude-address",
            "iproute2-rule-index",
            "iproute2-table-index",
            "kill-switch",
            "mtu",
            "route-address",
            "route-exclude-address",
            "stack",
            "strict-route",
            "udp-timeout",
        ],
    ),
    (
        "dns",
        &[
            "default-nameserver",
            "enable",
            "enhanced-mode",
            "fake-ip-filter",
            "fake-ip-filter-mode",
            "fake-ip-range",
            "fake-ip-range6",
            "fake-ip-ttl",
            "ipv6",
            "listen",
            "nameserver",
        ],
    ),
];

/// The sections that have `key`: those where it is heeded, or, where there is none, those where it is known.
pub(super) fn sections_of(key: &str) -> Vec<&'static str> {
    let heeded: Vec<&str> =
        HEEDED.iter().filter(|(_, keys)| keys.contains(&key)).map(|(section, _)| *section).collect();
    if !heeded.is_empty() {
        return heeded;
    }
    let top: Vec<&str> = SUBTREES.iter().map(|(key, _)| *key).collect();
    let reasoned: Vec<&str> = TUN_WITH_REASON.iter().flat_map(|(keys, _)| *keys).copied().collect();
    let flat = [("", TOP_LEVEL), ("", &top), ("tun", TUN), ("tun", &reasoned), ("dns", DNS)];
    let known = flat.into_iter().chain(SUBTREES.iter().map(|(section, keys)| (*section, *keys)));
    known.filter(|(_, keys)| keys.contains(&key)).map(|(section, _)| section).collect()
}

/// The heeded key that `word`, which no section has, was probably meant to be.
pub(super) fn nearest_heeded(word: &str) -> Option<&'static str> {
    nearest(word, HEEDED.iter().flat_map(|(_, keys)| *keys).copied())
}

/// One warning for each sub-tree that is written, and one for each unknown key in it.
pub(super) fn subtrees(fields: &mut Fields<'_>) {
    for &(key, children) in SUBTREES {
        fields.without_effect(&[key]);
        if let Some(mut nested) = fields.nested(key) {
            nested.silent(children);
            nested.finish();
        }
    }
}
