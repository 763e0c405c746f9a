//! Bulk TCP by the distribution's iperf3, which is single-threaded: ten flows are two processes of five.

use std::time::Instant;

use serde_json::Value;

use super::lab::{Carried, IPERF_PORTS, Lab, Relaying, Running, SERVER_V4, SERVER_V6};
use super::process::{machine_busy, processors};
use super::support::topology::{HOST_LAN_V4, HOST_V4, HOST_V6};
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

/// What carries the traffic.
#[derive(Clone, Copy)]
enum Through<'a> {
    Kernel,
    Relay(&'a Relaying),
    Tunproxy(&'a Running),
}

/// One transfer: bits per second, bytes, and CPU seconds per GB.
#[derive(Debug, Clone, Copy)]
struct Sample {
    rate: f64,
    machine: f64,
    proxy: f64,
    /// The share of the machine that went to neither side of the transfer nor the program.
    elsewhere: f64,
}

/// One round of each.
#[derive(Debug, Clone, Copy)]
struct Round {
    kernel: Sample,
    relay: Sample,
    ours: Sample,
}

/// Measures `loads`, each in rounds of kernel, relay and program in turn.
pub(crate) fn measure(lab: &Lab, loads: &[Load], rounds: u32, seconds: u32, report: &mut Report) {
    for load in loads {
        let rounds: Vec<Round> = (1..=rounds).map(|number| round(lab, load, number, seconds)).collect();
        let of = |what: fn(&Round) -> f64| median(&rounds.iter().map(what).collect::<Vec<_>>());
        report.elsewhere.extend(rounds.iter().flat_map(|r| [r.kernel, r.relay, r.ours]).map(|sample| sample.elsewhere));
        report.bulk(Bulk {
            name: load.name.to_owned(),
            kernel_rate: of(|round| round.kernel.rate / 1e9),
            relay_rate: of(|round| round.relay.rate / 1e9),
            rate: of(|round| round.ours.rate / 1e9),
            ratio: of(|round| round.ours.rate / round.kernel.rate),
            ratio_goal: load.ratio_goal,
            relay_cpu: of(|round| round.relay.proxy),
            proxy_cpu: of(|round| round.ours.proxy),
            cpu_goal: load.cpu_goal,
            kernel_machine: of(|round| round.kernel.machine),
            machine: of(|round| round.ours.machine),
        });
    }
}

fn round(lab: &Lab, load: &Load, number: u32, seconds: u32) -> Round {
    let kernel = transfer(lab, load, seconds, Through::Kernel);
    let relaying = lab.start_relay(load.server);
    let relay = transfer(lab, load, seconds, Through::Relay(&relaying));
    drop(relaying);
    let running = lab.start();
    let ours = transfer(lab, load, seconds, Through::Tunproxy(&running));
    running.stop();
    let rates = [kernel, relay, ours].map(|sample| format!("{:.1}", sample.rate / 1e9)).join(", ");
    let name = load.name;
    super::say(&format!("{name}, round {number}: {rates} Gbit/s, {:.2} and {:.2} s/GB", relay.proxy, ours.proxy));
    Round { kernel, relay, ours }
}

fn transfer(lab: &Lab, load: &Load, seconds: u32, through: Through<'_>) -> Sample {
    let client = if load.lan { lab.topology.client() } else { &lab.topology.host };
    let server = match through {
        // Its ports are the host's own, under the address that the client has it at.
        Through::Relay(_) if load.lan => HOST_LAN_V4,
        Through::Relay(_) if load.server == SERVER_V6 => HOST_V6,
        Through::Relay(_) => HOST_V4,
        Through::Kernel | Through::Tunproxy(_) => load.server,
    };
    let carried = if let Through::Tunproxy(running) = through { running.carried() } else { Carried::default() };
    let (proxy_before, busy_before, started) = (through.cpu(), machine_busy(), Instant::now());
    let results = iperf3(client, server, load, seconds);
    let elapsed = started.elapsed().as_secs_f64();
    let (proxy, busy) = (through.cpu() - proxy_before, machine_busy() - busy_before);
    let sum = |path: &str| -> f64 { results.iter().map(|result| number(result, path)).sum() };
    let bytes = sum("/end/sum_received/bytes");
    if let Through::Tunproxy(running) = through {
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

impl Through<'_> {
    /// CPU seconds that the relay or the program has used.
    fn cpu(self) -> f64 {
        match self {
            Self::Kernel => 0.0,
            Self::Relay(relaying) => relaying.process.cpu(),
            Self::Tunproxy(running) => running.process.cpu(),
        }
    }
}

/// Runs as many clients at once as the load needs, and returns what each reports.
fn iperf3(client: &Netns, server: &str, load: &Load, seconds: u32) -> Vec<Value> {
    let processes: u32 = if load.flows > 1 { 2 } else { 1 };
    let clients = IPERF_PORTS.iter().take(processes as usize).map(|port| {
        let mut command = client.command("iperf3");
        command.args(["--json", "--connect-timeout", "5000", "-c", server]);
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
