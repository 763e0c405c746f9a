//! The memory that flows may take: never more than that, and nobody is stuck when it is used up.

use std::cell::Cell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use crate::world::packet::{ACK, SYN, Tcp};
use crate::world::{Net, Peer, on, pattern};

const MEGABYTE: usize = 1 << 20;

fn small() -> impl Iterator<Item = Net> {
    Net::all().into_iter().map(|net| Net { memory: MEGABYTE, buffer: 64 << 10, ..net })
}

#[test]
fn a_hundred_transfers_at_once_share_little_memory_and_all_arrive() {
    for net in small() {
        on(net, |world| async move {
            let (done, most) = (Rc::new(Cell::new(0)), Rc::new(Cell::new(0)));
            world.serve(|flow| async move {
                flow.accept();
                let received = flow.read_pattern().await.unwrap();
                flow.write_pattern(received).await.unwrap();
                flow.shutdown();
                flow.flushed().await;
            });
            for _ in 0..100 {
                let (conn, done, most, stack) = (world.connect(80), Rc::clone(&done), Rc::clone(&most), world.clone());
                world.spawn(async move {
                    conn.established().await.unwrap();
                    for at in (0..100_000).step_by(10_000) {
                        conn.write(&pattern(at, 10_000)).await.unwrap();
                        most.set(stack.stack().memory().max(most.get()));
                    }
                    conn.shutdown();
                    assert_eq!(conn.read_pattern().await, Ok(100_000));
                    done.set(done.get() + 1);
                });
            }
            while done.get() < 100 {
                assert!(world.elapsed() < Duration::from_secs(600), "{} have arrived", done.get());
                world.sleep(Duration::from_millis(10)).await;
            }
            assert!((MEGABYTE / 4..=MEGABYTE).contains(&most.get()), "{}", most.get());
        });
    }
}

#[test]
fn flows_in_which_nothing_moves_make_room_for_those_in_which_something_does() {
    for net in small() {
        on(net, |world| async move {
            // Tasks that never read: what their clients send stays in the rings.
            world.serve(|flow| async move {
                flow.accept();
                flow.stalled().await;
            });
            let mut greedy = Vec::new();
            for port in 0..200 {
                let mut peer = Peer::new(&world, 2000 + port, 9);
                peer.syn();
                let Some(answer) = peer.replies().await.into_iter().find(|seen| seen.is(SYN | ACK)) else { continue };
                peer.next = 10;
                peer.expected = answer.sequence.wrapping_add(1);
                for _ in 0..8 {
                    peer.data(&pattern(0, 1000));
                }
                greedy.push(peer);
                world.settle().await;
                assert!(world.stack().memory() <= MEGABYTE);
            }
            let refused = world.stack().counters().no_memory;
            assert!(refused > 0, "there was not enough for all of them");
            world.sleep(Duration::from_secs(10)).await;
            // Newcomers are served: the stale make room.
            let conn = world.connect(80);
            conn.established().await.unwrap();
            world.sleep(Duration::from_secs(1)).await;
            let counters = world.stack().counters();
            assert!(counters.evicted > 0 && counters.evicted < 200, "{counters:?}");
            assert!(world.stack().memory() <= MEGABYTE);
        });
    }
}

#[test]
fn idle_flows_cost_their_place_alone_and_the_oldest_goes_when_places_run_out() {
    for net in small() {
        on(net, |world| async move {
            world.serve(|flow| async move {
                flow.accept();
                while flow.read(1000).await.is_ok_and(|bytes| !bytes.is_empty()) {}
            });
            let mut conns = Vec::new();
            for _ in 0..400 {
                let conn = world.connect(80);
                // A SYN that finds no place is sent again.
                conn.established().await.unwrap();
                conns.push(conn);
                world.sleep(Duration::from_millis(100)).await;
            }
            let counters = world.stack().counters();
            assert!(counters.evicted >= 140, "{counters:?}");
            assert!(world.flows() >= 200, "{}", world.flows());
            // The youngest are all there.
            for conn in &conns[300..] {
                conn.write(b"x").await.unwrap();
            }
            world.settle().await;
        });
    }
}

#[test]
fn a_flood_of_handshakes_ends_no_open_flow() {
    for net in small() {
        on(net, |world| async move {
            world.serve(|flow| async move {
                flow.accept();
                let received = flow.read_pattern().await.unwrap_or_default();
                assert_eq!(received, 1000);
            });
            let conn = world.connect(80);
            conn.established().await.unwrap();
            world.sleep(Duration::from_secs(30)).await;
            let to = SocketAddr::new(world.net().server(), 80);
            for n in 0..20_000_u32 {
                let from = SocketAddr::new(world.net().peer(), (n % 60_000) as u16 + 1);
                world.inject(&Tcp { sequence: n, ..Tcp::new(from, to, SYN) }.packet());
            }
            world.settle().await;
            let counters = world.stack().counters();
            assert_eq!(counters.evicted, 0, "{counters:?}");
            assert!(world.stack().memory() <= MEGABYTE / 4);
            conn.write_pattern(1000).await.unwrap();
            conn.shutdown();
            world.settle().await;
        });
    }
}
