//! Goodput over links that lose, repeat, reorder and delay frames, beside the kernel forwarding alone.
//!
//! Between a LAN client and the host it is our TCP that has to cope, between the host and the internet the kernel's.

use std::io::{self, Write};
use std::time::{Duration, Instant};

use super::support::client::act_in;
use super::support::peers::digest::of_pattern;
use super::support::sites::V4;
use super::support::topology::HOST_LAN_V4;
use super::support::tunproxy::Place;
use super::support::weather::Weather;
use super::support::{Netns, Sites, Topology};

/// Bytes of a transfer.
const BYTES: u64 = 4 << 20;

/// Loss, duplicates and reordering of ten thousand frames, and milliseconds of delay each way.
const WEATHERS: &[(u32, u32, u32, u64)] = &[
    (0, 0, 0, 1),
    (0, 0, 0, 20),
    (0, 0, 0, 100),
    (10, 0, 0, 1),
    (100, 0, 0, 1),
    (300, 0, 0, 1),
    (10, 0, 0, 20),
    (100, 0, 0, 20),
    (300, 0, 0, 20),
    (0, 0, 2500, 1),
    (0, 100, 0, 1),
    (100, 100, 2500, 20),
];

fn profile() -> Place {
    Place::new(&format!(
        "
mode: rule
log-level: warning
tun: {{ enable: true, auto-route: true, dns-hijack: ['any:53'] }}
dns: {{ enable: true, listen: '{HOST_LAN_V4}:53', enhanced-mode: fake-ip, nameserver: [192.168.1.1] }}
rules: ['MATCH,DIRECT']
"
    ))
}

/// Measures both places and prints a table for each, of the medians of so many rounds.
pub(crate) fn measure(rounds: u32) {
    compare(
        "between LAN client and host",
        rounds,
        |weather| Topology::desktop().and_lan_in(weather),
        |lab| lab.client().clone(),
    );
    let lab_in = |weather| Topology::desktop_in(weather).and_lan();
    compare("between host and internet", rounds, lab_in, |lab| lab.host.clone());
}

fn compare(place: &str, rounds: u32, lab_in: impl Fn(Weather) -> Topology, client: impl Fn(&Topology) -> Netns) {
    let mut stdout = io::stdout().lock();
    let head = "loss | twice | late | delay each way | up, kernel alone | up, tunproxy | | down, kernel alone | down, tunproxy | |";
    let _ = writeln!(stdout, "\n| {place}: {head}\n|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|");
    for (loss, twice, late, delay) in WEATHERS {
        let lab = lab_in(Weather::with(*loss, *twice, *late, Duration::from_millis(*delay)));
        let (_sites, ns) = (Sites::open(&lab), client(&lab));
        let alone = ["up", "down"].map(|direction| median(rounds, || goodput(&ns, direction)));
        let tunproxy = profile().start(&lab.host);
        tunproxy.assert_carries(&ns);
        let ours = ["up", "down"].map(|direction| median(rounds, || goodput(&ns, direction)));
        let percent = |of_ten_thousand: &u32| f64::from(*of_ten_thousand) / 100.0;
        let rates = [0, 1].map(|way| format!("{:.1} | {:.1} | {:.2}", alone[way], ours[way], ours[way] / alone[way]));
        let (loss, twice, late) = (percent(loss), percent(twice), percent(late));
        let _ = writeln!(stdout, "| {loss} % | {twice} % | {late} % | {delay} ms | {} |", rates.join(" | "));
        let _ = stdout.flush();
    }
}

fn median(rounds: u32, measure: impl Fn() -> f64) -> f64 {
    let mut measured: Vec<f64> = (0..rounds).map(|_| measure()).collect();
    measured.sort_by(f64::total_cmp);
    measured[measured.len() / 2]
}

/// Megabits a second of a transfer, whose bytes must be right.
fn goodput(ns: &Netns, direction: &str) -> f64 {
    let started = Instant::now();
    let outcome = act_in(ns, &format!("{direction} {V4}:9000 {BYTES}"));
    assert_eq!(outcome, Ok(of_pattern(BYTES)), "{direction} from {}", ns.name());
    BYTES as f64 * 8e-6 / started.elapsed().as_secs_f64()
}
