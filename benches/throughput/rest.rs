//! The program with nothing to do, and how long it takes to start.

use std::process::Command;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::lab::Lab;
use super::support::program;
use super::table::{Report, median};

/// How long wake-ups are counted.
const WATCH: Duration = Duration::from_secs(10);
/// Starts that are timed, beside those for the other workloads.
const STARTS: usize = 5;

/// Programs that are started behind `exec`, and bare.
const PROGRAMS: usize = 20;

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
    let [bare, behind] = starts_of_a_program(lab);
    let added = [behind.0 - bare.0, behind.1 - bare.1];
    report.row(
        &format!("`exec`: from its start to that of the program ({PROGRAMS} in turn)"),
        &format!("{:.1} ms", bare.0),
        &format!("{:.1} ms: {:.1} more", behind.0, added[0]),
        "≤ 50 ms more",
    );
    report.row(
        "… to the end of a program that does nothing",
        &format!("{:.1} ms", bare.1),
        &format!("{:.1} ms: {:.1} more", behind.1, added[1]),
        "",
    );
}

/// Milliseconds from before a program was started to when it ran and to its end, medians: bare, and behind `exec`.
fn starts_of_a_program(lab: &Lab) -> [(f64, f64); 2] {
    let host = &lab.topology.host;
    let mut times = [(Vec::new(), Vec::new()), (Vec::new(), Vec::new())];
    for _ in 0..PROGRAMS {
        for (command, (starts, ends)) in [host.command("date"), lab.exec()].into_iter().zip(&mut times) {
            let (start, end) = time(command);
            starts.push(start);
            ends.push(end);
        }
    }
    times.map(|(starts, ends)| (median(&starts), median(&ends)))
}

/// Runs a program that says when it runs.
fn time(mut command: Command) -> (f64, f64) {
    let (clock, before) = (SystemTime::now().duration_since(UNIX_EPOCH), Instant::now());
    let output = program::output(command.arg("+%s%N"));
    let end = before.elapsed().as_secs_f64() * 1e3;
    let said = String::from_utf8_lossy(&output.stdout).trim().parse::<u64>().expect("nanoseconds");
    let start = Duration::from_nanos(said).saturating_sub(clock.expect("a clock that is set"));
    (start.as_secs_f64() * 1e3, end)
}
