//! What it costs to go through tunproxy: every workload beside the kernel alone, bulk beside a plain relay too, in the
//! same namespaces, in turn.
//!
//! ```text
//! cargo bench --bench throughput [-- --rounds 5 --seconds 2 --only bulk,idle]
//! ```
//!
//! Everything happens in namespaces of its own (see tests/support); the machine's network is not touched. The table on
//! stdout is Markdown. Nothing here fails for being slow; it fails when traffic did not take the way it is said to.
//!
//! ```text
//! lab        namespaces, servers, the program under test and the proof that it carried the traffic
//! process    CPU time, memory and wake-ups as /proc has them
//! bulk       iperf3: own traffic and a LAN client's, both ways            table, peer, flood: shared by the rows
//! relay      the plain relay that bulk has beside tunproxy
//! connect    connect-request-close, idle flows, latency of a new flow
//! weather    links with loss, reordering and delay; runs only when asked for
//! datagrams  echo over UDP      names  fake-IP answers      rest  the idle process and its start
//! ```

use std::io::{self, Write};
use std::time::Instant;

use clap::{Parser, ValueEnum};

mod bulk;
mod connect;
mod datagrams;
mod flood;
mod idle;
mod lab;
mod names;
mod peer;
mod process;
mod relay;
mod rest;
mod table;
mod weather;

#[expect(dead_code, unused_imports, reason = "benchmarks use a part of the lab")]
#[path = "../../tests/support/mod.rs"]
mod support;

use lab::Lab;
use support::{needs, world};
use table::Report;

/// Measures tunproxy beside the kernel alone.
#[derive(Parser, Debug)]
#[command(name = "throughput", disable_version_flag = true)]
struct Options {
    /// Rounds of each workload that is measured in rounds; the table has medians.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=99))]
    rounds: u32,
    /// Length of one bulk transfer in seconds.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=60))]
    seconds: u32,
    /// Workloads to run; all of them if not given.
    #[arg(long, value_delimiter = ',', value_name = "WORKLOADS")]
    only: Vec<Workload>,
    /// TCP congestion control of every namespace; the machine's own if not given. One that paces (bbr) or not makes a
    /// large difference here.
    #[arg(long, value_name = "NAME")]
    congestion: Option<String>,
    /// Set by `cargo bench`; without it nothing is measured, so that running every target of the package stays quick.
    #[arg(long, hide = true)]
    bench: bool,
    /// Be the servers at this address instead; what the benchmark starts on its internet.
    #[arg(long, hide = true, value_name = "ADDRESS")]
    serve: Option<std::net::IpAddr>,
    /// Be the plain relay to the servers at this address instead.
    #[arg(long, hide = true, value_name = "ADDRESS")]
    relay: Option<std::net::IpAddr>,
}

/// A row or a group of rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Workload {
    /// Bulk TCP, IPv4.
    Bulk,
    /// Bulk TCP, IPv6, one flow of the host's own.
    Bulk6,
    /// 10 000 idle flows, and a new one beside them.
    Idle,
    /// Connect, request, close.
    Churn,
    /// Fake-IP answers.
    Names,
    /// UDP echo.
    Udp,
    /// The process without work, and its start.
    Rest,
    /// TCP over links with loss, reordering and delay. Takes minutes, and runs only when it is named.
    Weather,
}

impl Options {
    fn wants(&self, workload: Workload) -> bool {
        self.only.is_empty() || self.only.contains(&workload)
    }
}

fn main() {
    let options = Options::parse();
    if let Some(address) = options.serve {
        peer::serve(address);
    }
    if let Some(server) = options.relay {
        relay::serve(server);
    }
    if !options.bench {
        say("nothing measured: run it with `cargo bench --bench throughput`");
        return;
    }
    if let Some(missing) = needs::missing(&["ip", "nft", "iperf3", "/dev/net/tun"]) {
        say(&format!("cannot measure here: {missing}"));
        std::process::exit(1);
    }
    world::within(|| measure(&options));
}

fn measure(options: &Options) {
    process::raise_descriptor_limit();
    if options.only.contains(&Workload::Weather) {
        weather::measure(options.rounds);
    }
    if options.only == [Workload::Weather] {
        return;
    }
    let started = Instant::now();
    let lab = Lab::open(options.congestion.as_deref());
    let mut report = Report::default();
    if options.wants(Workload::Bulk) {
        bulk::measure(&lab, bulk::V4, options.rounds, options.seconds, &mut report);
    }
    if options.wants(Workload::Bulk6) {
        bulk::measure(&lab, bulk::V6, options.rounds, options.seconds, &mut report);
    }
    if options.wants(Workload::Idle) {
        idle::measure(&lab, &mut report);
    }
    if options.wants(Workload::Churn) {
        connect::measure(&lab, options.rounds, &mut report);
    }
    if options.wants(Workload::Names) {
        names::measure(&lab, &mut report);
    }
    if options.wants(Workload::Udp) {
        datagrams::measure(&lab, options.rounds, &mut report);
    }
    if options.wants(Workload::Rest) {
        rest::measure(&lab, &mut report);
    }
    let took = started.elapsed();
    let text = report.markdown(&lab.congestion(), options.rounds, options.seconds, took);
    // A reader that went away has seen enough.
    let _ = writeln!(io::stdout(), "{text}");
}

/// Tells the person who waits what is going on; the table alone goes to stdout.
fn say(line: &str) {
    let _ = writeln!(io::stderr(), "{line}");
}
