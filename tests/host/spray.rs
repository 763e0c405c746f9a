//! One client of a gateway that takes whatever it gets, of what costs others most: new ports, and new names.

use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};
use std::time::{Duration, Instant};

use super::fairness::second;
use super::support::client::act_in;
use super::support::program::PATIENCE;
use super::support::sites::V4;
use super::support::tunproxy::{Place, Tunproxy};
use super::support::{Netns, Sites, Topology, forged, packet, run, world};

const TUN: &str = "/dev/net/tun";
/// Each from a port of its own; a tenth of that is what a busy client may do.
const DATAGRAMS_A_SECOND: f64 = 6000.0;
/// So many were sent when the others begin: more than a client may do all at once.
const BEFORE_OTHERS: u32 = 12_000;

fn start(lab: &Topology, keys: &str) -> Tunproxy {
    let profile = format!(
        "
mode: rule
log-level: warning
memory-limit: 64MB
tun: {{ enable: true, auto-route: true, dns-hijack: ['any:53'] }}
dns: {{ enable: true, enhanced-mode: fake-ip, nameserver: [192.168.1.1]{keys} }}
rules: ['MATCH,DIRECT']
"
    );
    Place::new(&profile).start(&lab.host)
}

/// The LAN client `10.7.0.2` sends datagrams while `act` is under way. Returns what it returns, and how many were sent.
fn beside_a_flood<T>(lab: &Topology, datagram: impl Fn(u32) -> Vec<u8> + Sync, act: impl FnOnce() -> T) -> (T, u32) {
    let (stop, sent) = (AtomicBool::new(false), AtomicU32::new(0));
    let spray = || {
        let started = Instant::now();
        while !stop.load(Relaxed) {
            let (from, due) = (sent.load(Relaxed), (started.elapsed().as_secs_f64() * DATAGRAMS_A_SECOND) as u32);
            if from < due {
                packet::inject(lab.client(), "eth0", &forged::frames(lab, (from..due).map(&datagram)));
                sent.store(due, Relaxed);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(spray);
        // It has gone on for a while when the others begin.
        let goes_on = || (sent.load(Relaxed) >= BEFORE_OTHERS).then_some(());
        assert!(world::poll_until(PATIENCE, goes_on).is_some(), "only {} were sent", sent.load(Relaxed));
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(act));
        stop.store(true, Relaxed);
        let outcome = outcome.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        (outcome, sent.load(Relaxed))
    })
}

#[test]
fn a_client_that_sprays_datagrams_from_ever_new_ports_takes_nothing_from_the_others() {
    run(&[TUN], || {
        let lab = Topology::with_lan();
        let _sites = Sites::open(&lab);
        let modest = second(&lab);
        let tunproxy = start(&lab, "");
        tunproxy.assert_carries(&lab.host);
        let greedy: Ipv4Addr = "10.7.0.2".parse().expect("an address");
        let datagram = |n: u32| {
            let to = Ipv4Addr::from(0xcb00_0000 | n.wrapping_mul(0x9e37_79b9) >> 16 | 1);
            let payload = forged::udp(greedy, to, 1024 + (n % 64_000) as u16, 2000 + (n % 60_000) as u16, b"spray");
            forged::ipv4(greedy, to, packet::protocol::UDP, &payload)
        };
        let ask = |ns: &Netns, act: String| (act_in(ns, &act).is_ok(), act);
        let ask_all = || {
            let of_each = (0..6).flat_map(|round| {
                [(&modest, "modest"), (&lab.host, "host")].into_iter().flat_map(move |(ns, name)| {
                    let acts =
                        [format!("ask {V4}:7 x"), format!("datagram {V4}:7 x 3"), format!("lookup {name}{round}.test")];
                    acts.map(|act| ask(ns, act))
                })
            });
            of_each.collect::<Vec<_>>()
        };
        let (outcomes, sent) = beside_a_flood(&lab, datagram, ask_all);
        let failed: Vec<_> = outcomes.iter().filter(|(done, _)| !done).collect();
        let held_back = tunproxy.counted(&lab.host, &["flows", "held_back"]);
        // A datagram may be lost on a machine on which much else is going on.
        let said = tunproxy.output();
        assert!(failed.len() <= 4, "{held_back} of {sent} held back, and these failed: {failed:?}\n{said}");
        let told = said.matches("10.7.0.2 sends datagrams to new peers faster").count();
        assert_eq!(told, usize::from(held_back > 0), "{held_back}\n{said}");
    });
}

/// A question for the address of a name that nobody has asked for.
fn question(n: u32) -> Vec<u8> {
    let name = format!("{n:010}");
    let label = [&[name.len() as u8][..], name.as_bytes(), &[4], b"test", &[0, 0, 1, 0, 1]].concat();
    [&[0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0][..], &label].concat()
}

#[test]
fn a_client_that_asks_for_ever_new_names_leaves_addresses_to_the_others_and_to_the_next_run() {
    run(&[TUN], || {
        let lab = Topology::with_lan();
        let _sites = Sites::open(&lab);
        let modest = second(&lab);
        let tunproxy = start(&lab, ", fake-ip-range: 198.18.0.1/22");
        let greedy: Ipv4Addr = "10.7.0.2".parse().expect("an address");
        let datagram = |n: u32| {
            let to = Ipv4Addr::new(9, 9, 9, 9);
            let payload = forged::udp(greedy, to, 1024 + (n % 64_000) as u16, 53, &question(n));
            forged::ipv4(greedy, to, packet::protocol::UDP, &payload)
        };
        let ask_all = |tunproxy: &Tunproxy, when: &str| {
            for round in 0..10 {
                for (ns, name) in [(&modest, "modest"), (&lab.host, "host")] {
                    let found = act_in(ns, &format!("lookup {when}{name}{round}.test"));
                    let is_fake = found.as_ref().is_ok_and(|ip| ip.starts_with("198.18."));
                    assert!(is_fake, "{when} {round}: {found:?}\n{}", tunproxy.output());
                }
            }
        };
        let (seen, _) = beside_a_flood(&lab, datagram, || {
            ask_all(&tunproxy, "early");
            act_in(&modest, "lookup kept.test")
        });
        // 1019 addresses, of which one client has seven eighths at most.
        assert!(tunproxy.counted(&lab.host, &["dns", "exhausted"]) > 1000, "{}", tunproxy.output());
        assert!((800..=960).contains(&tunproxy.counted(&lab.host, &["fake_addresses"])), "{}", tunproxy.output());
        assert_eq!(tunproxy.output().matches("10.7.0.2 asks for so many names").count(), 1);
        let tunproxy = tunproxy.kill().start(&lab.host);
        ask_all(&tunproxy, "late");
        assert_eq!(act_in(&modest, "lookup kept.test"), seen);
    });
}
