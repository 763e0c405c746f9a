//! What clients are told of data that comes late, early or twice (RFC 2018, RFC 2883), and what becomes of it.

use crate::world::packet::{ACK, FIN, SYN};
use crate::world::{Flow, Net, Peer, Seen, World, on, on_every_net};

/// Where a segment stands behind the peer's next byte, in bytes.
fn send(peer: &Peer, at: u32, bytes: usize, flags: u8) {
    let mut segment = peer.segment(ACK | flags, &crate::world::pattern(at as usize, bytes));
    segment.sequence = peer.next.wrapping_add(at);
    peer.world.inject(&segment.packet());
}

/// What an acknowledgement says: up to where all has come, and the blocks of its option.
fn told(peer: &Peer, seen: &Seen) -> (u32, Vec<(u32, u32)>) {
    assert!(seen.is(ACK) && seen.payload.is_empty(), "a bare acknowledgement: {seen:?}");
    let place = |number: u32| number.wrapping_sub(peer.next);
    let blocks = crate::world::packet::blocks(&seen.bytes);
    (place(seen.acknowledgement), blocks.into_iter().map(|(left, right)| (place(left), place(right))).collect())
}

/// The only answer to what was sent just now.
async fn answer(peer: &Peer) -> (u32, Vec<(u32, u32)>) {
    let replies = peer.replies().await;
    assert_eq!(replies.len(), 1, "{replies:?}");
    told(peer, &replies[0])
}

async fn open(world: &World) -> (Peer, Flow) {
    let mut peer = Peer::new(world, 3000, 500);
    let flow = peer.open().await;
    (peer, flow)
}

#[test]
fn every_segment_beyond_a_gap_is_answered_at_once_by_all_that_came_the_latest_first() {
    on_every_net(|world| async move {
        let (peer, flow) = open(&world).await;
        send(&peer, 1000, 1000, 0);
        assert_eq!(answer(&peer).await, (0, vec![(1000, 2000)]));
        send(&peer, 3000, 1000, 0);
        assert_eq!(answer(&peer).await, (0, vec![(3000, 4000), (1000, 2000)]));
        send(&peer, 5000, 1000, 0);
        send(&peer, 7000, 1000, 0);
        send(&peer, 9000, 1000, 0);
        let replies: Vec<_> = peer.replies().await.iter().map(|seen| told(&peer, seen)).collect();
        assert_eq!(replies.len(), 3, "each is answered by itself, in one turn too");
        assert_eq!(replies[2], (0, vec![(9000, 10_000), (7000, 8000), (5000, 6000), (3000, 4000)]));
        send(&peer, 2000, 1000, 0);
        assert_eq!(answer(&peer).await, (0, vec![(1000, 4000), (9000, 10_000), (7000, 8000), (5000, 6000)]));
        send(&peer, 0, 1000, 0);
        assert_eq!(answer(&peer).await, (4000, vec![(9000, 10_000), (7000, 8000), (5000, 6000)]), "a gap is filled");
        for at in [4000, 6000, 8000] {
            send(&peer, at, 1000, 0);
        }
        assert_eq!(told(&peer, peer.replies().await.last().unwrap()), (10_000, vec![]));
        assert!(flow.read(10_000).await.unwrap() == crate::world::pattern(0, 10_000));
    });
}

#[test]
fn what_comes_twice_is_told_once() {
    on_every_net(|world| async move {
        let (peer, flow) = open(&world).await;
        send(&peer, 0, 1000, 0);
        assert_eq!(answer(&peer).await, (1000, vec![]));
        send(&peer, 0, 1000, 0);
        assert_eq!(answer(&peer).await, (1000, vec![(0, 1000)]), "before all that is missing");
        send(&peer, 2000, 1000, 0);
        assert_eq!(answer(&peer).await, (1000, vec![(2000, 3000)]));
        send(&peer, 2000, 1000, 0);
        assert_eq!(answer(&peer).await, (1000, vec![(2000, 3000), (2000, 3000)]), "beyond a gap");
        send(&peer, 1000, 1000, 0);
        assert_eq!(answer(&peer).await, (3000, vec![]));
        assert!(flow.read(3000).await.unwrap() == crate::world::pattern(0, 3000));
    });
}

#[test]
fn a_client_that_does_not_permit_it_is_answered_without_options() {
    on_every_net(|world| async move {
        let mut peer = Peer::new(&world, 3000, 500);
        world.inject(&peer.segment(SYN, &[]).packet());
        let flow = world.arrival().await;
        flow.accept();
        peer.finish_handshake().await;
        for at in [1000, 3000, 1000] {
            send(&peer, at, 1000, 0);
            assert_eq!(answer(&peer).await, (0, vec![]), "three equal words still tell of a loss");
        }
    });
}

#[test]
fn with_more_gaps_than_are_remembered_each_segment_is_answered_and_only_what_is_held_is_told() {
    on_every_net(|world| async move {
        let (peer, flow) = open(&world).await;
        let mut all = std::collections::BTreeSet::new();
        for gap in 0..50 {
            send(&peer, 200 * gap + 100, 100, 0);
            let (next, blocks) = answer(&peer).await;
            assert_eq!(next, 0);
            all.extend(blocks);
        }
        assert!(all.len() >= 32, "{}", all.len());
        // A client that believes it sends nothing again of what it was told.
        let held = |at: u32| all.iter().any(|(left, right)| (*left..*right).contains(&at));
        for piece in (0..100).filter(|piece| !held(100 * piece)) {
            send(&peer, 100 * piece, 100, 0);
        }
        assert_eq!(told(&peer, peer.replies().await.last().unwrap()), (10_000, vec![]));
        assert!(flow.read(10_000).await.unwrap() == crate::world::pattern(0, 10_000));
    });
}

#[test]
fn a_client_that_sends_beyond_its_window_is_told_of_what_was_taken() {
    on_every_net(|world| async move {
        let (mut peer, flow) = open(&world).await;
        // The window is known from here on.
        peer.data(&crate::world::pattern(0, 10));
        let window = u32::from(crate::world::packet::window(&peer.replies().await.last().unwrap().bytes)) << 5;
        send(&peer, window - 100, 200, 0);
        let (_, blocks) = answer(&peer).await;
        assert_eq!(blocks, [(window - 100, window)]);
        drop(flow);
    });
}

#[test]
fn a_fin_that_overtook_data_ends_the_stream_when_the_data_has_come() {
    on_every_net(|world| async move {
        for alone in [false, true] {
            let mut peer = Peer::new(&world, 3000 + u16::from(alone), 500);
            let flow = peer.open().await;
            if alone {
                send(&peer, 2000, 0, FIN);
                assert_eq!(answer(&peer).await, (0, vec![]));
                send(&peer, 1000, 1000, 0);
            } else {
                send(&peer, 1000, 1000, FIN);
            }
            assert_eq!(answer(&peer).await, (0, vec![(1000, 2000)]));
            send(&peer, 0, 1000, 0);
            assert_eq!(told(&peer, peer.replies().await.last().unwrap()), (2001, vec![]), "its FIN is taken, too");
            assert!(flow.read_all().await.unwrap() == crate::world::pattern(0, 2000));
        }
    });
}

/// Its acknowledgement is old by then; its data is not.
#[test]
fn data_that_was_overtaken_by_an_acknowledgement_is_taken() {
    on_every_net(|world| async move {
        let (mut peer, flow) = open(&world).await;
        let late = peer.segment(ACK | FIN, &crate::world::pattern(0, 700));
        flow.write(&[1; 300]).await.unwrap();
        assert_eq!(peer.replies().await.iter().map(|seen| seen.payload.len()).sum::<usize>(), 300);
        peer.expected = peer.expected.wrapping_add(300);
        peer.next = peer.next.wrapping_add(700);
        peer.send(ACK, &[]);
        peer.replies().await;
        world.inject(&late.packet());
        let replies = peer.replies().await;
        assert_eq!(replies.last().unwrap().acknowledgement, peer.next.wrapping_add(1));
        assert!(flow.read_all().await.unwrap() == crate::world::pattern(0, 700));
    });
}

/// What a challenge says of the window is what the client may count on.
#[test]
fn a_syn_in_the_middle_of_a_flow_does_not_shut_the_window() {
    on(Net::new(false, false), |world| async move {
        let (mut peer, _flow) = open(&world).await;
        peer.data(&[1; 10]);
        let before = crate::world::packet::window(&peer.replies().await.last().unwrap().bytes);
        peer.syn();
        let replies = peer.replies().await;
        assert_eq!(crate::world::packet::window(&replies.last().unwrap().bytes), before);
    });
}
