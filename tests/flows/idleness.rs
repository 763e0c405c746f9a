//! Flows that say nothing: they cost no wake-ups and no pages, and go on when they are spoken to.

use std::sync::Arc;
use std::time::Duration;

use tunproxy::stack::Heartbeat;

use crate::world::packet::ACK;
use crate::world::{Net, Peer, on, on_every_net, pattern};

const MEGABYTE: usize = 1 << 20;

#[test]
fn idle_flows_ask_for_no_wake_up() {
    on_every_net(|world| async move {
        let mut flows = Vec::new();
        for _ in 0..20 {
            let conn = world.connect(80);
            let flow = world.arrival().await;
            flow.accept();
            conn.established().await.unwrap();
            conn.write(b"hello").await.unwrap();
            assert_eq!(flow.read(9).await.unwrap(), b"hello");
            flow.write(b"welcome").await.unwrap();
            assert_eq!(conn.read().await.unwrap(), b"welcome");
            flows.push((conn, flow));
        }
        // Pages are given back once, timers of what was acknowledged run out; then nothing.
        world.sleep(Duration::from_secs(70)).await;
        assert!(world.rests());
        let turns = world.turns();
        world.sleep(Duration::from_secs(3600)).await;
        assert!(world.turns() - turns <= 2, "{} turns in an idle hour", world.turns() - turns);
        for (conn, flow) in flows {
            conn.write(b"still there?").await.unwrap();
            assert_eq!(flow.read(99).await.unwrap(), b"still there?");
        }
    });
}

#[test]
fn an_idle_flow_gives_its_pages_back_and_carries_data_afterwards() {
    on(Net::new(false, false), |world| async move {
        let mut flows = Vec::new();
        for _ in 0..16 {
            let conn = world.connect(80);
            let flow = world.arrival().await;
            flow.accept();
            conn.established().await.unwrap();
            conn.write_pattern(MEGABYTE).await.unwrap();
            let mut at = 0;
            while at < MEGABYTE {
                let part = flow.read(usize::MAX).await.unwrap();
                assert!(part == pattern(at, part.len()));
                at += part.len();
            }
            flows.push((conn, flow));
        }
        assert!(world.stack().ring_memory().1 >= 16 * MEGABYTE);
        world.sleep(Duration::from_secs(30)).await;
        assert_eq!(world.stack().ring_memory().1, 0);
        for (conn, flow) in flows {
            conn.write(&pattern(5, 100_000)).await.unwrap();
            let mut all = Vec::new();
            while all.len() < 100_000 {
                all.extend(flow.read(usize::MAX).await.unwrap());
            }
            assert!(all == pattern(5, 100_000));
        }
    });
}

#[test]
fn data_that_waits_behind_a_gap_survives_idleness() {
    on_every_net(|world| async move {
        let mut peer = Peer::new(&world, 3000, 77);
        let flow = peer.open().await;
        let body = pattern(0, 30_000);
        peer.data(&body[..1000]);
        assert_eq!(flow.read(usize::MAX).await.unwrap(), body[..1000]);
        // The second thousand is missing.
        let gap = peer.next;
        peer.next = gap.wrapping_add(1000);
        for part in body[2000..].chunks(1000) {
            peer.data(part);
        }
        world.sleep(Duration::from_secs(60)).await;
        peer.next = gap;
        peer.data(&body[1000..2000]);
        let mut all = Vec::new();
        while all.len() < 29_000 {
            all.extend(flow.read(usize::MAX).await.unwrap());
        }
        assert!(all == body[1000..], "what waited behind the gap is what was sent");
    });
}

#[test]
fn unread_and_unacknowledged_data_survives_idleness() {
    on_every_net(|world| async move {
        let mut peer = Peer::new(&world, 3000, 77);
        let flow = peer.open().await;
        peer.data(&pattern(0, 1400));
        flow.write_pattern(3000).await.unwrap();
        let first = peer.replies().await;
        world.sleep(Duration::from_secs(40)).await;
        assert_eq!(flow.read(usize::MAX).await.unwrap(), pattern(0, 1400));
        let again = peer.replies().await;
        let initial = peer.expected;
        let sent = |seen: &[crate::world::Seen]| {
            let mut bytes = vec![0; 3000];
            for seen in seen {
                let at = seen.sequence.wrapping_sub(initial) as usize;
                if !seen.payload.is_empty() {
                    bytes[at..at + seen.payload.len()].copy_from_slice(&seen.payload);
                }
            }
            bytes
        };
        assert!(sent(&first) == pattern(0, 3000));
        assert!(sent(&again) == pattern(0, 3000));
    });
}

#[test]
fn a_segment_beyond_the_window_does_not_keep_an_idle_flow_awake() {
    on_every_net(|world| async move {
        let mut peer = Peer::new(&world, 3000, 77);
        let flow = peer.open().await;
        peer.data(b"x");
        assert_eq!(flow.read(9).await.unwrap(), b"x");
        let stray = crate::world::packet::Tcp {
            sequence: peer.next.wrapping_add(100_000_000),
            ..peer.segment(ACK, b"from another time")
        };
        world.inject(&stray.packet());
        world.sleep(Duration::from_secs(70)).await;
        assert!(world.rests());
    });
}

#[test]
fn quiet_is_reached_soon_and_by_flows_that_hold_data_too() {
    on_every_net(|world| async move {
        let mut peers = Vec::new();
        for port in 0..40 {
            let mut peer = Peer::new(&world, 3000 + port, 77);
            let flow = peer.open().await;
            peer.data(b"early");
            world.sleep(Duration::from_millis(20)).await;
            peer.data(b"late");
            if port % 2 == 0 {
                assert_eq!(flow.read(99).await.unwrap(), b"earlylate");
            }
            peers.push((peer, flow));
        }
        world.sleep(Duration::from_secs(7)).await;
        assert!(world.rests());
        let turns = world.turns();
        world.sleep(Duration::from_secs(3600)).await;
        assert!(world.turns() - turns <= 2, "{} turns in an idle hour", world.turns() - turns);
        assert_eq!(world.stack().ring_memory().1, 20 * 9, "what was not read is still there, and nothing else");
        for (_, flow) in peers.iter().step_by(2) {
            flow.shutdown();
        }
        for (_, flow) in peers.iter().skip(1).step_by(2) {
            assert_eq!(flow.read(99).await.unwrap(), b"earlylate");
        }
        world.sleep(Duration::from_secs(7)).await;
        assert_eq!(world.stack().ring_memory().1, 0);
    });
}

/// Answers whatever is sent to `peer` by a bare acknowledgement, and returns what that was.
async fn answer(peer: &Peer) -> Vec<crate::world::Seen> {
    let asked = peer.replies().await;
    for _ in &asked {
        peer.send(ACK, &[]);
    }
    asked
}

#[test]
fn a_client_that_is_silent_for_hours_is_asked_and_kept_as_long_as_it_answers() {
    on_every_net(|world| async move {
        let mut peer = Peer::new(&world, 3000, 77);
        let flow = peer.open().await;
        let mut asked = Vec::new();
        for minute in 0..230 {
            world.sleep(Duration::from_secs(60)).await;
            let questions = answer(&peer).await;
            if minute < 123 {
                assert!(questions.is_empty(), "minute {minute}");
            }
            asked.extend(questions);
        }
        // The second question is due only when the silence has lasted as long again.
        assert_eq!(asked.len(), 1, "{asked:?}");
        assert!(asked[0].is(ACK) && asked[0].payload.len() == 1);
        assert_eq!(asked[0].sequence, peer.expected.wrapping_sub(1), "nothing new is said");
        peer.data(b"back");
        assert_eq!(flow.read(9).await.unwrap(), b"back");
        flow.write(b"welcome").await.unwrap();
        assert_eq!(peer.replies().await.last().unwrap().payload, b"welcome");
    });
}

#[test]
fn a_client_that_vanished_without_a_word_is_noticed_and_its_flow_ends() {
    on_every_net(|world| async move {
        let mut peer = Peer::new(&world, 3000, 77);
        let flow = peer.open().await;
        assert!(flow.read(1).await.is_err());
        assert!(world.elapsed() > Duration::from_secs(7440), "{:?}", world.elapsed());
        assert!(world.elapsed() < Duration::from_secs(9000), "{:?}", world.elapsed());
        let questions = peer.replies().await.iter().filter(|seen| seen.payload.len() == 1).count();
        assert!((5..12).contains(&questions), "{questions}");
        world.sleep(Duration::from_secs(130)).await;
        assert_eq!((world.flows(), world.deadline()), (0, None));
    });
}

#[test]
fn a_flow_moves_as_long_as_its_client_takes_what_was_written() {
    on_every_net(|world| async move {
        let mut peer = Peer::new(&world, 3000, 500);
        let flow = peer.open().await;
        let heartbeat = Arc::new(Heartbeat::new(world.now()));
        flow.watch(&heartbeat);
        flow.write(&[1; 100]).await.unwrap();
        peer.replies().await;
        world.sleep(Duration::from_millis(100)).await;
        let before = heartbeat.last();
        peer.send(ACK, &[]);
        peer.replies().await;
        assert_eq!(heartbeat.last(), before, "it says nothing new");
        peer.expected = peer.expected.wrapping_add(50);
        peer.send(ACK, &[]);
        peer.replies().await;
        assert_eq!(heartbeat.last().duration_since(before), world.now().duration_since(before), "half of it arrived");
        assert!(heartbeat.last() > before);
    });
}
