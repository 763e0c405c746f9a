//! The witness on a wire: everything that passes an interface, and proof that it would have been seen.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use socket2::Socket;

use super::Netns;
use super::packet::{EXPERIMENT, Packet, packet_socket};

/// How long a packet that was sent may take to be seen; only a broken capture takes that long.
const PATIENCE: Duration = Duration::from_secs(10);

/// A capture of both directions on one interface.
///
/// It proves nothing before [`Capture::prove`] has seen a packet that did leave: a test that only ever asserts
/// silence would also pass with its ear on the wrong wire.
pub(crate) struct Capture {
    heard: Arc<Heard>,
    socket: Arc<Socket>,
    /// Sends end markers: a packet socket does not hear what it sends itself.
    speaker: Socket,
    stop: Option<io::PipeWriter>,
    thread: Option<JoinHandle<()>>,
    proven: bool,
    marks: u64,
}

#[derive(Default)]
struct Heard {
    packets: Mutex<Vec<Packet>>,
    more: Condvar,
}

impl Capture {
    /// Listens to `device` of `ns`.
    ///
    /// # Panics
    /// If there is no such device.
    pub(crate) fn start(ns: &Netns, device: &str) -> Self {
        let name = CString::new(device).expect("a device name");
        let sockets = ns.enter(move || Ok((packet_socket(&name, libc::ETH_P_ALL)?, packet_socket(&name, 0)?)));
        let (socket, speaker) = sockets.unwrap_or_else(|error: io::Error| panic!("{device}: {error}"));
        let (socket, heard) = (Arc::new(socket), Arc::new(Heard::default()));
        let (stopped, stop) = io::pipe().expect("a pipe");
        let (reader, told) = (socket.clone(), heard.clone());
        let thread = std::thread::spawn(move || listen(&reader, &stopped, &told));
        Self { heard, socket, speaker, stop: Some(stop), thread: Some(thread), proven: false, marks: 0 }
    }

    /// Gives `send` a payload that occurs nowhere else, and waits until it has been seen on the wire.
    ///
    /// # Panics
    /// If it is never seen: then this capture cannot witness anything.
    pub(crate) fn prove(&mut self, send: impl FnOnce(&str)) {
        self.marks += 1;
        let mark = format!("marked-payload-{}-{}", std::process::id(), self.marks);
        send(&mark);
        assert!(self.wait_for(mark.as_bytes()), "the capture did not see a marked packet that was sent");
        self.proven = true;
    }

    /// Everything heard up to now: what was sent before this call is in it.
    ///
    /// # Panics
    /// If packets were lost, because then nothing follows from what is missing.
    pub(crate) fn packets(&mut self) -> Vec<Packet> {
        // Frames pass the device in order: when this one has come back, so has everything before it.
        self.marks += 1;
        let mark = format!("end-marker-{}-{}", std::process::id(), self.marks);
        let frame = [&[0xff; 6][..], &[2, 0, 0, 0, 0, 1], &EXPERIMENT.to_be_bytes(), mark.as_bytes()].concat();
        self.speaker.send(&frame).expect("a device that is up");
        assert!(self.wait_for(mark.as_bytes()), "the capture no longer hears anything");
        assert_eq!(dropped(&self.socket).expect("statistics"), 0, "the capture lost packets: it proves nothing");
        self.heard.packets.lock().expect("no panic while held").clone()
    }

    /// Fails if a packet was seen that `leak` calls one.
    ///
    /// # Panics
    /// With those packets; or if the capture was never proven.
    pub(crate) fn assert_nothing(&mut self, what: &str, leak: impl Fn(&Packet) -> bool) {
        assert!(self.proven, "prove the capture first");
        let packets = self.packets();
        let leaks: Vec<String> = packets.iter().filter(|packet| leak(packet)).map(ToString::to_string).collect();
        assert!(leaks.is_empty(), "{what}: {} of {} packets:\n{}", leaks.len(), packets.len(), leaks.join("\n"));
    }

    fn wait_for(&self, needle: &[u8]) -> bool {
        let end = Instant::now() + PATIENCE;
        let mut packets = self.heard.packets.lock().expect("no panic while held");
        loop {
            if packets.iter().rev().any(|packet| packet.contains(needle)) {
                return true;
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            packets = self.heard.more.wait_timeout(packets, left).expect("no panic while held").0;
        }
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        drop(self.stop.take());
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// How much of a packet is kept: headers and marks fit.
const SNAPLEN: usize = 512;

fn listen(socket: &Socket, stopped: &io::PipeReader, heard: &Heard) {
    let mut buffer = [0; SNAPLEN];
    loop {
        let mut ready =
            [PollFd::new(socket.as_fd(), PollFlags::POLLIN), PollFd::new(stopped.as_fd(), PollFlags::POLLIN)];
        if poll(&mut ready, PollTimeout::NONE).is_err() {
            continue;
        }
        if ready[1].revents().is_some_and(|events| !events.is_empty()) {
            return;
        }
        // A device that goes down is an error here; the socket hears on when it comes back.
        while let Ok(length) =
            nix::sys::socket::recv(socket.as_raw_fd(), &mut buffer, nix::sys::socket::MsgFlags::empty())
        {
            heard.packets.lock().expect("no panic while held").push(Packet::parse(&buffer[..length]));
            heard.more.notify_all();
        }
    }
}

/// How many packets the kernel could not hand over since the last question.
fn dropped(socket: &Socket) -> io::Result<u32> {
    let mut statistics = libc::tpacket_stats { tp_packets: 0, tp_drops: 0 };
    let mut length = size_of::<libc::tpacket_stats>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes into a structure of that size.
    let failed = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_STATISTICS,
            (&raw mut statistics).cast(),
            &raw mut length,
        )
    };
    if failed == 0 { Ok(statistics.tp_drops) } else { Err(io::Error::last_os_error()) }
}
