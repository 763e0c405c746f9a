//! A link with bad weather: two TAP devices, and a thread that carries frames between them as a radio would.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::TimeSpec;

use super::Netns;

/// What a link does to frames, in each direction by itself.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Weather {
    /// Frames lost, of ten thousand.
    pub(crate) loss: u32,
    /// Frames that come twice, of ten thousand.
    pub(crate) duplicates: u32,
    /// Frames that later ones overtake, of ten thousand.
    pub(crate) reorder: u32,
    /// How long every frame takes.
    pub(crate) delay: Duration,
}

impl Weather {
    /// Loss, duplicates and reordering of ten thousand frames, and the delay of each.
    pub(crate) const fn with(loss: u32, duplicates: u32, reorder: u32, delay: Duration) -> Self {
        Self { loss, duplicates, reorder, delay }
    }
}

/// A frame that was overtaken is later than others by up to this.
const OVERTAKEN: Duration = Duration::from_millis(3);
/// The thread looks at least this often whether it is to end.
const LOOK: Duration = Duration::from_millis(100);

/// The link, up until it is dropped.
pub(crate) struct Radio {
    over: Arc<AtomicBool>,
    carrier: Option<JoinHandle<()>>,
}

impl Radio {
    /// Makes a link between two hosts, up on both ends. Frames on it have whole checksums and are never longer than the
    /// MTU, whatever the kernels would leave to a device.
    ///
    /// # Panics
    /// If a name is taken or /dev/net/tun is closed.
    pub(crate) fn between(ends: [(&Netns, &str); 2], weather: Weather) -> Self {
        let taps = ends.map(|(ns, device)| {
            let name = device.to_owned();
            let tap = ns.enter(move || open_tap(&name)).unwrap_or_else(|error| panic!("{device}: {error}"));
            ns.ip(&format!("link set {device} up"));
            tap
        });
        let over = Arc::new(AtomicBool::new(false));
        let ended = Arc::clone(&over);
        let carrier = thread::spawn(move || carry(&taps, weather, &ended));
        Self { over, carrier: Some(carrier) }
    }
}

impl Drop for Radio {
    fn drop(&mut self) {
        self.over.store(true, Relaxed);
        let _ = self.carrier.take().map(JoinHandle::join);
    }
}

fn open_tap(name: &str) -> io::Result<File> {
    let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun")?;
    // SAFETY: all bytes zero is an empty request; the kernel reads it where it lies.
    let failed = unsafe {
        let mut request: libc::ifreq = std::mem::zeroed();
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes().take(libc::IFNAMSIZ - 1)) {
            *to = from.cast_signed();
        }
        request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI) as libc::c_short;
        libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as _, &raw const request)
    };
    if failed == 0 { Ok(file) } else { Err(io::Error::last_os_error()) }
}

/// Frames on their way, the earliest first: when, in which order, to which end, and what.
type OnTheWay = BinaryHeap<Reverse<(Instant, u64, usize, Vec<u8>)>>;

fn carry(taps: &[File; 2], weather: Weather, over: &AtomicBool) {
    let (mut on_the_way, mut number, mut dice) = (OnTheWay::new(), 0, Dice(0x9e37_79b9_7f4a_7c15));
    let mut space = vec![0; 65_536];
    while !over.load(Relaxed) {
        let now = Instant::now();
        while on_the_way.peek().is_some_and(|Reverse((due, ..))| *due <= now) {
            let Some(Reverse((_, _, to, frame))) = on_the_way.pop() else { break };
            // A full queue loses the frame, as a real one does.
            let _ = (&taps[to]).write(&frame);
        }
        let wait = on_the_way.peek().map_or(LOOK, |Reverse((due, ..))| due.saturating_duration_since(now).min(LOOK));
        let mut ends = [0, 1].map(|end| PollFd::new(taps[end].as_fd(), PollFlags::POLLIN));
        let _ = ppoll(&mut ends, Some(TimeSpec::from(wait)), None);
        for (from, tap) in taps.iter().enumerate() {
            // Bounded, so that neither direction starves the other or what is due.
            for _ in 0..64 {
                let mut tap = tap;
                let Ok(length) = tap.read(&mut space) else { break };
                let now = Instant::now();
                if dice.falls(weather.loss) {
                    continue;
                }
                for _ in 0..if dice.falls(weather.duplicates) { 2 } else { 1 } {
                    let late =
                        if dice.falls(weather.reorder) { OVERTAKEN.mul_f64(dice.share()) } else { Duration::ZERO };
                    number += 1;
                    on_the_way.push(Reverse((now + weather.delay + late, number, 1 - from, space[..length].to_vec())));
                }
            }
        }
    }
}

/// The same falls in every run: xorshift.
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// True in so many of ten thousand cases.
    fn falls(&mut self, of_ten_thousand: u32) -> bool {
        self.next() % 10_000 < u64::from(of_ten_thousand)
    }

    /// From 0 to 1.
    fn share(&mut self) -> f64 {
        (self.next() % 1000) as f64 / 1000.0
    }
}
