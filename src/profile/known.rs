//! Keys of mihomo that load and are not heeded yet. docs/profile.md lists them; a test holds it to that.

use super::fields::Fields;

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
