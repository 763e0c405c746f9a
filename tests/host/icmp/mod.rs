//! Ping and traceroute: what a program sees is what the network says, and nothing of ours answers for it.

mod answers;
mod floods;
mod refusals;
mod rights;

use std::net::IpAddr;

use super::support::Netns;
use super::support::packet::Packet;
use super::support::topology::HOST_LAN_V4;
use super::support::tunproxy::{Place, Said};

const TUN: &str = "/dev/net/tun";
/// Hosts of the internet.
const FOUR: &str = "203.0.113.10";
const SIX: &str = "2001:db8:1::10";
/// Who we are to a traceroute.
const HOP_V4: &str = "198.18.0.2";
const HOP_V6: &str = "fdfe:dcba:9876::2";

fn profile(rules: &str) -> Place {
    profile_with("", rules)
}

fn profile_with(keys: &str, rules: &str) -> Place {
    Place::new(&format!(
        "
mode: rule
ipv6: true
log-level: info
tun: {{ enable: true, auto-route: true, dns-hijack: ['any:53'], {keys} }}
dns: {{ enable: true, listen: '{HOST_LAN_V4}:53', enhanced-mode: fake-ip, nameserver: [192.168.1.1] }}
proxies: [{{ name: abroad, type: socks5, server: 203.0.113.99, port: 1080, udp: true }}]
proxy-groups: [{{ name: choice, type: select, proxies: [DIRECT, abroad] }}]
rules: [{rules}]
"
    ))
}

/// One ping and what it said.
fn ping(ns: &Netns, words: &str) -> Said {
    Said::of(ns.command("ping").args(["-n", "-c", "1", "-W", "10"]).args(words.split(' ')))
}

/// Whether the host answered, and with what time to live.
fn ttl(said: &Said) -> Option<u8> {
    let after = said.stdout.split("ttl=").nth(1)?;
    after.split(' ').next()?.parse().ok().filter(|_| said.succeeded())
}

/// The hops that a traceroute by echo requests names.
fn hops(ns: &Netns, to: &str) -> Vec<String> {
    let said = Said::of(ns.command("traceroute").args(["-n", "-I", "-q", "1", "-w", "10", "-m", "8", to]));
    assert!(said.succeeded(), "{said:?}");
    let hop = |line: &str| line.split_whitespace().nth(1).unwrap_or_default().to_owned();
    said.stdout.lines().skip(1).map(hop).collect()
}

/// The IP packet in a frame, if it is an echo request to `to`, and where its ICMP header begins.
fn request(packet: &Packet, to: &str) -> Option<(Vec<u8>, usize)> {
    let (bytes, start) = (packet.bytes.get(14..)?, if to.contains(':') { 40 } else { 20 });
    let to: IpAddr = to.parse().expect("an address");
    let kind = *bytes.get(start)?;
    let asks =
        packet.ip.is_some_and(|ip| ip.destination.ip() == to && matches!((ip.protocol, kind), (1, 8) | (58, 128)));
    asks.then(|| (bytes.to_vec(), start))
}

/// Makes the checksum of the ICMP message in an IPv4 packet right.
fn seal_icmp(packet: &mut [u8]) {
    packet[22..24].fill(0);
    let mut sum = 0u32;
    for pair in packet[20..].chunks(2) {
        sum += u32::from(pair[0]) << 8 | pair.get(1).copied().map_or(0, u32::from);
        sum = (sum & 0xffff) + (sum >> 16);
    }
    packet[22..24].copy_from_slice(&(!sum as u16).to_be_bytes());
}
