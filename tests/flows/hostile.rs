//! Whatever comes in: no panic, each drop counted once, and the flows beside it go on.

use std::net::{IpAddr, SocketAddr};

use proptest::prelude::*;
use tunproxy::stack::{Counters, VirtioHeader};

use crate::world::packet::{self, ACK, FIN, PSH, RST, SYN, Tcp, echo, header_length, seal, set_length, udp};
use crate::world::{Conn, Flow, Net, Peer, Random, World, on, on_every_net, pattern};

fn dropped(counters: Counters) -> u64 {
    counters.bad_length
        + counters.bad_header
        + counters.bad_options
        + counters.spoofed
        + counters.ignored
        + counters.flooded
}

/// A flow beside the storm.
struct Bystander {
    conn: Conn,
    flow: Flow,
    said: usize,
}

impl Bystander {
    async fn new(world: &World) -> Self {
        let conn = world.connect(80);
        let flow = world.arrival().await;
        flow.accept();
        conn.established().await.unwrap();
        Self { conn, flow, said: 0 }
    }

    /// Moves some bytes both ways.
    async fn talk(&mut self) {
        let part = pattern(self.said, 3000);
        self.said += part.len();
        self.conn.write(&part).await.unwrap();
        let mut heard = Vec::new();
        while heard.len() < part.len() {
            heard.extend(self.flow.read(usize::MAX).await.unwrap());
        }
        assert!(heard == part);
        self.flow.write(&heard).await.unwrap();
        let mut back = 0;
        while back < part.len() {
            back += self.conn.read().await.unwrap().len();
        }
    }
}

/// Puts `bytes` before the stack and checks that whatever became of it is accounted for exactly once.
fn put(world: &World, header: VirtioHeader, bytes: &[u8]) {
    let (before, written, strays) = (world.stack().counters(), world.emitted(), world.strays());
    let brought = world.ingest(header, bytes);
    let after = world.stack().counters();
    let drops = dropped(after) - dropped(before);
    let fragment = after.fragments > before.fragments;
    // A piece may make a packet whole, which then counts too.
    assert!(after.packets - before.packets <= 1 + u64::from(fragment));
    assert!(drops <= 1, "counted {drops} times: {bytes:02x?}");
    let answered = world.emitted() > written;
    if brought {
        assert_eq!(drops, 0, "{bytes:02x?}");
    } else if !answered && !fragment {
        assert_eq!(drops, 1, "vanished without a trace: {bytes:02x?}");
    } else if answered {
        assert_eq!((drops, strays), (0, world.strays()), "{bytes:02x?}");
    }
}

fn addresses(v6: bool) -> impl Strategy<Value = IpAddr> {
    let four = ["192.0.2.200", "198.18.0.2", "198.18.5.5", "127.0.0.1", "224.0.0.1", "255.255.255.255", "0.0.0.0"];
    let four = [&four[..], &["240.0.0.1", "198.51.100.9", "169.254.1.1", "192.0.2.200"]].concat();
    let six = ["2001:db8:1::200", "fdfe:dcba:9876::2", "::1", "ff02::1", "::", "::ffff:192.0.2.1", "fe80::1"];
    let six = [&six[..], &["2001:db8:2::9", "2001:db8:1::200", "64:ff9b::1"]].concat();
    proptest::sample::select(if v6 { six } else { four }).prop_map(|text| text.parse().unwrap())
}

/// A packet that was right once, of a tuple that no flow has.
fn packets(v6: bool) -> impl Strategy<Value = Vec<u8>> {
    let ends = (addresses(v6), addresses(v6), 0u16..4, 0u16..4);
    let payload = proptest::collection::vec(any::<u8>(), 0..200);
    let options = prop_oneof![
        Just(vec![]),
        Just(vec![2, 4, 5, 0xb4, 4, 2, 1, 3, 3, 7]),
        proptest::collection::vec(prop_oneof![0u8..12, any::<u8>()], 0..40),
    ];
    (ends, any::<u8>(), options, payload, 0u8..4, any::<(u32, u32, u16)>()).prop_map(
        |((from, to, sport, dport), flags, mut options, payload, kind, (sequence, acknowledgement, window))| {
            let (from, to) = (SocketAddr::new(from, sport), SocketAddr::new(to, dport));
            options.truncate(40);
            match kind {
                0 => udp(from, to, &payload),
                1 => echo(from.ip(), to.ip(), 9, &payload),
                _ => Tcp { from, to, flags, sequence, acknowledgement, window, options, payload }.packet(),
            }
        },
    )
}

/// What is done to it.
#[derive(Debug, Clone)]
enum Harm {
    Flip(usize, u8),
    Truncate(usize),
    Extend(Vec<u8>),
    Length(u16),
    DataOffset(u8),
    Fragment(u16),
    Chain(Vec<u8>),
    Seal,
}

fn harms() -> impl Strategy<Value = Vec<Harm>> {
    let harm = prop_oneof![
        (0usize..120, any::<u8>()).prop_map(|(at, bits)| Harm::Flip(at, bits)),
        (0usize..120).prop_map(Harm::Truncate),
        proptest::collection::vec(any::<u8>(), 1..40).prop_map(Harm::Extend),
        any::<u16>().prop_map(Harm::Length),
        any::<u8>().prop_map(Harm::DataOffset),
        any::<u16>().prop_map(Harm::Fragment),
        proptest::collection::vec(prop_oneof![Just(0u8), Just(43), Just(44), Just(60), Just(6), any::<u8>()], 1..12)
            .prop_map(Harm::Chain),
        Just(Harm::Seal),
        Just(Harm::Seal),
    ];
    proptest::collection::vec(harm, 0..5)
}

fn harm(mut bytes: Vec<u8>, harms: &[Harm]) -> Vec<u8> {
    for harm in harms {
        match harm {
            Harm::Flip(at, bits) => {
                if let Some(byte) = bytes.get_mut(*at) {
                    *byte ^= bits;
                }
            }
            Harm::Truncate(length) => bytes.truncate(*length),
            Harm::Extend(more) => {
                bytes.extend(more);
                let total = bytes.len();
                if total >= 40 {
                    set_length(&mut bytes, total);
                }
            }
            Harm::Length(length) if bytes.len() > 6 => {
                let at = if bytes[0] >> 4 == 6 { 4 } else { 2 };
                bytes[at..at + 2].copy_from_slice(&(length % 200).to_be_bytes());
            }
            Harm::DataOffset(offset) => {
                let at = if bytes.first().is_some_and(|byte| byte >> 4 == 6) { 52 } else { 32 };
                if let Some(byte) = bytes.get_mut(at) {
                    *byte = *offset;
                }
            }
            Harm::Fragment(word) if bytes.len() >= 40 && bytes[0] >> 4 == 4 => {
                bytes[6..8].copy_from_slice(&(word & 0x201f).to_be_bytes());
            }
            Harm::Fragment(word) if bytes.len() >= 40 => {
                let next = bytes[6];
                let word = (word & 0x00f9).to_be_bytes();
                bytes.splice(40..40, [next, 0, word[0], word[1], 0, 0, 0, 1]);
                bytes[6] = 44;
                let total = bytes.len();
                set_length(&mut bytes, total);
            }
            Harm::Chain(kinds) if bytes.len() >= 40 && bytes[0] >> 4 == 6 => {
                for kind in kinds {
                    let next = bytes[6];
                    bytes.splice(40..40, [next, 0, 1, 4, 0, 0, 0, 0]);
                    bytes[6] = *kind;
                }
                let total = bytes.len();
                set_length(&mut bytes, total);
            }
            Harm::Seal if bytes.len() >= 40 => {
                let v6 = bytes[0] >> 4 == 6;
                let total = bytes.len();
                if v6 || header_length(&bytes) >= 20 && header_length(&bytes) <= total {
                    set_length(&mut bytes, total);
                    seal(&mut bytes);
                }
            }
            _ => {}
        }
        if bytes.is_empty() {
            break;
        }
    }
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn arbitrary_bytes_are_dropped_and_counted_while_flows_go_on(
        storm in proptest::collection::vec(
            (proptest::collection::vec(any::<u8>(), 0..150), prop_oneof![Just(0x45u8), Just(0x60), any::<u8>()], any::<[u8; 10]>()),
            1..40,
        ),
        v6 in any::<bool>(),
        offload in any::<bool>(),
    ) {
        on(Net::new(offload, v6), move |world| {
            let storm = storm.clone();
            async move {
                let mut bystander = Bystander::new(&world).await;
                for (mut bytes, first, header) in storm {
                    if let Some(byte) = bytes.first_mut() {
                        *byte = first;
                    }
                    put(&world, VirtioHeader::parse(header), &bytes);
                    put(&world, VirtioHeader::PLAIN, &bytes);
                }
                bystander.talk().await;
            }
        });
    }

    #[test]
    fn damaged_packets_are_accounted_for_once_while_flows_go_on(
        v6 in any::<bool>(),
        offload in any::<bool>(),
        seed in any::<u64>(),
        storm in any::<bool>().prop_flat_map(|v6| proptest::collection::vec((packets(v6), harms(), any::<bool>()), 20..80)),
    ) {
        on(Net { seed, ..Net::new(offload, v6) }, move |world| {
            let storm = storm.clone();
            async move {
                let mut bystander = Bystander::new(&world).await;
                for (n, (bytes, harms, vouched)) in storm.into_iter().enumerate() {
                    let mut header = [0; VirtioHeader::LEN];
                    header[0] = u8::from(vouched);
                    put(&world, VirtioHeader::parse(header), &harm(bytes, &harms));
                    if n % 16 == 0 {
                        world.settle().await;
                    }
                }
                bystander.talk().await;
                let flows = world.flows();
                assert_eq!(flows, world.waiting() + 1, "each flow but the bystander's was reported");
            }
        });
    }

    /// Segments with numbers in and around the window, on a flow that is open: its peer is whom nobody can trust.
    #[test]
    fn a_client_that_lies_about_every_number_harms_itself_alone(
        seed in any::<u64>(),
        v6 in any::<bool>(),
        offload in any::<bool>(),
        own in any::<bool>(),
        steps in 50usize..300,
    ) {
        on(Net { seed, own, ..Net::new(offload, v6) }, move |world| async move {
            let mut bystander = Bystander::new(&world).await;
            let mut random = Random::new(seed);
            let mut peer = Peer::new(&world, 3000, random.next() as u32);
            peer.syn();
            let flow = world.arrival().await;
            let held = random.below(2) == 0;
            if !held {
                flow.accept();
            }
            if random.below(4) > 0 && !held {
                peer.finish_handshake().await;
            }
            for _ in 0..steps {
                lie(&world, &mut peer, &flow, &mut random).await;
            }
            bystander.talk().await;
            flow.close();
            world.sleep(std::time::Duration::from_secs(800)).await;
            while world.waiting() > 0 {
                world.arrival().await.close();
            }
            world.settle().await;
            assert_eq!(world.flows(), 1, "only the bystander's is left");
        });
    }
}

async fn lie(world: &World, peer: &mut Peer, flow: &Flow, random: &mut Random) {
    let near = |random: &mut Random| match random.below(8) {
        0 => 0u32,
        1 => random.below(3) as u32,
        2 => (random.below(3) as u32).wrapping_neg(),
        3 => random.below(70_000) as u32,
        4 => (random.below(70_000) as u32).wrapping_neg(),
        5 => (1 << 20) - 5 + random.below(10) as u32,
        6 => random.below(3 << 20) as u32,
        _ => random.next() as u32,
    };
    let flags = [ACK, ACK, ACK | PSH, ACK | FIN, ACK | FIN, SYN, SYN | ACK, RST, RST | ACK, FIN, 0, 255];
    // Resets end the fun, so they are rare.
    let mut choice = flags[random.below(flags.len())];
    if choice & RST != 0 && random.below(10) > 0 {
        choice = ACK;
    }
    let length = [0, 0, 1, 100, 1400, 30_000, 64_000][random.below(7)];
    let mut tcp = peer.segment(choice, &pattern(0, length));
    tcp.sequence = peer.next.wrapping_add(near(random));
    tcp.acknowledgement = peer.expected.wrapping_add(near(random));
    tcp.window = [0, 1, 100, 65_535][random.below(4)];
    if random.below(3) == 0 {
        // A modest one that is mostly taken.
        tcp.sequence = peer.next;
        tcp.acknowledgement = peer.expected;
        if random.below(2) == 0 {
            peer.next = peer.next.wrapping_add(length as u32);
        }
    }
    let mut header = [0; VirtioHeader::LEN];
    header[0] = 1;
    world.ingest(VirtioHeader::parse(header), &tcp.packet());
    match random.below(8) {
        0 => {
            let (read, take) = (flow.clone(), 1 + random.below(100_000));
            world.spawn(async move { drop(read.read(take).await) });
        }
        1 => {
            let (write, length) = (flow.clone(), random.below(100_000));
            world.spawn(async move { drop(write.write(&pattern(0, length)).await) });
        }
        2 => world.sleep(std::time::Duration::from_millis(random.below(3000) as u64)).await,
        3 if random.below(20) == 0 => flow.shutdown(),
        4 | 5 => {
            for seen in peer.replies().await.iter().filter(|seen| seen.is(ACK) || seen.is(ACK | SYN)) {
                peer.expected = seen.sequence.wrapping_add(seen.payload.len() as u32);
            }
        }
        _ => {}
    }
}

/// A client may ignore the window of the SYN-ACK, which is the one that is not scaled.
#[test]
fn data_far_beyond_the_first_window_is_dropped_and_harms_nobody() {
    on_every_net(|world| async move {
        let mut bystander = Bystander::new(&world).await;
        let mut peer = Peer::new(&world, 3000, 500);
        peer.syn();
        let flow = world.arrival().await;
        flow.accept();
        peer.finish_handshake().await;
        let start = peer.next;
        for at in (0..1_600_000).step_by(60_000).rev() {
            peer.next = start.wrapping_add(at);
            peer.send(ACK, &pattern(at as usize, 60_000));
        }
        // Seventeen of these fit into the ring whole.
        let mut got = 0;
        while got < 17 * 60_000 {
            let part = flow.read(usize::MAX).await.unwrap();
            assert!(part == pattern(got, part.len()));
            got += part.len();
        }
        assert!(dropped(world.stack().counters()) > 0);
        bystander.talk().await;
    });
}

#[test]
fn nested_and_oversized_fragments_are_dropped() {
    on_every_net(|world| async move {
        let v6 = world.net().v6;
        let (from, to) = (world.net().peer(), world.net().server());
        let body =
            udp(SocketAddr::new(from, 5), SocketAddr::new(to, 5), &[0; 400])[if v6 { 40 } else { 20 }..].to_vec();
        if v6 {
            // A fragment whose content is a fragment: the inner one must not pass for a whole packet.
            let inner = [&[17, 0, 0, 8, 0, 0, 0, 7][..], &body].concat();
            for (offset, more, part) in [(0u16, 1u16, &inner[..200]), (200, 0, &inner[200..])] {
                let word = (offset | more).to_be_bytes();
                let fragment = [&[44, 0, word[0], word[1], 0, 0, 0, 3][..], part].concat();
                world.inject(&packet::ip(from, to, 44, &fragment));
            }
        } else {
            // Options in the first header only: together they are longer than a packet can be.
            let mut rest = Vec::new();
            for (n, part) in vec![7u8; 65_500].chunks(32_000).enumerate() {
                let last = n == 2;
                let word = (n * 4000) as u16 | if last { 0 } else { 0x2000 };
                let mut piece = packet::ip(from, to, 17, part);
                if n == 0 {
                    piece.splice(20..20, [1u8; 40]);
                    piece[0] = 0x4f;
                }
                piece[6..8].copy_from_slice(&word.to_be_bytes());
                let total = piece.len();
                set_length(&mut piece, total);
                rest.push(piece);
            }
            rest.iter().rev().for_each(|piece| world.inject(piece));
        }
        assert!(world.datagrams().is_empty());
        assert_eq!(dropped(world.stack().counters()), 1, "{:?}", world.stack().counters());
    });
}

#[test]
fn sources_that_may_not_be_are_dropped_as_spoofed() {
    on_every_net(|world| async move {
        let v6 = world.net().v6;
        let spoofed: &[&str] = if v6 {
            &["::1", "::", "ff02::1", "fdfe:dcba:9876::9", "::ffff:10.0.0.1"]
        } else {
            &["127.0.0.1", "0.0.0.0", "224.0.0.5", "255.255.255.255", "198.18.0.9"]
        };
        let server = SocketAddr::new(world.net().server(), 80);
        for (n, text) in spoofed.iter().enumerate() {
            let from = SocketAddr::new(text.parse().unwrap(), 1000);
            put(&world, VirtioHeader::PLAIN, &Tcp::new(from, server, SYN).packet());
            put(&world, VirtioHeader::PLAIN, &udp(from, server, b"x"));
            put(&world, VirtioHeader::PLAIN, &echo(from.ip(), server.ip(), 1, b"x"));
            assert_eq!(world.stack().counters().spoofed, 3 * (n as u64 + 1), "{text}");
        }
        assert_eq!((world.flows(), world.datagrams().len()), (0, 0));
    });
}

#[test]
fn a_syn_with_options_that_cannot_be_read_opens_nothing() {
    on_every_net(|world| async move {
        let broken: [&[u8]; 6] =
            [&[2, 3, 5], &[3, 4, 1, 1], &[4, 3, 0], &[2, 0], &[99, 1], &[5, 9, 0, 0, 0, 0, 0, 0, 0]];
        let peer = Peer::new(&world, 3000, 500);
        for (n, options) in broken.into_iter().enumerate() {
            let syn = Tcp { options: options.to_vec(), ..peer.segment(SYN, &[]) };
            put(&world, VirtioHeader::PLAIN, &syn.packet());
            assert_eq!(world.stack().counters().bad_options, n as u64 + 1, "{options:?}");
        }
        assert_eq!((world.flows(), world.waiting()), (0, 0));
    });
}

#[test]
fn a_flood_of_packets_of_no_flow_leaves_nothing_behind() {
    on(Net::new(true, false), |world| async move {
        let server = SocketAddr::new(world.net().server(), 80);
        let mut random = Random::new(1);
        for _ in 0..20_000 {
            let from =
                SocketAddr::from(([10, random.next() as u8, random.next() as u8, 1], 1 + random.below(60_000) as u16));
            let flags = [ACK, ACK | FIN, RST, SYN | ACK][random.below(4)];
            world.inject(&Tcp { sequence: random.next() as u32, ..Tcp::new(from, server, flags) }.packet());
        }
        world.settle().await;
        while world.inbox().is_some() {}
        assert_eq!((world.flows(), world.deadline()), (0, None));
    });
}
