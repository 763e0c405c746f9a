//! Echo requests, sent from this host.

use std::io;
use std::net::IpAddr;
use std::sync::{Arc, Once};
use std::task::{Context, Poll};

use crate::net::{DialError, Echo, EchoArrival, Reach};
use crate::outbound::egress::Egress;
use crate::platform::EchoSocket;

/// A socket for the echo requests of one family.
pub(super) struct DirectEcho {
    egress: Arc<Egress>,
    socket: EchoSocket,
}

impl DirectEcho {
    /// # Errors
    /// Those of the dialer. That the system allows no such socket is said in the log, once.
    pub(super) fn open(egress: Arc<Egress>, ipv6: bool) -> Result<Self, DialError> {
        static TOLD: Once = Once::new();
        let socket = egress.echo(ipv6);
        if matches!(socket, Err(DialError::Unreachable(Reach::Prohibited))) {
            TOLD.call_once(|| {
                tracing::warn!(
                    "echo requests (ping) are refused: that takes CAP_NET_RAW, or a group of ours in the range of \
                     net.ipv4.ping_group_range"
                );
            });
        }
        Ok(Self { egress, socket: socket? })
    }
}

impl crate::net::EchoSocket for DirectEcho {
    fn own_id(&self) -> Option<u16> {
        self.socket.own_id()
    }

    fn send(&mut self, to: IpAddr, request: &Echo<'_>) -> Result<(), DialError> {
        // A name may lead to what no client may write to.
        if self.egress.is_fake(to) || to.is_multicast() || to.is_unspecified() {
            return Err(DialError::Unreachable(Reach::Host));
        }
        self.socket.send(to, request).map_err(|error| match error.raw_os_error() {
            Some(libc::EMSGSIZE) => DialError::Unreachable(Reach::TooBig(self.egress.path_mtu(to).unwrap_or(0))),
            _ => error.into(),
        })
    }

    fn is_stranded(&self) -> bool {
        self.egress.is_bound() && self.socket.is_stranded()
    }

    fn poll_recv(&mut self, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<EchoArrival>> {
        self.socket.poll_recv(cx, buffer)
    }
}
