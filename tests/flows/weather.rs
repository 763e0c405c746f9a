//! Links that lose, repeat, delay and reorder, with Cubic: every byte arrives once and in order.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use proptest::prelude::*;

use crate::world::packet::ACK;
use crate::world::{Net, Peer, Weather, World, on};

/// Sends `up` bytes and then takes `down` bytes, while the other way does the same; both end in order.
async fn exchange(world: World, up: usize, down: usize) {
    let conn = world.connect(80);
    let flow = world.arrival().await;
    flow.accept();
    let (reader, writer) = (flow.clone(), flow.clone());
    let both = Rc::new(Cell::new(0));
    let ended = Rc::clone(&both);
    world.spawn(async move {
        assert_eq!(reader.read_pattern().await.expect("no reset"), up);
        ended.set(ended.get() + 1);
    });
    let ended = Rc::clone(&both);
    world.spawn(async move {
        writer.write_pattern(down).await.expect("no reset");
        writer.shutdown();
        writer.flushed().await;
        ended.set(ended.get() + 1);
    });
    conn.established().await.expect("the handshake came through");
    let sender = conn.clone();
    world.spawn(async move {
        sender.write_pattern(up).await.expect("no reset");
        sender.shutdown();
    });
    assert_eq!(conn.read_pattern().await, Ok(down));
    while both.get() < 2 {
        world.sleep(Duration::from_millis(100)).await;
    }
    flow.close();
}

fn net(offload: bool, v6: bool, seed: u64, weather: Weather) -> Net {
    Net { own: false, seed, weather, ..Net::new(offload, v6) }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn every_byte_arrives_once_and_in_order_whatever_the_link_does(
        seed in any::<u64>(),
        offload in any::<bool>(),
        v6 in any::<bool>(),
        loss in 1_000u32..50_000,
        duplicates in 0u32..20_000,
        reorder in 0u32..250_000,
        delay in 1u64..100,
        up in 1usize..200_000,
        down in 1usize..200_000,
    ) {
        let weather = Weather { loss, duplicates, reorder, delay: Duration::from_millis(delay) };
        on(net(offload, v6, seed, weather), move |world| exchange(world, up, down));
    }
}

#[test]
fn a_megabyte_over_a_radio_with_one_percent_loss_does_not_take_minutes() {
    for (offload, v6) in [(false, false), (true, true)] {
        let weather = Weather { loss: 10_000, duplicates: 1_000, reorder: 0, delay: Duration::from_millis(5) };
        on(net(offload, v6, 7, weather), |world| async move {
            exchange(world.clone(), 1 << 20, 1 << 20).await;
            assert!(world.elapsed() < Duration::from_secs(10), "{:?}", world.elapsed());
        });
    }
}

/// Takes `bytes` from a server that then ends; the client has ended before that, or does so after it.
async fn download(world: World, bytes: usize, first: bool) {
    let conn = world.connect(80);
    let flow = world.arrival().await;
    flow.accept();
    conn.established().await.expect("the handshake came through");
    if first {
        conn.shutdown();
    }
    let (writer, ended) = (flow.clone(), Rc::new(Cell::new(false)));
    let told = Rc::clone(&ended);
    world.spawn(async move {
        if first {
            assert_eq!(writer.read_pattern().await.expect("no reset"), 0);
        }
        writer.write_pattern(bytes).await.expect("no reset");
        writer.shutdown();
        writer.flushed().await;
        told.set(true);
    });
    assert_eq!(conn.read_pattern().await, Ok(bytes));
    while !ended.get() {
        world.sleep(Duration::from_millis(10)).await;
    }
    if !first {
        conn.shutdown();
        assert_eq!(flow.read_pattern().await.expect("no reset"), 0);
    }
    flow.close();
}

#[test]
fn a_download_does_not_wait_for_timeouts_whether_its_client_has_finished_or_not() {
    for (offload, v6) in [(false, false), (true, false), (false, true), (true, true)] {
        for (loss, first, seed) in [10_000, 30_000].into_iter().flat_map(|loss| {
            [false, true].into_iter().flat_map(move |first| (1..6).map(move |seed| (loss, first, seed)))
        }) {
            let weather = Weather { loss, duplicates: 0, reorder: 0, delay: Duration::from_millis(5) };
            on(net(offload, v6, seed, weather), move |world| async move {
                download(world.clone(), 1 << 20, first).await;
                // The SYN-ACK and the FINs may be lost, too.
                assert!(world.elapsed() < Duration::from_secs(3), "{:?} {loss} {first} {seed}", world.elapsed());
            });
        }
    }
}

#[test]
fn reordering_alone_costs_no_data_and_duplicates_neither() {
    for (offload, v6) in [(false, true), (true, false)] {
        let weather = Weather { loss: 0, duplicates: 300_000, reorder: 300_000, delay: Duration::from_millis(10) };
        on(net(offload, v6, 3, weather), |world| exchange(world, 600_000, 600_000));
    }
}

#[test]
fn a_link_that_is_down_for_a_minute_only_delays() {
    for (offload, v6) in [(false, false), (true, true)] {
        let weather = Weather { delay: Duration::from_millis(20), ..Weather::CALM };
        on(net(offload, v6, 5, weather), |world| async move {
            let outage = world.clone();
            world.spawn(async move {
                outage.sleep(Duration::from_millis(300)).await;
                outage.set_weather(Weather::DOWN);
                outage.sleep(Duration::from_secs(60)).await;
                outage.set_weather(Weather::CALM);
            });
            exchange(world.clone(), 2 << 20, 2 << 20).await;
            assert!(world.elapsed() > Duration::from_secs(60), "the outage hit the transfer");
        });
    }
}

#[test]
fn a_window_update_that_is_lost_does_not_stall_the_flow() {
    for (offload, v6) in [(false, false), (true, true)] {
        let net = Net { own: false, buffer: 65_535, ..Net::new(offload, v6) };
        on(net, |world| async move {
            let conn = world.connect(80);
            let flow = world.arrival().await;
            flow.accept();
            conn.established().await.unwrap();
            // Exactly the client's window, all acknowledged: nothing is left to be sent again.
            flow.write_pattern(65_535).await.unwrap();
            flow.flushed().await;
            world.set_weather(Weather::DOWN);
            let first = conn.read().await.unwrap();
            world.sleep(Duration::from_millis(100)).await;
            world.set_weather(Weather::CALM);
            let writer = flow.clone();
            world.spawn(async move {
                writer.write(&crate::world::pattern(65_535, 100_000)).await.unwrap();
                writer.shutdown();
            });
            let mut all = first;
            loop {
                let part = conn.read().await.unwrap();
                if part.is_empty() {
                    break;
                }
                all.extend(part);
            }
            assert!(all == crate::world::pattern(0, 165_535));
            assert!(world.elapsed() < Duration::from_secs(20), "{:?}", world.elapsed());
        });
    }
}

/// A client that tells of a gap in acknowledgements whose windows differ, as those of kernels do.
#[test]
fn each_gap_is_repaired_when_the_client_tells_of_it_and_not_by_a_timeout() {
    for (offload, v6) in [(false, false), (true, false), (false, true), (true, true)] {
        on(Net { own: false, ..Net::new(offload, v6) }, |world| async move {
            let mut peer = Peer::new(&world, 3000, 500);
            let flow = peer.open().await;
            let first = peer.expected;
            world.spawn(async move {
                flow.write_pattern(1 << 20).await.unwrap_or_default();
                flow.stalled().await;
            });
            // All goes well until the window of the sender is wide enough.
            let mut sent = peer.replies().await;
            while peer.expected.wrapping_sub(first) < 60_000 {
                let last = sent.iter().map(|seen| end_of(seen).wrapping_sub(first)).max().unwrap_or_default();
                peer.expected = first.wrapping_add(last);
                peer.send(ACK, &[]);
                sent = peer.replies().await;
                assert!(!sent.is_empty());
            }
            // Of what has come since, the first and the fifth thousand bytes are lost.
            let (began, lost, gap) = (world.elapsed(), peer.expected, peer.expected.wrapping_add(5000));
            let top = sent.iter().map(end_of).max_by_key(|end| end.wrapping_sub(first)).unwrap_or(gap);
            let tells = |number: u32, window: u16, blocks: &[(u32, u32)]| {
                let mut options = vec![1, 1, 5, 2 + 8 * blocks.len() as u8];
                for (left, right) in blocks {
                    options.extend([left.to_be_bytes(), right.to_be_bytes()].concat());
                }
                let told = peer.segment(ACK, &[]);
                let told = crate::world::packet::Tcp { acknowledgement: number, window, options, ..told };
                peer.world.inject(&told.packet());
            };
            let arrived = [(gap.wrapping_add(1000), top), (lost.wrapping_add(1000), gap)];
            for step in 0..2 {
                tells(lost, 60_000 + step, &arrived[1..]);
            }
            let repeats = data_before(&peer.replies().await, top);
            assert!(repeats.is_empty(), "two words are no proof: {repeats:?}");
            tells(lost, 60_002, &arrived);
            let repeats = data_before(&peer.replies().await, top);
            assert_eq!(repeats, [(lost, 1000), (gap, 1000)], "the third is, and only what is missing is sent again");
            tells(lost, 60_003, &arrived);
            let repeats = data_before(&peer.replies().await, top);
            assert!(repeats.is_empty(), "once: {repeats:?}");
            assert!(world.elapsed() - began < Duration::from_millis(100), "long before any timeout");
        });
    }
}

/// The places and lengths of the data that begins before `end`.
fn data_before(sent: &[crate::world::Seen], end: u32) -> Vec<(u32, usize)> {
    let old = |sequence: u32| end.wrapping_sub(sequence) as i32 > 0;
    let data = sent.iter().filter(|seen| !seen.payload.is_empty() && old(seen.sequence));
    data.map(|seen| (seen.sequence, seen.payload.len())).collect()
}

/// The sequence number behind a segment.
fn end_of(seen: &crate::world::Seen) -> u32 {
    seen.sequence.wrapping_add(seen.payload.len() as u32)
}
