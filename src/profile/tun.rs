//! `tun:`, the device and the routes that lead into it.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::ops::RangeInclusive;
use std::time::Duration;

use ipnet::{IpNet, Ipv6Net};

use super::decode::{Decode, scalar};
use super::fields::Fields;
use super::node::{Node, shortened};
use super::ranges::{not_ours, overlap};
use super::report::Report;
use super::selection::{Selection, names_an_interface};
use super::{known, left_out};

/// Which queries are answered by us whoever they were sent to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hijack {
    /// The destination; `None` is any.
    pub address: Option<IpAddr>,
    /// The destination port. Both UDP and TCP are taken, whatever scheme was written.
    pub port: u16,
}

/// `tun:`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tun {
    /// `enable`, default false.
    pub enable: bool,
    /// `device`: the name that the profile wishes.
    pub device: Option<String>,
    /// `stack`, as written. There is one stack, ours, so every value means that.
    pub stack: Option<String>,
    /// `mtu` in bytes, default 1500.
    pub mtu: u16,
    /// `dns-hijack`, default port 53 of any address.
    pub dns_hijack: Vec<Hijack>,
    /// `auto-route`, default true: install the routes and rules.
    pub auto_route: bool,
    /// `auto-detect-interface`, default true; our mark makes the kernel's own tables choose.
    pub auto_detect_interface: bool,
    /// `auto-forward`, default false: switch packet forwarding on while running.
    pub auto_forward: bool,
    /// `strict-route`, default false: a family that the device cannot have is unreachable.
    pub strict_route: bool,
    /// `kill-switch`, default false; not of mihomo: nothing leaves past the device, whether we run or have crashed.
    pub kill_switch: bool,
    /// `inet6-address`; empty when `ipv6` is false.
    pub inet6_address: Vec<Ipv6Net>,
    /// `iproute2-table-index`: the routing table that is taken if it is free.
    pub table_index: u32,
    /// `iproute2-rule-index`: the first priority of our rules, if free.
    pub rule_index: u32,
    /// `udp-timeout`, default 300 s, at most a day: how long an idle association lives.
    pub udp_timeout: Duration,
    /// Which traffic is taken.
    pub selection: Selection,
    /// `icmp-timeout`, default 60 s, at most a day: how long an id to one host lives without a request or a reply.
    pub icmp_timeout: Duration,
    /// `disable-icmp-forwarding`, default false: echo requests to other hosts are refused.
    pub disable_icmp_forwarding: bool,
}

/// `inet6-address` when the profile has none.
const INET6_ADDRESS: Ipv6Addr = Ipv6Addr::new(0xfdfe, 0xdcba, 0x9876, 0, 0, 0, 0, 1);
/// The device's name when the profile wishes none.
pub const DEVICE: &str = "tunproxy0";
/// RFC 8200 section 5: no link that carries IPv6 has a smaller MTU. The same holds without IPv6, so that the device, the
/// stack and the routes have one rule.
const SMALLEST_MTU: u16 = 1280;
/// Beyond this an association is no longer idle but forgotten.
const LONGEST_TIMEOUT: u32 = 24 * 60 * 60;
/// Every network namespace has one of this name.
const LOOPBACK: &str = "lo";
/// `iproute2-table-index` and `iproute2-rule-index` when the profile has none.
const TABLE_INDEX: u32 = 2022;
const RULE_INDEX: u32 = 9000;
/// `default`, `main` and `local`.
const TABLES_OF_THE_KERNEL: RangeInclusive<u32> = 253..=255;
/// The highest first priority at which a run's hundred rules still come before that of the table `main`.
pub const LAST_RULE_INDEX: u32 = 32_666;
/// The keys by which traffic is kept in, taken or left out.
const GRAVE: &[&str] = &[
    "kill-switch",
    "strict-route",
    "exclude-interface",
    "exclude-uid",
    "exclude-uid-range",
    "include-interface",
    "include-uid",
    "include-uid-range",
    "inet4-route-address",
    "inet4-route-exclude-address",
    "inet6-route-address",
    "inet6-route-exclude-address",
    "route-address",
    "route-exclude-address",
];
const UDP_TIMEOUT: u32 = 300;
const ICMP_TIMEOUT: u32 = 60;

impl Tun {
    pub(super) fn decode(profile: &mut Fields<'_>, ipv6: bool) -> Self {
        let Some(mut fields) = profile.nested("tun") else {
            return Self::empty(ipv6);
        };
        let defaults = Self::empty(ipv6);
        let auto_route = fields.or("auto-route", true);
        let tun = Self {
            enable: fields.or("enable", false),
            device: device(&mut fields),
            stack: stack(&mut fields),
            mtu: mtu(&mut fields),
            dns_hijack: fields.or("dns-hijack", defaults.dns_hijack),
            auto_route,
            auto_detect_interface: fields.or("auto-detect-interface", true),
            auto_forward: fields.or("auto-forward", false),
            strict_route: fields.or("strict-route", false),
            kill_switch: kill_switch(&mut fields, auto_route),
            inet6_address: inet6_address(&mut fields, ipv6),
            table_index: table_index(&mut fields),
            rule_index: rule_index(&mut fields),
            udp_timeout: idle(&mut fields, "udp-timeout", UDP_TIMEOUT),
            icmp_timeout: idle(&mut fields, "icmp-timeout", ICMP_TIMEOUT),
            disable_icmp_forwarding: fields.or("disable-icmp-forwarding", false),
            selection: Selection::decode(&mut fields),
        };
        if tun.kill_switch && !tun.selection.takes_own_traffic() {
            let message =
                "the kill switch leaves this host itself open: the interfaces here leave out what it sends (`lo`)";
            fields
                .warn("kill-switch", message)
                .hint("add `lo` to `include-interface`, or take it out of `exclude-interface`");
        }
        left_out::warn(&tun.selection, tun.device.as_deref().unwrap_or(DEVICE), &mut fields);
        // UDP always is.
        fields.or("endpoint-independent-nat", true);
        fields.grave(GRAVE);
        fields.without_effect(known::TUN);
        for (keys, why) in known::TUN_WITH_REASON {
            fields.without_effect_because(keys, why);
        }
        fields.finish();
        tun
    }

    /// What holds when nothing is written.
    fn empty(ipv6: bool) -> Self {
        Self {
            enable: false,
            device: None,
            stack: None,
            mtu: 1500,
            dns_hijack: vec![Hijack { address: None, port: 53 }],
            auto_route: true,
            auto_detect_interface: true,
            auto_forward: false,
            strict_route: false,
            kill_switch: false,
            inet6_address: if ipv6 { vec![default_inet6()] } else { Vec::new() },
            table_index: TABLE_INDEX,
            rule_index: RULE_INDEX,
            udp_timeout: Duration::from_secs(UDP_TIMEOUT.into()),
            selection: Selection::default(),
            icmp_timeout: Duration::from_secs(ICMP_TIMEOUT.into()),
            disable_icmp_forwarding: false,
        }
    }
}

fn default_inet6() -> Ipv6Net {
    Ipv6Net::new_assert(INET6_ADDRESS, 126)
}

fn inet6_address(fields: &mut Fields<'_>, ipv6: bool) -> Vec<Ipv6Net> {
    let Some(node) = fields.node("inet6-address") else {
        return if ipv6 { vec![default_inet6()] } else { Vec::new() };
    };
    let path = fields.path_of("inet6-address");
    let mut nets: Vec<Ipv6Net> = Vec::new();
    for (index, item) in node.items().iter().enumerate() {
        let path = format!("{path}[{index}]");
        let Some(net) = Ipv6Net::decode(item, &path, fields.report()) else { continue };
        match why_not(net, &nets) {
            None => nets.push(net),
            Some(why) => {
                fields.report().error(item, path, format!("{net} cannot be on the device: {why}"));
            }
        }
    }
    if ipv6 { nets } else { Vec::new() }
}

/// Why the device cannot have `net` beside the earlier ones.
fn why_not(net: Ipv6Net, earlier: &[Ipv6Net]) -> Option<String> {
    if let Some(why) = not_ours(IpNet::V6(net)) {
        return Some(why.to_owned());
    }
    let next = u128::from(net.addr()).checked_add(1).map(Ipv6Addr::from);
    if !next.is_some_and(|next| net.contains(&next)) {
        return Some("it has no address behind ours, where names would be answered; a /126 has".to_owned());
    }
    let other = earlier.iter().find(|other| overlap(IpNet::V6(net), IpNet::V6(**other)))?;
    Some(format!("it overlaps with {other}"))
}

/// 0 is mihomo's way to say "the default".
fn idle(fields: &mut Fields<'_>, key: &'static str, default: u32) -> Duration {
    let seconds = fields.within(key, "seconds", 0..=LONGEST_TIMEOUT, default);
    Duration::from_secs(if seconds == 0 { default } else { seconds }.into())
}

fn device(fields: &mut Fields<'_>) -> Option<String> {
    let name: String = fields.optional::<String>("device").filter(|name| !name.is_empty())?;
    // The loopback is always there, and other signs would have to be quoted in commands that people type.
    let plain = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte));
    if names_an_interface(&name) && plain && name != LOOPBACK {
        return Some(name);
    }
    let why = if name == LOOPBACK { ": it is that of the loopback" } else { "" };
    fields
        .error("device", format!("`{}` cannot be the name of a device{why}", shortened(&name)))
        .hint("use at most 15 letters, digits, `-`, `_` and `.`");
    None
}

/// It stands on the routes.
fn kill_switch(fields: &mut Fields<'_>, auto_route: bool) -> bool {
    let wanted = fields.or("kill-switch", false);
    if wanted && !auto_route {
        fields
            .error("kill-switch", "a kill switch needs the routes of `auto-route`, which is false")
            .hint("set `auto-route: true`, or leave `kill-switch` out");
    }
    wanted
}

fn stack(fields: &mut Fields<'_>) -> Option<String> {
    let stack: String = fields.optional("stack")?;
    let known = ["gvisor", "system", "mixed", "lwip", "mips"];
    if !known.contains(&stack.to_ascii_lowercase().as_str()) {
        fields.warn("stack", format!("`{}` is not a stack of mihomo; ours is used as always", shortened(&stack)));
    }
    Some(stack)
}

/// 0 is mihomo's way to say "the default".
fn mtu(fields: &mut Fields<'_>) -> u16 {
    const DEFAULT: u16 = 1500;
    let written = fields.optional::<u16>("mtu").filter(|&mtu| mtu != 0).unwrap_or(DEFAULT);
    if written < SMALLEST_MTU {
        fields
            .warn("mtu", format!("an MTU of {written} bytes is too small; {SMALLEST_MTU} is used"))
            .hint("links that carry IPv6 have at least 1280 (RFC 8200); the default is 1500");
    }
    written.max(SMALLEST_MTU)
}

/// 0 is mihomo's way to say "the default".
fn table_index(fields: &mut Fields<'_>) -> u32 {
    const KEY: &str = "iproute2-table-index";
    let written = fields.optional::<u32>(KEY).filter(|&table| table != 0).unwrap_or(TABLE_INDEX);
    if !TABLES_OF_THE_KERNEL.contains(&written) {
        return written;
    }
    let message =
        format!("{written} is a table of the kernel's own (`default`, `main`, `local`); {TABLE_INDEX} is used");
    fields.warn(KEY, message).hint("any other number will do; if others use it, a free one is taken");
    TABLE_INDEX
}

/// 0 is mihomo's way to say "the default".
fn rule_index(fields: &mut Fields<'_>) -> u32 {
    const KEY: &str = "iproute2-rule-index";
    let written = fields.optional::<u32>(KEY).filter(|&first| first != 0).unwrap_or(RULE_INDEX);
    if written <= LAST_RULE_INDEX {
        return written;
    }
    let message = format!(
        "rules from {written} on would come too late: the rule of the table `main` stands at 32766; {RULE_INDEX} is used"
    );
    fields.warn(KEY, message).hint(format!("write a number from 1 to {LAST_RULE_INDEX}"));
    RULE_INDEX
}

impl Decode for Hijack {
    /// `any:53`, `0.0.0.0:53`, `tcp://8.8.8.8:53`: the scheme makes no difference.
    fn decode(node: &Node, path: &str, report: &mut Report) -> Option<Self> {
        scalar(node, path, report, "an address and a port such as any:53 or 8.8.8.8:53", |text| {
            let text = text.split_once("://").map_or(text, |(_, rest)| rest);
            if let Some(port) = text.strip_prefix("any:") {
                return Some(Self { address: None, port: port.parse().ok()? });
            }
            let socket: SocketAddr = text.parse().ok()?;
            Some(Self { address: Some(socket.ip()).filter(|ip| !ip.is_unspecified()), port: socket.port() })
        })
    }
}

impl Decode for Ipv6Net {
    fn decode(node: &Node, path: &str, report: &mut Report) -> Option<Self> {
        scalar(node, path, report, "an IPv6 prefix such as fdfe:dcba:9876::1/126", |text| text.parse().ok())
    }
}
