//! Connect, request, close: how many a second with many in flight, and how long one takes.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream as BlockingStream};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::runtime::Builder;
use tokio::task::{JoinSet, LocalSet};

use super::lab::{Lab, Running, SERVER_V4};
use super::peer::TCP_PORTS;
use super::support::Netns;
use super::table::{Report, median};

/// At once.
const IN_FLIGHT: usize = 256;
/// Bytes of a request, and of its answer.
const REQUEST: usize = 64;
/// Length of one round.
const ROUND: Duration = Duration::from_secs(1);
/// A connection that takes longer counts as failed.
const PATIENCE: Duration = Duration::from_secs(5);

/// What one round came to.
#[derive(Debug, Clone, Copy)]
struct Churn {
    per_second: f64,
    done: u64,
    failed: u64,
    /// CPU microseconds of the program for each connection.
    cpu: f64,
}

/// Measures rounds of kernel and program in turn.
pub(crate) fn measure(lab: &Lab, rounds: u32, report: &mut Report) {
    let pairs: Vec<(Churn, Churn)> = (1..=rounds)
        .map(|round| {
            let kernel = churn(lab, None);
            let running = lab.start();
            let ours = churn(lab, Some(&running));
            running.stop();
            super::say(&format!("connect-request-close, round {round}: {kernel:?}, {ours:?}"));
            (kernel, ours)
        })
        .collect();
    let of = |what: fn(&(Churn, Churn)) -> f64| median(&pairs.iter().map(what).collect::<Vec<_>>());
    let failed: u64 = pairs.iter().map(|(kernel, ours)| kernel.failed + ours.failed).sum();
    let done: u64 = pairs.iter().map(|(_, ours)| ours.done).sum();
    report.row(
        &format!("connect-request-close, {IN_FLIGHT} in flight, eight ports"),
        &format!("{:.0}/s", of(|(kernel, _)| kernel.per_second)),
        &format!("{:.0}/s", of(|(_, ours)| ours.per_second)),
        "≥ 5000/s",
    );
    report.row("… CPU of tunproxy for each", "", &format!("{:.0} µs", of(|(_, ours)| ours.cpu)), "");
    report.row("… failed, of all that were tried through us", "", &format!("{failed} of {done}"), "0");
}

fn churn(lab: &Lab, through: Option<&Running>) -> Churn {
    let carried = through.map(Running::carried).unwrap_or_default();
    let cpu = through.map_or(0.0, |running| running.process.cpu());
    let started = Instant::now();
    let (done, failed) = lab.topology.host.enter(|| run(async { churn_until(Instant::now() + ROUND).await }));
    let elapsed = started.elapsed().as_secs_f64();
    let cpu = through.map_or(0.0, |running| running.process.cpu()) - cpu;
    if let Some(running) = through {
        let bytes = done * REQUEST as u64;
        running.assert_carried(carried, done, bytes, bytes);
    }
    Churn { per_second: done as f64 / elapsed, done, failed, cpu: cpu * 1e6 / done as f64 }
}

/// Connections done and failed before `end`.
async fn churn_until(end: Instant) -> (u64, u64) {
    let mut clients = JoinSet::new();
    for client in 0..IN_FLIGHT {
        clients.spawn_local(async move {
            let (mut done, mut failed) = (0, 0);
            while Instant::now() < end {
                let to = server(client + done as usize);
                match tokio::time::timeout(PATIENCE, exchange(to, REQUEST)).await {
                    Ok(Ok(_closed)) => done += 1,
                    _ => failed += 1,
                }
            }
            (done, failed)
        });
    }
    clients.join_all().await.into_iter().fold((0, 0), |(d, f), (done, failed)| (d + done, f + failed))
}

/// Opens `count` flows that each have moved `bytes` both ways, and leaves them open.
pub(crate) fn open(ns: &Netns, count: usize, bytes: usize) -> Vec<std::net::TcpStream> {
    ns.enter(move || {
        run(async move {
            let mut clients = JoinSet::new();
            for client in 0..IN_FLIGHT {
                clients.spawn_local(async move {
                    let mut open = Vec::new();
                    for number in (client..count).step_by(IN_FLIGHT) {
                        let stream = exchange(server(number), bytes).await.expect("a connection");
                        open.push(stream.into_std().expect("a socket of this runtime"));
                    }
                    open
                });
            }
            clients.join_all().await.into_iter().flatten().collect()
        })
    })
}

/// One request and its answer over a new connection, which is then returned.
async fn exchange(to: SocketAddr, bytes: usize) -> io::Result<TcpStream> {
    let mut stream = TcpStream::connect(to).await?;
    let mut buffer = vec![7; bytes];
    stream.write_all(&buffer).await?;
    stream.read_exact(&mut buffer).await?;
    Ok(stream)
}

/// Median milliseconds of a connection and its first answer, one after the other.
pub(crate) fn latency(ns: &Netns, count: usize) -> f64 {
    let one = |number: usize| -> io::Result<f64> {
        let started = Instant::now();
        let mut stream = BlockingStream::connect_timeout(&server(number), PATIENCE)?;
        stream.write_all(b"x")?;
        stream.read_exact(&mut [0])?;
        Ok(started.elapsed().as_secs_f64() * 1e3)
    };
    let times = ns.enter(move || (0..count).map(one).collect::<io::Result<Vec<f64>>>());
    median(&times.expect("connections"))
}

/// The servers' ports in turn.
fn server(number: usize) -> SocketAddr {
    let ports = TCP_PORTS.len();
    let port = TCP_PORTS.clone().nth(number % ports).expect("one of them");
    SocketAddr::new(SERVER_V4.parse().expect("an address"), port)
}

/// Runs `work` on this thread.
fn run<T>(work: impl Future<Output = T>) -> T {
    let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
    LocalSet::new().block_on(&runtime, work)
}
