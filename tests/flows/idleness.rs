//! Flows that say nothing: they cost no wake-ups and no pages, and go on when they are spoken to.

use std::time::Duration;

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
        assert_eq!(world.deadline(), None);
        let turns = world.turns();
        world.sleep(Duration::from_secs(3600)).await;
        assert!(world.turns() - turns <= 2, "{} turns in an idle hour", world.turns() - turns);
        for (conn, flow) in flows {
            conn.write(b"still there?").await.unwrap();
            assert_eq!(flow.read(99).await.unwrap(), b"still there?");
        }
    });
}

/// Kilobytes of the private mappings that are in memory.
fn anonymous() -> usize {
    let rollup = std::fs::read_to_string("/proc/self/smaps_rollup").unwrap();
    let line = rollup.lines().find(|line| line.starts_with("Private_Dirty")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
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
        let before = anonymous();
        world.sleep(Duration::from_secs(30)).await;
        let after = anonymous();
        // Other tests run in this process; sixteen rings of a megabyte are hard to hide.
        assert!(before.saturating_sub(after) > 8 << 10 || after < 8 << 10, "{before} kB before, {after} kB after");
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
        let sent = |seen: &[crate::world::Seen]| {
            let mut segments: Vec<_> = seen.iter().filter(|seen| !seen.payload.is_empty()).collect();
            segments.sort_by_key(|seen| seen.sequence);
            segments.dedup_by_key(|seen| seen.sequence);
            segments.iter().flat_map(|seen| seen.payload.clone()).collect::<Vec<_>>()
        };
        assert_eq!(sent(&first), pattern(0, 3000));
        assert_eq!(sent(&again), pattern(0, 3000));
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
        assert_eq!(world.deadline(), None);
    });
}
