//! Ten thousand flows that have moved data and now say nothing, and a new flow beside them.

use std::thread;
use std::time::{Duration, Instant};

use super::connect::{latency, open};
use super::lab::Lab;
use super::table::Report;

const FLOWS: usize = 10_000;
/// Moved by each flow, both ways, before it falls silent.
const BYTES: usize = 16 << 10;
/// New flows whose time is taken.
const PROBES: usize = 200;
/// Idle flows give their memory back after some seconds.
const SETTLE: Duration = Duration::from_secs(8);
/// How long wake-ups are counted.
const WATCH: Duration = Duration::from_secs(5);

pub(crate) fn measure(lab: &Lab, report: &mut Report) {
    let host = &lab.topology.host;
    let by_kernel = latency(host, PROBES);
    let running = lab.start();
    let process = running.process;
    let alone_before = latency(host, PROBES);
    let empty = process.resident();
    let carried = running.carried();
    let opening = Instant::now();
    let flows = open(host, FLOWS, BYTES);
    let bytes = (FLOWS * BYTES) as u64;
    running.assert_carried(carried, FLOWS as u64, bytes, bytes);
    super::say(&format!("{} idle flows, open after {:.1} s", flows.len(), opening.elapsed().as_secs_f64()));
    thread::sleep(SETTLE);
    let each = process.resident().saturating_sub(empty) as f64 / FLOWS as f64;
    let before = process.wakeups();
    thread::sleep(WATCH);
    let wakeups = (process.wakeups() - before) as f64 / WATCH.as_secs_f64();
    let beside = latency(host, PROBES);
    drop(flows);
    thread::sleep(Duration::from_secs(1));
    let alone_after = latency(host, PROBES);
    running.stop();
    let alone = f64::midpoint(alone_before, alone_after);
    report.row(
        "10 000 idle flows that have moved data: resident memory of each",
        "",
        &format!("{:.1} KB", each / 1e3),
        "≤ 8 KB",
    );
    report.row("… wake-ups", "", &format!("{wakeups:.1}/s"), "none");
    report.row(
        "… a new flow beside them (and alone, before and after)",
        &format!("{by_kernel:.2} ms"),
        &format!("{beside:.2} ms ({alone_before:.2}, {alone_after:.2}): {:.2}", beside / alone),
        "≤ 1.1 of alone",
    );
}
