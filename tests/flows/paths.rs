//! Paths with a smaller MTU than the device's: what routers say of them, and what of that is believed.

use std::net::SocketAddr;
use std::time::Duration;

use crate::world::packet::{self, ACK};
use crate::world::{Net, Peer, Seen, on, on_every_net, pattern};

/// Everything of `seen` that is longer than `mtu`, and the stream that the data in it makes from `initial` on.
fn look(seen: &[Seen], mtu: usize, initial: u32, length: usize) -> (usize, Vec<u8>) {
    let mut stream = vec![0; length];
    for seen in seen.iter().filter(|seen| !seen.payload.is_empty() && seen.bytes.len() <= mtu) {
        let at = seen.sequence.wrapping_sub(initial) as usize;
        stream[at..at + seen.payload.len()].copy_from_slice(&seen.payload);
    }
    (seen.iter().filter(|seen| seen.bytes.len() > mtu).count(), stream)
}

#[test]
fn a_download_gets_through_a_smaller_hop_once_its_router_has_said_so() {
    on_every_net(|world| async move {
        let mut peer = Peer::new(&world, 3000, 77);
        let flow = peer.open().await;
        flow.write_pattern(9000).await.unwrap();
        let lost = peer.replies().await;
        assert!(lost.iter().any(|seen| seen.bytes.len() > 1400));
        for seen in lost.iter().filter(|seen| seen.bytes.len() > 1300) {
            world.inject(&packet::too_big(&seen.bytes, 1300));
        }
        world.sleep(Duration::from_secs(3)).await;
        let again = peer.replies().await;
        let (oversized, stream) = look(&again, 1300, peer.expected, 9000);
        assert_eq!(oversized, 0);
        assert!(stream == pattern(0, 9000), "every byte came again, in pieces that fit");
        let largest = again.iter().map(|seen| seen.bytes.len()).max();
        assert_eq!(largest, Some(1300), "as large as the path allows");
        // The next flow of this client knows the path from its first segment on.
        peer.expected = peer.expected.wrapping_add(9000);
        peer.send(ACK, &[]);
        let mut next = Peer::new(&world, 3001, 9);
        let flow = next.open().await;
        flow.write_pattern(5000).await.unwrap();
        let sent = next.replies().await;
        let (oversized, stream) = look(&sent, 1300, next.expected, 5000);
        assert_eq!((oversized, stream == pattern(0, 5000)), (0, true));
    });
}

#[test]
fn a_message_about_what_was_never_sent_is_not_believed() {
    on_every_net(|world| async move {
        let mut peer = Peer::new(&world, 3000, 77);
        let flow = peer.open().await;
        flow.write_pattern(4000).await.unwrap();
        let first = peer.replies().await;
        peer.expected = peer.expected.wrapping_add(4000);
        peer.send(ACK, &[]);
        flow.write_pattern(4000).await.unwrap();
        let second = peer.replies().await;
        for wrong in [peer.expected.wrapping_sub(1), peer.expected.wrapping_add(4000), 0x7000_0000] {
            let mut forged = second[0].clone();
            let at = packet::header_length(&forged.bytes) + 4;
            forged.bytes[at..at + 4].copy_from_slice(&wrong.to_be_bytes());
            world.inject(&packet::too_big(&forged.bytes, 1280));
        }
        // Acknowledged already.
        world.inject(&packet::too_big(&first[0].bytes, 1280));
        world.sleep(Duration::from_secs(2)).await;
        assert!(peer.replies().await.iter().any(|seen| seen.bytes.len() > 1400), "the size is what it was");
        // A damaged message, and one about a flow that is not there.
        let mut damaged = packet::too_big(&second[0].bytes, 1280);
        *damaged.last_mut().unwrap() ^= 1;
        world.inject(&damaged);
        let ignored = world.stack().counters().ignored;
        let mut other = second[0].clone();
        other.from = SocketAddr::new(other.from.ip(), 81);
        let at = packet::header_length(&other.bytes);
        other.bytes[at..at + 2].copy_from_slice(&81u16.to_be_bytes());
        world.inject(&packet::too_big(&other.bytes, 1280));
        assert_eq!(world.stack().counters().ignored, ignored + 1);
        world.sleep(Duration::from_secs(3)).await;
        assert!(peer.replies().await.iter().any(|seen| seen.bytes.len() > 1400), "the size is what it was");
    });
}

#[test]
fn no_message_makes_segments_smaller_than_every_link_carries() {
    on_every_net(|world| async move {
        let mut peer = Peer::new(&world, 3000, 77);
        let flow = peer.open().await;
        flow.write_pattern(6000).await.unwrap();
        let lost = peer.replies().await;
        world.inject(&packet::too_big(&lost[0].bytes, 68));
        world.sleep(Duration::from_secs(3)).await;
        let again = peer.replies().await;
        let least = if world.net().v6 { 1280 } else { 576 };
        assert_eq!(again.iter().map(|seen| seen.bytes.len()).max(), Some(least));
        assert!(look(&again, least, peer.expected, 6000).1 == pattern(0, 6000));
    });
}

#[test]
fn a_whole_download_over_a_smaller_hop_arrives() {
    for net in Net::all() {
        on(Net { own: false, hop: Some(1290), ..net }, |world| async move {
            let conn = world.connect(80);
            let flow = world.arrival().await;
            flow.accept();
            conn.established().await.unwrap();
            let writer = flow.clone();
            world.spawn(async move {
                writer.write_pattern(500_000).await.unwrap();
                writer.shutdown();
            });
            assert_eq!(conn.read_pattern().await, Ok(500_000));
        });
    }
}
