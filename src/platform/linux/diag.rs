//! The sockets of this network namespace, whoever's they are: sock_diag(7).

use std::io;
use std::ops::ControlFlow;

use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR, NetlinkBuffer};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_SOCK_DIAG};

/// `SOCK_DIAG_BY_FAMILY`.
const BY_FAMILY: u16 = 20;
/// `SOCK_DESTROY`.
const DESTROY: u16 = 21;
/// The length of `struct inet_diag_sockid`, in bytes.
pub(super) const ID: usize = 48;
/// The length of `struct nlmsghdr` and of `struct inet_diag_req_v2` behind it, in bytes.
const REQUEST: (usize, usize) = (16, 8 + ID);
/// The kernel builds replies of at most 32 KB.
const RECEIVE_SIZE: usize = 64 * 1024;

/// Which sockets are meant: an address family, a transport protocol, and bits of states.
#[derive(Debug, Clone, Copy)]
pub(super) struct Kind {
    /// `AF_INET` or `AF_INET6`: of the sockets, not of what they are connected to.
    pub(super) family: u8,
    /// `IPPROTO_TCP` or `IPPROTO_UDP`.
    pub(super) protocol: u8,
    /// `1 << TCP_ESTABLISHED` and so on; UDP has that one and `TCP_CLOSE`.
    pub(super) states: u32,
}

/// A conversation with the kernel about sockets.
pub(super) struct Diag(Socket);

impl Diag {
    /// Opens it, in the network namespace of the calling thread.
    ///
    /// # Errors
    /// The kernel has none for us.
    pub(super) fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_SOCK_DIAG)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self(socket))
    }

    /// Gives `each` the `struct inet_diag_msg` of every socket of this kind.
    ///
    /// # Errors
    /// The kernel does not say; ENOENT where it has nobody who would (`inet_diag`, `tcp_diag`, `udp_diag`).
    pub(super) fn list(&self, kind: Kind, mut each: impl FnMut(&[u8])) -> io::Result<()> {
        self.0.send(&request(BY_FAMILY, NLM_F_DUMP, kind, &[0; ID]), 0)?;
        self.answers(&mut each)
    }

    /// Ends a socket, which its program hears of (ECONNABORTED). `id` is that of its `struct inet_diag_msg`.
    ///
    /// # Errors
    /// It is gone (ENOENT), this kernel cannot (EOPNOTSUPP: it was built without `CONFIG_INET_DIAG_DESTROY`), or no
    /// CAP_NET_ADMIN.
    pub(super) fn destroy(&self, kind: Kind, id: &[u8; ID]) -> io::Result<()> {
        self.0.send(&request(DESTROY, NLM_F_ACK, kind, id), 0)?;
        self.answers(&mut |_| {})
    }

    fn answers(&self, each: &mut impl FnMut(&[u8])) -> io::Result<()> {
        loop {
            let mut bytes = Vec::with_capacity(RECEIVE_SIZE);
            match self.0.recv(&mut bytes, 0) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                other => other?,
            };
            if read(&bytes, each)?.is_break() {
                return Ok(());
            }
        }
    }
}

fn request(act: u16, flags: u16, kind: Kind, id: &[u8; ID]) -> Vec<u8> {
    let (header, body) = REQUEST;
    let mut request = Vec::with_capacity(header + body);
    request.extend(((header + body) as u32).to_ne_bytes());
    request.extend(act.to_ne_bytes());
    request.extend((NLM_F_REQUEST | flags).to_ne_bytes());
    // Sequence 1, from whoever the socket is.
    request.extend(1_u32.to_ne_bytes());
    request.extend(0_u32.to_ne_bytes());
    request.extend([kind.family, kind.protocol, 0, 0]);
    request.extend(kind.states.to_ne_bytes());
    request.extend(id);
    request
}

/// Hands over what is in one datagram of the kernel's; breaks where it was the last.
fn read(mut rest: &[u8], each: &mut impl FnMut(&[u8])) -> io::Result<ControlFlow<()>> {
    while !rest.is_empty() {
        let message = NetlinkBuffer::new_checked(rest).map_err(io::Error::other)?;
        match message.message_type() {
            // Of a list too the end says how it went: for a protocol that nobody answers for (tcp_diag, udp_diag) it alone does.
            NLMSG_DONE | NLMSG_ERROR => {
                let code = message.payload().first_chunk().map_or(0, |code| i32::from_ne_bytes(*code));
                return match code {
                    // An acknowledgement, or all of a list.
                    0 => Ok(ControlFlow::Break(())),
                    code => Err(io::Error::from_raw_os_error(code.saturating_abs())),
                };
            }
            _ => each(message.payload()),
        }
        let length = (message.length() as usize).next_multiple_of(4);
        rest = rest.get(length..).unwrap_or_default();
    }
    Ok(ControlFlow::Continue(()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of the type, with these bytes.
    fn message(of: u16, payload: &[u8]) -> Vec<u8> {
        let mut message = (16 + payload.len() as u32).to_ne_bytes().to_vec();
        message.extend(of.to_ne_bytes());
        message.extend([2, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        message.extend(payload);
        message
    }

    #[test]
    fn a_list_that_ends_with_an_error_is_none() {
        let nothing = (-libc::ENOENT).to_ne_bytes();
        for of in [NLMSG_DONE, NLMSG_ERROR] {
            let error = read(&message(of, &nothing), &mut |_| {}).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::ENOENT));
            assert!(read(&message(of, &[0; 4]), &mut |_| {}).unwrap().is_break());
        }
        // Not even where something came before.
        let torn = [message(BY_FAMILY, &[2, 10, 0, 0]), message(NLMSG_DONE, &(-libc::ENOMEM).to_ne_bytes())].concat();
        assert!(read(&torn, &mut |_| {}).is_err());
    }

    #[test]
    fn of_a_protocol_that_nobody_answers_for_the_kernel_says_so() {
        let diag = Diag::open().unwrap();
        for family in [libc::AF_INET as u8, libc::AF_INET6 as u8] {
            // RFC 3692: for experiments.
            let kind = Kind { family, protocol: 253, states: u32::MAX };
            assert_eq!(diag.list(kind, |_| {}).unwrap_err().raw_os_error(), Some(libc::ENOENT));
            // What came of one question is not the answer to the next.
            assert!(diag.list(Kind { protocol: libc::IPPROTO_TCP as u8, ..kind }, |_| {}).is_ok());
        }
    }

    #[test]
    fn torn_messages_end_in_an_error_or_in_silence() {
        let whole = message(BY_FAMILY, &[2, 10, 0, 0]);
        for length in 0..whole.len() {
            let _ = read(&whole[..length], &mut |_| {});
        }
        let mut found = 0;
        assert!(read(&whole, &mut |_| found += 1).unwrap().is_continue());
        assert_eq!(found, 1);
    }
}
