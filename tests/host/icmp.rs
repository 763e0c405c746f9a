//! Ping and traceroute: what a program sees is what the network says, and nothing of ours answers for it.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, Type};

use super::support::client::act_in;
use super::support::packet::{Packet, inject};
use super::support::program::Program;
use super::support::sites::NAME;
use super::support::topology::{
    BLACK_HOLE_V4, BLACK_HOLE_V6, GATEWAY_V4, GATEWAY_V6, HOST_LAN_V4, HOST_LAN_V6, HOST_V4,
};
use super::support::tunproxy::{Place, Said};
use super::support::world::poll_until;
use super::support::{Capture, Netns, Sites, Topology, run};

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

#[test]
fn a_host_of_the_internet_answers_itself_one_hop_further_away() {
    run(&["ping", TUN], || {
        for filter in ["0", "1"] {
            let lab = Topology::with_lan().rp_filter(filter);
            let _sites = Sites::open(&lab);
            let truth = [FOUR, SIX].map(|site| ttl(&ping(&lab.host, site)).expect("it answers without us"));
            let tunproxy = profile_with("icmp-timeout: 1", "'MATCH,DIRECT'").start(&lab.host);
            tunproxy.assert_carries(&lab.host);
            for (site, truth) in [FOUR, SIX].into_iter().zip(truth) {
                let there = format!("destination={site} ");
                let words = ["network=icmp", &there, "MATCH,DIRECT", "up=56 down=56", "outcome=closed", "idle"];
                let (said, _line) = tunproxy.line_after(|| ping(&lab.host, site), &words);
                assert_eq!(ttl(&said), Some(truth - 1), "{site}: {said:?}\n{}", tunproxy.output());
                // The client's host is a hop as well.
                let said = ping(lab.client(), site);
                assert_eq!(ttl(&said), Some(truth - 2), "{site}: {said:?}\n{}", tunproxy.output());
            }
        }
    });
}

#[test]
fn a_name_with_a_fake_address_leads_to_the_host_itself() {
    run(&["ping", TUN], || {
        let lab = Topology::with_lan();
        let _sites = Sites::open(&lab);
        let tunproxy = profile("'DOMAIN,www.example.test,DIRECT', 'MATCH,REJECT'").start(&lab.host);
        for ns in [&lab.host, lab.client()] {
            for family in ["-4", "-6"] {
                let mut capture = Capture::start(&lab.host, "eth0");
                let said = ping(ns, &format!("{family} {NAME}"));
                assert!(said.succeeded(), "{said:?}\n{}", tunproxy.output());
                assert!(said.stdout.contains("198.18.") || said.stdout.contains("fdfe:dcba:9877:"), "{said:?}");
                let site = if family == "-4" { FOUR } else { SIX };
                let asked = capture.packets().iter().filter(|packet| request(packet, site).is_some()).count();
                assert_eq!(asked, 1, "the wire carried the real address");
            }
        }
        let said = ping(&lab.host, "198.18.77.77");
        assert!(said.code == Some(1) && said.stdout.contains("Destination Host Unreachable"), "{said:?}");
    });
}

#[test]
fn a_dead_host_stays_dead_and_an_unreachable_one_is_named_by_the_router_that_knows() {
    run(&["ping", TUN], || {
        let lab = Topology::with_lan();
        let _sites = Sites::open(&lab);
        let tunproxy = profile("'MATCH,DIRECT'").start(&lab.host);
        for ns in [&lab.host, lab.client()] {
            for hole in [BLACK_HOLE_V4, BLACK_HOLE_V6] {
                let said = Said::of(ns.command("ping").args(["-n", "-c", "2", "-i", "0.2", "-W", "2", hole]));
                let silent = said.stdout.contains(" 0 received") && !said.stdout.contains("From");
                assert!(said.code == Some(1) && silent, "{said:?}");
            }
            for (nowhere, router, words) in
                [("192.0.2.1", GATEWAY_V4, "Net Unreachable"), ("2001:db8:ffff::1", GATEWAY_V6, "No route")]
            {
                let said = ping(ns, nowhere);
                let told = said.stdout.contains(&format!("From {router} icmp_seq=1")) && said.stdout.contains(words);
                assert!(said.code == Some(1) && told, "{said:?}\n{}", tunproxy.output());
            }
        }
    });
}

#[test]
fn a_traceroute_names_us_and_every_router_behind_us() {
    run(&["traceroute", TUN], || {
        let lab = Topology::with_lan();
        let _sites = Sites::open(&lab);
        let _tunproxy = profile("'MATCH,DIRECT'").start(&lab.host);
        assert_eq!(hops(&lab.host, FOUR), [HOP_V4, GATEWAY_V4, FOUR]);
        assert_eq!(hops(&lab.host, SIX), [HOP_V6, GATEWAY_V6, SIX]);
        assert_eq!(hops(lab.client(), FOUR), [HOST_LAN_V4, HOP_V4, GATEWAY_V4, FOUR]);
        assert_eq!(hops(lab.client(), SIX), [HOST_LAN_V6, HOP_V6, GATEWAY_V6, SIX]);
    });
}

#[test]
fn a_request_leaves_with_what_it_asked_of_the_routers() {
    run(&["ping", TUN], || {
        let lab = Topology::with_lan();
        let _sites = Sites::open(&lab);
        let _tunproxy = profile("'MATCH,DIRECT'").start(&lab.host);
        for (words, ttl, tos, whole) in [("-Q 0x48 -M do -t 30", 29, 0x48, true), ("-M dont -t 200", 199, 0, false)] {
            let mut capture = Capture::start(&lab.host, "eth0");
            for site in [FOUR, SIX] {
                assert!(ping(&lab.host, &format!("{words} {site}")).succeeded(), "{words} {site}");
            }
            let seen = capture.packets();
            let (four, _) = seen.iter().find_map(|packet| request(packet, FOUR)).expect("it left");
            assert_eq!((four[8], four[1], four[6] & 0x40 != 0), (ttl, tos, whole));
            let (six, _) = seen.iter().find_map(|packet| request(packet, SIX)).expect("it left");
            assert_eq!((six[7], six[0] << 4 | six[1] >> 4), (ttl, tos));
        }
    });
}

#[test]
fn what_is_too_large_for_a_link_comes_back_with_its_mtu_and_what_may_be_cut_arrives() {
    run(&["ping", TUN], || {
        let lab = Topology::with_lan();
        let _sites = Sites::open(&lab);
        // The uplink itself, and a link further on.
        lab.host.ip("link set eth0 mtu 1450");
        lab.gateway.ip("link set eth1 mtu 1450");
        lab.gateway.ip("link set eth0 mtu 1320");
        lab.internet.ip("link set eth0 mtu 1320");
        let tunproxy = profile("'MATCH,DIRECT'").start(&lab.host);
        for ns in [lab.client(), &lab.host] {
            for site in [FOUR, SIX] {
                for length in [100, 1400, 4000, 20_000, 60_000] {
                    // IPv6 is cut by its source alone, which first has to learn of each smaller link.
                    let tries = if site == SIX { 3 } else { 1 };
                    let whole = |_| ping(ns, &format!("-M dont -s {length} {site}")).succeeded();
                    assert!((0..tries).any(whole), "{length} {site} {}\n{}", ns.name(), tunproxy.output());
                }
            }
            // Addresses of which no kernel has learnt anything yet.
            let last = if ns.name() == lab.host.name() { 11 } else { 12 };
            let (four, six) = (format!("203.0.113.{last}"), format!("2001:db8:1::{last}"));
            for (site, header, router) in [(&four, 28, GATEWAY_V4), (&six, 48, GATEWAY_V6)] {
                for (size, mtu) in [(1460, 1450), (1440, 1320)] {
                    let said = ping(ns, &format!("-M do -s {} {site}", size - header));
                    let told =
                        [format!("mtu = {mtu}"), format!("mtu={mtu}")].iter().any(|mtu| said.stdout.contains(mtu));
                    assert!(said.code == Some(1) && told, "{size} {site}: {said:?}\n{}", tunproxy.output());
                    let from = if mtu == 1320 { router } else { site };
                    assert!(said.stdout.contains(&format!("From {from} ")), "{said:?}");
                }
                assert!(ping(ns, &format!("-M do -s {} {site}", 1320 - header)).succeeded(), "{site}");
            }
        }
    });
}

#[test]
fn requests_of_two_clients_with_one_id_are_told_apart() {
    run(&["ping", TUN], || {
        let lab = Topology::with_lan();
        let _sites = Sites::open(&lab);
        let _tunproxy = profile("'MATCH,DIRECT'").start(&lab.host);
        let mut capture = Capture::start(&lab.host, "eth0");
        let words = ["-n", "-c", "20", "-i", "0.05", "-W", "10", "-e", "4711", FOUR];
        let (host, client) = std::thread::scope(|scope| {
            let all = [&lab.host, lab.client()].map(|ns| scope.spawn(|| Said::of(ns.command("ping").args(words))));
            let [host, client] = all.map(|one| one.join().expect("no panic"));
            (host, client)
        });
        for said in [host, client] {
            assert!(said.stdout.contains("20 received") && !said.stdout.contains("DUP"), "{said:?}");
        }
        let id = |packet: &Packet| request(packet, FOUR).map(|(bytes, at)| [bytes[at + 4], bytes[at + 5]]);
        let ids: Vec<_> = capture.packets().iter().filter_map(id).collect();
        let distinct: std::collections::HashSet<_> = ids.iter().collect();
        assert_eq!((ids.len(), distinct.len()), (40, 2), "{distinct:?}");
    });
}

/// A host at every IPv4 address of the internet that answers echo requests by a program, after a while.
fn slow_hosts(internet: &Netns, delay: Duration) {
    internet.sysctl("net.ipv4.icmp_echo_ignore_all", "1");
    let listen = || {
        let hears = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::ICMPV4))?;
        let speaks = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(libc::IPPROTO_RAW)))?;
        std::io::Result::Ok((hears, speaks))
    };
    let (hears, speaks) = internet.enter(listen).expect("root opens raw sockets");
    // It ends with the test's own process.
    std::thread::spawn(move || {
        let mut space = [std::mem::MaybeUninit::uninit(); 2048];
        while let Ok(length) = hears.recv(&mut space) {
            // SAFETY: the kernel has written that many bytes.
            let mut packet: Vec<u8> = space[..length].iter().map(|byte| unsafe { byte.assume_init() }).collect();
            if packet.get(20) != Some(&8) {
                continue;
            }
            std::thread::sleep(delay);
            let (from, to) = (packet[12..16].to_vec(), packet[16..20].to_vec());
            packet[12..16].copy_from_slice(&to);
            packet[16..20].copy_from_slice(&from);
            (packet[8], packet[20]) = (64, 0);
            seal_icmp(&mut packet);
            let to = SocketAddr::from((<[u8; 4]>::try_from(from).expect("four bytes"), 0));
            speaks.send_to(&packet, &to.into()).expect("a way back");
        }
    });
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

#[test]
fn the_round_trip_time_is_that_of_the_host() {
    run(&["ping", TUN], || {
        let lab = Topology::with_lan();
        slow_hosts(&lab.internet, Duration::from_millis(300));
        let _tunproxy = profile("'MATCH,DIRECT'").start(&lab.host);
        let said = ping(&lab.host, FOUR);
        let time = said.stdout.split("time=").nth(1).and_then(|after| after.split(' ').next());
        let time: f64 = time.unwrap_or_else(|| panic!("{said:?}")).parse().expect("milliseconds");
        assert!((300.0..5000.0).contains(&time), "{said:?}");
    });
}

#[test]
fn rules_decide_and_what_is_not_carried_is_refused_and_never_leaves() {
    run(&["ping", TUN], || {
        let lab = Topology::with_lan();
        let _sites = Sites::open(&lab);
        let rules = "'DST-PORT,0-65535,REJECT-DROP', 'SRC-PORT,0-65535,REJECT-DROP', 'NETWORK,udp,REJECT-DROP',
                     'NETWORK,tcp,REJECT-DROP', 'IP-CIDR,203.0.113.20/32,REJECT', 'IP-CIDR6,2001:db8:1::20/128,REJECT',
                     'IP-CIDR,203.0.113.21/32,REJECT-DROP', 'IP-CIDR,203.0.113.22/32,abroad',
                     'IP-CIDR6,2001:db8:1::22/128,abroad', 'DOMAIN,www.example.test,abroad',
                     'IP-CIDR,203.0.113.23/32,choice', 'NETWORK,icmp,DIRECT', 'MATCH,REJECT'";
        let tunproxy = profile_with("icmp-timeout: 1", rules).start(&lab.host);
        let mut capture = Capture::start(&lab.host, "eth0");
        capture.prove(|mark| {
            let socket = lab.host.enter(|| Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::ICMPV4)));
            let to: SocketAddr = format!("{GATEWAY_V4}:0").parse().expect("an address");
            let message = [&[8, 0, 0, 0, 0, 1, 0, 1][..], mark.as_bytes()].concat();
            socket.expect("root opens raw sockets").send_to(&message, &to.into()).expect("it leaves");
        });
        let said = ping(&lab.host, "203.0.113.23");
        assert!(said.succeeded(), "the group's member is DIRECT: {said:?}\n{}", tunproxy.output());
        assert!(ping(&lab.host, FOUR).succeeded(), "by NETWORK,icmp");
        for ns in [&lab.host, lab.client()] {
            for (site, words) in [
                ("203.0.113.20", "Packet filtered"),
                ("2001:db8:1::20", "Administratively prohibited"),
                ("203.0.113.22", "Packet filtered"),
                ("2001:db8:1::22", "Administratively prohibited"),
                (NAME, "filtered"),
            ] {
                let said = ping(ns, &if site == NAME { format!("-4 {site}") } else { site.to_owned() });
                assert!(said.code == Some(1) && said.stdout.contains(words), "{site}: {said:?}\n{}", tunproxy.output());
            }
            let said = Said::of(ns.command("ping").args(["-n", "-c", "2", "-i", "0.2", "-W", "2", "203.0.113.21"]));
            assert!(said.code == Some(1) && !said.stdout.contains("From"), "{said:?}");
        }
        for last in [20, 21, 22] {
            capture.assert_nothing("refused echo requests", |packet| {
                request(packet, &format!("203.0.113.{last}")).is_some()
                    || request(packet, &format!("2001:db8:1::{last}")).is_some()
            });
        }
        tunproxy.line("choice -> DIRECT");
        for (target, outcome) in [("abroad", "outcome=failed"), ("REJECT", "outcome=rejected")] {
            let told = |line: &&str| line.contains("network=icmp") && line.contains(&format!("outbound=\"{target}\""));
            let said = tunproxy.output();
            assert!(said.lines().filter(told).all(|line| line.contains(outcome)), "{said}");
            assert!(said.lines().any(|line| told(&line)), "{said}");
        }
    });
}

#[test]
fn forwarding_that_is_switched_off_and_a_family_that_is_not_carried_are_refusals() {
    run(&["ping", TUN], || {
        let lab = Topology::with_lan();
        let _sites = Sites::open(&lab);
        let tunproxy = profile_with("disable-icmp-forwarding: true", "'MATCH,DIRECT'").start(&lab.host);
        for (site, words) in [(FOUR, "Packet filtered"), (SIX, "Administratively prohibited")] {
            let said = ping(&lab.host, site);
            assert!(said.code == Some(1) && said.stdout.contains(words), "{said:?}");
        }
        assert!(ping(&lab.host, HOP_V4).succeeded(), "our own address answers");
        assert!(tunproxy.stop().success());
        let place = Place::new("ipv6: false\ntun: { enable: true }\nrules: ['MATCH,DIRECT']\n");
        let _tunproxy = place.start(&lab.host);
        let said = ping(&lab.host, SIX);
        assert!(said.code == Some(1) && said.stdout.contains("No route"), "{said:?}");
        assert!(ping(&lab.host, FOUR).succeeded());
    });
}

/// A run without CAP_NET_RAW.
fn without_raw_sockets(lab: &Topology, place: &Place) -> Program {
    let full = place.run_command(&lab.host);
    let mut bare = lab.host.command("setpriv");
    bare.args(["--inh-caps=-net_raw", "--bounding-set=-net_raw"]).arg(full.get_program()).args(full.get_args());
    let program = Program::start("tunproxy", bare);
    program.wait_for(|line| line.starts_with("tunproxy ready")).unwrap_or_else(|said| panic!("{said}"));
    program
}

#[test]
fn without_the_capability_ping_alone_is_lost_with_one_warning() {
    run(&["ping", "setpriv", TUN], || {
        let lab = Topology::with_lan();
        let _sites = Sites::open(&lab);
        let program = without_raw_sockets(&lab, &profile("'MATCH,DIRECT'"));
        for (site, words) in [(FOUR, "Packet filtered"), (SIX, "Administratively prohibited")] {
            for _ in 0..2 {
                let said = ping(&lab.host, site);
                assert!(said.code == Some(1) && said.stdout.contains(words), "{said:?}\n{}", program.output());
            }
        }
        assert_eq!(act_in(&lab.host, &format!("ask {FOUR}:7 x")), Ok("x".to_owned()));
        assert_eq!(program.output().matches("CAP_NET_RAW").count(), 1, "{}", program.output());
    });
}

#[test]
fn without_the_capability_ping_sockets_serve_as_well() {
    run(&["ping", "traceroute", "setpriv", TUN], || {
        let lab = Topology::with_lan();
        let _sites = Sites::open(&lab);
        lab.host.sysctl("net.ipv4.ping_group_range", "0 0");
        let program = without_raw_sockets(&lab, &profile("'MATCH,DIRECT'"));
        for site in [FOUR, SIX] {
            for ns in [&lab.host, lab.client()] {
                assert!(ttl(&ping(ns, site)).is_some_and(|ttl| (50..64).contains(&ttl)), "{}", program.output());
                assert!(ping(ns, &format!("-M dont -s 4000 {site}")).succeeded(), "{}", program.output());
            }
        }
        assert_eq!(hops(&lab.host, FOUR), [HOP_V4, GATEWAY_V4, FOUR]);
        assert_eq!(hops(lab.client(), SIX), [HOST_LAN_V6, HOP_V6, GATEWAY_V6, SIX]);
        let said = ping(&lab.host, "192.0.2.1");
        assert!(said.stdout.contains(&format!("From {GATEWAY_V4}")), "{said:?}\n{}", program.output());
        assert!(!program.output().contains("CAP_NET_RAW"), "{}", program.output());
    });
}

#[test]
fn a_command_in_exec_pings_as_its_user_may() {
    run(&["ping", "traceroute"], || {
        let lab = Topology::with_lan();
        let _sites = Sites::open(&lab);
        let place = profile("'MATCH,DIRECT'");
        place.assert_encloses(&lab.host);
        for site in [FOUR, SIX, NAME] {
            let said = place.exec(&lab.host, "ping", &["-n", "-c", "1", "-W", "10", site]);
            assert!(ttl(&said).is_some(), "{said:?}");
        }
        let said = place.exec(&lab.host, "ping", &["-n", "-c", "1", "-W", "10", "192.0.2.1"]);
        assert!(said.stdout.contains(&format!("From {GATEWAY_V4}")), "{said:?}");
    });
}

/// An echo request of the host, as it comes to us.
fn echo_request(to: Ipv4Addr, id: u16) -> Vec<u8> {
    let mut packet = vec![0x45, 0, 0, 36, 0, 1, 0, 0, 64, 1, 0, 0, 198, 18, 0, 1];
    packet.extend(to.octets());
    packet.extend([8, 0, 0, 0]);
    packet.extend(id.to_be_bytes());
    packet.extend([0, 1]);
    packet.extend(*b"a flood!");
    seal_icmp(&mut packet);
    let words = packet[..20].chunks_exact(2).map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])));
    let sum = words.sum::<u32>();
    let sum = (sum & 0xffff) + (sum >> 16);
    packet[10..12].copy_from_slice(&(!(sum as u16)).to_be_bytes());
    packet
}

#[test]
fn ten_thousand_ids_at_once_are_bounded_and_the_next_ping_works() {
    run(&["ping", TUN], || {
        let lab = Topology::with_lan();
        let _sites = Sites::open(&lab);
        let tunproxy = profile("'MATCH,DIRECT'").start(&lab.host);
        tunproxy.assert_carries(&lab.host);
        let status = || -> serde_json::Value {
            serde_json::from_str(&tunproxy.place().ask(&lab.host, "status").stdout).expect("JSON")
        };
        let descriptors = || {
            let pid = status()["pid"].as_u64().expect("a number");
            std::fs::read_dir(format!("/proc/{pid}/fd")).expect("it runs").count()
        };
        assert!(ping(&lab.host, FOUR).succeeded() && ping(&lab.host, SIX).succeeded());
        let before = descriptors();
        for part in 0..10u16 {
            let ids = part * 1000..(part + 1) * 1000;
            let packets: Vec<_> =
                ids.map(|id| echo_request(Ipv4Addr::new(203, 0, 113, (id % 100) as u8), id)).collect();
            inject(&lab.host, "tunproxy0", &packets);
            assert!(ping(lab.client(), FOUR).succeeded(), "{}", tunproxy.output());
        }
        let flows = status()["flows"].clone();
        let number = |name: &str| flows[name].as_u64().expect("a number");
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get) as u64;
        let open = number("opened") - number("closed");
        assert!(number("opened") > 5000 && open <= 1024 * cores + 50, "{flows}");
        assert!(descriptors() <= before + 4 * cores as usize, "one pair of sockets for all");
        assert!(tunproxy.output().contains("evicted: too many echo flows"), "or there were none too many");
        assert!(ping(&lab.host, SIX).succeeded());
    });
}

/// What somebody on the internet sends to the host, as if `router` had sent it.
fn forged(router: Ipv4Addr, message: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x45, 0, 0, 0, 0, 0, 0, 0, 64, 1, 0, 0];
    packet.extend(router.octets());
    packet.extend(HOST_V4.parse::<Ipv4Addr>().expect("an address").octets());
    packet.extend(message);
    seal_icmp(&mut packet);
    packet
}

#[test]
fn forged_errors_and_replies_reach_nobody_unless_they_quote_what_was_sent() {
    run(&["ping", TUN], || {
        let lab = Topology::with_lan();
        let _sites = Sites::open(&lab);
        let tunproxy = profile("'MATCH,DIRECT'").start(&lab.host);
        tunproxy.assert_carries(&lab.host);
        let mut capture = Capture::start(&lab.host, "eth0");
        let speaks =
            lab.internet.enter(|| Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(libc::IPPROTO_RAW))));
        let speaks = speaks.expect("root opens raw sockets");
        let send = |packet: &[u8]| {
            let to: SocketAddr = format!("{HOST_V4}:0").parse().expect("an address");
            speaks.send_to(packet, &to.into()).expect("it leaves");
        };
        let (liar, honest) = (Ipv4Addr::new(203, 0, 113, 67), Ipv4Addr::new(203, 0, 113, 66));
        let words = ["-n", "-c", "3", "-i", "1", "-W", "2", BLACK_HOLE_V4];
        let said = std::thread::scope(|scope| {
            let pinging = scope.spawn(|| Said::of(lab.host.command("ping").args(words)));
            let find = || capture.packets().iter().find_map(|packet| request(packet, BLACK_HOLE_V4));
            let (sent, _) = poll_until(Duration::from_secs(10), find).expect("a request left");
            let error = |quoted: &[u8]| [&[11, 0, 0, 0, 0, 0, 0, 0][..], quoted].concat();
            let changed = |at: usize| {
                let mut quoted = sent.clone();
                quoted[at] ^= 0x55;
                error(&quoted)
            };
            // Another destination, another protocol, no request, another id, another number; and pieces of the right one.
            for at in [19, 9, 20, 24, 25, 26, 27] {
                send(&forged(liar, &changed(at)));
            }
            for length in 0..28 {
                send(&forged(liar, &error(&sent[..length])));
            }
            let mut damaged = forged(liar, &error(&sent));
            damaged[23] ^= 1;
            send(&damaged);
            // A reply of somebody else, and one with another id.
            let reply = [&[0, 0, 0, 0][..], &sent[24..]].concat();
            send(&forged(liar, &reply));
            let mut stranger = reply.clone();
            stranger[4] ^= 0x55;
            send(&forged(BLACK_HOLE_V4.parse().expect("an address"), &stranger));
            // What is right in all of this gets through: the rest would have been seen.
            send(&forged(honest, &error(&sent)));
            pinging.join().expect("no panic")
        });
        assert!(said.stdout.contains(&format!("From {honest} icmp_seq=1 Time to live exceeded")), "{said:?}");
        assert!(!said.stdout.contains(&liar.to_string()) && said.stdout.contains(" 0 received"), "{said:?}");
        assert!(!tunproxy.output().contains("panicked"), "{}", tunproxy.output());
    });
}
