//! The ports that servers have, by sock_diag(7): it costs what there is of listeners, while /proc/net/tcp costs what
//! there is of connections, of which a router may have a million. That is read where the kernel has no sock_diag for them
//! (`inet_diag` is a module of its own, which small systems leave out).

use std::collections::BTreeSet;
use std::fs;
use std::io;

use super::diag::{Diag, Kind};

/// `TCP_LISTEN`, as a bit of the states that are asked for.
const LISTENING: u32 = 1 << 10;
/// `TCP_CLOSE`: for UDP, bound and not connected to a peer.
const UNCONNECTED: u32 = 1 << 7;

/// The TCP ports that somebody listens on, in the network namespace of the calling thread; none where nobody says.
pub(super) fn listening_ports() -> BTreeSet<u16> {
    of_both_families(libc::IPPROTO_TCP as u8, LISTENING, ["tcp", "tcp6"])
}

/// The UDP ports of sockets that have no peer: those of servers are among them.
pub(super) fn unconnected_ports() -> BTreeSet<u16> {
    of_both_families(libc::IPPROTO_UDP as u8, UNCONNECTED, ["udp", "udp6"])
}

/// `tables`: those of /proc/net that say the same.
fn of_both_families(protocol: u8, states: u32, tables: [&str; 2]) -> BTreeSet<u16> {
    let mut found = BTreeSet::new();
    for (family, table) in [libc::AF_INET, libc::AF_INET6].into_iter().zip(tables) {
        match ports(Kind { family: family as u8, protocol, states }) {
            Ok(ports) => found.extend(ports),
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

/// The ports of those in one of `states`, from a table of proc_net(5): "0: 0100007F:1EDC 00000000:0000 0A ...".
fn in_table(table: &str, states: u32) -> impl Iterator<Item = u16> {
    table.lines().skip(1).filter_map(move |line| {
        let mut words = line.split_ascii_whitespace().skip(1);
        let (_, port) = words.next()?.rsplit_once(':')?;
        let state = u32::from_str_radix(words.nth(1)?, 16).ok()?;
        let wanted = 1_u32.checked_shl(state).is_some_and(|state| states & state != 0);
        wanted.then(|| u16::from_str_radix(port, 16).ok()).flatten()
    })
}

fn ports(kind: Kind) -> io::Result<Vec<u16>> {
    let mut ports = Vec::new();
    Diag::open()?.list(kind, |found| {
        // `struct inet_diag_msg`: four bytes, then the socket's own port in network byte order.
        ports.extend(found.get(4..6).map(|port| u16::from_be_bytes([port[0], port[1]])));
    })?;
    Ok(ports)
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
    fn a_kernel_that_does_not_list_them_tells_the_same_in_its_tables() {
        let read = |table: &str, states: u32| -> BTreeSet<u16> {
            in_table(&fs::read_to_string(format!("/proc/thread-self/net/{table}")).unwrap(), states).collect()
        };
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let connection = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let found = read("tcp", LISTENING);
        assert!(found.contains(&listener.local_addr().unwrap().port()));
        assert!(!found.contains(&connection.local_addr().unwrap().port()));
        let sockets = [(); 2].map(|()| std::net::UdpSocket::bind("[::1]:0").unwrap());
        sockets[0].connect(sockets[1].local_addr().unwrap()).unwrap();
        let found = read("udp6", UNCONNECTED);
        assert!(found.contains(&sockets[1].local_addr().unwrap().port()));
        assert!(!found.contains(&sockets[0].local_addr().unwrap().port()));
        assert_eq!(in_table("sl\n0: x\n1: 0:FFFFF 0:0 0A\n2: 0:1 0:0 FF\n", LISTENING).count(), 0);
        // No protocol of this number is listed.
        let both = of_both_families(253, LISTENING, ["tcp", "tcp6"]);
        assert!(both.contains(&listener.local_addr().unwrap().port()));
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
