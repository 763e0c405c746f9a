//! ICMP: echo, and errors that are never sent about the wrong packets.

use std::net::{IpAddr, SocketAddr};

use tunproxy::stack::Unreachable;

use crate::world::packet::{self, echo, header_length, seal_v4, sum, transport_checksum, udp};
use crate::world::{Net, World, on, on_every_net, pattern};

fn own_address(world: &World) -> IpAddr {
    if world.net().v6 { "fdfe:dcba:9876::2".parse().unwrap() } else { "198.18.0.2".parse().unwrap() }
}

fn checksum_holds(bytes: &[u8]) -> bool {
    let start = header_length(bytes);
    if bytes[0] >> 4 == 6 { transport_checksum(bytes, start) == 0 } else { sum(&bytes[start..]) == 0 }
}

#[test]
fn an_echo_request_to_one_of_our_addresses_is_answered_byte_for_byte() {
    on_every_net(|world| async move {
        let (from, to) = (world.net().peer(), own_address(&world));
        for length in [0, 1, 56, 1400] {
            let request = echo(from, to, 0x1234, &pattern(1, length));
            world.inject(&request);
            world.settle().await;
            let reply = world.inbox().expect("it is answered");
            assert_eq!((reply.from.ip(), reply.to.ip()), (to, from));
            assert_eq!(reply.icmp(), Some(if world.net().v6 { (129, 0) } else { (0, 0) }));
            let start = header_length(&request);
            assert_eq!(reply.bytes[start + 4..], request[start + 4..]);
            assert!(checksum_holds(&reply.bytes));
        }
    });
}

#[test]
fn an_echo_request_to_anybody_else_is_refused_where_none_are_carried() {
    for net in Net::all() {
        on(Net { carry_echo: false, ..net }, |world| async move {
            let request = echo(world.net().peer(), world.net().server(), 1, b"anybody there?");
            world.inject(&request);
            world.settle().await;
            let error = world.inbox().expect("it is answered");
            assert_eq!(error.icmp(), Some(if world.net().v6 { (1, 1) } else { (3, 13) }));
            assert!(error.bytes.ends_with(&request) && world.echoes().is_empty());
            assert!(checksum_holds(&error.bytes));
        });
    }
}

#[test]
fn an_echo_request_with_a_wrong_checksum_is_dropped_and_counted() {
    on_every_net(|world| async move {
        for to in [own_address(&world), world.net().server()] {
            let mut request = echo(world.net().peer(), to, 1, b"damaged on its way");
            *request.last_mut().unwrap() ^= 0x10;
            world.inject(&request);
        }
        world.settle().await;
        assert!(world.inbox().is_none() && world.echoes().is_empty());
        assert_eq!(world.stack().counters().bad_header, 2);
    });
}

#[test]
fn the_error_about_a_datagram_quotes_it_and_never_grows_beyond_its_limit() {
    on_every_net(|world| async move {
        let v6 = world.net().v6;
        let (client, server) = (SocketAddr::new(world.net().peer(), 9), SocketAddr::new(world.net().server(), 443));
        let kinds = [
            (Unreachable::Network, (3, 0), (1, 0)),
            (Unreachable::Host, (3, 1), (1, 3)),
            (Unreachable::Port, (3, 3), (1, 4)),
            (Unreachable::Prohibited, (3, 13), (1, 1)),
            (Unreachable::Protocol, (3, 2), (4, 1)),
            (Unreachable::Coded(7), (3, 7), (1, 0)),
            (Unreachable::Coded(9), (3, 9), (1, 1)),
            (Unreachable::Coded(10), (3, 10), (1, 1)),
            (Unreachable::TooBig(1380), (3, 4), (2, 0)),
        ];
        for (why, four, six) in kinds {
            for length in [0, 1400] {
                let datagram = udp(client, server, &pattern(0, length));
                world.with_device(|stack, device| stack.unreachable(&datagram, why, device));
                world.settle().await;
                let error = world.inbox().expect("it is sent");
                assert_eq!(error.icmp(), Some(if v6 { six } else { four }));
                assert!(error.bytes.len() <= if v6 { 1280 } else { 576 });
                assert!(checksum_holds(&error.bytes));
                let start = header_length(&error.bytes);
                let quote = &error.bytes[start + 8..];
                assert!(quote.len() >= datagram.len().min(500) && datagram.starts_with(quote));
                if why == Unreachable::TooBig(1380) {
                    assert_eq!(error.bytes[start + 6..start + 8], 1380u16.to_be_bytes());
                }
            }
        }
    });
}

#[test]
fn no_error_is_sent_about_errors_multicast_and_later_fragments() {
    on_every_net(|world| async move {
        let v6 = world.net().v6;
        let (from, to) = (world.net().peer(), world.net().server());
        let group: IpAddr = if v6 { "ff02::fb".parse().unwrap() } else { "224.0.0.251".parse().unwrap() };
        let mut error = echo(from, to, 1, b"quoted");
        let start = header_length(&error);
        error[start] = if v6 { 1 } else { 3 };
        packet::seal(&mut error);
        let mut silent = vec![error.clone(), udp(SocketAddr::new(from, 5), SocketAddr::new(group, 5353), b"x")];
        if v6 {
            // The same error behind an extension header.
            let mut chained = error[..40].to_vec();
            chained[6] = 60;
            chained.extend([58, 0, 1, 4, 0, 0, 0, 0]);
            chained.extend(&error[40..]);
            let total = chained.len();
            packet::set_length(&mut chained, total);
            silent.push(chained);
            let mut later = udp(SocketAddr::new(from, 5), SocketAddr::new(to, 5), &[0; 64]);
            later.splice(40..40, [17, 0, 0, 64, 0, 0, 0, 9]);
            later[6] = 44;
            silent.push(later);
        } else {
            let mut later = udp(SocketAddr::new(from, 5), SocketAddr::new(to, 5), &[0; 64]);
            later[7] = 9;
            seal_v4(&mut later);
            silent.push(later);
        }
        for quoted in silent {
            for length in [quoted.len(), 28.min(quoted.len())] {
                world.with_device(|stack, device| {
                    stack.unreachable(&quoted[..length], Unreachable::Port, device);
                });
                world.settle().await;
                if length == quoted.len() {
                    assert!(world.inbox().is_none(), "{quoted:02x?}");
                }
            }
            while world.inbox().is_some() {}
            world.inject(&quoted);
            world.settle().await;
            assert!(world.inbox().is_none(), "{quoted:02x?}");
        }
        for byte in 0..=255u8 {
            // Beginnings of anything: whatever is made of them, it is no panic.
            let junk = vec![byte; usize::from(byte) % 60];
            world.with_device(|stack, device| stack.unreachable(&junk, Unreachable::Port, device));
        }
    });
}

#[test]
fn an_error_or_a_neighbours_question_is_ignored_and_counted() {
    on_every_net(|world| async move {
        let (from, to) = (world.net().peer(), world.net().server());
        for kind in [1, 2, 3, 133, 135, 255u8] {
            let mut message = echo(from, to, 1, b"quoted");
            let start = header_length(&message);
            message[start] = kind;
            packet::seal(&mut message);
            world.inject(&message);
        }
        world.settle().await;
        assert!(world.inbox().is_none());
        assert_eq!(world.stack().counters().ignored, 6);
    });
}

#[test]
fn a_flood_of_a_protocol_that_nobody_speaks_is_answered_in_part_and_an_honest_packet_soon_again() {
    on_every_net(|world| async move {
        let esp = packet::ip(world.net().peer(), world.net().server(), 50, &pattern(0, 40));
        let answers = || std::iter::from_fn(|| world.inbox()).count();
        for _ in 0..5000 {
            world.inject(&esp);
        }
        world.settle().await;
        let answered = answers();
        assert!((1..100).contains(&answered), "{answered}");
        assert_eq!(world.stack().counters().ignored, 5000 - answered as u64);
        world.sleep(std::time::Duration::from_millis(100)).await;
        world.inject(&esp);
        world.settle().await;
        assert_eq!(answers(), 1);
    });
}

#[test]
fn a_protocol_that_nobody_speaks_is_refused_as_such_and_points_to_its_name() {
    on_every_net(|world| async move {
        let (v6, from, to) = (world.net().v6, world.net().peer(), world.net().server());
        // GRE, ESP, SCTP, and one that is kept for experiments.
        for protocol in [47, 50, 132, 253] {
            let mut packets = vec![(packet::ip(from, to, protocol, &pattern(0, 40)), 6_u32)];
            if v6 {
                let mut chained = packets[0].0.clone();
                chained.splice(40..40, [protocol, 0, 1, 4, 0, 0, 0, 0]);
                chained[6] = 60;
                let total = chained.len();
                packet::set_length(&mut chained, total);
                packets.push((chained, 40));
            }
            for (refused, named_at) in packets {
                world.inject(&refused);
                world.settle().await;
                let error = world.inbox().expect("it is answered");
                assert_eq!((error.from.ip(), error.to.ip()), (to, from));
                assert_eq!(error.icmp(), Some(if v6 { (4, 1) } else { (3, 2) }));
                let start = header_length(&error.bytes);
                let word = if v6 { named_at } else { 0 };
                assert_eq!(error.bytes[start + 4..start + 8], word.to_be_bytes());
                assert!(error.bytes.ends_with(&refused) && checksum_holds(&error.bytes));
            }
        }
        // A packet that says that it carries nothing wants no answer.
        if v6 {
            world.inject(&packet::ip(from, to, 59, &[]));
            world.settle().await;
            assert!(world.inbox().is_none());
            assert_eq!(world.stack().counters().ignored, 1);
        }
    });
}
