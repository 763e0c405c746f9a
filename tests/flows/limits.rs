//! Many flows: limits that hold, nothing left behind, and nobody starved.

use std::cell::RefCell;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::time::Duration;

use tunproxy::stack::Refusal;

use crate::world::packet::{ACK, FIN, SYN, Tcp};
use crate::world::{Net, Peer, on, on_every_net};

const MEGABYTE: usize = 1 << 20;

/// The `n`th of many sources, each of which is a client.
fn source(v6: bool, n: usize) -> IpAddr {
    let n = n as u16;
    if v6 {
        IpAddr::from([0x2001, 0xdb8, 9, n, 0, 0, 0, 1])
    } else {
        IpAddr::from([10, 9, (n >> 8) as u8, (n & 255) as u8])
    }
}

fn syn(from: SocketAddr, to: SocketAddr) -> Vec<u8> {
    Tcp { sequence: 7, ..Tcp::new(from, to, SYN) }.packet()
}

#[test]
fn one_source_may_have_256_flows_waiting_and_others_are_not_touched_by_it() {
    on_every_net(|world| async move {
        let server = SocketAddr::new(world.net().server(), 80);
        let (scanner, other) = (source(world.net().v6, 1), source(world.net().v6, 2));
        for port in 1..=1000 {
            world.inject(&syn(SocketAddr::new(scanner, port), server));
        }
        assert_eq!((world.flows(), world.waiting()), (256, 256));
        assert_eq!(world.stack().counters().flooded, 744);
        world.inject(&syn(SocketAddr::new(other, 1), server));
        assert_eq!(world.flows(), 257);
        // One that is answered makes room for one.
        world.arrival().await.refuse(Refusal::Silent);
        world.settle().await;
        world.inject(&syn(SocketAddr::new(scanner, 2000), server));
        world.inject(&syn(SocketAddr::new(scanner, 2001), server));
        assert_eq!(world.stack().counters().flooded, 745);
        let accepted = world.arrival().await;
        accepted.accept();
        world.settle().await;
        world.inject(&syn(SocketAddr::new(scanner, 2002), server));
        assert_eq!(world.stack().counters().flooded, 746, "its handshake is not over");
        let answer = std::iter::from_fn(|| world.inbox()).find(|seen| seen.is(SYN | ACK)).expect("a SYN-ACK came");
        let last =
            Tcp { sequence: 8, acknowledgement: answer.sequence.wrapping_add(1), ..Tcp::new(answer.to, server, ACK) };
        world.inject(&last.packet());
        world.settle().await;
        world.inject(&syn(SocketAddr::new(scanner, 2002), server));
        assert_eq!(world.stack().counters().flooded, 746, "an open flow does not wait any more");
    });
}

#[test]
fn all_addresses_of_a_64_are_one_source_and_this_host_is_none_of_them() {
    for own in [false, true] {
        on(Net { own, ..Net::new(true, true) }, move |world| async move {
            let server = SocketAddr::new(world.net().server(), 80);
            let beside = |n: u16| IpAddr::from([0x2001, 0xdb8, 1, 0, 0, 0, 1, n]);
            for (n, port) in (1..=20).flat_map(|n| (1..=256).map(move |port| (n, port))) {
                world.inject(&syn(SocketAddr::new(beside(n), port), server));
            }
            assert_eq!((world.waiting(), world.stack().counters().flooded), (256, 20 * 256 - 256));
            // In the same network, and stopped only where it is not this host itself.
            (1..=1000).for_each(|port| world.inject(&syn(SocketAddr::new(world.net().peer(), port), server)));
            assert_eq!(world.waiting(), if own { 1256 } else { 256 });
            world.inject(&syn(SocketAddr::new(source(true, 1), 1), server));
            assert_eq!(world.waiting(), if own { 1257 } else { 257 });
        });
    }
}

#[test]
fn where_flows_may_have_few_descriptors_one_source_may_have_fewer_waiting() {
    for v6 in [false, true] {
        on(Net { own: false, handshakes: 24, ..Net::new(true, v6) }, |world| async move {
            let server = SocketAddr::new(world.net().server(), 80);
            for (n, port) in (1..=100).flat_map(|port| [(1, port), (2, port)]) {
                world.inject(&syn(SocketAddr::new(source(world.net().v6, n), port), server));
            }
            assert_eq!((world.waiting(), world.stack().counters().flooded), (48, 152));
        });
    }
}

#[test]
fn a_flood_of_forged_sources_does_not_shut_out_a_client_that_has_been_there() {
    on_every_net(|world| async move {
        let server = SocketAddr::new(world.net().server(), 80);
        let known = source(world.net().v6, 60_000);
        world.inject(&syn(SocketAddr::new(known, 1), server));
        let flow = world.arrival().await;
        flow.accept();
        world.settle().await;
        let answer = std::iter::from_fn(|| world.inbox()).find(|seen| seen.is(SYN | ACK)).expect("a SYN-ACK came");
        let last =
            Tcp { sequence: 8, acknowledgement: answer.sequence.wrapping_add(1), ..Tcp::new(answer.to, server, ACK) };
        world.inject(&last.packet());
        world.settle().await;
        for n in 0..6000 {
            world.inject(&syn(SocketAddr::new(source(world.net().v6, n), 1), server));
        }
        let flooded = 6000 - 4096;
        assert_eq!(world.stack().counters().flooded, flooded);
        // As many as of any one source, and nobody else any.
        for port in 1000..1300 {
            world.inject(&syn(SocketAddr::new(known, port), server));
        }
        assert_eq!(world.stack().counters().flooded, flooded + 300 - 256);
        world.inject(&syn(SocketAddr::new(source(world.net().v6, 50_000), 1), server));
        assert_eq!(world.stack().counters().flooded, flooded + 300 - 256 + 1);
    });
}

#[test]
fn this_host_itself_may_have_more_flows_waiting_than_one_source() {
    on_every_net(|world| async move {
        let server = SocketAddr::new(world.net().server(), 80);
        for port in 1..=5000 {
            world.inject(&syn(SocketAddr::new(world.net().peer(), port), server));
        }
        assert_eq!(world.waiting(), 4096);
    });
}

#[test]
fn handshakes_that_nobody_completes_are_limited_and_end_soon() {
    on_every_net(|world| async move {
        let server = SocketAddr::new(world.net().server(), 53);
        world.serve(|flow| async move {
            flow.accept();
            // Until it is given up.
            let _ = flow.read(1).await;
        });
        for n in 0..6000usize {
            world.inject(&syn(SocketAddr::new(source(world.net().v6, n / 100), 1 + (n % 100) as u16), server));
            if n % 500 == 0 {
                world.settle().await;
            }
        }
        world.settle().await;
        assert_eq!((world.flows(), world.stack().counters().flooded), (4096, 6000 - 4096));
        world.sleep(Duration::from_secs(30)).await;
        assert_eq!(world.flows(), 0);
    });
}

#[test]
fn no_more_than_4096_flows_wait_and_they_leave_nothing_behind() {
    for v6 in [false, true] {
        on(Net::new(true, v6), move |world| async move {
            let server = SocketAddr::new(world.net().server(), 443);
            for n in 0..5000usize {
                world.inject(&syn(SocketAddr::new(source(v6, n / 200), 1 + (n % 200) as u16), server));
            }
            assert_eq!((world.flows(), world.waiting()), (4096, 4096));
            assert_eq!(world.stack().counters().flooded, 904);
            for _ in 0..4096 {
                world.arrival().await.close();
            }
            world.settle().await;
            assert_eq!(world.flows(), 0);
            world.inject(&syn(SocketAddr::new(source(v6, 0), 9), server));
            assert_eq!(world.flows(), 1);
        });
    }
}

#[test]
fn twenty_thousand_connections_in_a_row_leave_no_flow_and_no_growth() {
    on(Net { buffer: 4096, ..Net::new(false, false) }, |world| async move {
        world.serve(|flow| async move {
            flow.accept();
            let request = flow.read(100).await.unwrap();
            flow.write(&request).await.unwrap();
            flow.shutdown();
            assert!(flow.read(1).await.unwrap().is_empty());
            flow.close();
        });
        let conn = world.connect_from(1000, 80);
        let mut before = 0;
        for round in 0..20_000u32 {
            conn.established().await.unwrap();
            conn.write(&round.to_be_bytes()).await.unwrap();
            assert_eq!(conn.read().await.unwrap(), round.to_be_bytes());
            assert!(conn.read().await.unwrap().is_empty());
            conn.shutdown();
            conn.closed().await;
            // Ports come round after a hundred connections, as in failures.md 25.
            conn.open(1001 + (round % 100) as u16, 80);
            if round == 100 {
                before = world.stack().ring_memory().0;
            }
        }
        conn.abort();
        world.sleep(Duration::from_secs(130)).await;
        assert_eq!((world.flows(), world.deadline()), (0, None));
        assert!(world.stack().counters().flows >= 20_000);
        assert_eq!(world.stack().ring_memory(), (before, 0), "as much as after a hundred");
    });
}

#[test]
fn a_bulk_flow_does_not_starve_another_even_on_a_device_that_takes_little() {
    for net in Net::all() {
        // Room for less than one flow's share in a turn.
        on(Net { room: 4, ..net }, |world| async move {
            let order = Rc::new(RefCell::new(Vec::new()));
            let sizes = [8 * MEGABYTE, 8 * MEGABYTE, 100_000];
            let mut conns = Vec::new();
            for size in sizes {
                let conn = world.connect(80);
                let flow = world.arrival().await;
                flow.accept();
                conn.established().await.unwrap();
                conns.push((conn, flow, size));
            }
            for (conn, flow, size) in conns {
                world.spawn(async move {
                    flow.write_pattern(size).await.unwrap();
                    flow.shutdown();
                    drop(flow.read(1).await);
                });
                let order = Rc::clone(&order);
                world.spawn(async move {
                    assert_eq!(conn.read_pattern().await, Ok(size));
                    order.borrow_mut().push(size);
                });
            }
            while order.borrow().is_empty() {
                world.sleep(Duration::from_micros(1)).await;
            }
            assert_eq!(order.borrow()[0], 100_000, "the short one ends first");
        });
    }
}

#[test]
fn a_full_device_loses_no_byte_and_no_flow() {
    for net in Net::all() {
        on(Net { room: 1, ..net }, |world| async move {
            world.serve(|flow| async move {
                flow.accept();
                let count = flow.read_pattern().await.unwrap();
                flow.write_pattern(count).await.unwrap();
                flow.shutdown();
                flow.flushed().await;
            });
            let done = Rc::new(RefCell::new(0));
            for size in [1, 100_000, 300_000] {
                let (conn, done) = (world.connect(80), Rc::clone(&done));
                world.spawn(async move {
                    conn.established().await.unwrap();
                    conn.write_pattern(size).await.unwrap();
                    conn.shutdown();
                    assert_eq!(conn.read_pattern().await, Ok(size));
                    *done.borrow_mut() += 1;
                });
            }
            while *done.borrow() < 3 {
                world.sleep(Duration::from_millis(1)).await;
            }
        });
    }
}

#[test]
fn a_client_that_opens_and_resets_over_and_over_is_answered_every_time() {
    on_every_net(|world| async move {
        for round in 0..500u32 {
            let mut peer = Peer::new(&world, 5000 + (round % 10) as u16, round * 100_000);
            let flow = peer.open().await;
            peer.send(crate::world::packet::RST, &[]);
            assert!(flow.read(1).await.is_err());
            world.settle().await;
            assert_eq!(world.flows(), 0);
            // And with the ACK of a FIN that never came.
            peer.send(FIN | ACK, &[]);
            peer.replies().await;
        }
    });
}
