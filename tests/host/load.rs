//! Load and time: what many flows leave behind, what floods cost, and what is spent when nothing happens.

use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use super::support::client::{Session, act_in};
use super::support::lengths::asked;
use super::support::peers::digest::of_pattern;
use super::support::program::PATIENCE;
use super::support::sites::{V4, V6};
use super::support::topology::HOST_LAN_V4;
use super::support::tunproxy::{Place, Tunproxy};
use super::support::world::poll_until;
use super::support::{Netns, Sites, Topology, forged, packet, run};

const TUN: &str = "/dev/net/tun";
const MEGABYTE: u64 = 1 << 20;
/// Set to the number of connections and of datagrams' sockets to churn through instead of what a CI run can hold.
const CHURN: &str = "TUNPROXY_CHURN";
/// Set to the number of bytes of one long transfer.
const BULK: &str = "TUNPROXY_BULK_BYTES";

fn start(lab: &Topology, keys: &str) -> Tunproxy {
    let profile = format!(
        "
mode: rule
ipv6: true
log-level: warning
{keys}
tun: {{ enable: true, auto-route: true, dns-hijack: ['any:53'], udp-timeout: 2 }}
dns: {{ enable: true, listen: '{HOST_LAN_V4}:53', enhanced-mode: fake-ip, nameserver: [192.168.1.1] }}
rules: ['MATCH,DIRECT']
"
    );
    let tunproxy = Place::new(&profile).start(&lab.host);
    tunproxy.assert_carries(&lab.host);
    tunproxy
}

fn session(ns: &Netns, to: &str) -> Session {
    Session::open(ns, "0.0.0.0:0".parse().expect("an address"), to.parse().expect("an address"))
}

#[test]
fn an_idle_run_hardly_ever_wakes_up() {
    run(&[TUN], || {
        let lab = Topology::with_lan();
        let _sites = Sites::open(&lab);
        let tunproxy = start(&lab, "");
        let mut open: Vec<_> = (0..20).map(|_| session(&lab.host, &format!("{V4}:7"))).collect();
        open.iter_mut().for_each(|session| drop(session.alive()));
        // Flows that have moved data give their pages back after five seconds; then there is nothing left to do.
        let quiet = poll_until(PATIENCE, || {
            let before = tunproxy.wakeups();
            std::thread::sleep(Duration::from_secs(3));
            let woken = tunproxy.wakeups() - before;
            // At most five a second.
            (woken <= 15).then_some(woken)
        });
        assert!(quiet.is_some(), "{}", tunproxy.output());
        for session in &mut open {
            assert_eq!(session.alive().map(drop), Ok(()));
        }
    });
}

#[test]
fn churn_leaves_nothing_behind() {
    run(&[TUN], || {
        let lab = Topology::with_lan();
        let _sites = Sites::open(&lab);
        let tunproxy = start(&lab, "");
        let (flows, sockets) = (asked(CHURN, 20_000), asked(CHURN, 5000));
        let long = flows != 20_000;
        if long {
            // The firewall's memory of connections that have ended holds 262 144 of them, for two minutes each.
            for (state, seconds) in [("time_wait", "3"), ("last_ack", "3"), ("close", "3")] {
                lab.host.sysctl(&format!("net.netfilter.nf_conntrack_tcp_timeout_{state}"), seconds);
            }
            lab.host.sysctl("net.netfilter.nf_conntrack_udp_timeout", "5");
            lab.host.sysctl("net.netfilter.nf_conntrack_udp_timeout_stream", "5");
        }
        let servers: Vec<String> = (7001..=7008).map(|port| format!("{V4}:{port}")).collect();
        let round = |flows: usize, sockets: usize| {
            let words = format!("churn {flows} 64 {}", servers.join(" "));
            assert_eq!(act_in(&lab.host, &words), Ok(flows.to_string()), "{}", tunproxy.output());
            let words = format!("sprinkle {sockets} 64 {V4}:7");
            assert_eq!(act_in(&lab.host, &words), Ok(sockets.to_string()), "{}", tunproxy.output());
            let ended = || (tunproxy.counted(&lab.host, &["flows", "associations"]) == 0).then_some(());
            assert!(poll_until(PATIENCE, ended).is_some(), "associations end when they are idle");
            tunproxy.resident()
        };
        round(10_000, 3000);
        let mut seen = vec![round(flows / 4, sockets / 4)];
        // The slope over what follows: one measurement alone would be at the mercy of the allocator.
        seen.extend((0..3).map(|_| round(flows / 4, sockets / 4)));
        let growth = seen.last().copied().unwrap_or_default().saturating_sub(seen[0]);
        assert!(growth <= MEGABYTE, "resident memory after each quarter: {seen:?}");
        if long {
            // Nobody sees what a test that passes has printed.
            let _ = std::fs::write(std::env::temp_dir().join("tunproxy-churn.txt"), format!("{flows}: {seen:?}\n"));
        }
    });
}

/// Sequence numbers wrap after 4 GiB at the latest: set the variable to 8589934592 for that.
#[test]
fn a_long_transfer_arrives_whole_both_ways() {
    run(&[TUN], || {
        let lab = Topology::with_lan();
        let _sites = Sites::open(&lab);
        let tunproxy = start(&lab, "");
        let bytes: u64 = asked(BULK, 256 << 20);
        for direction in ["up", "down"] {
            let outcome = act_in(&lab.host, &format!("{direction} {V4}:9000 {bytes}"));
            assert_eq!(outcome, Ok(of_pattern(bytes)), "{direction}\n{}", tunproxy.output());
        }
    });
}

#[test]
fn greedy_flows_stay_below_the_memory_limit() {
    run(&[TUN], || {
        let lab = Topology::with_lan();
        let _sites = Sites::open(&lab);
        let (limit, slack) = (32 * MEGABYTE, 16 * MEGABYTE);
        let tunproxy = start(&lab, "memory-limit: 1GB");
        let grown = growth_by_greed(&lab, &tunproxy);
        assert!(grown > limit + slack, "nothing is shown by {} MB", grown / MEGABYTE);
        drop(tunproxy.kill());
        let tunproxy = start(&lab, "memory-limit: 32MB");
        let grown = growth_by_greed(&lab, &tunproxy);
        let said = || format!("{} MB more\n{}", grown / MEGABYTE, tunproxy.output());
        assert!(grown <= limit + slack, "{}", said());
        assert!(tunproxy.output().contains("memory-limit is reached"), "{}", said());
        assert_eq!(act_in(&lab.host, &format!("both {V4}:9000 3000000")).map(drop), Ok(()), "{}", said());
    });
}

/// By how many bytes resident memory grows while two thousand clients ask for much and read nothing: what comes stays
/// with us as long as it may. Others are served meanwhile.
fn growth_by_greed(lab: &Topology, tunproxy: &Tunproxy) -> u64 {
    let (base, host) = (tunproxy.resident(), lab.host.clone());
    let asking = std::thread::spawn(move || act_in(&host, &format!("greedy 2000 {V4}:9000")));
    let (mut most, mut served, mut slowest) = (base, 0, Duration::ZERO);
    while !asking.is_finished() {
        most = most.max(tunproxy.resident());
        let started = Instant::now();
        // Where memory is short a newcomer may have to try again, as any program would.
        let ask = || act_in(&lab.host, &format!("ask {V4}:7 x")).ok();
        assert_eq!(poll_until(PATIENCE, ask), Some("x".to_owned()), "{}", tunproxy.output());
        slowest = slowest.max(started.elapsed());
        served += 1;
    }
    assert_eq!(asking.join().expect("no panic"), Ok("2000".to_owned()), "{}", tunproxy.output());
    assert!(served > 2, "{served}, {slowest:?} the slowest\n{}", tunproxy.output());
    most - base
}

#[test]
fn a_hundred_thousand_forged_syns_and_datagrams_cost_little_and_harm_nobody() {
    run(&[TUN], || {
        let lab = Topology::with_lan();
        let _sites = Sites::open(&lab);
        let tunproxy = start(&lab, "memory-limit: 64MB");
        let mut open: Vec<_> =
            [&lab.host, lab.client()].map(|ns| session(ns, &format!("{V4}:7"))).into_iter().collect();
        open.iter_mut().for_each(|session| drop(session.alive()));
        let before = (tunproxy.resident(), tunproxy.descriptors());
        let site: Ipv4Addr = V4.parse().expect("an address");
        let source = |n: u32| Ipv4Addr::from(0x0a07_0000 + 3 + n % 65_000);
        // To a port that is open, to one that is closed, and to nowhere.
        let syn = |n: u32| {
            let mut tcp = vec![0; 20];
            tcp[..2].copy_from_slice(&(1024 + (n / 65_000) as u16).to_be_bytes());
            tcp[2..4].copy_from_slice(&[7_u16, 81, 9000][n as usize % 3].to_be_bytes());
            tcp[4..8].copy_from_slice(&n.to_be_bytes());
            (tcp[12], tcp[13], tcp[14]) = (5 << 4, 2, 64);
            forged::ipv4(source(n), site, packet::protocol::TCP, &tcp)
        };
        let datagram = |n: u32| {
            let from = source(n / 60_000);
            let payload = forged::udp(from, site, 1024 + (n % 60_000) as u16, 7, &[b'f'; 16]);
            forged::ipv4(from, site, packet::protocol::UDP, &payload)
        };
        let started = Instant::now();
        for part in 0..10_u32 {
            let numbers = || part * 10_000..(part + 1) * 10_000;
            packet::inject(lab.client(), "eth0", &forged::frames(&lab, numbers().map(syn)));
            packet::inject(lab.client(), "eth0", &forged::frames(&lab, numbers().map(datagram)));
            for session in &mut open {
                assert_eq!(session.alive().map(drop), Ok(()), "{}", tunproxy.output());
            }
        }
        let grown = tunproxy.resident().saturating_sub(before.0);
        let said = || format!("{} MB more after {:?}\n{}", grown / MEGABYTE, started.elapsed(), tunproxy.output());
        assert!(grown <= 64 * MEGABYTE + 16 * MEGABYTE, "{}", said());
        for ns in [&lab.host, lab.client()] {
            for site in [V4, V6] {
                assert_eq!(
                    act_in(ns, &format!("ask {site}:7 x")),
                    Ok("x".to_owned()),
                    "{} {site}\n{}",
                    ns.name(),
                    said()
                );
            }
        }
        // Handshakes that nobody completes end after 20 s, datagrams' flows after two: all of it goes.
        let descriptors = before.1 + 64;
        let gone = || (tunproxy.descriptors() <= descriptors).then_some(());
        assert!(poll_until(2 * PATIENCE, gone).is_some(), "{} descriptors\n{}", tunproxy.descriptors(), said());
    });
}

/// Opens a connection, says a line in it and hears it back.
fn opened(ns: &Netns, number: usize, said: impl Fn() -> String) -> Session {
    let mut opened = session(ns, &format!("{V4}:7"));
    assert_eq!(opened.alive().map(drop), Ok(()), "connection {number}\n{}", said());
    opened
}

#[test]
fn few_descriptors_go_from_the_connections_idle_longest_to_new_ones_and_those_that_talk_stay() {
    run(&[TUN, "prlimit"], || {
        let lab = Topology::with_lan();
        let _sites = Sites::open(&lab);
        let tunproxy = start(&lab, "");
        tunproxy.limit_descriptors(&lab.host, 256);
        let said = || tunproxy.output();
        let mut talking = opened(&lab.host, 0, said);
        let talk = |talking: &mut Session| assert_eq!(talking.alive().map(drop), Ok(()), "it talks on\n{}", said());
        let (mut idle, mut slowest) = (Vec::new(), Duration::ZERO);
        for number in 1..=600 {
            // One that waits for a descriptor does so until the stalest of the others has paused long enough.
            let stop = AtomicBool::new(false);
            idle.push(std::thread::scope(|scope| {
                let beside = scope.spawn(|| {
                    while !stop.load(Relaxed) {
                        talk(&mut talking);
                        std::thread::sleep(Duration::from_millis(20));
                    }
                });
                let begun = Instant::now();
                let new = opened(&lab.host, number, said);
                slowest = slowest.max(begun.elapsed());
                stop.store(true, Relaxed);
                beside.join().expect("it talks on");
                new
            }));
        }
        talk(&mut talking);
        // Until one of the others counts as idle it would be more than four seconds.
        assert!(slowest < Duration::from_secs(3), "{slowest:?}\n{}", said());
        let evicted = tunproxy.counted(&lab.host, &["flows", "evicted"]);
        assert!((350..600).contains(&evicted), "{evicted}\n{}", said());
        let ends: Vec<_> = idle.iter_mut().map(|session| session.alive().map(drop)).collect();
        let reset = ends.iter().filter(|end| **end == Err("ECONNRESET".to_owned())).count();
        assert_eq!(reset as u64, evicted, "{ends:?}");
        assert!(ends[..200].iter().all(Result::is_err), "the oldest went: {ends:?}");
        assert!(ends[500..].iter().all(Result::is_ok), "the newest are there: {ends:?}");
        let warnings = said().matches("no file descriptors are left: 256 is the limit").count();
        assert!((1..=2).contains(&warnings), "{warnings}\n{}", said());
    });
}

#[test]
fn few_descriptors_are_shared_among_thousands_of_flows_and_names_are_answered_at_once() {
    run(&[TUN, "prlimit"], || {
        let lab = Topology::with_lan();
        let _sites = Sites::open(&lab);
        let tunproxy = start(&lab, "");
        tunproxy.limit_descriptors(&lab.host, 1024);
        let baseline = tunproxy.descriptors();
        let mut slowest = Duration::ZERO;
        let mut answered = |ns: &Netns, name: &str| {
            // The best of ten: what others do on the machine is not ours.
            let ask = |_| {
                let started = Instant::now();
                let outcome = act_in(ns, &format!("lookup {name}"));
                assert!(outcome.as_ref().is_ok_and(|ip| ip.starts_with("198.18.")), "{name}: {outcome:?}");
                started.elapsed()
            };
            slowest = slowest.max((0..10).map(ask).min().unwrap_or_default());
        };
        for round in 0..4 {
            assert_eq!(act_in(&lab.host, &format!("datagrams 1500 {V4}:7")), Ok("1500".to_owned()));
            answered(lab.client(), &format!("n{round}.example.test"));
            // More connections at once than there are descriptors: some are refused for the moment, none hangs.
            let outcome = act_in(&lab.host, &format!("crowd 1500 {V4}:7"));
            let served = outcome.as_ref().ok().and_then(|many| many.parse::<usize>().ok());
            assert!(served.is_some_and(|many| many >= 200), "{outcome:?}");
            answered(lab.client(), &format!("m{round}.example.test"));
            assert_eq!(
                act_in(&lab.host, &format!("churn 500 16 {V4}:7")),
                Ok("500".to_owned()),
                "{}",
                tunproxy.output()
            );
        }
        assert!(slowest < Duration::from_millis(50), "{slowest:?}");
        let back = || (tunproxy.descriptors() <= baseline + 4).then_some(());
        assert!(poll_until(2 * PATIENCE, back).is_some(), "{} of {baseline}", tunproxy.descriptors());
    });
}
