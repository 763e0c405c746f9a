//! Packets to flows and back, on smoltcp: the server that answers behind the TUN.
//!
//! No sockets, no clock and no runtime in here: packets and the time are arguments, what is to be sent goes to a
//! [`Transmit`]. One [`Stack`] belongs to one worker; its [`FlowStream`]s live in that worker's tasks.
//!
//! A turn of the worker is: [`Stack::ingest`] for each packet read, then the woken flow tasks move bytes in and out of
//! the rings, then [`Stack::poll`] emits once per touched flow, so that one acknowledgement answers a batch.

mod allowance;
mod budget;
mod checksum;
mod claim;
mod counters;
mod datagram;
mod echo;
mod flow;
mod fragment;
pub mod frame;
mod heartbeat;
mod held;
mod icmp;
mod ingest;
pub mod ip;
mod path;
mod port;
mod progress;
mod reception;
mod recovery;
mod ring;
mod table;
mod tcp;
mod timers;
mod tombstone;

use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU16;
use std::rc::Rc;
use std::task::Waker;
use std::time::Instant;

pub use checksum::of_both as checksum;
pub use claim::{Claim, claim};
pub use counters::Counters;
pub use datagram::Datagram;
pub use echo::{Echo, EchoError, EchoReply};
pub use flow::{FlowStream, Refusal};
pub use frame::{Frame, Transmit, VirtioHeader};
pub use heartbeat::Heartbeat;
pub use icmp::Unreachable;
pub use ip::Malformed;
use ip::Packet;
use table::Table;

/// A TCP flow's two ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Tuple {
    /// Who opened it.
    pub client: SocketAddr,
    /// Whom it wants.
    pub server: SocketAddr,
}

/// What a stack must know at its start.
#[derive(Debug, Clone)]
pub struct Config {
    /// The device's MTU in bytes, at least 1280.
    pub mtu: usize,
    /// The device completes checksums and cuts segments (virtio header).
    pub offload: bool,
    /// This host's addresses on the device. Flows from them cross no lossy link.
    pub own: Vec<IpAddr>,
    /// Addresses that answer echo requests themselves. The first of a family is the hop that says when a request's time
    /// is over: `own` cannot, as a host takes nothing from outside that claims to come from itself.
    pub echo: Vec<IpAddr>,
    /// Whether echo requests to other addresses are carried; otherwise they are refused.
    pub carry_echo: bool,
    /// Addresses that nobody but `own` may use as a source.
    pub reserved: Vec<ipnet::IpNet>,
    /// Whether IPv6 flows are carried; otherwise they are refused at once.
    pub ipv6: bool,
    /// Unguessable; seeds initial sequence numbers.
    pub seed: u64,
    /// Bytes that flows may take, rings included. Beyond, those that are stale make room, and newcomers wait.
    pub memory: usize,
    /// What stands for the client that has an address, where each client has its part. Each of `own` stands for itself.
    pub client: fn(IpAddr) -> IpAddr,
    /// Handshakes of one client, other than this host, that may be under way: 256 at most.
    pub handshakes: usize,
    /// Whether [`Stack::ended`] is asked.
    pub tell_ended: bool,
}

/// What one packet brought.
#[derive(Debug)]
pub enum Event<'a> {
    /// A new flow. Its SYN-ACK is held until the stream is accepted.
    Incoming(Tuple, FlowStream),
    /// A UDP datagram; the stack keeps no state for it.
    Datagram(Datagram<'a>),
    /// An echo request to a host that is not ours; the stack keeps no state for it.
    Echo(Echo<'a>),
    /// A packet that its pieces have made up. It is to be ingested like one that was read, with a
    /// [plain](VirtioHeader::PLAIN) header: it may be another worker's.
    Whole(Vec<u8>),
    /// A TCP segment of no flow here, or an ICMP error about one. Another worker may own the flow; if none does,
    /// [`Stack::reset`] answers what is to be answered.
    Stray(Tuple),
}

impl Config {
    /// Who we are to a client of this family that asks for the hops on its way.
    fn hop(&self, client: IpAddr) -> Option<IpAddr> {
        self.echo.iter().find(|own| own.is_ipv4() == client.is_ipv4()).copied()
    }
}

/// The stack of one worker.
pub struct Stack {
    config: Config,
    table: Table,
    reassembly: fragment::Reassembly,
    next_id: u32,
    counters: Counters,
    /// For errors about protocols that nobody speaks.
    errors: allowance::Allowance,
}

impl Stack {
    /// An empty stack.
    #[must_use]
    pub fn new(config: Config, now: Instant) -> Self {
        let table = Table::new(&config, now);
        let next_id = (config.seed >> 32) as u32;
        let (reassembly, counters) = (fragment::Reassembly::default(), Counters::default());
        Self { config, table, reassembly, next_id, counters, errors: allowance::Allowance::new(now) }
    }

    /// Answers a segment that belongs to no flow, by the rules of RFC 9293 section 3.10.7.1. An error about one gets no
    /// answer.
    pub fn reset(&mut self, frame: Frame<'_>, now: Instant, transmit: &mut dyn Transmit) {
        match Packet::parse(frame.packet) {
            Ok(packet) if packet.protocol == ip::TCP => {
                let instead = tcp::unacknowledging(&packet);
                self.table.reset(instead.as_deref().unwrap_or(packet.bytes), now, transmit);
            }
            _ => self.counters.ignored += 1,
        }
    }

    /// Emits what flows have to say, and runs their timers. Returns whether something is left for the next turn, either
    /// because a flow used up its share or because `transmit` was not ready.
    pub fn poll(&mut self, now: Instant, transmit: &mut dyn Transmit) -> bool {
        self.table.poll(now, transmit)
    }

    /// When [`poll`](Self::poll) is due even if nothing else happens.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        self.table.deadline()
    }

    /// Wakes `waker` as soon as a flow has something to emit. Returns true if one has already.
    #[must_use]
    pub fn register(&self, waker: &Waker) -> bool {
        self.table.register(waker)
    }

    /// Writes a datagram to a client. False: the device was full, or the payload too long, and it was dropped.
    pub fn send(&mut self, from: SocketAddr, to: SocketAddr, payload: &[u8], transmit: &mut dyn Transmit) -> bool {
        self.next_id = self.next_id.wrapping_add(1);
        let link = datagram::Link { mtu: self.config.mtu, offload: self.config.offload };
        datagram::write(from, to, payload, link, self.next_id, transmit)
    }

    /// Writes datagrams that stand one behind the other in `train` to a client, each `size` bytes long but for the last,
    /// in as few packets as the device cuts for us. False: some were dropped.
    pub fn send_train(
        &mut self,
        from: SocketAddr,
        to: SocketAddr,
        train: &[u8],
        size: NonZeroU16,
        transmit: &mut dyn Transmit,
    ) -> bool {
        let link = datagram::Link { mtu: self.config.mtu, offload: self.config.offload };
        let longest = datagram::longest_train(to, size, link, transmit);
        let mut all = true;
        for part in train.chunks(longest) {
            if part.len() <= usize::from(size.get()) {
                all &= self.send(from, to, part, transmit);
                continue;
            }
            // The kernel counts on from here, one number for each datagram.
            let id = self.next_id.wrapping_add(1);
            self.next_id = self.next_id.wrapping_add(datagram::MOST_SEGMENTS);
            all &= datagram::write_train(from, to, part, size, id, transmit);
        }
        all
    }

    /// Tells a client that its packet, which began with `quoted`, did not arrive.
    pub fn unreachable(&mut self, quoted: &[u8], why: Unreachable, transmit: &mut dyn Transmit) {
        icmp::unreachable(quoted, why, transmit);
    }

    /// Writes the reply of `from` to an echo request of `to`. False: the device was full, or the payload too long, and it
    /// was dropped.
    pub fn reply(&mut self, from: IpAddr, to: IpAddr, reply: &EchoReply<'_>, transmit: &mut dyn Transmit) -> bool {
        self.next_id = self.next_id.wrapping_add(1);
        let link = datagram::Link { mtu: self.config.mtu, offload: self.config.offload };
        echo::write_reply((from, to), reply, link, self.next_id, transmit)
    }

    /// Tells the client `to` what `router` says of its echo request; without a router the word is ours.
    pub fn echo_error(
        &mut self,
        router: Option<IpAddr>,
        to: IpAddr,
        error: &EchoError<'_>,
        transmit: &mut dyn Transmit,
    ) {
        if let Some(from) = router.or_else(|| self.config.hop(to)) {
            echo::write_error((from, to), error, transmit);
        }
    }

    /// Flows that are open or being opened.
    #[must_use]
    pub fn flows(&self) -> usize {
        self.table.len()
    }

    /// Bytes of address space that the rings of flows have taken, which is given back at the end, and the most of it that
    /// may be in memory for the flows of now.
    #[must_use]
    pub fn ring_memory(&self) -> (usize, usize) {
        self.table.ring_memory()
    }

    /// Bytes of [`Config::memory`] that are in use.
    #[must_use]
    pub fn memory(&self) -> usize {
        self.table.memory().0
    }

    /// Whether a flow of these two ends is here.
    #[must_use]
    pub fn knows(&self, tuple: &Tuple) -> bool {
        self.table.knows(tuple)
    }

    /// The flows that have ended since the last call, if [`Config::tell_ended`] is set.
    pub fn ended(&mut self) -> impl Iterator<Item = Tuple> + '_ {
        self.table.ended()
    }

    /// What was counted so far.
    #[must_use]
    pub fn counters(&self) -> Counters {
        Counters { evicted: self.table.memory().1, ..self.counters }
    }

    /// Aborts every flow: their clients see a reset at the next [`poll`](Self::poll).
    pub fn abort_all(&mut self) {
        self.table.abort_all();
    }
}

/// smoltcp's time, counted from `epoch`.
fn since(epoch: Instant, now: Instant) -> smoltcp::time::Instant {
    let micros = now.saturating_duration_since(epoch).as_micros();
    smoltcp::time::Instant::from_micros(i64::try_from(micros).unwrap_or(i64::MAX))
}

/// A flow and the list that marks it, as the modules here pass them around.
type Handle = Rc<std::cell::RefCell<flow::Flow>>;
