//! Transfers both ways under everything at once: bad links, poor clients, slow readers, ends in any order and resets at
//! any moment. None stalls, and every byte that arrives is the right one.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use crate::world::packet;
use crate::world::{Conn, Flow, Net, Random, Rough, Weather, World, on, pattern};

/// Which seeds are tried; the variables are for longer runs.
fn number(variable: &str, otherwise: u64) -> u64 {
    std::env::var(variable).ok().and_then(|number| number.parse().ok()).unwrap_or(otherwise)
}

/// Who resets the connection, and when.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cut {
    Never,
    ByClient(Duration),
    ByServer(Duration),
}

/// Which side finishes sending only after it has read the other's end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Order {
    AsItComes,
    ClientLast,
    ServerLast,
}

#[derive(Debug, Clone, Copy)]
struct Case {
    up: usize,
    down: usize,
    order: Order,
    cut: Cut,
    /// How long the readers of client and server pause at most before they read.
    pauses: [u64; 2],
    seed: u64,
}

fn case(seed: u64) -> (Net, Case) {
    let mut random = Random::new(seed ^ 0x0bad_1e57);
    let mut below = |end: usize| random.below(end);
    let mut share = |of: [u32; 3]| of[below(3)];
    let weather = Weather {
        loss: share([0, 10_000, 80_000]),
        duplicates: share([0, 10_000, 100_000]),
        reorder: share([0, 50_000, 300_000]),
        delay: Duration::from_millis(share([0, 3, 50]).into()),
    };
    let rough = Rough {
        no_sack: below(2) == 0,
        no_scale: below(2) == 0,
        segment_size: [None, Some(536), Some(100)][below(3)],
        urgent: [0, 50_000][below(2)],
        keepalives: [0, 50_000][below(2)],
        shrunk: [0, 30_000, 150_000][below(3)],
    };
    let buffer = [1, 700, 4000, 65_535, 256 << 10][below(5)];
    let most = if buffer == 1 { 200 } else { 60_000 };
    let at = Duration::from_millis(below(2000) as u64);
    let case = Case {
        up: below(most),
        down: below(most),
        order: [Order::AsItComes, Order::ClientLast, Order::ServerLast][below(3)],
        cut: [Cut::Never, Cut::Never, Cut::Never, Cut::ByClient(at), Cut::ByServer(at)][below(5)],
        pauses: [below(2) * 40, below(2) * 40].map(|pause| pause as u64),
        seed,
    };
    let memory = [usize::MAX, 1 << 20][below(2)];
    let (own, offload, v6) = (below(4) == 0, below(2) == 0, below(2) == 0);
    (Net { own, seed, weather, rough, buffer, memory, ..Net::new(offload, v6) }, case)
}

/// What one side has done: bytes that it has read, whether it has read the end, and whether it has been told of a reset.
#[derive(Default)]
struct Done {
    read: Cell<usize>,
    ended: Cell<bool>,
    broken: Cell<bool>,
}

/// One side of a connection.
trait Side: Clone + 'static {
    async fn take(&self) -> Result<Vec<u8>, ()>;
    async fn put(&self, bytes: &[u8]) -> Result<(), ()>;
    fn finish(&self);
}

impl Side for Conn {
    async fn take(&self) -> Result<Vec<u8>, ()> {
        self.read().await.map_err(drop)
    }
    async fn put(&self, bytes: &[u8]) -> Result<(), ()> {
        self.write(bytes).await.map_err(drop)
    }
    fn finish(&self) {
        self.shutdown();
    }
}

impl Side for Flow {
    async fn take(&self) -> Result<Vec<u8>, ()> {
        self.read(3000).await.map_err(drop)
    }
    async fn put(&self, bytes: &[u8]) -> Result<(), ()> {
        self.write(bytes).await.map_err(drop)
    }
    fn finish(&self) {
        if self.is_open() {
            self.shutdown();
        }
    }
}

/// Has `side` send `bytes` and then finish, after it has read the other's end if it is to be `last`.
fn run(world: &World, side: impl Side, bytes: usize, last: bool, pause: u64, seed: u64) -> Rc<Done> {
    let done = Rc::<Done>::default();
    let (reader, read, rest) = (side.clone(), Rc::clone(&done), world.clone());
    world.spawn(async move {
        let mut random = Random::new(seed);
        loop {
            if pause > 0 && random.below(4) == 0 {
                rest.sleep(Duration::from_millis(random.next() % pause)).await;
            }
            let Ok(part) = reader.take().await else { return read.broken.set(true) };
            if part.is_empty() {
                return read.ended.set(true);
            }
            let at = read.read.get();
            assert!(part == pattern(at, part.len()), "other bytes than were sent, after {at}");
            read.read.set(at + part.len());
        }
    });
    let (heard, rest) = (Rc::clone(&done), world.clone());
    world.spawn(async move {
        if side.put(&pattern(0, bytes)).await.is_err() {
            return heard.broken.set(true);
        }
        while last && !heard.ended.get() && !heard.broken.get() {
            rest.sleep(Duration::from_millis(5)).await;
        }
        side.finish();
    });
    done
}

async fn transfer(world: World, case: Case) {
    world.watch();
    let conn = world.connect(80);
    let flow = world.arrival().await;
    flow.accept();
    let Case { up, down, order, cut, pauses, seed } = case;
    if conn.established().await.is_err() {
        panic!("the handshake failed");
    }
    let client = run(&world, conn.clone(), up, order == Order::ClientLast, pauses[0], seed);
    let server = run(&world, flow.clone(), down, order == Order::ServerLast, pauses[1], !seed);
    match cut {
        Cut::Never => {
            let began = world.elapsed();
            while !(client.ended.get() && server.ended.get()) {
                let stands = (client.read.get(), down, server.read.get(), up);
                let broken = client.broken.get() || server.broken.get();
                if broken || world.elapsed() - began > Duration::from_secs(1800) {
                    tell_last(&world);
                    panic!("{} at {stands:?}", if broken { "a reset for no cause" } else { "it stalls" });
                }
                world.sleep(Duration::from_millis(50)).await;
            }
            let (read, sent) = ((server.read.get(), client.read.get()), (up, down));
            if read != sent {
                tell_last(&world);
            }
            assert_eq!(read, sent, "the server and the client read all");
            flow.flushed().await;
        }
        Cut::ByClient(at) => {
            world.sleep(at).await;
            conn.abort();
        }
        Cut::ByServer(at) => {
            world.sleep(at).await;
            if !server.broken.get() {
                flow.abort();
            }
        }
    }
    if cut != Cut::Never {
        world.sleep(Duration::from_secs(1)).await;
    }
    flow.close();
    assert!(client.read.get() <= down && server.read.get() <= up);
    // What is left ends by itself, if only after the client was given up for lost.
    while world.flows() > 0 {
        world.sleep(Duration::from_secs(5)).await;
    }
}

/// Prints the last packets on the link.
fn tell_last(world: &World) {
    let seen = world.seen();
    let most = number("TUNPROXY_ROUGH_TOLD", 60) as usize;
    for packet in &seen[seen.len().saturating_sub(most)..] {
        let way = if packet.to_client { "->" } else { "<-" };
        let window = packet::window(&packet.bytes);
        let (sequence, number, flags) = (packet.sequence, packet.acknowledgement, packet.flags);
        eprintln!("{way} {flags:02x} {sequence}+{} ack {number} window {window}", packet.payload.len());
    }
}

#[test]
fn no_transfer_stalls_or_loses_a_byte_whatever_happens_to_it() {
    let (first, cases, threads) = (number("TUNPROXY_ROUGH_FIRST", 0), number("TUNPROXY_ROUGH_CASES", 1000), 2);
    let parts: Vec<_> = (0..threads)
        .map(|part| {
            std::thread::spawn(move || {
                for seed in (first + part..first + cases).step_by(threads as usize) {
                    let (net, case) = case(seed);
                    let told = format!("{case:?}");
                    let tell = Tell(told);
                    on(net, move |world| transfer(world, case));
                    drop(tell);
                }
            })
        })
        .collect();
    for part in parts {
        part.join().expect("every case holds");
    }
}

/// Says which case it was that failed.
struct Tell(String);

impl Drop for Tell {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("in {}", self.0);
        }
    }
}
