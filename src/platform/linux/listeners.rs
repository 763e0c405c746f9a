//! The ports that servers have, by sock_diag(7): it costs what there is of listeners, while /proc/net/tcp costs what
//! there is of connections, of which a router may have a million. That is read where the kernel has no sock_diag for them
//! (`inet_diag` is a module of its own, which small systems leave out).

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::net::IpAddr;

use super::diag::{Diag, Kind};

/// `TCP_LISTEN`, as a bit of the states that are asked for.
const LISTENING: u32 = 1 << 10;
/// `TCP_CLOSE`: for UDP, bound and not connected to a peer.
const UNCONNECTED: u32 = 1 << 7;

/// The TCP ports that somebody listens on, in the network namespace of the calling thread; none where nobody says.
pub(super) fn listening_ports() -> BTreeSet<u16> {
    listeners().map(|(_, port)| port).collect()
}

/// Those of them on which somebody from outside is heard, and not this host alone.
pub(super) fn answering_ports() -> BTreeSet<u16> {
    listeners().filter(|(address, _)| !address.to_canonical().is_loopback()).map(|(_, port)| port).collect()
}

/// The UDP ports of sockets that have no peer: those of servers are among them.
pub(super) fn unconnected_ports() -> BTreeSet<u16> {
    let found = of_both_families(libc::IPPROTO_UDP as u8, UNCONNECTED, ["udp", "udp6"]);
    found.into_iter().map(|(_, port)| port).collect()
}

fn listeners() -> impl Iterator<Item = (IpAddr, u16)> {
    of_both_families(libc::IPPROTO_TCP as u8, LISTENING, ["tcp", "tcp6"]).into_iter()
}

/// What sockets are bound to. `tables`: those of /proc/net that say the same.
fn of_both_families(protocol: u8, states: u32, tables: [&str; 2]) -> Vec<(IpAddr, u16)> {
    let mut found = Vec::new();
    for (family, table) in [libc::AF_INET, libc::AF_INET6].into_iter().zip(tables) {
        match listed(Kind { family: family as u8, protocol, states }) {
            Ok(listed) => found.extend(listed),
            Err(error) => {
                tracing::debug!("the kernel does not list sockets ({error}): reading /proc/net/{table}");
                // The kernel may have no IPv6.
                let text = fs::read_to_string(format!("/proc/thread-self/net/{table}")).unwrap_or_default();
                found.extend(in_table(&text, states));
            }
        }
    }
    found
}

/// Those in one of `states`, from a table of proc_net(5): "0: 0100007F:1EDC 00000000:0000 0A ...".
fn in_table(table: &str, states: u32) -> impl Iterator<Item = (IpAddr, u16)> {
    table.lines().skip(1).filter_map(move |line| {
        let mut words = line.split_ascii_whitespace().skip(1);
        let (address, port) = words.next()?.rsplit_once(':')?;
        let state = u32::from_str_radix(words.nth(1)?, 16).ok()?;
        let wanted = 1_u32.checked_shl(state).is_some_and(|state| states & state != 0);
        let bound = (hexadecimal(address)?, u16::from_str_radix(port, 16).ok()?);
        wanted.then_some(bound)
    })
}

/// An address as proc_net(5) shows it: in words of 32 bits, each as the processor reads it.
fn hexadecimal(text: &str) -> Option<IpAddr> {
    let word = |at: usize| Some(u32::from_str_radix(text.get(at..at + 8)?, 16).ok()?.to_ne_bytes());
    match text.len() {
        8 => Some(word(0)?.into()),
        32 => {
            let octets = [word(0)?, word(8)?, word(16)?, word(24)?].concat();
            Some(<[u8; 16]>::try_from(octets).ok()?.into())
        }
        _ => None,
    }
}

fn listed(kind: Kind) -> io::Result<Vec<(IpAddr, u16)>> {
    let mut all = Vec::new();
    Diag::open()?.list(kind, |found| all.extend(own_end(found)))?;
    Ok(all)
}

/// What the socket of a `struct inet_diag_msg` is bound to: behind four bytes its port and its peer's, in network byte order,
/// then its address, of which IPv4 takes the first four bytes.
fn own_end(socket: &[u8]) -> Option<(IpAddr, u16)> {
    let port = u16::from_be_bytes(*socket.get(4..)?.first_chunk()?);
    let octets: [u8; 16] = *socket.get(8..)?.first_chunk()?;
    match i32::from(*socket.first()?) {
        libc::AF_INET => Some((<[u8; 4]>::try_from(&octets[..4]).ok()?.into(), port)),
        libc::AF_INET6 => Some((octets.into(), port)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

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
    fn a_kernel_that_does_not_list_them_tells_the_same_in_its_tables() {
        let read = |table: &str, states: u32| -> BTreeSet<SocketAddr> {
            let text = fs::read_to_string(format!("/proc/thread-self/net/{table}")).unwrap();
            in_table(&text, states).map(SocketAddr::from).collect()
        };
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let connection = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let found = read("tcp", LISTENING);
        assert!(found.contains(&listener.local_addr().unwrap()));
        assert!(!found.contains(&connection.local_addr().unwrap()));
        let sockets = [(); 2].map(|()| std::net::UdpSocket::bind("[::1]:0").unwrap());
        sockets[0].connect(sockets[1].local_addr().unwrap()).unwrap();
        let found = read("udp6", UNCONNECTED);
        assert!(found.contains(&sockets[1].local_addr().unwrap()));
        assert!(!found.contains(&sockets[0].local_addr().unwrap()));
        assert_eq!(in_table("sl\n0: x\n1: 0:FFFFF 0:0 0A\n2: 0:1 0:0 FF\n", LISTENING).count(), 0);
        // No protocol of this number is listed.
        let both = of_both_families(253, LISTENING, ["tcp", "tcp6"]);
        let at = listener.local_addr().unwrap();
        assert!(both.contains(&(at.ip(), at.port())));
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
