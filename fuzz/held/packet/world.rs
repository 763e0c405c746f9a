//! A stack, the tasks of its flows, and the clock, all driven by the input.

use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU16;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use tunproxy::net::client_of;
use tunproxy::stack::{
    self, Config, EchoError, EchoReply, Event, FlowStream, Frame, Refusal, Stack, Unreachable, VirtioHeader,
};

use super::bytes::Bytes;
use super::device::Device;
use super::segment::{self, CLIENTS, SERVERS};

/// Streams whose tasks are kept; further flows are let go.
const MOST_FLOWS: usize = 64;
/// A stack that is not through after so many turns at one instant never will be.
const MOST_TURNS: usize = 20_000;
/// What smoltcp repeats of a full window goes no further than its port, and may take so many turns of which nothing is seen.
const MOST_IDLE_TURNS: usize = 64;
/// What a flow may take of address space: a pair of rings of each size that there is, and of each eight are made at once.
const MEMORY_OF_FLOW: usize = 2 * ((1 << 20) + (256 << 10) + (64 << 10) + (16 << 10) + (4 << 10));

pub(crate) struct World {
    stack: Stack,
    device: Device,
    now: Instant,
    flows: Vec<FlowStream>,
    ingested: u64,
    most: usize,
    /// What flows may take.
    memory: usize,
    /// What was ingested last, for errors to quote.
    last: Vec<u8>,
}

impl World {
    pub(crate) fn new(choice: u8) -> Self {
        let bit = |n: u8| choice >> n & 1 != 0;
        let own = vec![IpAddr::from(CLIENTS[2]), IpAddr::from(segment::v6(CLIENTS[2]))];
        let config = Config {
            mtu: if bit(1) { 9000 } else { 1500 },
            offload: bit(0),
            own,
            echo: vec![IpAddr::from(SERVERS[1]), IpAddr::from(segment::v6(SERVERS[1]))],
            reserved: vec!["198.18.0.0/16".parse().expect("a range"), "fd00::/64".parse().expect("a range")],
            carry_echo: !bit(5),
            ipv6: !bit(2),
            seed: 0x1234_5678_9abc_def0,
            // So little that few flows fill it, or so much that none do.
            memory: if bit(6) { 1 << 20 } else { 1 << 30 },
            client: client_of,
            handshakes: if bit(7) { 8 } else { 256 },
            tell_ended: bit(3),
        };
        let now = Instant::now();
        let mut device = Device::new(&config);
        device.cuts_datagrams &= !bit(4);
        let (memory, stack) = (config.memory, Stack::new(config, now));
        Self { stack, device, now, flows: Vec::new(), ingested: 0, most: 0, memory, last: Vec::new() }
    }

    /// One act. Packets are the most frequent.
    pub(crate) fn act(&mut self, bytes: &mut Bytes<'_>) {
        match bytes.byte() {
            0x00..=0x3f => self.raw(bytes),
            0x40..=0x9f => {
                let packet = segment::tcp(bytes, &self.device.said);
                self.ingest(VirtioHeader::PLAIN, &packet);
            }
            0xa0..=0xaf => {
                let quoted = std::mem::take(&mut self.last);
                let packet = segment::other(bytes, &quoted[..quoted.len().min(600)]);
                self.ingest(VirtioHeader::PLAIN, &packet);
            }
            0xb0..=0xbf => self.turn(),
            0xc0..=0xc7 => self.sleep(bytes),
            0xc8..=0xef => self.task(bytes),
            0xf0..=0xf7 => self.datagrams(bytes),
            0xf8..=0xfb => self.device.room = usize::from(bytes.byte()),
            _ => self.device.room = usize::MAX,
        }
        let (mapped, touched) = self.stack.ring_memory();
        // A flow that is over has its rings as long as its task does not know.
        self.most = self.most.max(self.stack.flows() + self.flows.len());
        assert!(
            touched <= mapped && mapped <= (self.most + 8) * MEMORY_OF_FLOW,
            "{mapped} bytes for {} flows",
            self.most
        );
        assert!(self.stack.memory() <= self.memory, "{} bytes are in use", self.stack.memory());
    }

    /// Bytes as they are, or with their lengths and sums made right, or many times.
    fn raw(&mut self, bytes: &mut Bytes<'_>) {
        let kind = bytes.byte();
        let header = if kind & 1 != 0 {
            let mut header = [0; VirtioHeader::LEN];
            for byte in &mut header {
                *byte = bytes.byte();
            }
            VirtioHeader::parse(header)
        } else {
            VirtioHeader::PLAIN
        };
        let length = usize::from(bytes.word()) % 2048;
        let mut packet = bytes.take(length).to_vec();
        if kind & 4 != 0 {
            // As long as a super-packet.
            let fill = packet.last().copied().unwrap_or_default();
            packet.resize(usize::from(bytes.word()).max(packet.len()), fill);
        }
        if kind & 2 != 0 {
            packet = segment::repaired(packet);
        }
        self.ingest(header, &packet);
        if kind & 8 != 0 {
            // The same once more, as a network may do.
            self.ingest(header, &packet);
        }
    }

    fn ingest(&mut self, header: VirtioHeader, packet: &[u8]) {
        self.last = packet.to_vec();
        let mut whole = None;
        let _ = stack::claim(packet);
        // Transmission cannot fail at ingest: what cannot wait is sent or lost.
        let frame = Frame { header, packet };
        self.ingested += 1;
        match self.stack.ingest(frame, self.now, &mut self.device) {
            Some(Event::Incoming(tuple, stream)) => {
                assert_ne!(tuple.client.port(), 0);
                if self.flows.len() < MOST_FLOWS {
                    self.flows.push(stream);
                }
            }
            Some(Event::Whole(packet)) => whole = Some(packet),
            Some(Event::Stray(tuple)) => {
                assert!(!self.stack.knows(&tuple));
                self.stack.reset(frame, self.now, &mut self.device);
            }
            Some(Event::Datagram(datagram)) => {
                let (from, to) = (datagram.destination, datagram.source);
                let payload = datagram.payload[..datagram.payload.len().min(300)].to_vec();
                let quoted = datagram.packet.to_vec();
                if payload.first().is_some_and(|byte| byte & 1 != 0) {
                    self.stack.send(from, to, &payload, &mut self.device);
                } else if self.device.room > 0 {
                    self.stack.unreachable(&quoted, Unreachable::Port, &mut self.device);
                }
            }
            Some(Event::Echo(echo)) => {
                let (client, host) = (echo.source, echo.destination);
                let (head, payload) = (echo.head.to_vec(), echo.payload.to_vec());
                let (id, sequence, ttl, tos) = (echo.id, echo.sequence, echo.ttl, echo.tos);
                assert!(ttl > 1, "its time is over");
                match payload.first() {
                    Some(kind) if kind & 1 != 0 => {
                        let payload = &payload[..payload.len().min(500)];
                        let router = (kind & 2 != 0).then_some(host);
                        let quoted = (kind & 4 != 0).then_some(ttl - 1);
                        let error =
                            EchoError { kind: *kind, code: sequence as u8, word: 0, head: &head, ttl: quoted, payload };
                        if self.device.room > 0 {
                            self.stack.echo_error(router, client, &error, &mut self.device);
                        }
                    }
                    _ => {
                        let reply = EchoReply { id, sequence, payload: &payload, ttl, tos };
                        self.stack.reply(host, client, &reply, &mut self.device);
                    }
                }
            }
            None => {}
        }
        if let Some(packet) = whole {
            assert!(packet.len() <= 65_535 + 40);
            self.ingest(VirtioHeader::PLAIN, &packet);
        }
        let counted = self.stack.counters();
        assert_eq!(counted.packets, self.ingested, "each packet is counted once");
    }

    /// What the worker does after a batch.
    fn turn(&mut self) {
        let mut idle = 0;
        for _ in 0..MOST_TURNS {
            let sent = self.device.sent;
            let more = self.stack.poll(self.now, &mut self.device);
            if !more || self.device.room == 0 {
                self.stack.ended().for_each(drop);
                return;
            }
            idle = if self.device.sent > sent { 0 } else { idle + 1 };
            assert!(idle <= MOST_IDLE_TURNS, "there is more, and none of it is sent");
        }
        panic!("a turn that does not end");
    }

    fn sleep(&mut self, bytes: &mut Bytes<'_>) {
        match bytes.byte() {
            // To the next deadline, as a worker that nobody disturbs.
            0..=0x7f => self.now = self.stack.deadline().unwrap_or(self.now).max(self.now),
            long => self.now += Duration::from_millis(1 << (long & 0x0f)),
        }
        self.turn();
    }

    /// A task does something with its flow.
    fn task(&mut self, bytes: &mut Bytes<'_>) {
        let act = bytes.byte();
        let Some(count) = (!self.flows.is_empty()).then_some(self.flows.len()) else { return };
        let at = usize::from(bytes.byte()) % count;
        let mut cx = Context::from_waker(Waker::noop());
        let flow = &mut self.flows[at];
        let most = usize::from(bytes.word());
        match act % 10 {
            0 | 1 => flow.accept(),
            2 => {
                let refusals = [Refusal::Reset, Refusal::Network, Refusal::Host, Refusal::Prohibited, Refusal::Silent];
                self.flows.swap_remove(at).refuse(refusals[most % 5]);
            }
            3 => drop(self.flows.swap_remove(at)),
            4 => drop(flow.poll_recv_with(&mut cx, |_, data| Poll::Ready(Ok(data.len().min(most))))),
            5 | 6 => {
                let write = |_: &mut Context<'_>, space: &mut [u8]| {
                    let put = space.len().min(most);
                    space[..put].fill(act);
                    Poll::Ready(Ok(put))
                };
                drop(flow.poll_send_with(&mut cx, write));
            }
            7 => flow.shutdown(),
            8 => flow.abort(),
            _ => {
                let _ = (flow.poll_gone(&mut cx), flow.poll_open(&mut cx), flow.poll_flushed(&mut cx));
                let _ = flow.poll_recv_with(&mut cx, |_, _| Poll::Pending);
            }
        }
    }

    fn datagrams(&mut self, bytes: &mut Bytes<'_>) {
        let six = bytes.byte() & 1 != 0;
        let address = |four: [u8; 4]| if six { IpAddr::from(segment::v6(four)) } else { IpAddr::from(four) };
        let (from, to) = (SocketAddr::new(address(SERVERS[0]), 53), SocketAddr::new(address(CLIENTS[0]), 4000));
        let payload = vec![7; usize::from(bytes.word())];
        match NonZeroU16::new(bytes.word()) {
            Some(size) => self.stack.send_train(from, to, &payload, size, &mut self.device),
            None => self.stack.send(from, to, &payload, &mut self.device),
        };
    }

    /// All tasks end, and with them, in time, all that the stack has of their flows.
    pub(crate) fn end(mut self) {
        self.device.room = usize::MAX;
        self.flows.clear();
        self.stack.abort_all();
        for _ in 0..MOST_TURNS {
            self.turn();
            match self.stack.deadline() {
                Some(deadline) => self.now = deadline.max(self.now),
                None => break,
            }
        }
        assert_eq!((self.stack.flows(), self.stack.deadline()), (0, None), "something is left");
    }
}
