//! Fake-IP answers: queries for A records that any resolver is asked and we answer.

use std::time::Duration;

use super::flood::{self, Flood};
use super::lab::Lab;
use super::support::Netns;
use super::table::Report;

/// A second.
const RATE: u64 = 50_000;
/// Names asked for in turn; after the first time round each has its address.
const NAMES: u64 = 4_000;
const LENGTH: Duration = Duration::from_secs(3);

pub(crate) fn measure(lab: &Lab, report: &mut Report) {
    let host = &lab.topology.host;
    let running = lab.start();
    // The first time round is slower: each name gets its address, which is logged.
    let first = ask(host, RATE / 5, Duration::from_secs_f64(NAMES as f64 / (RATE / 5) as f64));
    let before = running.process.cpu();
    let outcome = ask(host, RATE, LENGTH);
    let cpu = (running.process.cpu() - before) * 1e6 / outcome.answered as f64;
    running.stop();
    super::say(&format!("fake-IP answers: new names {first:?}, known ones {outcome:?}"));
    // Without the program nobody answers there, so an answer is the proof that it came from us.
    assert!(outcome.answered > 0, "no answers: {outcome:?}");
    report.row(
        &format!("fake-IP answers at {:.0}/s, {NAMES} names in turn: CPU of tunproxy for each", outcome.rate),
        "",
        &format!("{cpu:.1} µs"),
        "≤ 10 µs",
    );
    report.row("… without an answer", "", &format!("{:.2} %", 100.0 * outcome.loss()), "");
}

fn ask(host: &Netns, per_second: u64, length: Duration) -> flood::Outcome {
    let payloads = (0..NAMES).map(query).collect();
    flood::run(host, Flood { payloads, to: Lab::resolver().parse().expect("an address"), per_second, length })
}

/// A query for the address of a name like `n0042.bench.example` (RFC 1035, section 4).
fn query(number: u64) -> Vec<u8> {
    let mut message = Vec::with_capacity(48);
    message.extend_from_slice(&(number as u16).to_be_bytes());
    // Recursion desired; one question.
    message.extend_from_slice(&[1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    for label in [format!("n{number:04}").as_str(), "bench", "example"] {
        message.push(label.len() as u8);
        message.extend_from_slice(label.as_bytes());
    }
    // The root, type A, class IN.
    message.extend_from_slice(&[0, 0, 1, 0, 1]);
    message
}
