//! Bulk TCP by the distribution's iperf3, which is single-threaded: ten flows are two processes of five.

use std::time::Instant;

use serde_json::Value;

use super::lab::{IPERF_PORTS, Lab, Running, SERVER_V4, SERVER_V6};
use super::process::{machine_busy, processors};
use super::support::{Netns, program};
use super::table::{Bulk, Report, median};

/// Who sends, which way, and what is to be reached.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Load {
    name: &'static str,
    server: &'static str,
    lan: bool,
    flows: u32,
    down: bool,
    ratio_goal: f64,
    cpu_goal: Option<f64>,
}

const fn load(name: &'static str, flows: u32, down: bool, ratio_goal: f64, cpu_goal: Option<f64>) -> Load {
    Load { name, server: SERVER_V4, lan: false, flows, down, ratio_goal, cpu_goal }
}

/// The host's own traffic and a forwarded client's over IPv4.
pub(crate) const V4: &[Load] = &[
    load("own, one flow up", 1, false, 0.75, Some(0.6)),
    load("own, one flow down", 1, true, 0.9, Some(0.45)),
    load("own, ten flows up", 10, false, 0.65, Some(0.6)),
    load("own, ten flows down", 10, true, 0.65, Some(0.45)),
    Load { lan: true, ..load("LAN client, one flow up", 1, false, 0.75, Some(0.75)) },
    Load { lan: true, ..load("LAN client, one flow down", 1, true, 0.85, Some(0.75)) },
];

/// The same over IPv6, as far as it may differ.
pub(crate) const V6: &[Load] = &[
    Load { server: SERVER_V6, ..load("own, one flow up, IPv6", 1, false, 0.75, Some(0.6)) },
    Load { server: SERVER_V6, ..load("own, one flow down, IPv6", 1, true, 0.9, Some(0.45)) },
];

/// One transfer: bits per second, bytes, and CPU seconds per GB.
#[derive(Debug, Clone, Copy)]
struct Sample {
    rate: f64,
    machine: f64,
    proxy: f64,
    /// The share of the machine that went to neither side of the transfer nor the program.
    elsewhere: f64,
}

/// Measures `loads`, each in rounds of kernel and program in turn.
pub(crate) fn measure(lab: &Lab, loads: &[Load], rounds: u32, seconds: u32, report: &mut Report) {
    for load in loads {
        let pairs: Vec<(Sample, Sample)> = (1..=rounds)
            .map(|round| {
                let kernel = transfer(lab, load, seconds, None);
                let running = lab.start();
                let ours = transfer(lab, load, seconds, Some(&running));
                running.stop();
                super::say(&format!(
                    "{}, round {round}: {:.1} and {:.1} Gbit/s, {:.2} s/GB",
                    load.name,
                    kernel.rate / 1e9,
                    ours.rate / 1e9,
                    ours.proxy
                ));
                (kernel, ours)
            })
            .collect();
        let of = |what: fn(&(Sample, Sample)) -> f64| median(&pairs.iter().map(what).collect::<Vec<_>>());
        report.elsewhere.extend(pairs.iter().flat_map(|(kernel, ours)| [kernel.elsewhere, ours.elsewhere]));
        report.bulk(Bulk {
            name: load.name.to_owned(),
            kernel_rate: of(|(kernel, _)| kernel.rate / 1e9),
            rate: of(|(_, ours)| ours.rate / 1e9),
            ratio: of(|(kernel, ours)| ours.rate / kernel.rate),
            ratio_goal: load.ratio_goal,
            proxy_cpu: of(|(_, ours)| ours.proxy),
            cpu_goal: load.cpu_goal,
            kernel_machine: of(|(kernel, _)| kernel.machine),
            machine: of(|(_, ours)| ours.machine),
        });
    }
}

fn transfer(lab: &Lab, load: &Load, seconds: u32, through: Option<&Running>) -> Sample {
    let client = if load.lan { lab.topology.client() } else { &lab.topology.host };
    let carried = through.map(Running::carried).unwrap_or_default();
    let (proxy_before, busy_before, started) = (proxy_cpu(through), machine_busy(), Instant::now());
    let results = iperf3(client, load, seconds);
    let elapsed = started.elapsed().as_secs_f64();
    let (proxy, busy) = (proxy_cpu(through) - proxy_before, machine_busy() - busy_before);
    let sum = |path: &str| -> f64 { results.iter().map(|result| number(result, path)).sum() };
    let bytes = sum("/end/sum_received/bytes");
    if let Some(running) = through {
        let bytes = bytes as u64;
        let (up, down) = if load.down { (0, bytes) } else { (bytes, 0) };
        running.assert_carried(carried, u64::from(load.flows), up, down);
    }
    let ends = ["/end/cpu_utilization_percent/host_total", "/end/cpu_utilization_percent/remote_total"];
    let own: f64 = ends.iter().map(|end| sum(end) / 100.0 * f64::from(seconds)).sum::<f64>() + proxy;
    Sample {
        rate: sum("/end/sum_received/bits_per_second"),
        machine: busy / bytes * 1e9,
        proxy: proxy / bytes * 1e9,
        elsewhere: (busy - own).max(0.0) / elapsed / processors() as f64,
    }
}

fn proxy_cpu(through: Option<&Running>) -> f64 {
    through.map_or(0.0, |running| running.process.cpu())
}

/// Runs as many clients at once as the load needs, and returns what each reports.
fn iperf3(client: &Netns, load: &Load, seconds: u32) -> Vec<Value> {
    let processes: u32 = if load.flows > 1 { 2 } else { 1 };
    let clients = IPERF_PORTS.iter().take(processes as usize).map(|port| {
        let mut command = client.command("iperf3");
        command.args(["--json", "--connect-timeout", "5000", "-c", load.server]);
        command.args(["-p", &port.to_string(), "-t", &seconds.to_string()]);
        command.args(["-P", &(load.flows / processes).to_string()]);
        if load.down {
            command.arg("-R");
        }
        std::thread::spawn(move || program::output(&mut command))
    });
    let clients: Vec<_> = clients.collect();
    clients
        .into_iter()
        .map(|client| {
            let output = client.join().expect("no panic while waiting");
            let said = String::from_utf8_lossy(&output.stdout);
            assert!(output.status.success(), "iperf3: {said}");
            serde_json::from_str(&said).expect("iperf3 reports in JSON")
        })
        .collect()
}

fn number(report: &Value, path: &str) -> f64 {
    report.pointer(path).and_then(Value::as_f64).unwrap_or_else(|| panic!("no {path} in iperf3's report"))
}
