//! Memory is shared between clients: who has most gives way, and who has little does not notice.

use std::cell::Cell;
use std::future::Future;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::task::{Context, Wake, Waker};
use std::time::Duration;

use crate::world::packet::{ACK, SYN};
use crate::world::{Conn, Flow, Net, Peer, World, on, pattern};

const MEGABYTE: usize = 1 << 20;
/// Flows that the greedy client opens: there is room for fewer than half of them.
const MANY: u16 = 200;

fn small() -> impl Iterator<Item = Net> {
    Net::all().into_iter().map(|net| Net { memory: MEGABYTE, buffer: 64 << 10, ..net })
}

/// What the other side of a flow does: it repeats what the modest client says, and of what the greedy one says it takes
/// nothing, so that all of its flows hold memory.
async fn serve(world: World, flow: Flow) {
    flow.accept();
    if flow.tuple.client.ip() == world.net().peer() {
        flow.stalled().await;
        return;
    }
    while let Ok(bytes) = flow.read(1 << 20).await
        && !bytes.is_empty()
        && flow.write(&bytes).await.is_ok()
    {}
    flow.shutdown();
}

fn serve_both(world: &World) {
    let server = world.clone();
    world.serve(move |flow| serve(server.clone(), flow));
}

/// The greedy client takes what there is.
async fn take_all(world: &World) {
    for port in 0..MANY {
        let mut peer = Peer::new(world, 2000 + port, 9);
        peer.syn();
        let Some(answer) = peer.replies().await.into_iter().find(|seen| seen.is(SYN | ACK)) else { continue };
        (peer.next, peer.expected) = (10, answer.sequence.wrapping_add(1));
        for _ in 0..4 {
            peer.data(&pattern(0, 1000));
        }
        world.settle().await;
        assert!(world.stack().memory() <= MEGABYTE);
    }
    assert!(world.stack().counters().no_memory > 0, "there was not enough for all of them");
}

/// Sends `bytes` and has them come back; how long that took.
async fn transfer(world: &World, conn: &Conn, bytes: usize) -> Duration {
    let (start, writer) = (world.elapsed(), conn.clone());
    world.spawn(async move { writer.write_pattern(bytes).await.expect("the flow goes on") });
    let mut at = 0;
    while at < bytes {
        let part = conn.read().await.expect("the flow goes on");
        assert!(!part.is_empty() && part == pattern(at, part.len()));
        at += part.len();
    }
    world.elapsed() - start
}

#[test]
fn who_came_first_and_has_little_keeps_its_flow_and_its_speed() {
    for net in small() {
        on(net, |world| async move {
            serve_both(&world);
            let conn = world.connect(80);
            conn.established().await.unwrap();
            let alone = transfer(&world, &conn, 300_000).await;
            world.sleep(Duration::from_secs(30)).await;
            take_all(&world).await;
            // Long idle, and next to nothing beside what the other has: no reason to end it.
            world.sleep(Duration::from_secs(2)).await;
            let beside = transfer(&world, &conn, 300_000).await;
            assert!(beside <= alone * 2 + Duration::from_millis(100), "{alone:?} alone, {beside:?} beside the other");
            assert_eq!(world.stack().counters().evicted, 0, "an eighth was kept for it");
        });
    }
}

#[test]
fn who_comes_last_finds_room_at_the_cost_of_who_has_most() {
    for net in small() {
        on(net, |world| async move {
            serve_both(&world);
            take_all(&world).await;
            let flows = world.flows();
            for _ in 0..8 {
                let conn = world.connect(80);
                conn.established().await.unwrap();
                let took = transfer(&world, &conn, 100_000).await;
                assert!(took < Duration::from_secs(5), "{took:?}");
            }
            let evicted = usize::try_from(world.stack().counters().evicted).unwrap();
            assert!((1..=flows / 2).contains(&evicted), "{evicted} of {flows}");
            assert!(world.stack().memory() <= MEGABYTE);
        });
    }
}

/// Counts how often somebody is woken.
#[derive(Default)]
struct Count(AtomicUsize);

impl Wake for Count {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Relaxed);
    }
}

#[test]
fn a_flow_that_waits_for_memory_is_remembered_once_however_often_it_asks() {
    for net in small() {
        on(net, |world| async move {
            let full = Rc::new(Cell::new(true));
            let mut peer = Peer::new(&world, 1999, 9);
            let waiting = peer.open().await;
            let (server, held) = (world.clone(), Rc::clone(&full));
            world.serve(move |flow| {
                let (world, held) = (server.clone(), Rc::clone(&held));
                async move {
                    flow.accept();
                    while held.get() {
                        world.sleep(Duration::from_millis(100)).await;
                    }
                    flow.abort();
                }
            });
            take_all(&world).await;
            let count = Arc::<Count>::default();
            let waker = Waker::from(Arc::clone(&count));
            {
                let mut write = pin!(waiting.write(b"an answer"));
                for _ in 0..1000 {
                    assert!(write.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
                }
            }
            full.set(false);
            world.sleep(Duration::from_secs(1)).await;
            assert_eq!(count.0.load(Relaxed), 1);
            waiting.write(b"an answer").await.unwrap();
        });
    }
}
