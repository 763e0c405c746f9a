//! The ports that servers have, by sock_diag(7): it costs what there is of listeners, while /proc/net/tcp costs what
//! there is of connections, of which a router may have a million.

use std::collections::BTreeSet;
use std::io;

use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR, NetlinkBuffer};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_SOCK_DIAG};

/// `SOCK_DIAG_BY_FAMILY`.
const BY_FAMILY: u16 = 20;
/// `TCP_LISTEN`, as a bit of the states that are asked for.
const LISTENING: u32 = 1 << 10;
/// `TCP_CLOSE`: for UDP, bound and not connected to a peer.
const UNCONNECTED: u32 = 1 << 7;
/// The length of `struct nlmsghdr` and of `struct inet_diag_req_v2` behind it, in bytes.
const REQUEST: (usize, usize) = (16, 56);
/// The kernel builds replies of at most 32 KB.
const RECEIVE_SIZE: usize = 64 * 1024;

/// The TCP ports that somebody listens on, in the network namespace of the calling thread; none where the kernel does not
/// say.
pub(super) fn listening_ports() -> BTreeSet<u16> {
    of_both_families(libc::IPPROTO_TCP as u8, LISTENING)
}

/// The UDP ports of sockets that have no peer: those of servers are among them.
pub(super) fn unconnected_ports() -> BTreeSet<u16> {
    of_both_families(libc::IPPROTO_UDP as u8, UNCONNECTED)
}

fn of_both_families(protocol: u8, states: u32) -> BTreeSet<u16> {
    let families = [libc::AF_INET, libc::AF_INET6].map(|family| ports(&request(family as u8, protocol, states)));
    for error in families.iter().filter_map(|found| found.as_ref().err()) {
        tracing::debug!("the kernel does not say who listens: {error}");
    }
    families.into_iter().flatten().flatten().collect()
}

fn ports(request: &[u8]) -> io::Result<Vec<u16>> {
    let mut socket = Socket::new(NETLINK_SOCK_DIAG)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    socket.send(request, 0)?;
    let mut ports = Vec::new();
    loop {
        let mut bytes = Vec::with_capacity(RECEIVE_SIZE);
        socket.recv(&mut bytes, 0)?;
        if collect(&bytes, &mut ports)? {
            return Ok(ports);
        }
    }
}

fn request(family: u8, protocol: u8, states: u32) -> Vec<u8> {
    let (header, body) = REQUEST;
    let mut request = Vec::with_capacity(header + body);
    request.extend(((header + body) as u32).to_ne_bytes());
    request.extend(BY_FAMILY.to_ne_bytes());
    request.extend((NLM_F_REQUEST | NLM_F_DUMP).to_ne_bytes());
    // Sequence 1, from whoever the socket is.
    request.extend(1_u32.to_ne_bytes());
    request.extend(0_u32.to_ne_bytes());
    request.extend([family, protocol, 0, 0]);
    request.extend(states.to_ne_bytes());
    // Any socket.
    request.resize(header + body, 0);
    request
}

/// Takes the ports out of one datagram of the kernel's; says whether it was the last.
fn collect(mut rest: &[u8], ports: &mut Vec<u16>) -> io::Result<bool> {
    while !rest.is_empty() {
        let message = NetlinkBuffer::new_checked(rest).map_err(io::Error::other)?;
        match message.message_type() {
            NLMSG_DONE => return Ok(true),
            NLMSG_ERROR => {
                let code = message.payload().first_chunk().map_or(0, |code| i32::from_ne_bytes(*code));
                return Err(io::Error::from_raw_os_error(code.saturating_abs()));
            }
            // `struct inet_diag_msg`: four bytes, then the socket's own port in network byte order.
            _ => ports.extend(message.payload().get(4..6).map(|port| u16::from_be_bytes([port[0], port[1]]))),
        }
        let length = (message.length() as usize).next_multiple_of(4);
        rest = rest.get(length..).unwrap_or_default();
    }
    Ok(false)
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
    fn a_datagram_socket_counts_until_it_is_connected() {
        let sockets = [(); 2].map(|()| std::net::UdpSocket::bind("127.0.0.1:0").unwrap());
        let ports = sockets.each_ref().map(|socket| socket.local_addr().unwrap().port());
        assert!(ports.iter().all(|port| unconnected_ports().contains(port)));
        sockets[0].connect(("127.0.0.1", ports[1])).unwrap();
        assert!(!unconnected_ports().contains(&ports[0]));
    }

    #[test]
    fn torn_messages_end_in_an_error_or_in_silence() {
        let mut whole = 20_u32.to_ne_bytes().to_vec();
        whole.extend([20, 0, 2, 0, 1, 0, 0, 0, 0, 0, 0, 0, 2, 10, 0, 0]);
        for length in 0..whole.len() {
            let _ = collect(&whole[..length], &mut Vec::new());
        }
        assert!(!collect(&whole, &mut Vec::new()).unwrap());
    }
}
