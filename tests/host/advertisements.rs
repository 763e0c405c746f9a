//! Routers that speak for themselves: they appear, renumber and withdraw while we run.

use std::net::{Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::change::{BOTH, Day, Internet, NAMESERVERS, PROXIED, of_others};
use super::leaks::{at, seen};
use super::support::client::act_in;
use super::support::escapes::{self, Kind, TARGET_V4, TARGET_V6, Tie, escaped};
use super::support::frames::{self, Prefix};
use super::support::packet::inject;
use super::support::sites::{V4, V6};
use super::support::tunproxy::Place;
use super::support::uplinks::Uplinks;
use super::support::{Capture, Dump, Netns, Topology, run, world};

const TUN: &str = "/dev/net/tun";
/// The prefixes that the links have, and one that the first gets later.
const FIRST_PREFIX: &str = "2001:db8:2::";
const SECOND_PREFIX: &str = "2001:db8:3::";
const NEXT_PREFIX: &str = "2001:db8:4::";
const PATIENCE: Duration = Duration::from_secs(20);
const HOUR: u32 = 3600;

fn profile(tun: &str) -> Place {
    Place::new(&format!(
        "
mode: rule
ipv6: true
log-level: info
tun: {{ enable: true, auto-route: true, dns-hijack: ['any:53']{tun} }}
dns: {{ enable: true, enhanced-mode: fake-ip{NAMESERVERS} }}
proxies: [{{ name: up, type: socks5, server: 203.0.113.3, port: 1080, udp: true }}]
rules:
- IP-CIDR,{TARGET_V4}/32,REJECT
- IP-CIDR6,{TARGET_V6}/128,REJECT
- IP-CIDR,{PROXIED}/32,up
- MATCH,DIRECT
"
    ))
}

/// A router on the link of `device`.
struct Router<'a> {
    ns: &'a Netns,
    device: &'a str,
    address: Ipv6Addr,
}

impl<'a> Router<'a> {
    fn new(ns: &'a Netns, device: &'a str) -> Self {
        let shown = ns.ip(&format!("-6 -o addr show dev {device} scope link"));
        let address =
            shown.split_whitespace().nth(3).and_then(|net| net.split('/').next()).expect("a link-local address");
        Self { ns, device, address: address.parse().expect("an address") }
    }

    fn says(&self, lifetime: u16, prefixes: &[(&str, u32, u32)]) {
        let prefix = |(prefix, valid, preferred): &(&str, u32, u32)| Prefix {
            prefix: prefix.parse().expect("a prefix"),
            valid: *valid,
            preferred: *preferred,
        };
        let prefixes: Vec<Prefix> = prefixes.iter().map(prefix).collect();
        let frame = frames::router_advertisement(frames::mac(self.ns, self.device), self.address, lifetime, &prefixes);
        inject(self.ns, self.device, &[frame]);
    }

    fn is_there(&self, prefix: &str) {
        self.says(1800, &[(prefix, HOUR, HOUR)]);
    }
}

/// The host has nothing of IPv6 but what routers tell it on `devices`.
fn listen_to_routers(host: &Netns, devices: &[&str]) {
    host.ip("-6 route flush exact default");
    for device in devices {
        host.ip(&format!("-6 addr flush dev {device} scope global"));
        host.sysctl(&format!("net.ipv6.conf.{device}.accept_ra"), "1");
    }
}

/// What the first network's provider lets pass, from now on.
fn provider_has(gateway: &Netns, prefix: &str) {
    gateway.nft("flush chain inet provider strangers");
    gateway.nft(&format!("add rule inet provider strangers iifname eth1 ip6 saddr != {prefix}/64 drop"));
}

fn await_default(host: &Netns, there: bool) {
    let found = || host.ip("-6 route show default").contains("via fe80");
    let settled = world::poll_until(PATIENCE, || (found() == there).then_some(()));
    assert!(settled.is_some(), "a default route: {there}\n{}", host.ip("-6 route"));
}

/// A program that never stops trying what the profile forbids.
struct Nag {
    stop: Arc<AtomicBool>,
    tries: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Nag {
    fn on(host: &Netns) -> Self {
        let (stop, tries) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (told, count) = (stop.clone(), tries.clone());
        let thread = host.spawn(move || {
            while !told.load(Ordering::Relaxed) {
                for kind in [Kind::Udp, Kind::Tcp, Kind::Ping] {
                    let _ = escapes::send(kind, Tie::Free, forbidden(), b"past us");
                }
                count.fetch_add(1, Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        Self { stop, tries, thread: Some(thread) }
    }

    fn end(mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().map(JoinHandle::join).expect("a thread").expect("no panic");
        assert!(self.tries.load(Ordering::Relaxed) > 20, "it was at work");
    }
}

fn forbidden() -> SocketAddr {
    at(&format!("[{TARGET_V6}]:4711"))
}

#[test]
fn routers_that_appear_renumber_and_withdraw_are_followed_and_nothing_leaks() {
    run(&[TUN], || {
        for keys in ["", ", kill-switch: true"] {
            let net = Uplinks::new();
            let host = &net.lab.host;
            let _internet = Internet::open(&net.lab);
            let (first, second) = (Router::new(&net.lab.gateway, "eth1"), Router::new(net.second(), "eth1"));
            listen_to_routers(host, &["eth0", "eth1"]);
            let before = of_others(host);
            let mut captures = ["eth0", "eth1"].map(|device| Capture::start(host, device));
            let tunproxy = profile(keys).start(host);
            let nag = Nag::on(host);
            let mut day = Day::new(host);
            day.goes_on("without a router", Instant::now(), &tunproxy, host, &["-4"]);

            first.is_there(FIRST_PREFIX);
            day.goes_on("a router appeared", Instant::now(), &tunproxy, host, BOTH);

            net.lab.gateway.address("eth1", &[&format!("{NEXT_PREFIX}1/64")]);
            provider_has(&net.lab.gateway, NEXT_PREFIX);
            first.says(1800, &[(FIRST_PREFIX, 0, 0), (NEXT_PREFIX, HOUR, HOUR)]);
            day.goes_on("another prefix", Instant::now(), &tunproxy, host, BOTH);

            second.is_there(SECOND_PREFIX);
            first.says(0, &[]);
            day.goes_on("another router", Instant::now(), &tunproxy, host, BOTH);

            second.says(0, &[]);
            await_default(host, false);
            let refused = act_in(host, &format!("connect {V6}:80 20"));
            assert!(refused.as_ref().is_err_and(|error| error != "ETIMEDOUT"), "{refused:?}\n{}", tunproxy.output());
            day.goes_on("no router", Instant::now(), &tunproxy, host, &["-4"]);

            second.is_there(SECOND_PREFIX);
            day.goes_on("the router is back", Instant::now(), &tunproxy, host, BOTH);
            nag.end();
            for capture in &mut captures {
                assert_eq!(seen(capture, escaped), Vec::<String>::new(), "{keys}");
            }
            assert!(tunproxy.stop().success());
            assert_eq!(of_others(host), before);
            captures[1].prove(|mark| {
                let mark = mark.to_owned();
                host.enter(move || {
                    escapes::send(Kind::Udp, Tie::Free, forbidden(), mark.as_bytes()).expect("it is sent");
                });
            });
        }
    });
}

#[test]
fn a_gateway_goes_on_listening_to_its_router_and_is_afterwards_what_it_was() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _internet = Internet::open(&lab);
        let host = &lab.host;
        let router = Router::new(&lab.gateway, "eth1");
        listen_to_routers(host, &["eth0"]);
        router.is_there(FIRST_PREFIX);
        await_default(host, true);
        let before = Dump::take(host);
        let tunproxy = profile(", auto-forward: true").start(host);
        let mut day = Day::new(host);
        day.goes_on("the router was there", Instant::now(), &tunproxy, host, BOTH);
        router.is_there(FIRST_PREFIX);
        assert_eq!(act_in(host, &format!("ask {V4}:7 x")), Ok("x".to_owned()));
        assert!(tunproxy.stop().success());
        before.assert_same(&Dump::take(host));

        let tunproxy = profile(", auto-forward: true").start(host);
        let mut day = Day::new(host);
        router.says(0, &[]);
        await_default(host, false);
        assert!(act_in(host, &format!("connect {V6}:80 20")).is_err());
        lab.gateway.address("eth1", &[&format!("{NEXT_PREFIX}1/64")]);
        router.says(1800, &[(FIRST_PREFIX, 0, 0), (NEXT_PREFIX, HOUR, HOUR)]);
        day.goes_on("back with another prefix", Instant::now(), &tunproxy, host, BOTH);
        let place = tunproxy.kill();
        place.clean_up(host);
        await_default(host, true);
        for (key, value) in [("eth0/accept_ra", "1"), ("all/forwarding", "0")] {
            let path = format!("/proc/sys/net/ipv6/conf/{key}");
            let now = host.enter(move || std::fs::read_to_string(path).expect("a parameter"));
            assert_eq!(now.trim(), value, "{key}");
        }
        let connected = act_in(host, &format!("connect {V6}:80 20"));
        assert!(connected.is_ok(), "{connected:?}\n{}", host.ip("-6 route"));
    });
}
