//! The program with nothing to do, and how long it takes to start.

use std::thread;
use std::time::Duration;

use super::lab::Lab;
use super::table::{Report, median};

/// How long wake-ups are counted.
const WATCH: Duration = Duration::from_secs(10);
/// Starts that are timed, beside those for the other workloads.
const STARTS: usize = 5;

pub(crate) fn measure(lab: &Lab, report: &mut Report) {
    for _ in 0..STARTS {
        lab.start().stop();
    }
    let running = lab.start();
    thread::sleep(Duration::from_secs(1));
    let before = running.process.wakeups();
    thread::sleep(WATCH);
    let wakeups = (running.process.wakeups() - before) as f64 / WATCH.as_secs_f64();
    let resident = running.process.resident() as f64 / 1e6;
    running.stop();
    let starts = lab.starts.borrow();
    report.row("idle process: resident memory", "", &format!("{resident:.1} MB"), "≤ 15 MB");
    report.row("… wake-ups", "", &format!("{wakeups:.1}/s"), "≤ 5/s");
    report.row(
        &format!("from the start of the process to `ready` ({} starts)", starts.len()),
        "",
        &format!("{:.0} ms", median(&starts)),
        "≤ 100 ms",
    );
}
