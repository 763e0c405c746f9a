//! Ending connections of any program of this network namespace, whose other end hears nothing of that.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::diag::{Diag, ID, Kind};

/// `TCP_ESTABLISHED`, as a bit: for UDP, connected to a peer.
const ESTABLISHED: u32 = 1 << 1;
/// `TCP_FIN_WAIT2`: it has nothing more to send. Before Linux 6.8 some of these cannot be ended.
const SILENT: u8 = 5;
/// `TCP_SYN_SENT` and the other states in which something is sent or awaited: not LISTEN, TIME_WAIT and CLOSE.
const ALIVE: u32 = ESTABLISHED | 1 << 2 | 1 << 3 | 1 << 4 | 1 << SILENT | 1 << 8 | 1 << 9 | 1 << 11;

/// What became of connections that were to end.
#[derive(Debug, Default)]
pub(in crate::platform) struct Ended {
    /// So many have ended.
    pub(in crate::platform) ended: usize,
    /// So many live on, and why the last of them does.
    pub(in crate::platform) left: Option<(usize, io::Error)>,
}

/// Ends the TCP connections, and the sockets of datagrams with a peer, of which `is_meant` says so by their own address and
/// the peer's. Listeners, and sockets without a peer, stay; and so do ping sockets, which the kernel lists nowhere (it has no
/// diag handler for them), and raw ones, which only some kernels list (`CONFIG_INET_RAW_DIAG`).
///
/// # Errors
/// The kernel does not say which there are, or not of all kinds; of the others they have ended.
pub(in crate::platform) fn end(is_meant: impl Fn(IpAddr, IpAddr) -> bool) -> io::Result<Ended> {
    let diag = Diag::open()?;
    let (mut ended, mut unseen) = (Ended::default(), None);
    for family in [libc::AF_INET as u8, libc::AF_INET6 as u8] {
        for (protocol, states) in [(libc::IPPROTO_TCP as u8, ALIVE), (libc::IPPROTO_UDP as u8, ESTABLISHED)] {
            let kind = Kind { family, protocol, states };
            let mut found = Vec::new();
            // One for each: the rest of a list that broke off is no answer to the next question.
            let listed = Diag::open()?.list(kind, |message| {
                found.extend(parse(message).filter(|it| is_meant(it.source, it.destination)));
            });
            if let Err(error) = listed {
                unseen = unseen.or_else(|| explained(&error, kind));
            }
            for connection in found {
                match diag.destroy(kind, &connection.id) {
                    Ok(()) => ended.ended += 1,
                    Err(error) if error.raw_os_error() == Some(libc::ENOENT) || connection.state == SILENT => {}
                    Err(error) => ended.left = Some((ended.left.map_or(0, |(many, _)| many) + 1, error)),
                }
            }
        }
    }
    let Some(error) = unseen else { return Ok(ended) };
    tracing::debug!("of those that the kernel lists, {} have ended", ended.ended);
    Err(error)
}

/// Why those of this kind are not known; none where there can be none: a kernel without IPv6.
fn explained(error: &io::Error, kind: Kind) -> Option<io::Error> {
    let lacking = error.raw_os_error() == Some(libc::ENOENT);
    if lacking && i32::from(kind.family) == libc::AF_INET6 {
        return None;
    }
    let which = if i32::from(kind.protocol) == libc::IPPROTO_TCP { "TCP" } else { "UDP" };
    let told = match lacking {
        true => format!("the kernel does not list sockets of {which} (CONFIG_INET_{which}_DIAG)"),
        false => format!("of {which}: {error}"),
    };
    Some(io::Error::new(error.kind(), told))
}

struct Connection {
    state: u8,
    source: IpAddr,
    destination: IpAddr,
    id: [u8; ID],
}

/// Reads a `struct inet_diag_msg`.
fn parse(message: &[u8]) -> Option<Connection> {
    // Four bytes, the first two of which are family and state; then the socket's id: two ports, two addresses of 16 bytes.
    let (family, state) = (*message.first()?, *message.get(1)?);
    let id: [u8; ID] = *message.get(4..)?.first_chunk()?;
    let ip = |at: usize| -> Option<IpAddr> {
        let bytes = id.get(at..)?;
        Some(match i32::from(family) {
            libc::AF_INET => Ipv4Addr::from(*bytes.first_chunk::<4>()?).into(),
            // A socket of IPv6 may be connected over IPv4.
            _ => IpAddr::V6(Ipv6Addr::from(*bytes.first_chunk::<16>()?)).to_canonical(),
        })
    };
    Some(Connection { state, source: ip(4)?, destination: ip(20)?, id })
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, UdpSocket};

    use super::*;

    #[test]
    fn a_connection_is_known_by_both_of_its_addresses() {
        let listener = TcpListener::bind("127.0.78.1:0").unwrap();
        let stream = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let datagrams = UdpSocket::bind("127.0.78.2:0").unwrap();
        datagrams.connect("127.0.78.3:9").unwrap();
        let mut seen = std::sync::Mutex::new(Vec::new());
        let none = end(|source, destination| {
            seen.lock().unwrap().push((source, destination));
            false
        });
        assert!(none.is_ok_and(|it| it.ended == 0 && it.left.is_none()));
        let seen = seen.get_mut().unwrap();
        let at = |last: u8| IpAddr::from([127, 0, 78, last]);
        assert!(seen.contains(&(stream.local_addr().unwrap().ip(), at(1))));
        assert!(seen.contains(&(at(1), stream.local_addr().unwrap().ip())));
        assert!(seen.contains(&(at(2), at(3))));
    }

    #[test]
    fn a_kernel_that_lists_nothing_is_told_and_one_without_ipv6_is_not() {
        let kind = |family: i32, protocol: i32| Kind { family: family as u8, protocol: protocol as u8, states: ALIVE };
        let lacking = || io::Error::from_raw_os_error(libc::ENOENT);
        let told = explained(&lacking(), kind(libc::AF_INET, libc::IPPROTO_UDP)).unwrap();
        assert!(told.to_string().contains("CONFIG_INET_UDP_DIAG"), "{told}");
        assert!(explained(&lacking(), kind(libc::AF_INET6, libc::IPPROTO_TCP)).is_none());
        let refused = io::Error::from_raw_os_error(libc::EPERM);
        assert!(explained(&refused, kind(libc::AF_INET6, libc::IPPROTO_TCP)).is_some());
    }

    #[test]
    fn a_torn_message_is_no_connection() {
        for length in 0..4 + ID {
            assert!(parse(&vec![2; length]).is_none());
        }
        assert!(parse(&[2; 4 + ID]).is_some());
    }
}
