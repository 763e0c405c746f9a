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
mod datagram;
mod echo;
mod flow;
mod fragment;
pub mod frame;
mod heartbeat;
mod held;
mod icmp;
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
    /// Handshakes of one source, other than this host, that may be under way: 256 at most.
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

/// What the stack counted since its start. Dropped packets are counted once each, by reason.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct Counters {
    /// Packets read, and those that pieces have made up.
    pub packets: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Dropped: lengths that contradict each other.
    pub bad_length: u64,
    /// Dropped: no IP packet, or a wrong checksum.
    pub bad_header: u64,
    /// Dropped: source routes and senseless extension headers.
    pub bad_options: u64,
    /// Dropped: a source that no packet may carry, or one that is ours.
    pub spoofed: u64,
    /// Pieces of packets.
    pub fragments: u64,
    /// Ignored: multicast, broadcast, and messages of ICMP that are for nobody here.
    pub ignored: u64,
    /// SYNs dropped because too many flows are being opened.
    pub flooded: u64,
    /// Dropped: SYNs and data for which there was no memory.
    pub no_memory: u64,
    /// TCP flows that were ended to make room for others.
    pub evicted: u64,
    /// TCP flows begun.
    pub flows: u64,
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

    /// Takes one packet in. Answers that cannot wait go to `transmit`; what somebody else has to do is returned.
    pub fn ingest<'a>(&'a mut self, frame: Frame<'a>, now: Instant, transmit: &mut dyn Transmit) -> Option<Event<'a>> {
        self.counters.packets += 1;
        self.counters.bytes += frame.packet.len() as u64;
        let packet = match Packet::parse(frame.packet) {
            Ok(packet) => packet,
            Err(why) => {
                self.counters.drop(why);
                return None;
            }
        };
        if !self.admits(&packet) {
            return None;
        }
        if let Some(fragment) = packet.fragment {
            return self.gather(&packet, fragment, now).map(Event::Whole);
        }
        self.deliver(packet, frame.header, now, transmit)
    }

    /// Sorts a whole packet to where it belongs.
    fn deliver<'a>(
        &mut self,
        packet: Packet<'a>,
        header: VirtioHeader,
        now: Instant,
        transmit: &mut dyn Transmit,
    ) -> Option<Event<'a>> {
        let Self { config, table, counters, errors, .. } = self;
        if packet.source.is_ipv6() && !config.ipv6 {
            counters.ignored += u64::from(!refuse_v6(&packet, transmit));
            return None;
        }
        match packet.protocol {
            ip::TCP => {
                let segment = match tcp::Segment::read(&packet, header.checksum_trusted()) {
                    Ok(segment) => segment,
                    Err(why) => {
                        counters.drop(why);
                        return None;
                    }
                };
                table.segment(&packet, &segment, counters, now, transmit)
            }
            ip::UDP => {
                if !header.checksum_trusted() && !datagram::checksum_holds(&packet) {
                    counters.bad_header += 1;
                    return None;
                }
                let datagram = datagram::read(&packet, header.datagram_size());
                counters.bad_length += u64::from(datagram.is_none());
                datagram.map(Event::Datagram)
            }
            _ if icmp::is_echo_request(&packet) => {
                if !header.checksum_trusted() && !icmp::checksum_holds(&packet) {
                    counters.bad_header += 1;
                    return None;
                }
                pass_echo(config, counters, &packet, transmit)
            }
            _ => {
                let told =
                    icmp::TooBig::read(&packet).filter(|_| header.checksum_trusted() || icmp::checksum_holds(&packet));
                match told {
                    Some(message) if !table.too_big(&message, now) => Some(Event::Stray(message.tuple)),
                    Some(_) => None,
                    None => {
                        counters.ignored += u64::from(!icmp::unknown_protocol(&packet, errors, now, transmit));
                        None
                    }
                }
            }
        }
    }

    /// Adds a piece to its packet; returns that once it is whole.
    fn gather(&mut self, packet: &Packet<'_>, fragment: ip::Fragment, now: Instant) -> Option<Vec<u8>> {
        self.counters.fragments += 1;
        let whole = self.reassembly.add(packet, fragment, now).and_then(|whole| match whole {
            // Pieces of a piece have no honest source.
            Some(whole) if Packet::parse(&whole)?.fragment.is_some() => Err(Malformed::Options),
            whole => Ok(whole),
        });
        whole.unwrap_or_else(|why| {
            self.counters.drop(why);
            None
        })
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

    fn admits(&mut self, packet: &Packet<'_>) -> bool {
        let reserved = self.config.reserved.iter().any(|range| range.contains(&packet.source));
        if reserved && !self.config.own.contains(&packet.source) {
            self.counters.spoofed += 1;
            return false;
        }
        if ip::is_not_unicast(packet.destination) {
            self.counters.ignored += 1;
            return false;
        }
        true
    }
}

/// An echo request that is not for us to answer goes on, unless its time is over here (RFC 1812 section 5.3.1).
fn pass_echo<'a>(
    config: &Config,
    counters: &mut Counters,
    packet: &Packet<'a>,
    transmit: &mut dyn Transmit,
) -> Option<Event<'a>> {
    if config.echo.contains(&packet.destination) {
        icmp::echo_reply(packet, transmit);
        return None;
    }
    let Some(echo) = echo::read(packet) else {
        counters.bad_length += 1;
        return None;
    };
    let told = match config.hop(echo.source) {
        _ if !config.carry_echo => icmp::unreachable(packet.bytes, Unreachable::Prohibited, transmit),
        _ if echo.ttl > 1 => return Some(Event::Echo(echo)),
        Some(hop) => icmp::time_exceeded(hop, packet.bytes, transmit),
        None => false,
    };
    counters.ignored += u64::from(!told);
    None
}

/// `ipv6: false`: codes that programs take as "no IPv6 here" at once, TCP as ENETUNREACH, UDP as ECONNREFUSED.
/// False: the packet is one that must not be answered.
fn refuse_v6(packet: &Packet<'_>, transmit: &mut dyn Transmit) -> bool {
    let why = if packet.protocol == ip::UDP { Unreachable::Port } else { Unreachable::Network };
    icmp::unreachable(packet.bytes, why, transmit)
}

impl Counters {
    /// The sums of both.
    #[must_use]
    pub fn plus(&self, other: &Self) -> Self {
        Self {
            packets: self.packets + other.packets,
            bytes: self.bytes + other.bytes,
            bad_length: self.bad_length + other.bad_length,
            bad_header: self.bad_header + other.bad_header,
            bad_options: self.bad_options + other.bad_options,
            spoofed: self.spoofed + other.spoofed,
            fragments: self.fragments + other.fragments,
            ignored: self.ignored + other.ignored,
            flooded: self.flooded + other.flooded,
            no_memory: self.no_memory + other.no_memory,
            evicted: self.evicted + other.evicted,
            flows: self.flows + other.flows,
        }
    }

    fn drop(&mut self, why: Malformed) {
        match why {
            Malformed::Length => self.bad_length += 1,
            Malformed::Header => self.bad_header += 1,
            Malformed::Options => self.bad_options += 1,
            Malformed::Martian => self.spoofed += 1,
        }
    }
}

/// What a packet needs before it is ingested, where several stacks share a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Claim {
    /// It opens this flow, which must have one owner.
    Flow(Tuple),
    /// It is a piece of this packet, whose pieces must come together.
    Piece(IpAddr, IpAddr, u32),
}

/// Says what `packet` needs before it is ingested. Nearly always nothing, which costs a few comparisons.
#[must_use]
pub fn claim(packet: &[u8]) -> Option<Claim> {
    let syn = |at: usize| packet.get(at + 13).is_some_and(|flags| flags & 2 != 0);
    let look = match packet.first()? >> 4 {
        4 if packet.len() >= 20 => {
            packet[6] & 0x3f != 0 || packet[7] != 0 || packet[9] == ip::TCP && syn(usize::from(packet[0] & 15) * 4)
        }
        6 if packet.len() >= 40 => packet[6] != ip::UDP && (packet[6] != ip::TCP || syn(40)),
        _ => false,
    };
    if !look {
        return None;
    }
    let packet = Packet::parse(packet).ok()?;
    if let Some(fragment) = packet.fragment {
        return Some(Claim::Piece(packet.source, packet.destination, fragment.id));
    }
    if packet.protocol != ip::TCP {
        return None;
    }
    // The checksum is looked at when the packet is ingested.
    tcp::Segment::read(&packet, true).ok().filter(tcp::Segment::opens).map(|segment| Claim::Flow(segment.tuple))
}

/// smoltcp's time, counted from `epoch`.
fn since(epoch: Instant, now: Instant) -> smoltcp::time::Instant {
    let micros = now.saturating_duration_since(epoch).as_micros();
    smoltcp::time::Instant::from_micros(i64::try_from(micros).unwrap_or(i64::MAX))
}

/// A flow and the list that marks it, as the modules here pass them around.
type Handle = Rc<std::cell::RefCell<flow::Flow>>;
