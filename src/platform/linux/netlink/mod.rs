//! Routes, rules, addresses and links by rtnetlink, and what nftables holds: one blocking socket, every act acknowledged
//! before the next.
//!
//! Blocking on purpose (docs/decisions/0003-sync-netlink.md): it serves the single-threaded child of `exec`, the
//! crash clean-up and the start, none of which has anything else to do meanwhile.

pub(in crate::platform) mod exact_route;
mod gates;
mod gateway;
mod link;
mod mark_sets;
pub(super) mod next_hops;
pub(super) mod marks;
pub(in crate::platform) mod nftables;
pub(super) mod route;
mod rule;
mod seen_link;

use std::io;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_ACK_TLVS, NLM_F_CAPPED, NLM_F_CREATE, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_EXCL, NLM_F_REQUEST,
    NLMSG_DONE, NLMSG_ERROR, NetlinkBuffer, NetlinkHeader, NetlinkMessage, NetlinkPayload, NetlinkSerializable,
    NlasIterator, parse_string,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

/// The kernel builds replies of at most 32 KB; twice that leaves room for growth.
const RECEIVE_SIZE: usize = 64 * 1024;

/// How often a dump that changed under our eyes is begun anew.
const DUMP_ATTEMPTS: usize = 8;

/// `NLMSGERR_ATTR_MSG`: the kernel's own words about a refusal.
const ERROR_MESSAGE_ATTRIBUTE: u16 = 1;

/// Flags of an act that must make something new.
const CREATE: u16 = NLM_F_CREATE | NLM_F_EXCL;

/// Takes one message: its type, its flags, its payload.
type Each<'a> = dyn FnMut(u16, u16, &[u8]) -> Result<(), NetlinkError> + 'a;

/// An act that the kernel refused.
#[derive(Debug, thiserror::Error)]
#[error("{act}: {source}{}", said.as_ref().map(|said| format!(" (kernel: {said})")).unwrap_or_default())]
pub struct NetlinkError {
    /// What was tried, in words.
    pub act: String,
    /// The errno.
    pub source: io::Error,
    /// What the kernel says about it, where it says more than the errno.
    pub said: Option<String>,
}

impl NetlinkError {
    fn new(act: &str, source: io::Error) -> Self {
        Self { act: act.to_owned(), source, said: None }
    }

    fn garbled(act: &str, why: impl std::fmt::Display) -> Self {
        Self::new(act, io::Error::new(io::ErrorKind::InvalidData, why.to_string()))
    }

    /// The thing to be deleted is not there, or the device that held it is not.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        matches!(
            self.source.raw_os_error(),
            Some(libc::ENOENT | libc::ESRCH | libc::ENODEV | libc::EADDRNOTAVAIL | libc::ENXIO)
        )
    }

    /// The kernel wants a capability that we lack.
    #[must_use]
    pub fn is_denied(&self) -> bool {
        matches!(self.source.raw_os_error(), Some(libc::EPERM | libc::EACCES))
    }
}

/// A conversation with the kernel about this network namespace.
pub struct Netlink {
    socket: Socket,
    sequence: u32,
}

impl Netlink {
    /// Opens the socket, in the network namespace of the calling thread.
    ///
    /// # Errors
    /// The kernel has no netlink for us (a sandbox forbids the family, or no file descriptor is left).
    pub fn open() -> Result<Self, NetlinkError> {
        Self::with(NETLINK_ROUTE)
    }

    fn with(protocol: isize) -> Result<Self, NetlinkError> {
        let act = "open a netlink socket";
        let open = || {
            let mut socket = Socket::new(protocol)?;
            socket.bind_auto()?;
            socket.connect(&SocketAddr::new(0, 0))?;
            Ok(socket)
        };
        let socket = open().map_err(|error| NetlinkError::new(act, error))?;
        // Old kernels have neither; the errno alone is then all that an error shows.
        let _ = socket.set_ext_ack(true);
        let _ = socket.set_cap_ack(true);
        Ok(Self { socket, sequence: 0 })
    }

    /// Sends `message` and waits for its acknowledgement.
    fn act(&mut self, act: &str, message: RouteNetlinkMessage, flags: u16) -> Result<(), NetlinkError> {
        let sequence = self.send(act, message, NLM_F_ACK | flags)?;
        let mut outcome = None;
        while outcome.is_none() {
            self.receive(act, sequence, &mut |kind, flags, payload| {
                if kind == NLMSG_ERROR {
                    outcome = Some(acknowledgement(act, flags, payload));
                }
                Ok(())
            })?;
        }
        outcome.unwrap_or(Ok(()))
    }

    /// Sends the dump request `message` and has `each` collect the answers; begins anew when the list changed meanwhile.
    fn dump<T: Default, M: NetlinkSerializable + Clone>(
        &mut self,
        act: &str,
        message: &M,
        each: impl Fn(&mut T, u16, &[u8]) -> Result<(), NetlinkError>,
    ) -> Result<T, NetlinkError> {
        for _ in 0..DUMP_ATTEMPTS {
            if let (found, false) = self.dump_once(act, message, &each)? {
                return Ok(found);
            }
        }
        Err(NetlinkError::new(act, io::Error::from_raw_os_error(libc::EAGAIN)))
    }

    /// The answers to one dump request, and whether the list changed meanwhile.
    fn dump_once<T: Default, M: NetlinkSerializable + Clone>(
        &mut self,
        act: &str,
        message: &M,
        each: &impl Fn(&mut T, u16, &[u8]) -> Result<(), NetlinkError>,
    ) -> Result<(T, bool), NetlinkError> {
        let sequence = self.send(act, message.clone(), NLM_F_DUMP)?;
        let (mut found, mut end, mut torn) = (T::default(), None, false);
        while end.is_none() {
            self.receive(act, sequence, &mut |kind, flags, payload| {
                torn |= flags & NLM_F_DUMP_INTR != 0;
                match kind {
                    // A dump ends with a code as an acknowledgement does; most kernels send 0.
                    NLMSG_DONE | NLMSG_ERROR => end = Some(acknowledgement(act, flags, payload)),
                    kind => each(&mut found, kind, payload)?,
                }
                Ok(())
            })?;
        }
        end.unwrap_or(Ok(()))?;
        Ok((found, torn))
    }

    fn send<M: NetlinkSerializable>(&mut self, act: &str, message: M, flags: u16) -> Result<u32, NetlinkError> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        header.sequence_number = self.sequence;
        let mut request = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(message));
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        loop {
            match self.socket.send(&bytes, 0) {
                Ok(_) => return Ok(self.sequence),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(NetlinkError::new(act, error)),
            }
        }
    }

    /// Waits for one datagram and hands each message that answers `sequence` to `each`.
    fn receive(&mut self, act: &str, sequence: u32, each: &mut Each<'_>) -> Result<(), NetlinkError> {
        let mut bytes = Vec::with_capacity(RECEIVE_SIZE);
        while let Err(error) = self.socket.recv(&mut bytes, 0) {
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(NetlinkError::new(act, error));
            }
        }
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            let message = NetlinkBuffer::new_checked(rest).map_err(|error| NetlinkError::garbled(act, error))?;
            if message.sequence_number() == sequence {
                each(message.message_type(), message.flags(), message.payload())?;
            }
            // Messages are padded to four bytes, except perhaps the last (NLMSG_ALIGN, netlink(7)).
            let length = (message.length() as usize).next_multiple_of(4);
            rest = rest.get(length..).unwrap_or_default();
        }
        Ok(())
    }
}

impl std::fmt::Debug for Netlink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Netlink").field("sequence", &self.sequence).finish_non_exhaustive()
    }
}

/// Reads an acknowledgement: a negative errno or zero, then with `NLM_F_ACK_TLVS` the kernel's words (netlink(7)).
fn acknowledgement(act: &str, flags: u16, payload: &[u8]) -> Result<(), NetlinkError> {
    let code = payload.first_chunk().map_or(0, |code| i32::from_ne_bytes(*code));
    if code == 0 {
        return Ok(());
    }
    let mut error = NetlinkError::new(act, io::Error::from_raw_os_error(code.saturating_abs()));
    // With NLM_F_CAPPED only the header (16 bytes) of our request stands between the code and the attributes.
    if flags & NLM_F_ACK_TLVS != 0 && flags & NLM_F_CAPPED != 0 {
        let attributes = payload.get(20..).unwrap_or_default();
        error.said = NlasIterator::new(attributes)
            .flatten()
            .find(|attribute| attribute.kind() == ERROR_MESSAGE_ATTRIBUTE)
            .and_then(|attribute| parse_string(attribute.value()).ok());
    }
    Err(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_acknowledgement_of_zero_is_success() {
        assert!(acknowledgement("try", 0, &[0; 4]).is_ok());
    }

    #[test]
    fn a_refusal_carries_the_errno_and_the_words_of_the_kernel() {
        let mut payload = (-libc::EEXIST).to_ne_bytes().to_vec();
        payload.extend([0; 16]);
        payload.extend(10u16.to_ne_bytes());
        payload.extend(ERROR_MESSAGE_ATTRIBUTE.to_ne_bytes());
        payload.extend(b"twice\0\0\0");
        let error = acknowledgement("add a rule", NLM_F_ACK_TLVS | NLM_F_CAPPED, &payload).unwrap_err();
        assert_eq!(error.source.raw_os_error(), Some(libc::EEXIST));
        assert_eq!(error.said.as_deref(), Some("twice"));
        assert!(error.to_string().starts_with("add a rule: "), "{error}");
    }

    #[test]
    fn a_torn_acknowledgement_does_not_panic() {
        for length in 0..24 {
            let payload = vec![0xff; length];
            let _ = acknowledgement("try", NLM_F_ACK_TLVS | NLM_F_CAPPED, &payload);
        }
    }
}
