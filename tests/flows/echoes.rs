//! Echo requests to other hosts: handed over as they came, and what comes back written as a router would.

use std::net::IpAddr;

use tunproxy::stack::{EchoError, EchoReply};

use crate::world::packet::{self, Seen, echo, header_length, seal, seal_v4, set_length, sum, transport_checksum};
use crate::world::{MTU, World, on_every_net, pattern};

fn own_address(world: &World) -> IpAddr {
    if world.net().v6 { "fdfe:dcba:9876::2" } else { "198.18.0.2" }.parse().unwrap()
}

/// The request with another time to live and type of service.
fn altered(mut packet: Vec<u8>, ttl: u8, tos: u8) -> Vec<u8> {
    if packet[0] >> 4 == 6 {
        (packet[0], packet[1], packet[7]) = (0x60 | tos >> 4, tos << 4, ttl);
    } else {
        (packet[1], packet[8]) = (tos, ttl);
        seal_v4(&mut packet);
    }
    packet
}

fn is_sound(seen: &Seen) -> bool {
    let start = header_length(&seen.bytes);
    if seen.bytes[0] >> 4 == 6 {
        transport_checksum(&seen.bytes, start) == 0
    } else {
        sum(&seen.bytes[start..]) == 0 && sum(&seen.bytes[..20]) == 0
    }
}

#[test]
fn a_request_to_another_host_is_handed_over_with_all_that_it_says() {
    on_every_net(|world| async move {
        let (from, to) = (world.net().peer(), world.net().server());
        for (length, ttl, tos) in [(0, 64, 0), (56, 2, 0xb8), (1400, 255, 0x03)] {
            let request = altered(echo(from, to, 7, &pattern(1, length)), ttl, tos);
            world.inject(&request);
            let seen = world.echoes().pop().expect("it is told");
            assert_eq!((seen.source, seen.destination, seen.number), (from, to, (0xbeef, 7)));
            assert_eq!((seen.ttl, seen.tos, seen.payload), (ttl, tos, pattern(1, length)));
            // Nobody cuts IPv6 on its way.
            assert_eq!(seen.dont_fragment, world.net().v6);
            assert_eq!(seen.head, request[..header_length(&request) + 8]);
        }
        if !world.net().v6 {
            let mut whole = echo(from, to, 7, b"whole or not at all");
            whole[6] = 0x40;
            seal_v4(&mut whole);
            world.inject(&whole);
            assert!(world.echoes()[0].dont_fragment);
        }
        world.settle().await;
        assert!(world.inbox().is_none(), "nothing here answers for another host");
    });
}

#[test]
fn the_time_of_a_request_may_be_over_here() {
    on_every_net(|world| async move {
        let (from, to) = (world.net().peer(), world.net().server());
        for ttl in [0, 1] {
            let request = altered(echo(from, to, 1, &pattern(0, 40)), ttl, 0);
            world.inject(&request);
            world.settle().await;
            let error = world.inbox().expect("it is answered");
            assert_eq!(error.icmp(), Some(if world.net().v6 { (3, 0) } else { (11, 0) }));
            assert_eq!((error.from.ip(), error.to.ip()), (own_address(&world), from));
            assert!(error.bytes.ends_with(&request) && is_sound(&error));
        }
        assert!(world.echoes().is_empty());
    });
}

#[test]
fn a_request_in_pieces_is_one_request_that_may_be_cut_again() {
    on_every_net(|world| async move {
        let (from, to) = (world.net().peer(), world.net().server());
        let request = echo(from, to, 9, &pattern(3, 3000));
        let start = header_length(&request);
        for (at, end) in [(0, 1480), (1480, 2960), (2960, 3008)] {
            let body = &request[start + at..start + end];
            let more = u16::from(end < 3008);
            let piece = if world.net().v6 {
                let header = [&[58, 0][..], &(at as u16 | more).to_be_bytes(), &[0, 0, 0, 9]].concat();
                let mut piece = [&request[..40], &header, body].concat();
                piece[6] = 44;
                let total = piece.len();
                set_length(&mut piece, total);
                piece
            } else {
                let mut piece = [&request[..20], body].concat();
                piece[6..8].copy_from_slice(&((at as u16 / 8) | (more << 13)).to_be_bytes());
                let total = piece.len();
                set_length(&mut piece, total);
                piece
            };
            world.inject(&piece);
        }
        let seen = world.echoes().pop().expect("the pieces are together");
        assert_eq!((seen.number, seen.payload, seen.dont_fragment), ((0xbeef, 9), pattern(3, 3000), false));
    });
}

#[test]
fn a_reply_is_written_from_the_host_that_was_asked() {
    on_every_net(|world| async move {
        let (client, host) = (world.net().peer(), world.net().server());
        for length in [0, 56, 1400] {
            let payload = pattern(2, length);
            let reply = EchoReply { id: 0x1234, sequence: 5, payload: &payload, ttl: 51, tos: 0xb8 };
            assert!(world.with_device(|stack, device| stack.reply(host, client, &reply, device)));
            world.settle().await;
            let seen = world.inbox().expect("it is sent");
            assert_eq!((seen.from.ip(), seen.to.ip()), (host, client));
            assert_eq!(seen.icmp(), Some(if world.net().v6 { (129, 0) } else { (0, 0) }));
            let start = header_length(&seen.bytes);
            assert_eq!(seen.bytes[start + 4..], [&[0x12, 0x34, 0, 5][..], &payload].concat());
            let (ttl, tos) =
                if world.net().v6 { (7, seen.bytes[0] << 4 | seen.bytes[1] >> 4) } else { (8, seen.bytes[1]) };
            assert_eq!((seen.bytes[ttl], tos), (51, 0xb8));
            assert!(is_sound(&seen));
        }
        let long = vec![0; if world.net().v6 { 65_528 } else { 65_508 }];
        let reply = EchoReply { id: 1, sequence: 1, payload: &long, ttl: 64, tos: 0 };
        assert!(!world.with_device(|stack, device| stack.reply(host, client, &reply, device)), "no packet holds that");
    });
}

#[test]
fn a_reply_that_no_ipv6_packet_of_the_device_holds_leaves_in_pieces() {
    on_every_net(|world| async move {
        if !world.net().v6 {
            return;
        }
        let (client, host) = (world.net().peer(), world.net().server());
        let payload = pattern(4, 5000);
        let reply = EchoReply { id: 7, sequence: 8, payload: &payload, ttl: 33, tos: 0 };
        assert!(world.with_device(|stack, device| stack.reply(host, client, &reply, device)));
        world.settle().await;
        let mut message = Vec::new();
        while let Some(piece) = world.inbox() {
            assert!(piece.bytes.len() <= MTU && piece.bytes[6] == 44 && piece.bytes[40] == 58 && piece.bytes[7] == 33);
            let place = u16::from_be_bytes([piece.bytes[42], piece.bytes[43]]);
            assert_eq!(usize::from(place & 0xfff8), message.len());
            message.extend_from_slice(&piece.bytes[48..]);
            assert_eq!(place & 1 == 0, message.len() == 5008);
        }
        let mut whole = packet::ip(host, client, 58, &message);
        assert_eq!(transport_checksum(&whole, 40), 0);
        seal(&mut whole);
        assert_eq!(whole[48..], payload);
    });
}

#[test]
fn an_error_comes_from_its_router_and_quotes_what_the_client_sent() {
    on_every_net(|world| async move {
        let (client, host) = (world.net().peer(), world.net().server());
        let router: IpAddr = if world.net().v6 { "2001:db8:77::1" } else { "198.51.100.77" }.parse().unwrap();
        let request = altered(echo(client, host, 3, &pattern(5, 1000)), 9, 0);
        world.inject(&request);
        let seen = world.echoes().pop().expect("it is told");
        let (kind, code) = if world.net().v6 { (3, 0) } else { (11, 0) };
        for (from, quoted, ttl) in [(Some(router), 1000, Some(1)), (None, 0, None)] {
            let error = EchoError { kind, code, word: 0x0102, head: &seen.head, ttl, payload: &seen.payload[..quoted] };
            world.with_device(|stack, device| stack.echo_error(from, client, &error, device));
            world.settle().await;
            let error = world.inbox().expect("it is sent");
            // Without a router the word is ours.
            assert_eq!((error.from.ip(), error.to.ip()), (from.unwrap_or(own_address(&world)), client));
            assert_eq!(error.icmp(), Some((kind, code)));
            assert!(is_sound(&error) && error.bytes.len() <= if world.net().v6 { 1280 } else { 576 });
            let start = header_length(&error.bytes);
            assert_eq!(error.bytes[start + 4..start + 8], [0, 0, 1, 2]);
            let expected = altered(request.clone(), ttl.unwrap_or(9), 0);
            let quote = &error.bytes[start + 8..];
            assert!(quote.len() >= seen.head.len() && expected.starts_with(quote), "{quote:02x?}");
        }
    });
}

#[test]
fn requests_that_are_cut_short_or_go_to_many_are_told_to_nobody() {
    on_every_net(|world| async move {
        let (from, to) = (world.net().peer(), world.net().server());
        let request = echo(from, to, 1, b"cut short");
        for length in 0..request.len() {
            world.inject(&request[..length]);
        }
        let start = header_length(&request);
        for length in start..start + 8 {
            let mut short = request[..length].to_vec();
            set_length(&mut short, length);
            seal(&mut short);
            world.inject(&short);
        }
        let groups =
            if world.net().v6 { ["ff02::1", "ff0e::9", "::1"] } else { ["224.0.0.1", "255.255.255.255", "127.0.0.1"] };
        for group in groups {
            world.inject(&echo(from, group.parse().unwrap(), 1, b"all of you"));
        }
        world.settle().await;
        assert!(world.echoes().is_empty() && world.inbox().is_none());
    });
}
