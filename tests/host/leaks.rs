//! Nothing goes past us that should come to us, whatever routes, addresses and resolvers a host is given.

use std::net::{Ipv6Addr, SocketAddr};
use std::time::{Duration, Instant};

use super::support::client::{Session, act_in};
use super::support::escapes::{self, Kind, TARGET_V4, TARGET_V6, TIES, Tie, escaped};
use super::support::frames;
use super::support::packet::{Packet, inject, protocol};
use super::support::peers::Peers;
use super::support::peers::dns::Zone;
use super::support::peers::proxy::Door;
use super::support::sites::{NAME, V4, V6, zone};
use super::support::topology::{GATEWAY_V4, GATEWAY_V6, HOST_LAN_V4, HOST_V4, HOST_V6};
use super::support::tunproxy::{Place, Said};
use super::support::{Capture, Dump, Netns, Sites, Topology, run, world};

const TUN: &str = "/dev/net/tun";
const KINDS: [Kind; 3] = [Kind::Udp, Kind::Tcp, Kind::Ping];
pub(super) fn at(address: &str) -> SocketAddr {
    address.parse().expect("an address")
}

/// With further keys of `tun`, further keys, and these rules. Our own questions leave to port 5353, so that nothing to
/// port 53 is ours.
pub(super) fn profile(tun: &str, more: &str, rules: &str) -> Place {
    Place::new(&format!(
        "
mode: rule
log-level: info
tun: {{ enable: true{tun} }}
dns: {{ enable: true, enhanced-mode: fake-ip, nameserver: ['192.168.1.1:5353'] }}
rules: [{rules}]
{more}
"
    ))
}

/// A capture on the host's uplink that has seen a marked datagram of the host, and of the LAN client if there is one.
fn proven_capture(lab: &Topology) -> Capture {
    let mut capture = Capture::start(&lab.host, "eth0");
    for ns in [Some(&lab.host), lab.lan.as_ref()].into_iter().flatten() {
        for site in [V4, V6] {
            capture.prove(|mark| {
                assert_eq!(act_in(ns, &format!("datagram {site}:7 {mark}")), Ok(mark.to_owned()));
            });
        }
    }
    capture
}

/// Sends one of each kind to each address, tied or not.
pub(super) fn send_all(ns: &Netns, ties: &[Tie], to: &[&str]) {
    let (ties, to): (Vec<Tie>, Vec<SocketAddr>) = (ties.to_vec(), to.iter().map(|to| at(to)).collect());
    ns.enter(move || {
        for to in to {
            for kind in KINDS {
                for tie in &ties {
                    let _ = escapes::send(kind, *tie, to, b"past-us");
                }
            }
        }
    });
}

pub(super) fn seen(capture: &mut Capture, leak: impl Fn(&Packet) -> bool) -> Vec<String> {
    capture.packets().iter().filter(|packet| leak(packet)).map(ToString::to_string).collect()
}

// --- routes ---

/// What a rogue DHCP server or router may put into the main table, by the uplink.
const ROGUE: [&str; 6] = [
    "0.0.0.0/1 via 192.168.1.1 dev eth0",
    "128.0.0.0/1 via 192.168.1.1 dev eth0",
    "203.0.113.0/24 via 192.168.1.1 dev eth0",
    "2000::/3 via 2001:db8:2::1 dev eth0",
    "2001:db8:1::/64 via 2001:db8:2::1 dev eth0",
    "8.0.0.0/6 via 192.168.1.1 dev eth0",
];

#[test]
fn routes_that_somebody_puts_into_the_main_table_pull_nothing_out() {
    run(&[TUN], || {
        for kill_switch in [false, true] {
            let lab = Topology::with_lan();
            let _sites = Sites::open(&lab);
            let mut capture = proven_capture(&lab);
            let keys = format!(", auto-forward: true, kill-switch: {kill_switch}");
            let tunproxy = profile(&keys, "", "'MATCH,REJECT'").start(&lab.host);
            lab.host.routes(&ROGUE);
            let targets = [format!("{TARGET_V4}:80"), format!("[{TARGET_V6}]:80"), "10.99.0.1:80".to_owned()];
            let targets: Vec<&str> = targets.iter().map(String::as_str).collect();
            send_all(&lab.host, &[Tie::Free], &targets);
            send_all(lab.client(), &[Tie::Free], &targets);
            if kill_switch {
                send_all(&lab.host, &TIES, &targets[..2]);
            }
            tunproxy.assert_carries(&lab.host);
            tunproxy.assert_carries(lab.client());
            let private = |packet: &Packet| packet.ip.is_some_and(|ip| ip.destination.ip().to_string() == "10.99.0.1");
            let out = seen(&mut capture, |packet| escaped(packet) || private(packet));
            assert_eq!(out, Vec::<String>::new(), "kill switch: {kill_switch}");
            assert!(tunproxy.stop().success());
            send_all(&lab.host, &[Tie::Free], &targets);
            assert!(seen(&mut capture, escaped).len() >= 6, "the routes are there, and the attempts can be seen");
        }
    });
}

#[test]
fn a_public_prefix_on_the_uplink_itself_pulls_nothing_out() {
    run(&[TUN], || {
        for before_the_start in [true, false] {
            let lab = Topology::desktop();
            let _sites = Sites::open(&lab);
            let mut capture = proven_capture(&lab);
            let add = || lab.host.address("eth0", &["203.0.113.250/24", "2001:db8:1::250/64"]);
            if before_the_start {
                add();
            }
            let tunproxy = profile("", "", "'MATCH,REJECT'").start(&lab.host);
            if !before_the_start {
                add();
            }
            send_all(&lab.host, &[Tie::Free], &[&format!("{TARGET_V4}:80"), &format!("[{TARGET_V6}]:80")]);
            tunproxy.assert_carries(&lab.host);
            // On the link, whoever is looked for is asked after first.
            let asked = |packet: &Packet| packet.contains(&[203, 0, 113, 77]);
            assert_eq!(seen(&mut capture, |packet| escaped(packet) || asked(packet)), Vec::<String>::new());
            assert!(tunproxy.stop().success());
            send_all(&lab.host, &[Tie::Free], &[&format!("{TARGET_V4}:80")]);
            let found =
                world::poll_until(Duration::from_secs(10), || (!seen(&mut capture, asked).is_empty()).then_some(()));
            assert!(found.is_some(), "without us it is looked for on the link");
        }
    });
}

// --- names ---

fn is_question(packet: &Packet) -> bool {
    let ports = |ip: super::support::packet::Ip| {
        matches!(ip.protocol, protocol::TCP | protocol::UDP) && ip.destination.port() == 53
    };
    packet.ip.is_some_and(ports)
}

/// The gateway's link-local address on the host's link, tied to that link.
fn link_local_resolver(lab: &Topology) -> String {
    let listed = lab.gateway.ip("-o -6 addr show dev eth1 scope link");
    let address = listed.split_whitespace().find_map(|word| word.strip_suffix("/64")).expect("a link-local address");
    let index = lab.host.enter(|| nix::net::if_::if_nametoindex("eth0").expect("the uplink"));
    format!("[{address}%{index}]:53")
}

#[test]
fn no_question_of_the_host_leaves_past_us_however_its_socket_is_tied() {
    run(&[TUN], || {
        for (kill_switch, rp_filter) in [(false, "0"), (false, "1"), (true, "0"), (true, "1")] {
            let lab = Topology::desktop().rp_filter(rp_filter);
            let _sites = Sites::open(&lab);
            let mut capture = proven_capture(&lab);
            let link_local = link_local_resolver(&lab);
            let resolvers = [
                &format!("{GATEWAY_V4}:53"),
                &format!("[{GATEWAY_V6}]:53"),
                "203.0.113.53:53",
                "[2001:db8:1::53]:53",
                link_local.as_str(),
            ];
            let ask = |capture: &mut Capture| -> usize {
                let before = seen(capture, is_question).len();
                let resolvers: Vec<SocketAddr> = resolvers.iter().map(|to| at(to)).collect();
                lab.host.enter(move || {
                    for to in resolvers {
                        for tie in TIES {
                            for kind in [Kind::Udp, Kind::Tcp] {
                                let _ = escapes::send(kind, tie, to, b"a question");
                            }
                        }
                    }
                });
                seen(capture, is_question).len() - before
            };
            let ways = resolvers.len() * TIES.len() * 2;
            let open = ask(&mut capture);
            // A link-local resolver cannot be asked from a global address over TCP, perhaps.
            assert!(open >= ways - 4, "an open host asks: {open} of {ways}");
            let tunproxy = profile(&format!(", kill-switch: {kill_switch}"), "", "'MATCH,REJECT'").start(&lab.host);
            let leaked = ask(&mut capture);
            tunproxy.assert_carries(&lab.host);
            assert_eq!(
                leaked,
                0,
                "kill switch: {kill_switch}, rp_filter {rp_filter}: {:?}",
                seen(&mut capture, is_question)
            );
            let place = tunproxy.kill();
            let after = ask(&mut capture);
            match kill_switch {
                true => assert_eq!(after, 0, "after a kill"),
                false => assert!(after >= ways - 4, "after a kill everything is direct at once: {after} of {ways}"),
            }
            place.clean_up(&lab.host);
            let open = ask(&mut capture);
            assert!(open >= ways - 4, "after the clean-up: {open} of {ways}");
        }
    });
}

#[test]
fn what_a_stub_on_the_loopback_asks_upstream_comes_to_us() {
    run(&["dig", TUN], || {
        let lab = Topology::desktop();
        let sites = Sites::open(&lab);
        let _ours = lab.at_gateway.dns(at(&format!("{GATEWAY_V4}:5353")), zone());
        let mut capture = proven_capture(&lab);
        let at_host = Peers::new(&lab.host);
        let upstream = at(&format!("{GATEWAY_V4}:53"));
        let _stub = at_host.udp(at("127.0.0.53:53"), async move |socket| {
            let mut buffer = vec![0; 4096];
            loop {
                let (length, from) = socket.recv_from(&mut buffer).await?;
                let up = tokio::net::UdpSocket::bind("0.0.0.0:0").await?;
                up.send_to(&buffer[..length], upstream).await?;
                let (length, _) = up.recv_from(&mut buffer).await?;
                socket.send_to(&buffer[..length], from).await?;
            }
        });
        let ask = || lab.host.run("dig", &["+short", "+tries=1", "+timeout=20", "@127.0.0.53", NAME, "A"]);
        assert_eq!(ask().trim(), V4, "the stub works");
        let before = (seen(&mut capture, is_question).len(), sites.dns.queries.all().len());
        assert!(before.0 > 0, "and its questions can be seen");
        let tunproxy = profile("", "", "'MATCH,REJECT'").start(&lab.host);
        assert!(ask().starts_with("198.18."), "{}", tunproxy.output());
        let after = (seen(&mut capture, is_question).len(), sites.dns.queries.all().len());
        assert_eq!(after, before);
    });
}

#[test]
fn no_question_of_a_lan_client_leaves_past_us() {
    run(&["dig", TUN], || {
        let lab = Topology::with_lan();
        let _sites = Sites::open(&lab);
        let _ours = lab.at_gateway.dns(at(&format!("{GATEWAY_V4}:5353")), zone());
        let mut capture = proven_capture(&lab);
        let keys = ", auto-forward: true";
        let listen = profile(keys, "", "'MATCH,REJECT'");
        let text = std::fs::read_to_string(&listen.profile).expect("the profile");
        listen.rewrite(
            &text.replace("dns: { enable: true", &format!("dns: {{ listen: '{HOST_LAN_V4}:53', enable: true")),
        );
        let ask = |server: &str, transport: &str| {
            let words = ["+short", "+tries=1", "+timeout=20", transport, &format!("@{server}"), NAME, "A"];
            lab.client().run("dig", &words)
        };
        let servers = [GATEWAY_V4, GATEWAY_V6, "203.0.113.53", "2001:db8:1::53", HOST_LAN_V4];
        assert_eq!(ask(GATEWAY_V4, "+notcp").trim(), V4);
        let before = seen(&mut capture, is_question).len();
        assert!(before > 0, "an open gateway lets questions out");
        let tunproxy = listen.start(&lab.host);
        for server in servers {
            for transport in ["+tcp", "+notcp"] {
                let answer = ask(server, transport);
                assert!(answer.starts_with("198.18."), "{server} {transport}: {answer}\n{}", tunproxy.output());
            }
        }
        assert_eq!(seen(&mut capture, is_question).len(), before);
    });
}

// --- IPv6 that is not carried ---

/// The fastest of a few, because the machine has other work, and hosts send few ICMP errors a second.
fn fastest(attempt: impl Fn() -> Result<String, String>) -> (Duration, Result<String, String>) {
    let mut timed = (0..5).map(|_| {
        let start = Instant::now();
        let outcome = attempt();
        (start.elapsed(), outcome)
    });
    let first = timed.next().expect("five");
    if first.0 < AT_ONCE {
        return first;
    }
    timed.find(|(took, _)| *took < AT_ONCE).unwrap_or(first)
}

/// How soon a refusal must have come.
const AT_ONCE: Duration = Duration::from_millis(100);

/// `ns` is told at once, over TCP by one of these errors.
fn refuses_ipv6(ns: &Netns, targets: &[String], refusals: &[&str]) {
    for target in targets {
        let (took, outcome) = fastest(|| act_in(ns, &format!("connect {target}:80 20")));
        let told = matches!(&outcome, Err(error) if refusals.contains(&error.as_str()));
        assert!(told && took < AT_ONCE, "{} tcp {target}: {outcome:?} after {took:?}", ns.name());
        let (took, outcome) = fastest(|| act_in(ns, &format!("datagram {target}:7 past-us 20")));
        let silent = !matches!(&outcome, Err(error) if error != "EAGAIN");
        assert!(!silent && took < AT_ONCE, "{} udp {target}: {outcome:?} after {took:?}", ns.name());
        let address = target.trim_matches(['[', ']']);
        let ping = Said::of(ns.command("ping").args(["-6", "-c1", "-W20", address]));
        let told = ping.stdout.contains("unreachable") || ping.stderr.contains("unreachable");
        assert!(!ping.succeeded() && told, "{} ping {target}: {ping:?}", ns.name());
    }
}

#[test]
fn ipv6_that_is_not_wanted_is_refused_at_once_and_never_leaks() {
    run(&["ping", TUN], || {
        for kill_switch in [false, true] {
            let lab = Topology::with_lan();
            let _sites = Sites::open(&lab);
            let mut capture = proven_capture(&lab);
            for (key, value) in [("accept_ra", "2"), ("autoconf", "1")] {
                lab.host.sysctl(&format!("net.ipv6.conf.eth0.{key}"), value);
            }
            let keys = format!(", auto-forward: true, kill-switch: {kill_switch}");
            let tunproxy = profile(&keys, "ipv6: false", "'MATCH,DIRECT'").start(&lab.host);
            let targets = [format!("[{TARGET_V6}]"), "[2001:db8:77::99]".to_owned()];
            let past_us = |packet: &Packet| {
                let target = |ip: super::support::packet::Ip| {
                    let to = ip.destination.ip().to_string();
                    to == TARGET_V6 || to == "2001:db8:77::99"
                };
                packet.ip.is_some_and(target) && !packet.is_housekeeping()
            };
            refuses_ipv6(&lab.host, &targets[..1], &["ENETUNREACH"]);
            refuses_ipv6(lab.client(), &targets[..1], &["ENETUNREACH"]);
            // Another router says that it is one, and which prefix the link has.
            let router: Ipv6Addr = "fe80::77".parse().expect("an address");
            let prefix = "2001:db8:77::".parse().expect("a prefix");
            let prefixes = [frames::Prefix { prefix, valid: 3600, preferred: 3600 }];
            let mac = frames::mac(&lab.gateway, "eth1");
            let advertisement = frames::router_advertisement(mac, router, 1800, &prefixes);
            inject(&lab.gateway, "eth1", &[advertisement]);
            let taken = world::poll_until(Duration::from_secs(20), || {
                let taken = lab.host.ip("-6 addr show dev eth0").contains("2001:db8:77:");
                (taken && lab.host.ip("-6 route show").contains("fe80::77")).then_some(())
            });
            assert!(taken.is_some(), "the host takes what the router says: {}", lab.host.ip("-6 route show"));
            refuses_ipv6(&lab.host, &targets, &["ENETUNREACH"]);
            refuses_ipv6(lab.client(), &targets, &["ENETUNREACH"]);
            let out = seen(&mut capture, past_us);
            assert_eq!(out, Vec::<String>::new(), "kill switch: {kill_switch}\n{}", tunproxy.output());
            assert!(tunproxy.stop().success());
            send_all(&lab.host, &[Tie::Free], &[&format!("[{TARGET_V6}]:80")]);
            assert!(!seen(&mut capture, past_us).is_empty(), "without us it leaves");
        }
    });
}

#[test]
fn strict_route_makes_ipv6_unreachable_where_the_device_cannot_have_it() {
    run(&["ping", TUN], || {
        let lab = Topology::with_lan();
        let _sites = Sites::open(&lab);
        let at_host = Peers::new(&lab.host);
        let _server = at_host.tcp_echo(at("[::]:22"));
        let mut capture = proven_capture(&lab);
        // As in a container: off for new interfaces, and not to be switched on.
        lab.host.sysctl("net.ipv6.conf.default.disable_ipv6", "1");
        let before = Dump::take(&lab.host);
        let read_only = "mount --bind /proc/sys /proc/sys && mount -o remount,bind,ro /proc/sys";
        assert!(Said::of(std::process::Command::new("sh").args(["-c", read_only])).succeeded());
        let target = format!("[{TARGET_V6}]");
        let loose = profile("", "", "'MATCH,DIRECT'").start(&lab.host);
        loose.line("goes past the rules");
        send_all(&lab.host, &[Tie::Free], &[&format!("{target}:80")]);
        let leaked = seen(&mut capture, escaped).len();
        assert!(leaked > 0, "the test's ground: without strict-route it goes past us");
        assert!(loose.stop().success());
        for keys in [", strict-route: true", ", kill-switch: true"] {
            let strict = profile(keys, "", "'MATCH,DIRECT'").start(&lab.host);
            strict.line("is unreachable");
            refuses_ipv6(&lab.host, std::slice::from_ref(&target), &["ECONNREFUSED"]);
            refuses_ipv6(lab.client(), std::slice::from_ref(&target), &["ECONNREFUSED"]);
            let mut inward = Session::open(&lab.internet, at("[2001:db8:1::50]:0"), at(&format!("[{HOST_V6}]:22")));
            assert_eq!(inward.alive().map(drop), Ok(()), "answers to outside leave");
            assert_eq!(seen(&mut capture, escaped).len(), leaked, "{keys}");
            assert_eq!(act_in(&lab.host, &format!("ask {V4}:7 x")), Ok("x".to_owned()), "IPv4 is carried");
            assert!(strict.stop().success());
            before.assert_same(&Dump::take(&lab.host));
            let place = profile(keys, "", "'MATCH,DIRECT'").start(&lab.host).kill();
            place.clean_up(&lab.host);
            before.assert_same(&Dump::take(&lab.host));
        }
    });
}

// --- what others have ---

#[test]
fn what_others_have_in_our_places_survives_start_stop_kill_and_cleanup() {
    run(&[TUN], || {
        for keys in ["", ", kill-switch: true"] {
            let lab = Topology::desktop();
            let _sites = Sites::open(&lab);
            for words in [
                "rule add priority 9000 fwmark 0x1000000/0x1000000 lookup 2022",
                "rule add priority 9043 from 192.0.2.0/24 lookup 2023 protocol kernel",
                "rule add priority 9090 nop",
                "route add 192.0.2.0/24 dev eth0 table 2022",
                "route add unreachable default metric 4294967294 table 2023",
                "-6 rule add priority 9004 fwmark 0x2000000/0x2000000 lookup 2023",
                "-6 route add unreachable default metric 4294967294 table 2023",
            ] {
                lab.host.ip(words);
            }
            for script in [
                "add table inet tunproxy { comment \"kill switch of tunproxy0\"; }",
                "add chain inet tunproxy reroute { type filter hook output priority 0; }",
                "add rule inet tunproxy reroute meta mark 0x4000000 counter accept",
                "add table arp tunproxy",
                "add table ip tunproxy1",
            ] {
                lab.host.nft(script);
            }
            let before = Dump::take(&lab.host);
            let place = profile(keys, "", "'MATCH,DIRECT'");
            for _ in 0..2 {
                let tunproxy = place.start(&lab.host);
                tunproxy.assert_carries(&lab.host);
                assert_eq!(act_in(&lab.host, &format!("ask {V4}:7 x")), Ok("x".to_owned()));
                assert!(tunproxy.stop().success());
                before.assert_same(&Dump::take(&lab.host));
                // Twice in a row, so that one stands beside the other.
                let place = place.start(&lab.host).kill().start(&lab.host).kill();
                place.clean_up(&lab.host);
                before.assert_same(&Dump::take(&lab.host));
            }
        }
    });
}

// --- our own connections ---

#[test]
fn a_proxy_whose_name_means_another_address_each_time_is_never_reached_through_us() {
    run(&["curl", TUN], || {
        for kill_switch in [false, true] {
            let lab = Topology::with_lan();
            let zone = Zone::default().address(NAME, V4).turning("proxy.example.test", &["203.0.113.3", "203.0.113.4"]);
            let _sites = Sites::with(&lab, zone.clone());
            let _ours = lab.at_gateway.dns(at(&format!("{GATEWAY_V4}:5353")), zone);
            let doors = [Door::default(), Door::default()];
            let _proxies = ["203.0.113.3:1080", "203.0.113.4:1080"]
                .iter()
                .zip(&doors)
                .map(|(address, door)| lab.sites.socks5(at(address), door.clone()))
                .collect::<Vec<_>>();
            let more = "
proxies: [{ name: up, type: socks5, server: proxy.example.test, port: 1080 }]
mixed-port: 7890
allow-lan: true";
            let keys = format!(", auto-forward: true, kill-switch: {kill_switch}");
            let tunproxy = profile(&keys, more, "'MATCH,up'").start(&lab.host);
            let opened = || {
                let said = tunproxy.place().ask(&lab.host, "status").stdout;
                let status: serde_json::Value = serde_json::from_str(&said).expect("JSON");
                status["flows"]["opened"].as_u64().expect("a number")
            };
            let before = opened();
            for _ in 0..10 {
                assert_eq!(act_in(&lab.host, &format!("ask {V4}:7 x")), Ok("x".to_owned()), "{}", tunproxy.output());
            }
            assert_eq!(opened() - before, 10, "one flow each: {}", tunproxy.output());
            assert!(doors.iter().all(|door| !door.requests.all().is_empty()), "both addresses were used");
            // A client of the LAN that knows the host by its outer address.
            for address in [HOST_V4, HOST_LAN_V4] {
                let proxy = format!("socks5://{address}:7890");
                let url = format!("http://{V4}/");
                lab.client().run("curl", &["-sS", "--max-time", "20", "-x", &proxy, &url]);
            }
            assert_eq!(opened() - before, 12, "{}", tunproxy.output());
            assert!(tunproxy.stop().success());
        }
    });
}
