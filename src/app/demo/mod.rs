//! `demo`: the main job on real packets, with no root, no network and nothing to configure.
//!
//! Two namespaces, one in the other. The outer one is ours after the first step: it holds a small internet and this
//! program. The inner one holds the client, whose only way out is a device that this program serves, as in `exec`.

mod client;
mod internet;
mod record;
mod requests;
mod table;

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Write};
use std::process::{ChildStdout, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, bail};

pub use client::client;

use super::build::{self, Addresses, Outside};
use super::worker::{Seed, Worker};
use super::{exec, load};
use crate::platform::rootless::{self, Inside};
use crate::platform::{Dialer, Framing};
use crate::profile::Profile;
use crate::session::Network;
use client::Report;
use record::Recorder;
use requests::{Act, REQUESTS, Request};
use table::Row;

const PROFILE: &str = include_str!("../../../profiles/demo.yaml");
const PROFILE_NAME: &str = "profiles/demo.yaml";
/// The hidden subcommand of the client.
const CLIENT: &str = "demo-client";

/// Shows the main job; returns the exit code, which is 0 only if everything was as it must be.
///
/// Must be called while the process has a single thread.
///
/// # Errors
/// Namespaces are refused, with what to do about it; or a part cannot be built.
pub fn demo() -> anyhow::Result<u8> {
    let profile = profile()?;
    rootless::make_namespaces()?;
    let v6 = internet::settle()?;
    let addresses = Addresses::of(&profile);
    let inside = Inside {
        addresses: addresses.device.clone(),
        mtu: u32::from(profile.tun.mtu),
        nameserver: addresses.dns[0],
        queues: 1,
        dies_with_command: true,
    };
    let command = ["/proc/self/exe", CLIENT].map(OsString::from);
    let (channel, mut child) = exec::start_child(&inside, &command, Stdio::piped())?;
    super::limits::raise_descriptor_limit();
    let output = child.stdout.take().context("the client has no output")?;
    let queues = rootless::receive(&channel)?;
    let framing = queues.first().context("the private namespace has no device")?.framing();
    let asked = internet::start(v6)?;
    let recorder = Arc::new(Recorder::default());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (reports, took) = runtime.block_on(async {
        let core = build::core(&profile, Outside::Apart, Dialer::default(), None, true).await?;
        core.counters.listen(recorder.clone());
        let mut workers = Vec::new();
        let (ended, _) = tokio::sync::mpsc::unbounded_channel();
        for (number, tun) in addresses.tuns(&profile, queues).into_iter().enumerate() {
            let seed = Seed { tun: Some(tun), core: core.clone(), ended: ended.clone() };
            workers.push(Worker::start(number, seed)?);
        }
        rootless::go(&channel).context("the private namespace is gone")?;
        let started = Instant::now();
        let reports = tokio::task::spawn_blocking(|| read(output)).await??;
        anyhow::Ok((reports, started.elapsed()))
    })?;
    let status = child.wait()?;
    if !status.success() {
        bail!("the demo's client failed: {status}");
    }
    let mut leaked: Vec<&str> =
        asked.lock().iter().filter_map(|name| never_asked().find(|never| never == name)).collect();
    leaked.sort_unstable();
    Ok(tell(&Shown { reports, took, framing, leaked, v6 }, &recorder))
}

fn profile() -> anyhow::Result<Profile> {
    let loaded = load::read(PROFILE_NAME, PROFILE.as_bytes());
    loaded.profile.filter(|_| !loaded.report.has_errors()).ok_or_else(|| anyhow!("{}", loaded.report))
}

fn read(output: ChildStdout) -> anyhow::Result<Vec<Report>> {
    let lines = BufReader::new(output).lines();
    lines.map(|line| Ok(serde_json::from_str(&line?)?)).collect()
}

/// The names that go to proxies alone, so that nobody here has a reason to look them up.
fn never_asked() -> impl Iterator<Item = &'static str> {
    let direct = |name: &str| REQUESTS.iter().any(|other| other.act.host() == name && !by_proxy(other));
    REQUESTS
        .iter()
        .filter(|request| request.act.by_name())
        .map(|request| request.act.host())
        .filter(move |name| !direct(name))
}

fn by_proxy(request: &Request) -> bool {
    ["abroad", "office"].iter().any(|proxy| request.way.ends_with(proxy))
}

/// All that there is to show.
struct Shown {
    reports: Vec<Report>,
    took: Duration,
    framing: Framing,
    /// Names that were looked up although they went to a proxy.
    leaked: Vec<&'static str>,
    v6: bool,
}

/// Prints the table and what it means; returns the exit code.
fn tell(shown: &Shown, recorder: &Recorder) -> u8 {
    let mut rows = Vec::new();
    let mut complaints = Vec::new();
    for (index, request) in REQUESTS.iter().enumerate().filter(|(_, request)| shown.v6 || !request.act.needs_v6()) {
        match shown.reports.iter().find(|report| report.request == index) {
            Some(report) => {
                let (row, complaint) = judge(request, report, recorder);
                rows.push(row);
                complaints.extend(complaint);
            }
            None => complaints.push(format!("{}: the client did not report", request.words)),
        }
    }
    complaints.extend(shown.leaked.iter().map(|name| format!("{name} went to a proxy, but was looked up here too")));
    let text = words(shown, &rows, &complaints);
    // A reader that has gone is no reason to fail.
    let _ = std::io::stdout().write_all(text.as_bytes());
    u8::from(!complaints.is_empty())
}

/// The row of one request, and what is wrong with it.
fn judge(request: &Request, report: &Report, recorder: &Recorder) -> (Row, Option<String>) {
    let network = if matches!(request.act, Act::Datagram(..)) { Network::Udp } else { Network::Tcp };
    let decided = report.from.zip(report.to).and_then(|(from, to)| recorder.find(network, from.port(), to));
    let fake = match request.act {
        Act::Reverse(_) => report.to.map(|to| to.ip()),
        _ => decided.as_ref().and_then(|decided| decided.fake),
    };
    let (rule, way) = match decided {
        Some(decided) => (decided.rule, decided.way),
        None if request.rule.is_none() => ("none: answered here".to_owned(), request.way.to_owned()),
        None => ("none was asked".to_owned(), "nowhere".to_owned()),
    };
    let expected = request.rule.map_or_else(|| rule.clone(), |rule| format!("{rule} (line {})", line_of(rule)));
    let right = rule == expected
        && way == request.way
        && report.back == request.back
        && fake.is_some() == request.act.by_name();
    let complaint =
        (!right).then(|| format!("{}: expected {expected}, {}, {}", request.words, request.way, request.back));
    let ms = format!("{:.1}", Duration::from_micros(report.micros).as_secs_f64() * 1e3);
    let fake = fake.map_or_else(|| "-".to_owned(), |ip| ip.to_string());
    let cells = [request.words.to_owned(), fake, short(&rule), way, report.back.clone(), ms];
    (Row { right, cells }, complaint)
}

/// A rule as the log has it, for the table: its line and its condition. Where it sends stands in the next column.
fn short(rule: &str) -> String {
    let Some((text, line)) = rule.strip_suffix(')').and_then(|rule| rule.rsplit_once(" (line ")) else {
        return rule.to_owned();
    };
    let condition = match text.split(',').collect::<Vec<_>>()[..] {
        [kind, payload, _target, ..] => format!("{kind},{payload}"),
        [kind, ..] => kind.to_owned(),
        [] => String::new(),
    };
    format!("{line}: {condition}")
}

/// The line of the profile that says `rule`; 0 if none does.
fn line_of(rule: &str) -> usize {
    PROFILE.lines().position(|line| line.trim_start_matches([' ', '-']) == rule).map_or(0, |at| at + 1)
}

fn words(shown: &Shown, rows: &[Row], complaints: &[String]) -> String {
    let device = match shown.framing {
        Framing::Offload => "a TUN device with offloads",
        Framing::Plain => "a TUN device",
        Framing::Packet => "a packet socket on a veth pair (/dev/net/tun is closed to this user)",
    };
    let program = std::env::args().next().unwrap_or_else(|| "tunproxy".to_owned());
    let right = rows.iter().filter(|row| row.right).count();
    let mut text = format!(
        "An ordinary program in a private namespace; its only way out is {device}.\n\
         tunproxy takes its packets there and sends each flow where {PROFILE_NAME} says:\n\
         DIRECT, abroad (a SOCKS5 proxy), office (an HTTP proxy), or nowhere.\n\n"
    );
    text += &table::draw(rows, table::terminal_width());
    text += &format!("\n{right} of {} as expected, in {:.1} s.", rows.len(), shown.took.as_secs_f64());
    if !shown.v6 {
        text += " IPv6 is switched off on this system, so its requests were left out.";
    }
    if complaints.is_empty() {
        text += "\nNames that went to a proxy were handed on as names: the nameserver here was never asked for them.\n";
        text += &format!(
            "\nNext: one program behind your own profile   {program} exec --profile FILE -- CMD\n\
             \x20     this computer, until Ctrl-C            sudo {program} --profile profiles/desktop.yaml\n\
             \x20     a gateway for the home network         sudo {program} --profile profiles/gateway.yaml\n"
        );
    } else {
        text += "\nNot as expected:\n";
        for complaint in complaints {
            text += &format!("  {complaint}\n");
        }
    }
    text
}
