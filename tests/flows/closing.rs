//! How flows end: in order, one way at a time, by reset, and what is remembered afterwards.

use std::time::Duration;

use crate::world::packet::{ACK, FIN, PSH, RST, SYN, Tcp};
use crate::world::{Ended, Peer, on_every_net};

const MEGABYTE: usize = 1 << 20;

#[test]
fn each_direction_ends_by_itself_and_megabytes_follow_the_other_ones_fin() {
    on_every_net(|world| async move {
        let conn = world.connect(80);
        let flow = world.arrival().await;
        flow.accept();
        let server = flow.clone();
        world.spawn(async move {
            // The request ends with the client's FIN; only then does the answer begin.
            assert_eq!(server.read_pattern().await.unwrap(), 2 * MEGABYTE + 3);
            server.write_pattern(4 * MEGABYTE + 1).await.unwrap();
            server.shutdown();
            server.flushed().await;
            server.close();
        });
        conn.established().await.unwrap();
        conn.write_pattern(2 * MEGABYTE + 3).await.unwrap();
        conn.shutdown();
        assert_eq!(conn.read_pattern().await, Ok(4 * MEGABYTE + 1));
        conn.closed().await;
        world.settle().await;
        assert_eq!(world.flows(), 0);
    });
}

#[test]
fn the_server_may_end_first_and_still_take_megabytes() {
    on_every_net(|world| async move {
        let conn = world.connect(80);
        let flow = world.arrival().await;
        flow.accept();
        conn.established().await.unwrap();
        flow.write(b"bye").await.unwrap();
        flow.shutdown();
        assert_eq!(conn.read().await.unwrap(), b"bye");
        assert!(conn.read().await.unwrap().is_empty());
        let sender = conn.clone();
        world.spawn(async move {
            sender.write_pattern(3 * MEGABYTE).await.unwrap();
            sender.shutdown();
        });
        assert_eq!(flow.read_pattern().await.unwrap(), 3 * MEGABYTE);
        flow.close();
        conn.closed().await;
        // Entries in its queues that have lost their flow run out by themselves.
        world.sleep(Duration::from_secs(130)).await;
        assert_eq!((world.flows(), world.deadline()), (0, None));
    });
}

#[test]
fn a_half_closed_flow_that_was_quiet_for_an_hour_still_ends_by_fin() {
    on_every_net(|world| async move {
        let conn = world.connect(80);
        let flow = world.arrival().await;
        flow.accept();
        conn.established().await.unwrap();
        conn.shutdown();
        assert!(flow.read(1).await.unwrap().is_empty());
        world.sleep(Duration::from_secs(3600)).await;
        flow.shutdown();
        flow.close();
        assert_eq!(conn.read_pattern().await, Ok(0), "the end, not a reset");
        conn.closed().await;
    });
}

#[test]
fn a_flow_that_was_quiet_for_an_hour_still_carries_what_the_server_says() {
    on_every_net(|world| async move {
        let conn = world.connect(80);
        let flow = world.arrival().await;
        flow.accept();
        conn.established().await.unwrap();
        world.sleep(Duration::from_secs(3600)).await;
        flow.write(b"news").await.unwrap();
        assert_eq!(conn.read().await, Ok(b"news".to_vec()));
        conn.write(b"thanks").await.unwrap();
        assert_eq!(flow.read(100).await.unwrap(), b"thanks");
    });
}

#[test]
fn the_clients_reset_in_mid_stream_reaches_the_task() {
    on_every_net(|world| async move {
        let conn = world.connect(80);
        let flow = world.arrival().await;
        flow.accept();
        conn.established().await.unwrap();
        conn.write(b"half a requ").await.unwrap();
        assert_eq!(flow.read(100).await.unwrap(), b"half a requ");
        conn.abort();
        let error = flow.read(100).await.unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
        assert_eq!(flow.write(b"x").await.unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
        world.settle().await;
        assert_eq!(world.flows(), 0);
    });
}

#[test]
fn a_reset_that_merely_lies_in_the_window_is_asked_about_and_the_right_one_ends_the_flow() {
    on_every_net(|world| async move {
        let mut peer = Peer::new(&world, 3000, 500);
        let flow = peer.open().await;
        let _ = peer.replies().await;
        for guess in [1, 100, 5000] {
            let next = peer.next;
            peer.next = next.wrapping_add(guess);
            peer.send(RST, &[]);
            peer.next = next;
            let replies = peer.replies().await;
            assert_eq!(replies.len(), 1, "{replies:?}");
            assert!(replies[0].is(ACK) && replies[0].acknowledgement == next, "{replies:?}");
            world.sleep(Duration::from_secs(2)).await;
        }
        peer.data(b"still here");
        assert_eq!(flow.read(100).await.unwrap(), b"still here");
        peer.send(RST, &[]);
        assert_eq!(flow.read(100).await.unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
    });
}

#[test]
fn a_reset_after_the_clients_fin_reaches_a_task_that_only_waits_to_write() {
    on_every_net(|world| async move {
        let mut peer = Peer::new(&world, 3000, 500);
        let flow = peer.open().await;
        peer.send(FIN | ACK, &[]);
        peer.next += 1;
        assert!(flow.read(1).await.unwrap().is_empty());
        let reset = peer.segment(RST, &[]).packet();
        let world = world.clone();
        let other = world.clone();
        world.spawn(async move {
            other.sleep(Duration::from_secs(5)).await;
            other.inject(&reset);
        });
        assert_eq!(flow.failed_send().await.kind(), std::io::ErrorKind::ConnectionReset);
    });
}

#[test]
fn the_clients_reset_reaches_a_task_that_waits_for_somebody_else() {
    on_every_net(|world| async move {
        // The upstream takes nothing and says nothing; the client fills the ring and is killed.
        let mut peer = Peer::new(&world, 3000, 500);
        let flow = peer.open().await;
        for _ in 0..3 {
            peer.data(&[7; 1000]);
        }
        world.settle().await;
        let reset = peer.segment(RST, &[]).packet();
        let other = world.clone();
        world.spawn(async move {
            other.sleep(Duration::from_secs(5)).await;
            other.inject(&reset);
        });
        assert_eq!(flow.stalled().await.kind(), std::io::ErrorKind::ConnectionReset);
        flow.close();
        world.settle().await;
        assert_eq!(world.flows(), 0);
    });
}

#[test]
fn data_before_the_clients_fin_is_not_given_up_when_nobody_takes_it_for_a_while() {
    on_every_net(|world| async move {
        let mut peer = Peer::new(&world, 3000, 500);
        let flow = peer.open().await;
        flow.shutdown();
        let fin = peer.replies().await.pop().expect("a FIN came");
        peer.expected = fin.sequence.wrapping_add(1);
        peer.data(b"the last of it");
        peer.send(FIN | ACK, &[]);
        world.settle().await;
        assert_eq!(world.flows(), 0, "both directions are over");
        let stalled = flow.clone();
        world.spawn(async move {
            stalled.stalled().await;
            panic!("nothing is wrong with it");
        });
        world.sleep(Duration::from_secs(60)).await;
        assert_eq!(flow.read_all().await.unwrap(), b"the last of it");
    });
}

#[test]
fn the_tasks_reset_in_mid_stream_reaches_the_client() {
    on_every_net(|world| async move {
        let conn = world.connect(80);
        let flow = world.arrival().await;
        flow.accept();
        conn.established().await.unwrap();
        flow.write(b"half an answ").await.unwrap();
        assert_eq!(conn.read().await.unwrap(), b"half an answ");
        flow.abort();
        assert_eq!(conn.read().await, Err(Ended));
        world.settle().await;
        assert_eq!(world.flows(), 0);
    });
}

#[test]
fn dropping_a_flow_in_mid_stream_resets_it() {
    on_every_net(|world| async move {
        let conn = world.connect(80);
        let flow = world.arrival().await;
        flow.accept();
        conn.established().await.unwrap();
        conn.write(b"unread").await.unwrap();
        world.settle().await;
        flow.close();
        assert_eq!(conn.read().await, Err(Ended));
        world.settle().await;
        assert_eq!(world.flows(), 0);
    });
}

#[test]
fn what_came_before_the_clients_fin_can_be_read_after_both_ends_are_through() {
    on_every_net(|world| async move {
        let conn = world.connect(80);
        let flow = world.arrival().await;
        flow.accept();
        conn.established().await.unwrap();
        flow.shutdown();
        conn.write_pattern(100_000).await.unwrap();
        conn.shutdown();
        conn.closed().await;
        world.sleep(Duration::from_secs(60)).await;
        assert_eq!(flow.read_pattern().await.unwrap(), 100_000);
    });
}

#[test]
fn in_time_wait_a_late_fin_is_acknowledged_and_a_new_syn_is_answered() {
    on_every_net(|world| async move {
        let mut peer = Peer::new(&world, 3000, 500);
        let flow = peer.open().await;
        flow.shutdown();
        let replies = peer.replies().await;
        let fin = replies.last().expect("a FIN came");
        assert!(fin.is(FIN | ACK));
        peer.expected = fin.sequence.wrapping_add(1);
        peer.send(FIN | ACK, &[]);
        let replies = peer.replies().await;
        assert_eq!(replies.len(), 1);
        assert!(replies[0].is(ACK));
        assert_eq!(replies[0].acknowledgement, peer.next.wrapping_add(1));
        assert_eq!(world.flows(), 0, "only a tombstone is left");
        // Our last acknowledgement was lost.
        world.sleep(Duration::from_secs(3)).await;
        peer.send(FIN | ACK, &[]);
        let replies = peer.replies().await;
        assert_eq!(replies.len(), 1);
        assert!(replies[0].is(ACK));
        assert_eq!((replies[0].sequence, replies[0].acknowledgement), (peer.expected, peer.next.wrapping_add(1)));
        let mut again = Peer::new(&world, 3000, 0x5000_0000);
        let flow = again.open().await;
        again.data(b"x");
        assert_eq!(flow.read(1).await.unwrap(), b"x");
    });
}

#[test]
fn the_tombstone_acknowledges_behind_the_fin_even_if_that_was_sent_twice() {
    on_every_net(|world| async move {
        let mut peer = Peer::new(&world, 3000, 500);
        let flow = peer.open().await;
        flow.shutdown();
        let first = peer.replies().await;
        world.sleep(Duration::from_secs(2)).await;
        assert!(peer.replies().await.iter().any(|seen| seen.is(FIN | ACK)), "the FIN was sent again");
        // FIN and the acknowledgement of theirs in one segment, which is then lost on its way and repeated.
        peer.expected = first[0].sequence.wrapping_add(1);
        peer.send(FIN | ACK, &[]);
        peer.replies().await;
        peer.send(FIN | ACK, &[]);
        let replies = peer.replies().await;
        assert_eq!(replies.len(), 1);
        assert_eq!((replies[0].sequence, replies[0].acknowledgement), (peer.expected, peer.next.wrapping_add(1)));
    });
}

#[test]
fn one_tuple_serves_a_thousand_connections_in_a_row() {
    on_every_net(|world| async move {
        for round in 0..1000u32 {
            let mut peer = Peer::new(&world, 4000, round.wrapping_mul(0x0123_4567));
            let flow = peer.open().await;
            peer.data(b"ping");
            assert_eq!(flow.read(10).await.unwrap(), b"ping", "round {round}");
            match round % 4 {
                0 => peer.send(RST, &[]),
                1 => flow.abort(),
                2 => flow.close(),
                _ => {
                    flow.shutdown();
                    let replies = peer.replies().await;
                    peer.expected = replies.last().unwrap().sequence.wrapping_add(1);
                    peer.send(FIN | ACK, &[]);
                }
            }
            peer.replies().await;
            assert_eq!(world.flows(), 0, "round {round}");
        }
        assert_eq!(world.stack().counters().flows, 1000);
    });
}

#[test]
fn an_orphan_whose_client_is_gone_is_given_up() {
    on_every_net(|world| async move {
        let mut peer = Peer::new(&world, 3000, 500);
        let flow = peer.open().await;
        peer.send(FIN | ACK, &[]);
        peer.next += 1;
        assert!(flow.read(1).await.unwrap().is_empty());
        flow.write_pattern(5000).await.unwrap();
        flow.shutdown();
        flow.close();
        world.settle().await;
        assert_eq!(world.flows(), 1, "the last bytes are still on their way");
        world.sleep(Duration::from_secs(50)).await;
        assert_eq!(world.flows(), 1);
        world.sleep(Duration::from_secs(150)).await;
        assert_eq!((world.flows(), world.deadline()), (0, None));
    });
}

#[test]
fn an_orphan_whose_client_holds_its_window_shut_is_given_up_too() {
    on_every_net(|world| async move {
        let mut peer = Peer::new(&world, 3000, 500);
        let flow = peer.open().await;
        let shut = Tcp { window: 0, ..peer.segment(FIN | ACK, &[]) };
        world.inject(&shut.packet());
        peer.next += 1;
        assert!(flow.read(1).await.unwrap().is_empty());
        flow.write_pattern(5000).await.unwrap();
        flow.shutdown();
        flow.close();
        let mut probes = 0;
        for _ in 0..400 {
            world.sleep(Duration::from_secs(5)).await;
            // Each probe is answered, so this client is there, but it takes nothing.
            for probe in peer.replies().await.iter().filter(|seen| !seen.is(RST | ACK)) {
                probes += 1;
                assert!(probe.payload.len() <= 1);
                world.inject(&Tcp { window: 0, ..peer.segment(ACK, &[]) }.packet());
            }
        }
        assert!(probes > 5);
        assert_eq!(world.flows(), 0);
    });
}

#[test]
fn a_client_that_vanishes_while_data_waits_for_it_is_given_up() {
    on_every_net(|world| async move {
        let mut peer = Peer::new(&world, 3000, 500);
        let flow = peer.open().await;
        flow.write_pattern(100_000).await.unwrap();
        world.sleep(Duration::from_secs(540)).await;
        assert_eq!(world.flows(), 1);
        assert!(flow.read(1).await.is_err());
        assert!(world.elapsed() < Duration::from_secs(720), "{:?}", world.elapsed());
        // Entries in its queues that have lost their flow run out by themselves.
        world.sleep(Duration::from_secs(130)).await;
        assert_eq!((world.flows(), world.deadline()), (0, None));
    });
}

#[test]
fn a_client_that_vanishes_before_it_acknowledges_the_fin_is_given_up() {
    on_every_net(|world| async move {
        let mut peer = Peer::new(&world, 3000, 500);
        let flow = peer.open().await;
        flow.shutdown();
        assert!(flow.read(1).await.is_err());
        assert!(world.elapsed() < Duration::from_secs(720), "{:?}", world.elapsed());
        // Entries in its queues that have lost their flow run out by themselves.
        world.sleep(Duration::from_secs(130)).await;
        assert_eq!((world.flows(), world.deadline()), (0, None));
    });
}

#[test]
fn ending_all_flows_resets_open_ones_and_held_ones() {
    on_every_net(|world| async move {
        let mut open = Peer::new(&world, 3000, 500);
        let flow = open.open().await;
        let held = Peer::new(&world, 3001, 500);
        held.syn();
        let waiting = world.arrival().await;
        world.stack().abort_all();
        let replies = open.replies().await;
        assert_eq!(replies.iter().filter(|seen| seen.is(RST | ACK)).count(), 2, "{replies:?}");
        assert!(flow.read(1).await.is_err());
        waiting.gone().await;
        assert_eq!(world.flows(), 0);
    });
}

#[test]
fn a_segment_of_no_flow_is_answered_by_a_reset_and_a_reset_by_nothing() {
    on_every_net(|world| async move {
        let mut peer = Peer::new(&world, 3000, 500);
        peer.expected = 0x0bad_cafe;
        peer.send(ACK, b"data");
        let replies = peer.replies().await;
        // RFC 9293 3.10.7.1: with ACK, the reset takes its number from it.
        assert_eq!(replies.len(), 1);
        assert!(replies[0].flags & RST != 0);
        assert_eq!(replies[0].sequence, 0x0bad_cafe);
        peer.send(RST, &[]);
        peer.send(RST | ACK, &[]);
        assert!(peer.replies().await.is_empty());
        peer.send(SYN | ACK, &[]);
        assert!(peer.replies().await.iter().all(|seen| seen.flags & RST != 0));
        assert_eq!(world.strays(), 4);
    });
}

#[test]
fn a_segment_of_no_flow_that_acknowledges_nothing_is_answered_by_a_reset_that_acknowledges_all_of_it() {
    on_every_net(|world| async move {
        for (flags, payload) in [(FIN, &b""[..]), (FIN | PSH, b"data"), (FIN, &[7; 1000])] {
            let mut peer = Peer::new(&world, 3000, 500);
            peer.next = u32::MAX - 2;
            peer.send(flags, payload);
            let replies = peer.replies().await;
            assert_eq!(replies.len(), 1, "{replies:?}");
            // RFC 9293 3.10.7.1: without ACK, the reset has the number 0.
            assert!(replies[0].is(RST | ACK), "{replies:?}");
            let end = (u32::MAX - 2).wrapping_add(payload.len() as u32 + 1);
            assert_eq!((replies[0].sequence, replies[0].acknowledgement), (0, end));
        }
    });
}
