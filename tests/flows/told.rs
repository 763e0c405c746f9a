//! Acknowledgements in hard places: before a shut window, on a device that is full, to numbers that nobody sent.

use std::num::NonZeroU16;
use std::time::Duration;

use tunproxy::stack::{Frame, Transmit, VirtioHeader};

use crate::world::packet::{ACK, FIN, RST, SYN, Tcp, blocks};
use crate::world::{Flow, Peer, Seen, World, on_every_net, packet, pattern};

/// A device that takes nothing at present.
struct Full;

impl Transmit for Full {
    fn ready(&mut self) -> bool {
        false
    }

    fn transmit(&mut self, _: usize, _: Option<NonZeroU16>, _: &mut dyn FnMut(&mut [u8])) {
        panic!("written to a device that takes nothing");
    }
}

/// A device with a mistake in it, as any code may have.
struct Broken;

impl Transmit for Broken {
    fn ready(&mut self) -> bool {
        true
    }

    fn transmit(&mut self, _: usize, _: Option<NonZeroU16>, _: &mut dyn FnMut(&mut [u8])) {
        panic!("a mistake, made on purpose");
    }
}

/// Puts `segment` before the stack while `device` is what it writes to.
fn put(world: &World, segment: &Tcp, device: &mut dyn Transmit) {
    let packet = segment.packet();
    let frame = Frame { header: VirtioHeader::PLAIN, packet: &packet };
    assert!(world.stack().ingest(frame, world.now(), device).is_none(), "no event");
}

/// Data that stands `at` bytes behind the peer's next byte.
fn piece(peer: &Peer, at: u32, bytes: usize) -> Tcp {
    Tcp { sequence: peer.next.wrapping_add(at), ..peer.segment(ACK, &pattern(at as usize, bytes)) }
}

async fn open(world: &World, selective: bool) -> (Peer, Flow) {
    let mut peer = Peer::new(world, 3000, 500);
    if selective {
        let flow = peer.open().await;
        return (peer, flow);
    }
    world.inject(&peer.segment(SYN, &[]).packet());
    let flow = world.arrival().await;
    flow.accept();
    peer.finish_handshake().await;
    (peer, flow)
}

/// What the peer is told: sequence number and up to where all has come, behind its next byte.
fn told(peer: &Peer, replies: &[Seen]) -> Vec<(u32, u32)> {
    let bare = replies.iter().filter(|seen| seen.is(ACK) && seen.payload.is_empty());
    bare.map(|seen| (seen.sequence, seen.acknowledgement.wrapping_sub(peer.next))).collect()
}

/// Lets the stack have a turn for which nothing of the flow's own is the cause.
async fn turn(world: &World) {
    world.inject(&packet::ip(world.net().peer(), world.net().server(), 59, &[]));
    world.settle().await;
}

#[test]
fn a_client_whose_window_is_shut_can_read_what_it_is_told_while_the_window_is_probed() {
    on_every_net(|world| async move {
        let (mut peer, flow) = open(&world, true).await;
        world.inject(&Tcp { window: 0, ..peer.segment(ACK, b"wait") }.packet());
        peer.next += 4;
        peer.replies().await;
        let writer = flow.clone();
        world.spawn(async move { writer.write_pattern(100_000).await.unwrap_or_default() });
        world.sleep(Duration::from_secs(3)).await;
        let probes = peer.replies().await;
        assert!(probes.iter().any(|seen| seen.payload.len() == 1 && seen.sequence == peer.expected), "{probes:?}");
        let shut = |segment: Tcp| world.inject(&Tcp { window: 0, ..segment }.packet());
        // A client drops what lies beyond its window, and with it the acknowledgement (RFC 9293 section 3.10.7.4).
        shut(piece(&peer, 0, 1000));
        assert_eq!(told(&peer, &peer.replies().await), [(peer.expected, 1000)]);
        shut(piece(&peer, 2000, 1000));
        let replies = peer.replies().await;
        assert_eq!(told(&peer, &replies), [(peer.expected, 1000)]);
        assert_eq!(blocks(&replies[0].bytes).len(), 1);
        shut(piece(&peer, 1000, 1000));
        assert_eq!(told(&peer, &peer.replies().await), [(peer.expected, 3000)]);
        // The probe's byte was taken after all: from there on it counts.
        peer.expected = peer.expected.wrapping_add(1);
        shut(piece(&peer, 3000, 1000));
        assert_eq!(told(&peer, &peer.replies().await), [(peer.expected, 4000)]);
    });
}

#[test]
fn what_a_client_could_not_be_told_on_a_full_device_it_is_told_once() {
    on_every_net(|world| async move {
        for (number, selective) in [true, false].into_iter().enumerate() {
            let (mut peer, flow) = open(&world, selective).await;
            put(&world, &piece(&peer, 1000, 1000), &mut Full);
            turn(&world).await;
            assert_eq!(told(&peer, &peer.replies().await), [(peer.expected, 0)], "of the gap");
            put(&world, &piece(&peer, 0, 1000), &mut Full);
            turn(&world).await;
            assert_eq!(told(&peer, &peer.replies().await), [(peer.expected, 2000)], "that it is filled");
            peer.next = peer.next.wrapping_add(2000);
            for _ in 0..3 {
                peer.data(&[1; 100]);
                assert_eq!(told(&peer, &peer.replies().await), [(peer.expected, 0)], "and nothing twice: {selective}");
            }
            flow.abort();
            peer.replies().await;
            assert_eq!(world.flows(), 0, "{number}");
        }
    });
}

#[test]
fn a_challenge_that_a_full_device_did_not_take_is_sent_later() {
    on_every_net(|world| async move {
        for flags in [SYN, RST] {
            let (peer, flow) = open(&world, true).await;
            put(&world, &Tcp { sequence: peer.next.wrapping_add(5), ..peer.segment(flags, &[]) }, &mut Full);
            turn(&world).await;
            assert_eq!(told(&peer, &peer.replies().await), [(peer.expected, 0)]);
            flow.abort();
            peer.replies().await;
        }
    });
}

#[test]
fn before_the_answer_to_its_first_syn_a_client_is_told_nothing_of_a_second() {
    on_every_net(|world| async move {
        let peer = Peer::new(&world, 3000, 500);
        peer.syn();
        let flow = world.arrival().await;
        flow.accept();
        put(&world, &Tcp { sequence: 900, ..peer.segment(SYN, &[]) }, &mut Full);
        world.inject(&Tcp { sequence: 900, ..peer.segment(SYN, &[]) }.packet());
        let replies = peer.replies().await;
        assert!(replies.iter().all(|seen| seen.is(SYN | ACK)) && replies.len() == 1, "{replies:?}");
    });
}

#[test]
fn a_flow_in_which_something_went_wrong_ends_by_a_reset_and_tells_its_task() {
    on_every_net(|world| async move {
        let (peer, flow) = open(&world, true).await;
        // What was never sent is acknowledged, which smoltcp answers at once.
        let wrong = Tcp { acknowledgement: peer.expected.wrapping_add(50_000), ..peer.segment(ACK, &[]) };
        put(&world, &wrong, &mut Broken);
        turn(&world).await;
        assert!(peer.replies().await.iter().any(|seen| seen.flags & RST != 0));
        assert!(flow.read(1).await.is_err());
        assert_eq!(world.flows(), 0);
    });
}

#[test]
fn a_fin_is_not_believed_that_acknowledges_what_is_older_than_any_window() {
    on_every_net(|world| async move {
        let (mut peer, flow) = open(&world, true).await;
        for ahead in [0, 5000] {
            let forged = Tcp {
                sequence: peer.next.wrapping_add(ahead),
                acknowledgement: peer.expected.wrapping_sub(1 << 25),
                ..peer.segment(ACK | FIN, &[])
            };
            world.inject(&forged.packet());
        }
        peer.replies().await;
        peer.data(&pattern(0, 7000));
        peer.replies().await;
        peer.send(ACK | FIN, &[]);
        assert!(flow.read_all().await.unwrap() == pattern(0, 7000));
    });
}
