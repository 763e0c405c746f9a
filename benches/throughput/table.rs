//! Medians, and the Markdown that comes out.

use std::fmt::Write as _;
use std::time::Duration;

use super::process;

/// Rows as they come in.
#[derive(Default)]
pub(crate) struct Report {
    bulk: Vec<Bulk>,
    rest: Vec<Row>,
    /// Shares of the machine, per round, that neither the workload nor the program used.
    pub(crate) elsewhere: Vec<f64>,
}

/// One bulk workload; rates in Gbit/s, CPU in seconds per GB.
pub(crate) struct Bulk {
    pub(crate) name: String,
    pub(crate) kernel_rate: f64,
    pub(crate) relay_rate: f64,
    pub(crate) rate: f64,
    pub(crate) ratio: f64,
    pub(crate) ratio_goal: f64,
    pub(crate) relay_cpu: f64,
    pub(crate) proxy_cpu: f64,
    pub(crate) cpu_goal: Option<f64>,
    pub(crate) kernel_machine: f64,
    pub(crate) machine: f64,
}

/// Anything else: what it was for the kernel alone if that makes sense, what it is through us, and the goal.
struct Row {
    name: String,
    kernel: String,
    ours: String,
    goal: String,
}

impl Report {
    pub(crate) fn bulk(&mut self, row: Bulk) {
        self.bulk.push(row);
    }

    pub(crate) fn row(&mut self, name: &str, kernel: &str, ours: &str, goal: &str) {
        let [name, kernel, ours, goal] = [name, kernel, ours, goal].map(str::to_owned);
        self.rest.push(Row { name, kernel, ours, goal });
    }

    /// The whole table, with what it was made by.
    pub(crate) fn markdown(&self, congestion: &str, rounds: u32, seconds: u32, took: Duration) -> String {
        let mut text = String::new();
        // Writing to a string cannot fail.
        let _ = self.write(&mut text, congestion, rounds, seconds, took);
        text
    }

    fn write(
        &self,
        text: &mut String,
        congestion: &str,
        rounds: u32,
        seconds: u32,
        took: Duration,
    ) -> std::fmt::Result {
        writeln!(
            text,
            "{} processors, {}, TCP {congestion}; {rounds} rounds, bulk transfers of {seconds} s; the run took {} s.",
            process::processors(),
            kernel(),
            took.as_secs()
        )?;
        if !self.elsewhere.is_empty() {
            let share = 100.0 * median(&self.elsewhere);
            writeln!(text, "Other programs of the machine used {share:.0} % of its CPU time meanwhile (median).")?;
        }
        if !self.bulk.is_empty() {
            writeln!(
                text,
                "\n| bulk TCP | kernel alone | plain relay | tunproxy | of the kernel | goal | CPU s/GB of the relay | of tunproxy | goal | CPU s/GB of the machine, kernel alone | with tunproxy |\n\
                 |---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|"
            )?;
        }
        for row in &self.bulk {
            let goal = row.cpu_goal.map_or_else(String::new, |goal| format!("≤ {goal:.2}"));
            writeln!(
                text,
                "| {} | {:.1} Gbit/s | {:.1} Gbit/s | {:.1} Gbit/s | {:.2} | ≥ {:.2} | {:.2} | {:.2} | {goal} | {:.2} | {:.2} |",
                row.name,
                row.kernel_rate,
                row.relay_rate,
                row.rate,
                row.ratio,
                row.ratio_goal,
                row.relay_cpu,
                row.proxy_cpu,
                row.kernel_machine,
                row.machine
            )?;
        }
        if !self.rest.is_empty() {
            writeln!(text, "\n| | kernel alone | tunproxy | goal |\n|---|--:|--:|--:|")?;
        }
        for Row { name, kernel, ours, goal } in &self.rest {
            writeln!(text, "| {name} | {kernel} | {ours} | {goal} |")?;
        }
        Ok(())
    }
}

/// The kernel by its name and its first two numbers.
fn kernel() -> String {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let short: Vec<&str> = release.trim().splitn(3, '.').take(2).collect();
    format!("Linux {}", short.join("."))
}

/// The middle one, or the mean of the two in the middle; 0 of nothing.
pub(crate) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match (sorted.len(), sorted.len() / 2) {
        (0, _) => 0.0,
        (length, middle) if length % 2 == 0 => f64::midpoint(sorted[middle - 1], sorted[middle]),
        (_, middle) => sorted[middle],
    }
}
