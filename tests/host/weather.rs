//! Links that lose, repeat, reorder and delay: everything arrives whole, and nothing stalls.
//!
//! Between a LAN client and the host it is our TCP that has to cope; between the host and the internet it is the kernel's.

use std::time::{Duration, Instant};

use super::support::client::{act_in, acts_in};
use super::support::peers::digest::of_pattern;
use super::support::sites::{V4, V6};
use super::support::topology::HOST_LAN_V4;
use super::support::tunproxy::Place;
use super::support::weather::Weather;
use super::support::{Netns, Sites, Topology, run};

const TUN: &str = "/dev/net/tun";
/// Bytes of a transfer.
const BYTES: u64 = 1 << 20;

/// `cargo bench --bench throughput -- --only weather` measures many more.
const WEATHERS: [Weather; 3] = [
    Weather::with(0, 0, 0, Duration::from_millis(1)),
    Weather::with(100, 100, 2500, Duration::from_millis(1)),
    Weather::with(300, 0, 0, Duration::from_millis(20)),
];

fn profile() -> Place {
    Place::new(&format!(
        "
mode: rule
ipv6: true
log-level: info
tun: {{ enable: true, auto-route: true, dns-hijack: ['any:53'] }}
dns: {{ enable: true, listen: '{HOST_LAN_V4}:53', enhanced-mode: fake-ip, nameserver: [192.168.1.1] }}
rules: ['MATCH,DIRECT']
"
    ))
}

fn everything_arrives(lab_in: impl Fn(Weather) -> Topology, client: impl Fn(&Topology) -> Netns) {
    for weather in WEATHERS {
        let lab = lab_in(weather);
        let (_sites, ns) = (Sites::open(&lab), client(&lab));
        let tunproxy = profile().start(&lab.host);
        tunproxy.assert_carries(&ns);
        let words = ["up", "down"].map(|direction| format!("{direction} {V4}:9000 {BYTES}"));
        let words = [&words[..], &[format!("both {V6}:9000 {BYTES}")]].concat();
        for (words, outcome) in words.iter().zip(acts_in(words.iter().map(|words| (&ns, words.clone())))) {
            assert_eq!(outcome, Ok(of_pattern(BYTES)), "{words} {weather:?}\n{}", tunproxy.output());
        }
    }
}

#[test]
fn between_a_client_and_the_host_bad_weather_costs_time_and_no_byte() {
    run(&[TUN], || {
        everything_arrives(|weather| Topology::desktop().and_lan_in(weather), |lab| lab.client().clone());
    });
}

#[test]
fn between_the_host_and_the_internet_bad_weather_costs_time_and_no_byte() {
    run(&[TUN], || {
        everything_arrives(|weather| Topology::desktop_in(weather).and_lan(), |lab| lab.host.clone());
    });
}

#[test]
fn a_download_to_a_client_that_has_finished_is_repaired_in_round_trips_and_not_by_timeouts() {
    run(&[TUN], || {
        let lab = Topology::desktop().and_lan_in(Weather::with(300, 0, 0, Duration::from_millis(5)));
        let _sites = Sites::open(&lab);
        let tunproxy = profile().start(&lab.host);
        tunproxy.assert_carries(lab.client());
        for to in [V4, V6] {
            let began = Instant::now();
            let outcome = act_in(lab.client(), &format!("both {to}:9000 {}", 2 * BYTES));
            assert_eq!(outcome, Ok(of_pattern(2 * BYTES)), "{}", tunproxy.output());
            // Forty losses of a second each would be more than this; in fact it takes less than one second.
            assert!(began.elapsed() < Duration::from_secs(15), "{to}: {:?}", began.elapsed());
        }
    });
}
