//! ICMP messages as sockets hand them over: replies, and errors that quote a request of ours.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::net::{EchoArrival, EchoError, EchoFailure};
use crate::stack::{checksum, ip};

/// What the kernel tells beside a message.
#[derive(Debug, Clone, Copy)]
pub(super) struct Told {
    pub(super) from: IpAddr,
    /// Whom it was sent to, where that is told.
    pub(super) to: Option<IpAddr>,
    pub(super) ttl: u8,
    pub(super) tos: u8,
}

/// Reads a message behind its IPv4 header. Raw sockets are given what nobody has looked at: the checksum too.
pub(super) fn read_v4(packet: &[u8], from: IpAddr) -> Option<EchoArrival> {
    let header = packet.first_chunk::<20>()?;
    let start = usize::from(header[0] & 15) * 4;
    let message = packet.get(start..)?;
    if checksum(message, &[]) != 0 {
        return None;
    }
    let to = Ipv4Addr::new(header[16], header[17], header[18], header[19]).into();
    read(packet, start, false, &Told { from, to: Some(to), ttl: header[8], tos: header[1] })
}

/// Reads the message that begins at `start`; None: it is neither a reply nor an error about an echo request.
pub(super) fn read(packet: &[u8], start: usize, ipv6: bool, told: &Told) -> Option<EchoArrival> {
    let head = packet.get(start..)?.first_chunk::<8>()?;
    let word = |at: usize| u16::from_be_bytes([head[at], head[at + 1]]);
    match (head[0], ipv6) {
        (0, false) | (129, true) => Some(EchoArrival::Reply {
            from: told.from,
            id: word(4),
            sequence: word(6),
            ttl: told.ttl,
            tos: told.tos,
            payload: start + 8..packet.len(),
        }),
        (3 | 11 | 12, false) | (1..=4, true) => {
            let quoted = Quoted::read(&packet[start + 8..], ipv6)?;
            let word = u32::from_be_bytes([head[4], head[5], head[6], head[7]]);
            Some(EchoArrival::Error(EchoError {
                router: Some(told.from).filter(|from| told.to != Some(*from)),
                to: quoted.to,
                id: quoted.id,
                sequence: quoted.sequence,
                ttl: Some(quoted.ttl),
                message: EchoFailure { kind: head[0], code: head[1], word },
                payload: start + 8 + quoted.payload..packet.len(),
            }))
        }
        _ => None,
    }
}

/// A request that an error quotes.
struct Quoted {
    to: IpAddr,
    ttl: u8,
    id: u16,
    sequence: u16,
    /// Where its payload begins.
    payload: usize,
}

impl Quoted {
    fn read(packet: &[u8], ipv6: bool) -> Option<Self> {
        let (to, ttl, start) = if ipv6 { Self::read_v6(packet) } else { Self::read_v4(packet) }?;
        let message = packet.get(start..)?.first_chunk::<8>()?;
        let word = |at: usize| u16::from_be_bytes([message[at], message[at + 1]]);
        let request = message[0] == if ipv6 { 128 } else { 8 };
        request.then(|| Self { to, ttl, id: word(4), sequence: word(6), payload: start + 8 })
    }

    fn read_v4(packet: &[u8]) -> Option<(IpAddr, u8, usize)> {
        let header = packet.first_chunk::<20>()?;
        let length = usize::from(header[0] & 15) * 4;
        let first = u16::from_be_bytes([header[6], header[7]]) & 0x1fff == 0;
        let sound = header[0] >> 4 == 4 && length >= 20 && header[9] == ip::ICMP && first;
        let to = Ipv4Addr::new(header[16], header[17], header[18], header[19]);
        sound.then_some((to.into(), header[8], length))
    }

    fn read_v6(packet: &[u8]) -> Option<(IpAddr, u8, usize)> {
        let header = packet.first_chunk::<40>()?;
        let to: [u8; 16] = header[24..40].try_into().ok()?;
        let (protocol, length) = match header[6] {
            // The first piece of what we had to cut.
            ip::FRAGMENT if packet.get(42..44).is_some_and(|word| word[0] == 0 && word[1] & 0xf8 == 0) => {
                (packet[40], 48)
            }
            protocol => (protocol, 40),
        };
        let sound = header[0] >> 4 == 6 && protocol == ip::ICMPV6;
        sound.then_some((Ipv6Addr::from(to).into(), header[7], length))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn told(from: &str, to: &str) -> Told {
        Told { from: from.parse().unwrap(), to: Some(to.parse().unwrap()), ttl: 60, tos: 0 }
    }

    /// A request of ours as a router would quote it.
    fn request(ipv6: bool) -> Vec<u8> {
        let mut packet =
            if ipv6 { vec![0x60, 0, 0, 0, 0, 12, 58, 1] } else { vec![0x45, 0, 0, 32, 0, 7, 0, 0, 1, 1, 0, 0] };
        if ipv6 {
            packet.extend("2001:db8::1".parse::<Ipv6Addr>().unwrap().octets());
            packet.extend("2001:db8::9".parse::<Ipv6Addr>().unwrap().octets());
        } else {
            packet.extend([192, 0, 2, 1, 192, 0, 2, 9]);
        }
        packet.extend([if ipv6 { 128 } else { 8 }, 0, 0xaa, 0xaa, 0x12, 0x34, 0, 5, b'd', b'a', b't', b'a']);
        packet
    }

    fn error(ipv6: bool, quoted: &[u8]) -> Vec<u8> {
        let mut message = if ipv6 { vec![2, 0, 0, 0, 0, 0, 5, 0] } else { vec![3, 4, 0, 0, 0, 0, 5, 0] };
        message.extend_from_slice(quoted);
        message
    }

    #[test]
    fn an_error_is_that_of_the_request_that_it_quotes() {
        for (ipv6, router, to) in [(false, "198.51.100.1", "192.0.2.9"), (true, "2001:db8:5::1", "2001:db8::9")] {
            let message = error(ipv6, &request(ipv6));
            let own = if ipv6 { "2001:db8::1" } else { "192.0.2.1" };
            let Some(EchoArrival::Error(error)) = read(&message, 0, ipv6, &told(router, own)) else { panic!("{ipv6}") };
            assert_eq!((error.router, error.to), (Some(router.parse().unwrap()), to.parse().unwrap()));
            assert_eq!((error.id, error.sequence, error.ttl), (0x1234, 5, Some(1)));
            assert_eq!(error.message.word & 0xffff, 1280);
            assert_eq!(&message[error.payload], b"data");
            // From this host itself there is no router.
            let Some(EchoArrival::Error(error)) = read(&message, 0, ipv6, &told(own, own)) else { panic!("{ipv6}") };
            assert_eq!(error.router, None);
        }
    }

    #[test]
    fn an_error_about_anything_else_is_not_for_us() {
        for ipv6 in [false, true] {
            let (protocol, kind, place) = if ipv6 { (6, 40, 0) } else { (9, 20, 6) };
            for (at, value) in [(protocol, 17), (kind, 0), (0, 0x00)] {
                let mut quoted = request(ipv6);
                quoted[at] = value;
                assert_eq!(read(&error(ipv6, &quoted), 0, ipv6, &told("::", "::1")), None, "{at}");
            }
            if !ipv6 {
                let mut later = request(false);
                later[place + 1] = 3;
                assert_eq!(read(&error(false, &later), 0, false, &told("::", "::1")), None);
            }
        }
    }

    #[test]
    fn a_message_with_a_wrong_checksum_is_not_read() {
        let mut packet = vec![0x45, 0, 0, 32, 0, 7, 0, 0, 60, 1, 0, 0, 192, 0, 2, 9, 192, 0, 2, 1];
        let mut reply = vec![0, 0, 0, 0, 0x12, 0x34, 0, 5, b'd', b'a', b't', b'a'];
        let sum = checksum(&reply, &[]).to_be_bytes();
        reply[2..4].copy_from_slice(&sum);
        packet.extend(reply);
        let from = "192.0.2.9".parse().unwrap();
        let Some(EchoArrival::Reply { id, ttl, payload, .. }) = read_v4(&packet, from) else { panic!("it is right") };
        assert_eq!((id, ttl, &packet[payload]), (0x1234, 60, &b"data"[..]));
        packet[31] ^= 1;
        assert_eq!(read_v4(&packet, from), None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused_without_a_panic(
            bytes in proptest::collection::vec(any::<u8>(), 0..120), ipv6 in any::<bool>(), start in 0usize..4,
            kind in prop_oneof![Just(3u8), Just(1), Just(2), Just(0), Just(129), any::<u8>()],
            inner in prop_oneof![Just(0x45u8), Just(0x60), Just(0x4f)],
        ) {
            let mut bytes = bytes;
            if let Some(first) = bytes.get_mut(start) { *first = kind; }
            if let Some(first) = bytes.get_mut(start + 8) { *first = inner; }
            let told = told("192.0.2.9", "192.0.2.1");
            for read in [read(&bytes, start, ipv6, &told), read_v4(&bytes, told.from)] {
                match read {
                    Some(EchoArrival::Reply { payload, .. } | EchoArrival::Error(EchoError { payload, .. })) => {
                        prop_assert!(bytes.get(payload).is_some());
                    }
                    None => {}
                }
            }
        }
    }
}
