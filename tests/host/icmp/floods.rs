//! Echo requests without number, and answers that are not what they say.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, Type};

use super::super::support::packet::inject;
use super::super::support::topology::{BLACK_HOLE_V4, HOST_V4};
use super::super::support::tunproxy::Said;
use super::super::support::world::poll_until;
use super::super::support::{Capture, Sites, Topology, run};
use super::{FOUR, SIX, TUN, ping, profile, request, seal_icmp};

/// An echo request of the host, as it comes to us.
fn echo_request(to: Ipv4Addr, id: u16) -> Vec<u8> {
    let mut packet = vec![0x45, 0, 0, 36, 0, 1, 0, 0, 64, 1, 0, 0, 198, 18, 0, 1];
    packet.extend(to.octets());
    packet.extend([8, 0, 0, 0]);
    packet.extend(id.to_be_bytes());
    packet.extend([0, 1]);
    packet.extend(*b"a flood!");
    seal_icmp(&mut packet);
    let words = packet[..20].chunks_exact(2).map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])));
    let sum = words.sum::<u32>();
    let sum = (sum & 0xffff) + (sum >> 16);
    packet[10..12].copy_from_slice(&(!(sum as u16)).to_be_bytes());
    packet
}

#[test]
fn ten_thousand_ids_at_once_are_bounded_and_the_next_ping_works() {
    run(&["ping", TUN], || {
        let lab = Topology::with_lan();
        let _sites = Sites::open(&lab);
        let tunproxy = profile("'MATCH,DIRECT'").start(&lab.host);
        tunproxy.assert_carries(&lab.host);
        let status = || -> serde_json::Value {
            serde_json::from_str(&tunproxy.place().ask(&lab.host, "status").stdout).expect("JSON")
        };
        let descriptors = || {
            let pid = status()["pid"].as_u64().expect("a number");
            std::fs::read_dir(format!("/proc/{pid}/fd")).expect("it runs").count()
        };
        assert!(ping(&lab.host, FOUR).succeeded() && ping(&lab.host, SIX).succeeded());
        let before = descriptors();
        for part in 0..10u16 {
            let ids = part * 1000..(part + 1) * 1000;
            let packets: Vec<_> =
                ids.map(|id| echo_request(Ipv4Addr::new(203, 0, 113, (id % 100) as u8), id)).collect();
            inject(&lab.host, "tunproxy0", &packets);
            assert!(ping(lab.client(), FOUR).succeeded(), "{}", tunproxy.output());
        }
        let flows = status()["flows"].clone();
        let number = |name: &str| flows[name].as_u64().expect("a number");
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get) as u64;
        let open = number("opened") - number("closed");
        assert!(number("opened") > 5000 && open <= 1024 * cores + 50, "{flows}");
        assert!(descriptors() <= before + 4 * cores as usize, "one pair of sockets for all");
        assert!(tunproxy.output().contains("evicted: too many echo flows"), "or there were none too many");
        assert!(ping(&lab.host, SIX).succeeded());
    });
}

/// What somebody on the internet sends to the host, as if `router` had sent it.
fn forged(router: Ipv4Addr, message: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x45, 0, 0, 0, 0, 0, 0, 0, 64, 1, 0, 0];
    packet.extend(router.octets());
    packet.extend(HOST_V4.parse::<Ipv4Addr>().expect("an address").octets());
    packet.extend(message);
    seal_icmp(&mut packet);
    packet
}

#[test]
fn forged_errors_and_replies_reach_nobody_unless_they_quote_what_was_sent() {
    run(&["ping", TUN], || {
        let lab = Topology::with_lan();
        let _sites = Sites::open(&lab);
        let tunproxy = profile("'MATCH,DIRECT'").start(&lab.host);
        tunproxy.assert_carries(&lab.host);
        let mut capture = Capture::start(&lab.host, "eth0");
        let speaks =
            lab.internet.enter(|| Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(libc::IPPROTO_RAW))));
        let speaks = speaks.expect("root opens raw sockets");
        let send = |packet: &[u8]| {
            let to: SocketAddr = format!("{HOST_V4}:0").parse().expect("an address");
            speaks.send_to(packet, &to.into()).expect("it leaves");
        };
        let (liar, honest) = (Ipv4Addr::new(203, 0, 113, 67), Ipv4Addr::new(203, 0, 113, 66));
        let words = ["-n", "-c", "3", "-i", "1", "-W", "2", BLACK_HOLE_V4];
        let said = std::thread::scope(|scope| {
            let pinging = scope.spawn(|| Said::of(lab.host.command("ping").args(words)));
            let find = || capture.packets().iter().find_map(|packet| request(packet, BLACK_HOLE_V4));
            let (sent, _) = poll_until(Duration::from_secs(10), find).expect("a request left");
            let error = |quoted: &[u8]| [&[11, 0, 0, 0, 0, 0, 0, 0][..], quoted].concat();
            let changed = |at: usize| {
                let mut quoted = sent.clone();
                quoted[at] ^= 0x55;
                error(&quoted)
            };
            // Another destination, another protocol, no request, another id, another number; and pieces of the right one.
            for at in [19, 9, 20, 24, 25, 26, 27] {
                send(&forged(liar, &changed(at)));
            }
            for length in 0..28 {
                send(&forged(liar, &error(&sent[..length])));
            }
            let mut damaged = forged(liar, &error(&sent));
            damaged[23] ^= 1;
            send(&damaged);
            // A reply of somebody else, and one with another id.
            let reply = [&[0, 0, 0, 0][..], &sent[24..]].concat();
            send(&forged(liar, &reply));
            let mut stranger = reply.clone();
            stranger[4] ^= 0x55;
            send(&forged(BLACK_HOLE_V4.parse().expect("an address"), &stranger));
            // What is right in all of this gets through: the rest would have been seen.
            send(&forged(honest, &error(&sent)));
            pinging.join().expect("no panic")
        });
        assert!(said.stdout.contains(&format!("From {honest} icmp_seq=1 Time to live exceeded")), "{said:?}");
        assert!(!said.stdout.contains(&liar.to_string()) && said.stdout.contains(" 0 received"), "{said:?}");
        assert!(!tunproxy.output().contains("panicked"), "{}", tunproxy.output());
    });
}
