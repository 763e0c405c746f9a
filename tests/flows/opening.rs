//! From the SYN to the answer: held, accepted, refused, given up, replaced.

use std::time::Duration;

use tunproxy::stack::Refusal;

use crate::world::packet::{ACK, RST, SYN};
use crate::world::{Peer, on_every_net};

#[test]
fn the_syn_ack_is_held_until_the_flow_is_accepted() {
    on_every_net(|world| async move {
        world.watch();
        let conn = world.connect(80);
        let flow = world.arrival().await;
        assert_eq!((flow.tuple.client.ip(), flow.tuple.server.port()), (world.net().client(), 80));
        world.sleep(Duration::from_secs(20)).await;
        let seen = world.seen();
        assert!(seen.iter().filter(|seen| seen.is(SYN)).count() > 1, "the client repeats its SYN");
        assert!(seen.iter().all(|seen| !seen.to_client), "nothing is said while the SYN is held");
        assert_eq!((world.waiting(), world.flows()), (0, 1), "a repeated SYN opens nothing");
        flow.accept();
        conn.established().await.expect("the flow was accepted");
        assert_eq!(world.stack().counters().flows, 1);
    });
}

#[test]
fn a_held_flow_asks_for_no_timer_and_no_turn() {
    on_every_net(|world| async move {
        Peer::new(&world, 1000, 5).syn();
        let _flow = world.arrival().await;
        world.settle().await;
        assert!(world.rests());
        let turns = world.turns();
        world.sleep(Duration::from_secs(30)).await;
        assert!(world.turns() - turns <= 2, "{} turns for one sleeper", world.turns() - turns);
    });
}

#[test]
fn a_flow_refused_by_reset_is_refused_with_the_right_numbers() {
    on_every_net(|world| async move {
        world.watch();
        let conn = world.connect(80);
        world.arrival().await.refuse(Refusal::Reset);
        assert!(conn.established().await.is_err());
        assert!(world.elapsed() < Duration::from_millis(100));
        let seen = world.seen();
        let (syn, rst) = (&seen[0], &seen[1]);
        assert!(syn.is(SYN) && rst.is(RST | ACK), "{seen:?}");
        assert_eq!(rst.acknowledgement, syn.sequence.wrapping_add(1));
        assert!(rst.payload.is_empty());
        assert_eq!(world.flows(), 0);
    });
}

#[test]
fn a_flow_that_nobody_takes_is_refused() {
    on_every_net(|world| async move {
        let conn = world.connect(80);
        world.arrival().await.close();
        assert!(conn.established().await.is_err());
        assert_eq!(world.flows(), 0);
    });
}

#[test]
fn an_unreachable_destination_is_told_by_the_right_icmp_error_which_quotes_the_syn() {
    on_every_net(|world| async move {
        let v6 = world.net().v6;
        let cases = [
            (Refusal::Network, if v6 { (1, 0) } else { (3, 0) }),
            (Refusal::Host, if v6 { (1, 3) } else { (3, 1) }),
            (Refusal::Prohibited, if v6 { (1, 1) } else { (3, 13) }),
        ];
        for (port, (refusal, code)) in cases.into_iter().enumerate() {
            let peer = Peer::new(&world, 2000 + port as u16, 77);
            peer.syn();
            world.arrival().await.refuse(refusal);
            let replies = peer.replies().await;
            assert_eq!(replies.len(), 1, "{refusal:?}");
            let error = &replies[0];
            assert_eq!(error.icmp(), Some(code));
            assert_eq!(error.from.ip(), world.net().server());
            let syn = peer.segment(SYN, &[]).packet();
            // The quote holds the IP header and the ports and number of the SYN.
            let quoted = &error.bytes[if v6 { 48 } else { 28 }..];
            let header = if v6 { 40 } else { 20 };
            assert_eq!(quoted[header..header + 12], syn[header..header + 12]);
            assert_eq!(crate::world::packet::source(quoted), peer.local.ip());
            let start = if v6 { 40 } else { 20 };
            let sum = if v6 {
                crate::world::packet::transport_checksum(&error.bytes, start)
            } else {
                crate::world::packet::sum(&error.bytes[start..])
            };
            assert_eq!(sum, 0, "the checksum is right");
            assert_eq!(world.flows(), 0);
        }
    });
}

#[test]
fn a_silent_refusal_swallows_the_repeated_syn_and_a_new_syn_opens_anew() {
    on_every_net(|world| async move {
        let mut peer = Peer::new(&world, 3000, 1234);
        peer.syn();
        world.arrival().await.refuse(Refusal::Silent);
        for _ in 0..6 {
            world.sleep(Duration::from_secs(20)).await;
            peer.syn();
            assert!(peer.replies().await.is_empty());
        }
        assert_eq!((world.waiting(), world.flows()), (0, 0));
        peer.next = 999_999;
        peer.syn();
        let flow = world.arrival().await;
        flow.accept();
        peer.finish_handshake().await;
        assert_eq!(world.flows(), 1);
        drop(flow);
    });
}

#[test]
fn the_clients_reset_ends_the_dial() {
    on_every_net(|world| async move {
        let mut peer = Peer::new(&world, 3000, 500);
        peer.syn();
        let flow = world.arrival().await;
        let dial = flow.clone();
        let ended = std::rc::Rc::new(std::cell::Cell::new(false));
        let told = std::rc::Rc::clone(&ended);
        world.spawn(async move {
            dial.gone().await;
            told.set(true);
            dial.close();
        });
        world.sleep(Duration::from_secs(1)).await;
        assert!(!ended.get());
        peer.next += 1;
        peer.send(RST, &[]);
        world.settle().await;
        assert!(ended.get(), "the dial was told");
        assert_eq!(world.flows(), 0);
        assert!(peer.replies().await.is_empty(), "nothing answers a reset");
    });
}

#[test]
fn a_syn_with_another_number_replaces_the_one_that_is_held() {
    on_every_net(|world| async move {
        let mut peer = Peer::new(&world, 3000, 500);
        peer.syn();
        let old = world.arrival().await;
        peer.next = 700_000;
        peer.syn();
        let new = world.arrival().await;
        old.gone().await;
        // Whatever the old dial still wants must not touch the new flow.
        old.accept();
        old.close();
        world.settle().await;
        assert_eq!(world.flows(), 1);
        new.accept();
        peer.finish_handshake().await;
        peer.data(b"hello");
        assert_eq!(new.read(100).await.unwrap(), b"hello");
    });
}

#[test]
fn an_accepted_flow_whose_client_is_never_heard_of_again_is_given_up() {
    on_every_net(|world| async move {
        let peer = Peer::new(&world, 3000, 500);
        peer.syn();
        let flow = world.arrival().await;
        flow.accept();
        let answers = peer.replies().await;
        assert!(answers[0].is(SYN | ACK));
        assert!(flow.read(1).await.is_err());
        assert!(world.elapsed() < Duration::from_secs(60), "after {:?}", world.elapsed());
        world.sleep(Duration::from_secs(130)).await;
        assert_eq!((world.flows(), world.deadline()), (0, None));
    });
}

#[test]
fn a_lost_syn_ack_is_sent_again() {
    on_every_net(|world| async move {
        let conn = world.connect(80);
        let flow = world.arrival().await;
        world.set_weather(crate::world::Weather::DOWN);
        flow.accept();
        world.sleep(Duration::from_millis(500)).await;
        world.set_weather(crate::world::Weather::CALM);
        conn.established().await.expect("the second SYN-ACK arrived");
    });
}

#[test]
fn a_flow_shut_down_before_its_handshake_is_over_still_opens_and_ends_in_order() {
    on_every_net(|world| async move {
        let conn = world.connect(80);
        let flow = world.arrival().await;
        flow.accept();
        flow.shutdown();
        conn.established().await.expect("the flow was accepted");
        assert_eq!(conn.read_pattern().await, Ok(0), "the end, not a reset");
        conn.write(b"still open").await.unwrap();
        conn.shutdown();
        assert_eq!(flow.read(100).await.unwrap(), b"still open");
        assert!(flow.read(100).await.unwrap().is_empty());
        conn.closed().await;
    });
}

#[test]
fn a_flow_dropped_before_its_handshake_is_over_is_reset() {
    on_every_net(|world| async move {
        let conn = world.connect(80);
        let flow = world.arrival().await;
        flow.accept();
        flow.close();
        conn.closed().await;
        world.settle().await;
        assert_eq!(world.flows(), 0);
    });
}

#[test]
fn a_restarted_client_that_reuses_its_port_gets_through() {
    on_every_net(|world| async move {
        let mut peer = Peer::new(&world, 3000, 500);
        let old = peer.open().await;
        // Its machine was switched off and on; the new SYN meets the old flow.
        let mut reborn = Peer::new(&world, 3000, 0x7000_0000);
        reborn.syn();
        let replies = reborn.replies().await;
        assert_eq!(replies.len(), 1);
        // RFC 9293 3.10.7.4: a challenge acknowledgement, by which the client finds out and resets the old one.
        assert!(replies[0].is(ACK), "{:?}", replies[0]);
        assert_eq!((replies[0].acknowledgement, replies[0].sequence), (peer.next, peer.expected));
        let reset = crate::world::packet::Tcp { sequence: replies[0].acknowledgement, ..reborn.segment(RST, &[]) };
        world.inject(&reset.packet());
        assert!(old.read(1).await.is_err());
        reborn.syn();
        let flow = world.arrival().await;
        flow.accept();
        reborn.finish_handshake().await;
        reborn.data(b"again");
        assert_eq!(flow.read(99).await.unwrap(), b"again");
    });
}

#[test]
fn syns_with_options_of_all_kinds_open_flows() {
    on_every_net(|world| async move {
        let options: [&[u8]; 5] = [
            &[],
            &[2, 4, 0, 0],                                  // MSS 0: as if absent
            &[2, 4, 0, 1, 1, 1],                            // MSS 1: clamped
            &[3, 3, 255, 1],                                // a window scale beyond 14
            &[8, 10, 0, 0, 0, 1, 0, 0, 0, 0, 254, 4, 1, 2], // timestamps, experimental
        ];
        for (n, option) in options.into_iter().enumerate() {
            let mut peer = Peer::new(&world, 100 + n as u16, 9);
            let mut syn = peer.segment(SYN, &[]);
            syn.options = option.to_vec();
            world.inject(&syn.packet());
            let flow = world.arrival().await;
            flow.accept();
            peer.finish_handshake().await;
            flow.write(&[7; 5000]).await.unwrap();
            assert!(!peer.replies().await.is_empty());
            peer.data(b"x");
            assert_eq!(flow.read(9).await.unwrap(), b"x");
        }
    });
}
