//! UDP echo: the highest rate at which every datagram comes back.

use std::net::SocketAddr;
use std::time::Duration;

use super::flood::{self, Flood};
use super::lab::{Lab, Running, SERVER_V4};
use super::peer::UDP_PORT;
use super::table::{Report, median};

/// Bytes of a datagram.
const SIZE: usize = 1200;
/// Length of one attempt.
const ATTEMPT: Duration = Duration::from_millis(400);
/// Rates that are tried: each is a tenth above the one before.
const STEP: f64 = 1.1;
const LOWEST: f64 = 5_000.0;
const STEPS: u32 = 45;
/// So much may be missing for a rate to count as without loss: the machine has other things to do at times.
const TOLERATED: f64 = 0.001;
/// A client that cannot send this share of what is asked has found its own limit.
const KEPT_UP: f64 = 0.97;

pub(crate) fn measure(lab: &Lab, rounds: u32, report: &mut Report) {
    let pairs: Vec<(f64, f64)> = (1..=rounds)
        .map(|round| {
            let kernel = highest(lab, None);
            let running = lab.start();
            let ours = highest(lab, Some(&running));
            running.stop();
            super::say(&format!("UDP echo, round {round}: {kernel:.0}/s and {ours:.0}/s"));
            (kernel, ours)
        })
        .collect();
    let of = |what: fn(&(f64, f64)) -> f64| median(&pairs.iter().map(what).collect::<Vec<_>>());
    report.row(
        &format!("UDP echo of {SIZE} B, one source: highest rate without loss (at most 1 in 1000)"),
        &format!("{:.0}/s", of(|(kernel, _)| *kernel)),
        &format!("{:.0}/s: {:.2}", of(|(_, ours)| *ours), of(|(kernel, ours)| ours / kernel)),
        "≥ 0.5 of the kernel",
    );
}

/// Halves the range of rates until it is one step wide.
fn highest(lab: &Lab, through: Option<&Running>) -> f64 {
    let rate = |step: u32| LOWEST * STEP.powf(f64::from(step));
    let (mut good, mut bad) = (0, STEPS);
    while bad - good > 1 {
        let middle = u32::midpoint(good, bad);
        // A second attempt: what others do on the machine is no limit of ours.
        if (0..2).any(|_| is_carried(lab, rate(middle), through)) {
            good = middle;
        } else {
            bad = middle;
        }
    }
    if good == 0 { 0.0 } else { rate(good) }
}

fn is_carried(lab: &Lab, per_second: f64, through: Option<&Running>) -> bool {
    let to = SocketAddr::new(SERVER_V4.parse().expect("an address"), UDP_PORT);
    let carried = through.map(Running::carried).unwrap_or_default();
    let flood = Flood { payloads: vec![vec![7; SIZE]], to, per_second: per_second as u64, length: ATTEMPT };
    let outcome = flood::run(&lab.topology.host, flood);
    if let Some(running) = through {
        let bytes = outcome.answered * SIZE as u64;
        running.assert_carried(carried, 1, bytes, bytes);
    }
    outcome.loss() <= TOLERATED && outcome.rate >= per_second * KEPT_UP
}
