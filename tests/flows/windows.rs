//! Windows and sequence numbers: shut, nearly full, wrapping.

use std::time::Duration;

use crate::world::packet::{ACK, FIN, SYN, Tcp};
use crate::world::{MTU, Net, Peer, World, on, on_every_net, pattern};

const MEGABYTE: usize = 1 << 20;

#[test]
fn a_task_that_stops_reading_for_half_a_minute_loses_nothing() {
    on_every_net(|world| async move {
        let conn = world.connect(80);
        let flow = world.arrival().await;
        flow.accept();
        conn.established().await.unwrap();
        let sender = conn.clone();
        world.spawn(async move {
            sender.write_pattern(3 * MEGABYTE).await.unwrap();
            sender.shutdown();
        });
        world.sleep(Duration::from_secs(30)).await;
        assert_eq!(flow.read_pattern().await.unwrap(), 3 * MEGABYTE);
        assert!(world.elapsed() < Duration::from_secs(32), "the open window was announced: {:?}", world.elapsed());
    });
}

#[test]
fn a_client_that_stops_reading_for_half_a_minute_loses_nothing() {
    on_every_net(|world| async move {
        let conn = world.connect(80);
        let flow = world.arrival().await;
        flow.accept();
        conn.established().await.unwrap();
        world.spawn(async move {
            flow.write_pattern(3 * MEGABYTE).await.unwrap();
            flow.shutdown();
            flow.flushed().await;
        });
        world.sleep(Duration::from_secs(30)).await;
        assert_eq!(conn.read_pattern().await, Ok(3 * MEGABYTE));
        assert!(world.elapsed() < Duration::from_secs(40), "{:?}", world.elapsed());
    });
}

/// Fills the receive ring to its last byte, in pieces that leave the announced window between two of its steps.
#[test]
fn a_fin_at_the_very_edge_of_the_window_ends_the_stream_only_behind_its_last_byte() {
    on_every_net(|world| async move {
        let mut peer = Peer::new(&world, 3000, 500);
        let flow = peer.open().await;
        let body = pattern(0, MEGABYTE);
        // Ten bytes, acknowledged: the ring's rest is no multiple of the window's unit any more.
        let initial = peer.next;
        peer.data(&body[..10]);
        peer.replies().await;
        for part in body[10..MEGABYTE - 500].chunks(1000) {
            peer.data(part);
        }
        peer.replies().await;
        let tail = &body[(peer.next - initial) as usize..];
        peer.send(FIN | ACK, tail);
        peer.replies().await;
        let server = flow.clone();
        let (world, total) = (world.clone(), std::rc::Rc::new(std::cell::Cell::new(None)));
        let result = std::rc::Rc::clone(&total);
        world.spawn(async move {
            result.set(Some(server.read_pattern().await.unwrap()));
        });
        // What was not acknowledged is repeated, as any TCP does.
        for _ in 0..3 {
            let replies = peer.replies().await;
            if let Some(last) = replies.last() {
                let done = last.acknowledgement.wrapping_sub(initial) as usize;
                if done < body.len() {
                    peer.next = last.acknowledgement;
                    peer.send(FIN | ACK, &body[done..]);
                }
            }
            world.sleep(Duration::from_secs(1)).await;
        }
        assert_eq!(total.get(), Some(MEGABYTE));
    });
}

/// Opens connections until one side's initial number lies less than a megabyte before the wrap.
async fn near_the_wrap(world: &World, of_client: bool) -> (crate::world::Conn, crate::world::Flow) {
    world.watch();
    let conn = world.connect_from(10_000, 80);
    for attempt in 1..30_000u16 {
        let flow = world.arrival().await;
        flow.accept();
        conn.established().await.unwrap();
        world.settle().await;
        let seen = world.seen();
        let opening = seen.iter().find(|seen| seen.to_client != of_client).unwrap();
        if opening.sequence > u32::MAX - MEGABYTE as u32 {
            return (conn, flow);
        }
        flow.abort();
        conn.closed().await;
        conn.open(10_000 + attempt, 80);
    }
    panic!("no initial number near the wrap in 30 000 attempts");
}

#[test]
fn sequence_numbers_of_either_side_wrap_in_mid_stream() {
    for (net, of_client) in [(Net::new(false, false), true), (Net::new(true, true), false)] {
        on(net, move |world| async move {
            let (conn, flow) = near_the_wrap(&world, of_client).await;
            let server = flow.clone();
            world.spawn(async move {
                server.write_pattern(3 * MEGABYTE).await.unwrap();
                server.shutdown();
            });
            let client = conn.clone();
            world.spawn(async move {
                client.write_pattern(3 * MEGABYTE).await.unwrap();
                client.shutdown();
            });
            let reader = conn.clone();
            world.spawn(async move { assert_eq!(reader.read_pattern().await, Ok(3 * MEGABYTE)) });
            assert_eq!(flow.read_pattern().await.unwrap(), 3 * MEGABYTE);
            conn.closed().await;
        });
    }
}

#[test]
fn pieces_in_the_wrong_order_are_put_together() {
    on_every_net(|world| async move {
        let mut peer = Peer::new(&world, 3000, u32::MAX - 5000);
        let flow = peer.open().await;
        let initial = peer.next;
        let body = pattern(0, 20_000);
        let mut parts: Vec<usize> = (0..20).collect();
        parts.reverse();
        parts.swap(3, 9);
        for part in parts {
            peer.next = initial.wrapping_add(part as u32 * 1000);
            peer.send(ACK, &body[part * 1000..(part + 1) * 1000]);
        }
        peer.next = initial.wrapping_add(20_000);
        peer.send(FIN | ACK, &[]);
        assert_eq!(flow.read_pattern().await.unwrap(), 20_000);
    });
}

/// A client on a link whose handshake is over with its first data, or with an acknowledgement before that.
async fn opened(world: &World, bare: bool) -> (Peer, crate::world::Flow) {
    let mut peer = Peer::new(world, 3000, 500);
    if bare {
        let flow = peer.open().await;
        return (peer, flow);
    }
    peer.syn();
    let flow = world.arrival().await;
    flow.accept();
    let answer = peer.replies().await.into_iter().find(|seen| seen.is(SYN | ACK)).unwrap();
    (peer.next, peer.expected) = (501, answer.sequence.wrapping_add(1));
    (peer, flow)
}

fn links() -> impl Iterator<Item = Net> {
    Net::all().into_iter().map(|net| Net { own: false, ..net })
}

/// Bytes of data among `seen`.
fn bytes(seen: &[crate::world::Seen]) -> usize {
    seen.iter().map(|seen| seen.payload.len()).sum()
}

#[test]
fn the_window_of_a_client_that_never_acknowledges_without_data_is_read_and_so_are_its_losses() {
    for net in links() {
        on(net, |world| async move {
            let (mut peer, flow) = opened(&world, false).await;
            peer.data(b"a question");
            peer.replies().await;
            let writer = flow.clone();
            world.spawn(async move { writer.write_pattern(100_000).await.unwrap_or_default() });
            let first = peer.replies().await;
            assert!((1..20_000).contains(&bytes(&first)), "{} bytes at once", bytes(&first));
            // Nothing is acknowledged: that is noticed long before smoltcp's own timer would run out twice.
            world.sleep(Duration::from_millis(1500)).await;
            let again = peer.replies().await;
            assert!(again.iter().any(|seen| seen.sequence == first[0].sequence && seen.payload.len() > 1));
            flow.stalled().await;
        });
    }
}

#[test]
fn a_window_that_is_shut_by_a_segment_with_data_is_shut() {
    for net in links() {
        on(net, |world| async move {
            let (mut peer, flow) = opened(&world, true).await;
            let writer = flow.clone();
            world.spawn(async move { writer.write_pattern(100_000).await.unwrap_or_default() });
            let first = peer.replies().await;
            peer.expected = peer.expected.wrapping_add(bytes(&first) as u32);
            world.inject(&Tcp { window: 0, ..peer.segment(ACK, b"wait") }.packet());
            peer.next += 4;
            assert_eq!(bytes(&peer.replies().await), 0, "nothing is sent into a shut window");
            world.sleep(Duration::from_secs(5)).await;
            let probes = peer.replies().await;
            assert!(probes.iter().all(|seen| seen.payload.len() <= 1), "probes alone");
            peer.send(ACK, &[]);
            assert!(bytes(&peer.replies().await) > 1000, "it goes on when it opens");
            flow.stalled().await;
        });
    }
}

#[test]
fn an_acknowledgement_that_was_overtaken_does_not_shut_the_window() {
    for net in links() {
        on(net, |world| async move {
            let (mut peer, flow) = opened(&world, true).await;
            let old = Tcp { window: 0, ..peer.segment(ACK, &[]) };
            flow.write_pattern(1000).await.unwrap();
            peer.replies().await;
            peer.expected = peer.expected.wrapping_add(1000);
            peer.send(ACK, &[]);
            world.inject(&old.packet());
            world.settle().await;
            flow.write(&pattern(1000, 1000)).await.unwrap();
            assert_eq!(bytes(&peer.replies().await), 1000);
            world.sleep(Duration::from_millis(600)).await;
            assert!(bytes(&peer.replies().await) >= 1000, "what is lost is sent again in time");
            flow.stalled().await;
        });
    }
}

#[test]
fn segments_of_ipv6_leave_as_super_packets_of_the_right_size() {
    for v6 in [false, true] {
        on(Net::new(true, v6), |world| async move {
            let headers = if world.net().v6 { 60 } else { 40 };
            // What the client says it takes, and what it then gets: never more than the MTU carries.
            for (port, (says, gets)) in
                [(1400u16, 1400), (536, 536), (9000, MTU - headers), (0, 536), (1, 48)].into_iter().enumerate()
            {
                let mut peer = Peer::new(&world, 3000 + port as u16, 9);
                let mut syn = peer.segment(SYN, &[]);
                syn.options = [&[2, 4][..], &says.to_be_bytes(), &[3, 3, 7, 1]].concat();
                world.inject(&syn.packet());
                let flow = world.arrival().await;
                flow.accept();
                world.settle().await;
                let answer = world.inbox().expect("a SYN-ACK came");
                let announced = &answer.bytes[headers..headers + 4];
                assert_eq!(announced, [&[2, 4][..], &((MTU - headers) as u16).to_be_bytes()].concat());
                peer.next += 1;
                peer.expected = answer.sequence.wrapping_add(1);
                peer.send(ACK, &[]);
                world.settle().await;
                let before = world.super_packets();
                flow.write_pattern(20_000).await.unwrap();
                let segments = peer.replies().await;
                assert_eq!(world.super_packets() - before, 1, "all in one");
                let sizes: Vec<_> = segments.iter().map(|seen| seen.payload.len()).collect();
                let (last, full) = sizes.split_last().unwrap();
                assert!(full.iter().all(|size| *size == gets) && *last <= gets, "{says}: {sizes:?}");
                let all: Vec<_> = segments.iter().flat_map(|seen| seen.payload.clone()).collect();
                assert!(all == pattern(0, 20_000));
                flow.abort();
                peer.replies().await;
            }
        });
    }
}
