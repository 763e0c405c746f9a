//! The ports that servers have, by sock_diag(7): it costs what there is of listeners, while /proc/net/tcp costs what
//! there is of connections, of which a router may have a million.

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;

use super::diag::{Diag, Kind};

/// `TCP_LISTEN`, as a bit of the states that are asked for.
const LISTENING: u32 = 1 << 10;
/// `TCP_CLOSE`: for UDP, bound and not connected to a peer.
const UNCONNECTED: u32 = 1 << 7;

/// The TCP ports that somebody listens on, in the network namespace of the calling thread; none where the kernel does not
/// say.
pub(super) fn listening_ports() -> BTreeSet<u16> {
    of_both_families(libc::IPPROTO_TCP as u8, LISTENING, |_| true)
}

/// Those of them on which somebody from outside is heard, and not this host alone.
pub(super) fn answering_ports() -> BTreeSet<u16> {
    let open = |socket: &[u8]| !own_address(socket).is_some_and(|address| address.to_canonical().is_loopback());
    of_both_families(libc::IPPROTO_TCP as u8, LISTENING, open)
}

/// The UDP ports of sockets that have no peer: those of servers are among them.
pub(super) fn unconnected_ports() -> BTreeSet<u16> {
    of_both_families(libc::IPPROTO_UDP as u8, UNCONNECTED, |_| true)
}

/// Those of sockets that `wanted` says yes to: it is given each `struct inet_diag_msg`.
fn of_both_families(protocol: u8, states: u32, wanted: impl Fn(&[u8]) -> bool + Copy) -> BTreeSet<u16> {
    let families =
        [libc::AF_INET, libc::AF_INET6].map(|family| ports(Kind { family: family as u8, protocol, states }, wanted));
    for error in families.iter().filter_map(|found| found.as_ref().err()) {
        tracing::debug!("the kernel does not say who listens: {error}");
    }
    families.into_iter().flatten().flatten().collect()
}

fn ports(kind: Kind, wanted: impl Fn(&[u8]) -> bool) -> io::Result<Vec<u16>> {
    let mut ports = Vec::new();
    Diag::open()?.list(kind, |found| {
        // `struct inet_diag_msg`: four bytes, then the socket's own port in network byte order.
        let port = found.get(4..6).filter(|_| wanted(found));
        ports.extend(port.map(|port| u16::from_be_bytes([port[0], port[1]])));
    })?;
    Ok(ports)
}

/// The address that a socket is bound to: behind the ports of both ends, of which IPv4 takes the first four bytes.
fn own_address(socket: &[u8]) -> Option<IpAddr> {
    let octets: [u8; 16] = *socket.get(8..)?.first_chunk()?;
    match i32::from(*socket.first()?) {
        libc::AF_INET => Some(<[u8; 4]>::try_from(&octets[..4]).ok()?.into()),
        libc::AF_INET6 => Some(octets.into()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listeners_of_both_families_are_found_and_connections_are_not() {
        let listeners = ["127.0.0.1:0", "[::1]:0"].map(|any| std::net::TcpListener::bind(any).unwrap());
        let found = listening_ports();
        for listener in &listeners {
            let at = listener.local_addr().unwrap();
            assert!(found.contains(&at.port()), "{at} in {found:?}");
            let connection = std::net::TcpStream::connect(at).unwrap();
            assert!(!listening_ports().contains(&connection.local_addr().unwrap().port()));
        }
    }

    #[test]
    fn who_listens_on_the_loopback_answers_nobody_outside() {
        let bound = |any: &str| std::net::TcpListener::bind(any).unwrap();
        let inside = ["127.0.0.1:0", "127.9.9.9:0", "[::1]:0", "[::ffff:127.0.0.1]:0"].map(bound);
        let open = ["0.0.0.0:0", "[::]:0"].map(bound);
        let port = |listener: &std::net::TcpListener| listener.local_addr().unwrap().port();
        let found = answering_ports();
        assert!(open.iter().all(|listener| found.contains(&port(listener))), "{found:?}");
        assert!(!inside.iter().any(|listener| found.contains(&port(listener))), "{found:?}");
    }

    #[test]
    fn a_datagram_socket_counts_until_it_is_connected() {
        let sockets = [(); 2].map(|()| std::net::UdpSocket::bind("127.0.0.1:0").unwrap());
        let ports = sockets.each_ref().map(|socket| socket.local_addr().unwrap().port());
        assert!(ports.iter().all(|port| unconnected_ports().contains(port)));
        sockets[0].connect(("127.0.0.1", ports[1])).unwrap();
        assert!(!unconnected_ports().contains(&ports[0]));
    }
}
