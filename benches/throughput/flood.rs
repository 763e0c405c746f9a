//! Datagrams at a given rate, and how many answers come back.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use socket2::SockRef;

use super::support::Netns;

/// Room for answers while the client is busy sending.
const ROOM: usize = 4 << 20;
/// After the last datagram, answers are awaited for so long.
const LAST_ANSWERS: Duration = Duration::from_millis(100);
/// Datagrams sent before answers are looked at.
const BURST: u64 = 16;

/// What to send, where to and how fast.
pub(crate) struct Flood {
    /// Sent in turn.
    pub(crate) payloads: Vec<Vec<u8>>,
    pub(crate) to: SocketAddr,
    pub(crate) per_second: u64,
    pub(crate) length: Duration,
}

/// What became of it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Outcome {
    pub(crate) sent: u64,
    pub(crate) answered: u64,
    /// Datagrams sent a second: less than asked for where the client could not keep up.
    pub(crate) rate: f64,
}

impl Outcome {
    /// The share of datagrams without an answer.
    pub(crate) fn loss(&self) -> f64 {
        1.0 - self.answered as f64 / self.sent as f64
    }
}

/// Sends from one socket of `ns` and counts the answers.
pub(crate) fn run(ns: &Netns, flood: Flood) -> Outcome {
    ns.enter(move || send_and_count(&flood).unwrap_or_else(|error| panic!("{}: {error}", flood.to)))
}

fn send_and_count(flood: &Flood) -> io::Result<Outcome> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    SockRef::from(&socket).set_recv_buffer_size(ROOM)?;
    socket.connect(flood.to)?;
    socket.set_nonblocking(true)?;
    let wanted = (flood.per_second as f64 * flood.length.as_secs_f64()) as u64;
    let (mut sent, mut answered) = (0, 0);
    let started = Instant::now();
    while sent < wanted && started.elapsed() < flood.length * 2 {
        let due = ((started.elapsed().as_secs_f64() * flood.per_second as f64) as u64).min(wanted);
        let burst = (due - sent.min(due)).min(BURST);
        for number in sent..sent + burst {
            let payload = &flood.payloads[number as usize % flood.payloads.len()];
            match socket.send(payload) {
                Ok(_) => {}
                // A full queue of the sender is a loss like any other.
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock) => {}
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {}
                Err(error) => return Err(error),
            }
        }
        sent += burst;
        answered += drain(&socket)?;
        if burst == 0 {
            thread::sleep(Duration::from_micros(100));
        }
    }
    let elapsed = started.elapsed().as_secs_f64();
    let mut last = Instant::now();
    while answered < sent && last.elapsed() < LAST_ANSWERS {
        let more = drain(&socket)?;
        if more > 0 {
            last = Instant::now();
        }
        answered += more;
        thread::sleep(Duration::from_micros(100));
    }
    Ok(Outcome { sent, answered, rate: sent as f64 / elapsed })
}

/// Takes the answers that are there.
fn drain(socket: &UdpSocket) -> io::Result<u64> {
    let mut buffer = [0; 2048];
    let mut count = 0;
    loop {
        match socket.recv(&mut buffer) {
            Ok(_) => count += 1,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(count),
            Err(error) => return Err(error),
        }
    }
}
