//! UDP on the device's side: read, coalesced, in fragments; written, summed, cut.

use std::net::SocketAddr;

use proptest::prelude::*;
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{Ipv4Packet, Ipv6Packet, UdpPacket, UdpRepr};
use tunproxy::stack::VirtioHeader;

use crate::world::packet::{self, header_length, seal_v4, set_length, udp};
use crate::world::{MTU, Net, World, on, on_every_net, pattern};

fn ends(world: &World) -> (SocketAddr, SocketAddr) {
    (SocketAddr::new(world.net().peer(), 5353), SocketAddr::new(world.net().server(), 443))
}

/// Cuts a whole packet into fragments whose payloads begin at `edges` (multiples of eight, ascending, the first zero).
fn cut(whole: &[u8], edges: &[usize]) -> Vec<Vec<u8>> {
    let v6 = whole[0] >> 4 == 6;
    let start = header_length(whole);
    let body = &whole[start..];
    let ends = edges[1..].iter().copied().chain([body.len()]);
    let pieces = edges.iter().zip(ends).map(|(from, to)| {
        let more = to < body.len();
        let mut piece = whole[..start].to_vec();
        if v6 {
            let word = *from as u16 | u16::from(more);
            piece.extend([whole[6], 0]);
            piece.extend(word.to_be_bytes());
            piece.extend([0, 0, 0x13, 0x37]);
            piece[6] = 44;
        } else {
            let word = (*from / 8) as u16 | if more { 0x2000 } else { 0 };
            piece[6..8].copy_from_slice(&word.to_be_bytes());
        }
        piece.extend_from_slice(&body[*from..to]);
        let total = piece.len();
        set_length(&mut piece, total);
        piece
    });
    pieces.collect()
}

#[test]
fn a_datagram_is_read_with_its_ends_and_its_bytes() {
    on_every_net(|world| async move {
        let (client, server) = ends(&world);
        for length in [0, 1, 2, 1400] {
            world.inject(&udp(client, server, &pattern(0, length)));
            let read = world.datagrams();
            assert_eq!(read.len(), 1, "{length}");
            assert_eq!((read[0].source, read[0].destination), (client, server));
            assert_eq!(read[0].payload, pattern(0, length));
            assert_eq!(read[0].size, None);
            assert_eq!(read[0].packet, udp(client, server, &pattern(0, length)));
        }
    });
}

#[test]
fn the_dont_fragment_flag_is_seen() {
    on_every_net(|world| async move {
        let (client, server) = ends(&world);
        let mut bytes = udp(client, server, b"probe");
        world.inject(&bytes);
        assert_eq!(world.datagrams()[0].dont_fragment, world.net().v6, "IPv6 is never cut by routers");
        if !world.net().v6 {
            bytes[6] |= 0x40;
            seal_v4(&mut bytes);
            world.inject(&bytes);
            assert!(world.datagrams()[0].dont_fragment);
        }
    });
}

#[test]
fn a_wrong_checksum_is_dropped_unless_the_kernel_vouches_for_it() {
    on_every_net(|world| async move {
        let (client, server) = ends(&world);
        let mut bytes = udp(client, server, b"payload");
        *bytes.last_mut().unwrap() ^= 1;
        world.inject(&bytes);
        assert!(world.datagrams().is_empty());
        assert_eq!(world.stack().counters().bad_header, 1);
        let mut vouched = [0; VirtioHeader::LEN];
        vouched[0] = 1;
        assert!(world.ingest(VirtioHeader::parse(vouched), &bytes));
        assert_eq!(world.datagrams().len(), 1);
    });
}

#[test]
fn a_missing_checksum_is_right_in_ipv4_and_wrong_in_ipv6() {
    on_every_net(|world| async move {
        let (client, server) = ends(&world);
        let mut bytes = udp(client, server, b"payload");
        let at = header_length(&bytes) + 6;
        bytes[at..at + 2].fill(0);
        world.inject(&bytes);
        assert_eq!(world.datagrams().is_empty(), world.net().v6);
    });
}

#[test]
fn padding_behind_the_datagram_is_no_part_of_it() {
    on_every_net(|world| async move {
        let (client, server) = ends(&world);
        let mut bytes = udp(client, server, b"payload");
        // Behind the IP packet, as an Ethernet minimum leaves it; and inside, where only UDP's length tells.
        bytes.extend([0; 9]);
        world.inject(&bytes);
        let total = bytes.len();
        set_length(&mut bytes, total);
        world.inject(&bytes);
        let read = world.datagrams();
        assert_eq!(read.len(), 2);
        assert!(read.iter().all(|read| read.payload == b"payload"));
    });
}

#[test]
fn coalesced_datagrams_come_with_their_size() {
    on_every_net(|world| async move {
        let (client, server) = ends(&world);
        let mut bytes = udp(client, server, &pattern(0, 3000));
        let start = header_length(&bytes);
        // The kernel's own super-packets carry the first datagram's length, or that of all.
        bytes[start + 4..start + 6].copy_from_slice(&1208u16.to_be_bytes());
        let mut header = [0; VirtioHeader::LEN];
        (header[0], header[1]) = (1, 5);
        header[4..6].copy_from_slice(&1200u16.to_ne_bytes());
        world.ingest(VirtioHeader::parse(header), &bytes);
        let read = world.datagrams();
        assert_eq!((read[0].size, read[0].payload.len()), (Some(1200), 3000));
        assert_eq!(read[0].payload, pattern(0, 3000));
    });
}

#[test]
fn port_zero_and_lengths_that_contradict_each_other_are_dropped_and_counted() {
    on_every_net(|world| async move {
        let (client, server) = ends(&world);
        let zero = |address: SocketAddr| SocketAddr::new(address.ip(), 0);
        world.inject(&udp(zero(client), server, b"x"));
        world.inject(&udp(client, zero(server), b"x"));
        for length in [0u16, 7, 10, 5000] {
            let mut bytes = udp(client, server, b"x");
            let start = header_length(&bytes);
            bytes[start + 4..start + 6].copy_from_slice(&length.to_be_bytes());
            packet::seal(&mut bytes);
            world.inject(&bytes);
        }
        assert!(world.datagrams().is_empty());
        let counters = world.stack().counters();
        assert_eq!(counters.bad_length + counters.bad_header, 6, "{counters:?}");
    });
}

#[test]
fn an_answer_carries_the_right_checksum() {
    on_every_net(|world| async move {
        let (client, server) = ends(&world);
        // The second payload makes the sum zero, which must not be sent as zero.
        let mut bytes = udp(server, client, &[0, 0]);
        packet::seal(&mut bytes);
        let start = header_length(&bytes);
        let folding = [bytes[start + 6], bytes[start + 7]];
        for payload in [&b"answer"[..], &folding, &[], &pattern(0, 1400)] {
            assert!(world.send(server, client, payload));
            world.settle().await;
            let seen = world.inbox().expect("it was sent");
            assert_eq!((seen.from, seen.to), (server, client));
            let body = &seen.bytes[header_length(&seen.bytes)..];
            let read = UdpPacket::new_checked(body).unwrap();
            let (from, to) = (server.ip().into(), client.ip().into());
            assert_ne!(read.checksum(), 0);
            UdpRepr::parse(&read, &from, &to, &ChecksumCapabilities::default()).unwrap();
            assert_eq!(read.payload(), payload);
            if let Ok(header) = Ipv4Packet::new_checked(&seen.bytes[..])
                && header.version() == 4
            {
                assert!(header.verify_checksum() && !header.dont_frag());
            }
        }
    });
}

#[test]
fn a_large_answer_leaves_whole_in_ipv4_and_in_right_fragments_in_ipv6() {
    on_every_net(|world| async move {
        let (client, server) = ends(&world);
        let mut ids = Vec::new();
        for length in [1453, 3000, if world.net().v6 { 65_527 } else { 65_507 }] {
            assert!(world.send(server, client, &pattern(0, length)));
            world.settle().await;
            let pieces: Vec<_> = std::iter::from_fn(|| world.inbox()).map(|seen| seen.bytes).collect();
            if !world.net().v6 {
                assert_eq!(pieces.len(), 1, "the kernel cuts it where it has to");
                assert_eq!(packet::transport_checksum(&pieces[0], 20), 0);
                continue;
            }
            assert!(pieces.len() > 1);
            let mut whole = pieces[0][..40].to_vec();
            let mut id = None;
            for (n, piece) in pieces.iter().enumerate() {
                assert!(piece.len() <= MTU);
                let header = Ipv6Packet::new_checked(&piece[..]).unwrap();
                assert_eq!(u8::from(header.next_header()), 44);
                let word = u16::from_be_bytes([piece[42], piece[43]]);
                assert_eq!(usize::from(word & 0xfff8), whole.len() - 40, "each begins where the last ended");
                assert_eq!(word & 1 != 0, n + 1 < pieces.len());
                assert_eq!((piece[40], piece[41]), (17, 0));
                assert_eq!(*id.get_or_insert(piece[44..48].to_vec()), piece[44..48]);
                whole.extend(&piece[48..]);
            }
            ids.push(id);
            whole[6] = 17;
            let total = whole.len();
            set_length(&mut whole, total);
            assert_eq!(packet::transport_checksum(&whole, 40), 0);
            assert_eq!(whole[48..], pattern(0, length));
        }
        ids.dedup();
        assert_eq!(ids.len(), if world.net().v6 { 3 } else { 0 }, "each datagram has its own identification");
    });
}

#[test]
fn a_payload_that_no_datagram_holds_is_refused() {
    on_every_net(|world| async move {
        let (client, server) = ends(&world);
        // The length field of IPv4 counts the header, that of IPv6 does not.
        let longest = if world.net().v6 { 65_527 } else { 65_507 };
        assert!(!world.send(server, client, &vec![0; longest + 1]));
        world.settle().await;
        assert!(world.inbox().is_none());
    });
}

#[test]
fn a_v6_client_is_refused_at_once_where_ipv6_is_off() {
    for offload in [false, true] {
        on(Net { ipv6: false, ..Net::new(offload, true) }, |world| async move {
            let (client, server) = ends(&world);
            world.inject(&udp(client, server, b"x"));
            crate::world::Peer::new(&world, 9, 9).syn();
            world.inject(&packet::echo(client.ip(), server.ip(), 7, b"ping"));
            world.settle().await;
            let codes: Vec<_> = std::iter::from_fn(|| world.inbox()).map(|seen| seen.icmp().unwrap()).collect();
            // UDP as "port", which is ECONNREFUSED; all else as "no route", which is ENETUNREACH.
            assert_eq!(codes, [(1, 4), (1, 0), (1, 0)]);
            assert_eq!((world.flows(), world.datagrams().len()), (0, 0));
        });
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn fragments_in_any_order_and_twice_make_the_datagram_once(
        v6 in any::<bool>(),
        length in 100usize..60_000,
        cuts in proptest::collection::btree_set(1usize..6000, 1..40),
        order in any::<u64>(),
    ) {
        on(Net::new(false, v6), move |world| {
            let cuts = cuts.clone();
            async move {
                let (client, server) = ends(&world);
                let payload = pattern(3, length);
                let edges: Vec<_> =
                    [0].into_iter().chain(cuts.iter().map(|cut| cut * 8).filter(|cut| *cut < length)).collect();
                let mut pieces = cut(&udp(client, server, &payload), &edges);
                let mut random = crate::world::Random::new(order);
                for n in (1..pieces.len()).rev() {
                    pieces.swap(n, random.below(n + 1));
                }
                for (n, piece) in pieces.iter().enumerate() {
                    world.inject(piece);
                    if n + 1 < pieces.len() && n % 3 == 0 {
                        world.inject(piece);
                    }
                }
                let read = world.datagrams();
                assert_eq!(read.len(), 1);
                assert!(read[0].payload == payload);
                assert_eq!((read[0].source, read[0].destination), (client, server));
            }
        });
    }
}

#[test]
fn a_syn_in_fragments_opens_a_flow() {
    on_every_net(|world| async move {
        let mut peer = crate::world::Peer::new(&world, 3000, 500);
        let mut syn = peer.segment(packet::SYN, &[]);
        syn.options = vec![2, 4, 5, 0xb4];
        for piece in cut(&syn.packet(), &[0, 8, 16]) {
            world.inject(&piece);
        }
        let flow = world.arrival().await;
        flow.accept();
        peer.finish_handshake().await;
        for piece in cut(&peer.segment(packet::ACK, b"in pieces").packet(), &[0, 16]) {
            world.inject(&piece);
        }
        assert_eq!(flow.read(99).await.unwrap(), b"in pieces");
    });
}
