//! A tunnel on a pair of sockets in place of a device: what goes in, what comes out, and on which queue.

use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;

use arc_swap::ArcSwap;
use tokio::net::UnixDatagram;
use tokio::task::{LocalSet, spawn_local};
use tokio::time::timeout;

use super::*;
use crate::dispatch::{Core, Counters, Router};
use crate::dns::{self, Filter, FilterMode, Wildcards};
use crate::net::{Lookup, client_of};
use crate::outbound::{Context, Egress, Outbounds, Roots};
use crate::platform::{Dialer, Framing};
use crate::profile::{Mode, Report};
use crate::stack::VirtioHeader;

const CLIENT: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 9);
const SERVER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 53);
const TCP: u8 = 6;
const UDP: u8 = 17;
const SYN: u8 = 2;
const RST: u8 = 4;
const ACK: u8 = 16;

/// The far end of one queue.
struct Device {
    socket: UnixDatagram,
    tunnel: Rc<Tunnel>,
}

impl Device {
    /// The program sends `packet`.
    async fn put(&self, packet: &[u8]) {
        self.socket.send(&[&[0; 10], packet].concat()).await.unwrap();
    }

    /// A packet for the program.
    async fn take(&self) -> Vec<u8> {
        let mut buffer = vec![0; 70_000];
        let length = self.socket.recv(&mut buffer).await.unwrap();
        buffer[10..length].to_vec()
    }
}

fn core(nameservers: Vec<dns::Source>) -> Arc<Core> {
    let mode = dns::Mode::FakeIp {
        range: "198.18.0.0/16".parse().unwrap(),
        range6: None,
        filter: Filter::new(Wildcards::default(), FilterMode::Blacklist),
        ttl: 1,
    };
    let dialer = Dialer::default();
    let runtime = tokio::runtime::Handle::current();
    let (ipv6, tracers, log) = (false, Arc::default(), None);
    let config = dns::Config { ipv6, mode, nameservers, tracers, dialer: dialer.clone(), log, runtime };
    let dns = Arc::new(Dns::open(config).unwrap());
    let lookup: Arc<dyn Lookup> = dns.clone();
    let context = Context { egress: Egress::new(dialer, lookup), roots: Roots::default() };
    let outbounds = Outbounds::build(&[], &[], &context, &mut Report::new("", ""));
    let router = Router::new(Mode::Rule, Vec::new(), |name| outbounds.index(name)).unwrap();
    Arc::new(Core {
        router: ArcSwap::from_pointee(router),
        outbounds: Arc::new(outbounds),
        dns,
        counters: Arc::new(Counters::default()),
        udp_timeout: Duration::from_secs(60),
        icmp_timeout: Duration::from_secs(60),
        echo_ids: Arc::default(),
        own: None,
        carried: Arc::default(),
        mappings: Arc::default(),
        memory: 1 << 30,
    })
}

/// As many running tunnels as there are to be workers. To be called within a `LocalSet`.
fn start(workers: usize) -> Vec<Device> {
    start_with(&core(Vec::new()), workers)
}

fn start_with(core: &Arc<Core>, workers: usize) -> Vec<Device> {
    let device = |crew| {
        let (here, there) = std::os::unix::net::UnixDatagram::pair().unwrap();
        here.set_nonblocking(true).unwrap();
        socket2::SockRef::from(&there).set_send_buffer_size(8192).unwrap();
        let queue = TunQueue::from_descriptor(OwnedFd::from(there), Framing::Offload).unwrap();
        let config = stack::Config {
            mtu: 1500,
            offload: true,
            own: Vec::new(),
            echo: Vec::new(),
            carry_echo: true,
            reserved: Vec::new(),
            ipv6: true,
            seed: 1,
            memory: usize::MAX,
            client: client_of,
            handshakes: usize::MAX,
            tell_ended: workers > 1,
        };
        let hijack = Hijack::new(vec![(None, 53)], &[]);
        let dispatcher = Dispatcher::new(Arc::clone(core));
        let tunnel = Rc::new(Tunnel::new(queue, config, hijack, crew, dispatcher).unwrap());
        let running = Rc::clone(&tunnel);
        spawn_local(async move { running.run().await });
        Device { socket: UnixDatagram::from_std(here).unwrap(), tunnel }
    };
    Crew::of(workers).into_iter().map(device).collect()
}

fn sum(bytes: &[u8]) -> [u8; 2] {
    let words = bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | pair.get(1).copied().map_or(0, u32::from));
    let mut sum: u32 = words.sum();
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!(sum as u16)).to_be_bytes()
}

/// An IPv4 packet, or the piece of one that begins at `offset`.
fn ip(protocol: u8, id: u16, offset: usize, more: bool, body: &[u8]) -> Vec<u8> {
    let length = (20 + body.len() as u16).to_be_bytes();
    let place = (offset as u16 / 8 + if more { 0x2000 } else { 0 }).to_be_bytes();
    let id = id.to_be_bytes();
    let mut packet =
        [&[0x45, 0, length[0], length[1], id[0], id[1], place[0], place[1], 64, protocol, 0, 0][..]].concat();
    packet.extend(CLIENT.octets());
    packet.extend(SERVER.octets());
    let sum = sum(&packet);
    packet[10..12].copy_from_slice(&sum);
    packet.extend_from_slice(body);
    packet
}

/// A transport header and its payload, with the checksum at `at` made right.
fn sealed(protocol: u8, mut body: Vec<u8>, at: usize) -> Vec<u8> {
    let length = (body.len() as u16).to_be_bytes();
    let pseudo = [&CLIENT.octets()[..], &SERVER.octets(), &[0, protocol], &length].concat();
    let sum = sum(&[&pseudo[..], &body].concat());
    body[at..at + 2].copy_from_slice(&sum);
    body
}

/// A question for the address of a name that nobody has asked for yet.
fn question(id: u16) -> Vec<u8> {
    let label = format!("name-{id:05}");
    let mut message = [&id.to_be_bytes()[..], &[1, 0, 0, 1, 0, 0, 0, 0, 0, 0]].concat();
    for part in [&label[..], "example"] {
        message.push(part.len() as u8);
        message.extend(part.bytes());
    }
    message.extend([0, 0, 1, 0, 1]);
    message
}

fn datagram(id: u16) -> Vec<u8> {
    datagram_of(question(id))
}

fn datagram_of(question: Vec<u8>) -> Vec<u8> {
    let length = (8 + question.len() as u16).to_be_bytes();
    let header = [&4000u16.to_be_bytes()[..], &53u16.to_be_bytes(), &length, &[0, 0]].concat();
    ip(UDP, 0, 0, false, &sealed(UDP, [header, question].concat(), 6))
}

/// A segment with these flags, numbers and payload.
fn segment(flags: u8, sequence: u32, acknowledgement: u32, payload: &[u8]) -> Vec<u8> {
    let mut body = [&4000u16.to_be_bytes()[..], &53u16.to_be_bytes()].concat();
    body.extend(sequence.to_be_bytes());
    body.extend(acknowledgement.to_be_bytes());
    body.extend([5 << 4, flags, 0xff, 0xff, 0, 0, 0, 0]);
    body.extend_from_slice(payload);
    sealed(TCP, body, 16)
}

fn word(packet: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(packet[at..at + 4].try_into().unwrap())
}

/// The next packet on any of two queues, and on which.
async fn either(devices: &[Device]) -> (usize, Vec<u8>) {
    tokio::select! {
        packet = devices[0].take() => (0, packet),
        packet = devices[1].take() => (1, packet),
    }
}

#[tokio::test]
async fn a_flow_whose_segments_come_in_pieces_is_one_flow_on_whatever_queue_they_come() {
    let test = async {
        let devices = start(2);
        let syn = segment(SYN, 999, 0, &[]);
        devices[0].put(&ip(TCP, 7, 0, true, &syn[..8])).await;
        devices[0].put(&ip(TCP, 7, 8, false, &syn[8..])).await;
        let (owner, answer) = either(&devices).await;
        assert_eq!((answer[33], word(&answer, 28)), (SYN | ACK, 1000));
        let mut expected = word(&answer, 24).wrapping_add(1);
        let mut next = 1000;
        devices[1 - owner].put(&ip(TCP, 0, 0, false, &segment(ACK, next, expected, &[]))).await;
        // Pieces are gathered by the worker that the packet's number names: now the flow's owner, now the other.
        for id in 0..16u16 {
            let question = question(id);
            let question = [&(question.len() as u16).to_be_bytes()[..], &question].concat();
            let whole = segment(ACK, next, expected, &question);
            next += question.len() as u32;
            let queue = &devices[usize::from(id) % 2];
            queue.put(&ip(TCP, id, 24, false, &whole[24..])).await;
            queue.put(&ip(TCP, id, 0, true, &whole[..24])).await;
            let answer = loop {
                let (queue, packet) = either(&devices).await;
                assert_eq!((queue, packet[33] & 4), (owner, 0), "an answer of the owner, and no reset");
                if packet.len() > 40 {
                    break packet;
                }
            };
            assert_eq!((word(&answer, 24), word(&answer, 28)), (expected, next));
            assert_eq!(answer[42..44], id.to_be_bytes());
            expected = expected.wrapping_add(answer.len() as u32 - 40);
        }
        assert_eq!(devices.iter().map(|device| device.tunnel.flows()).sum::<usize>(), 1);
    };
    LocalSet::new().run_until(timeout(Duration::from_secs(60), test)).await.expect("every question is answered");
}

#[tokio::test]
async fn a_syn_whose_tuple_was_let_go_of_on_its_way_to_another_worker_opens_a_flow_with_an_owner() {
    let test = async {
        let devices = start(2);
        let hand = |packet: &[u8]| devices[1].tunnel.crew.borrow().hand(0, VirtioHeader::PLAIN, packet);
        let is_owned = || {
            let tuple = Tuple { client: (CLIENT, 4000).into(), server: (SERVER, 53).into() };
            devices[1].tunnel.crew.borrow().owner(&tuple) == Some(0)
        };
        let mut torn = segment(SYN, 999, 0, &[]);
        torn[16] ^= 1;
        // Nobody has the tuple: its flow has ended since another worker looked.
        assert!(hand(&ip(TCP, 0, 0, false, &segment(SYN, 999, 0, &[]))));
        let (queue, answer) = either(&devices).await;
        assert_eq!((queue, answer[33], is_owned()), (0, SYN | ACK, true));
        // The kernel may not have learnt yet by which queue the flow goes.
        let question = [&(question(7).len() as u16).to_be_bytes()[..], &question(7)].concat();
        let expected = word(&answer, 24).wrapping_add(1);
        devices[1].put(&ip(TCP, 0, 0, false, &segment(ACK, 1000, expected, &question))).await;
        loop {
            let (queue, packet) = either(&devices).await;
            assert_eq!((queue, packet[33] & RST), (0, 0), "an answer of the owner, and no reset");
            if packet.len() > 40 {
                break;
            }
        }
        let next = 1000 + question.len() as u32;
        devices[1].put(&ip(TCP, 0, 0, false, &segment(RST, next, 0, &[]))).await;
        while is_owned() {
            yield_now().await;
        }
        // What opens no flow leaves no owner.
        assert!(hand(&ip(TCP, 0, 0, false, &torn)));
        assert!(hand(&datagram(8)));
        either(&devices).await;
        assert!(!is_owned());
    };
    LocalSet::new().run_until(timeout(Duration::from_secs(60), test)).await.expect("an answer");
}

#[tokio::test]
async fn a_packet_that_the_device_did_not_take_leaves_as_soon_as_it_does() {
    let test = async {
        let device = &start(1)[0];
        let mut asked = 0;
        while !device.tunnel.writer.borrow().is_blocked() {
            device.put(&datagram(asked)).await;
            asked += 1;
            yield_now().await;
        }
        // The program reads again; nothing else happens.
        let mut buffer = [0; 2000];
        let mut answered = Vec::new();
        while let Ok(length) = device.socket.try_recv(&mut buffer) {
            answered.push(buffer[..length][38..40].to_vec());
        }
        assert!(!answered.is_empty());
        let late = device.take().await;
        assert!(!answered.contains(&late[28..30].to_vec()), "it had not come before");
        while device.socket.try_recv(&mut buffer).is_ok() {}
        device.put(&datagram(60_000)).await;
        while device.take().await[28..30] != 60_000u16.to_be_bytes() {}
    };
    LocalSet::new().run_until(timeout(Duration::from_secs(60), test)).await.expect("the packet comes");
}

#[tokio::test]
async fn questions_that_wait_for_a_silent_nameserver_are_limited_for_each_source() {
    let test = async {
        let silent = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let upstream = dns::Upstream { address: silent.local_addr().unwrap(), tcp_only: false };
        let core = core(vec![upstream.into()]);
        let device = &start_with(&core, 1)[0];
        let asked = super::MOST_QUESTIONS_OF_SOURCE as u16 + 50;
        for id in 0..asked {
            // The same name again and again, of a type that only nameservers know.
            let mut question = question(7);
            question[..2].copy_from_slice(&id.to_be_bytes());
            let kind = question.len() - 3;
            question[kind] = 16;
            device.put(&datagram_of(question)).await;
        }
        while core.dns.counters().snapshot().queries < asked.into() {
            yield_now().await;
        }
        assert_eq!(core.dns.counters().snapshot().dropped, 50);
        // What is asked over TCP needs the same places.
        let segment_of = |flags, sequence, expected, payload: &[u8]| {
            ip(TCP, 0, 0, false, &segment(flags, sequence, expected, payload))
        };
        let of_tcp = async || loop {
            let packet = device.take().await;
            if packet[9] == TCP && (packet.len() > 40 || packet[33] & SYN != 0) {
                break packet;
            }
        };
        device.put(&segment_of(SYN, 999, 0, &[])).await;
        let expected = word(&of_tcp().await, 24).wrapping_add(1);
        let mut question = question(8);
        let kind = question.len() - 3;
        question[kind] = 16;
        let framed = [&(question.len() as u16).to_be_bytes()[..], &question].concat();
        device.put(&segment_of(ACK, 1000, expected, &framed)).await;
        assert_eq!(of_tcp().await[45] & 0xf, 2, "SERVFAIL");
        assert_eq!(core.dns.counters().snapshot().dropped, 51, "and at once");
    };
    LocalSet::new().run_until(timeout(Duration::from_secs(60), test)).await.expect("all have been asked");
}
