//! A failed dial in the words of the client's own protocol.

use std::io;

use hyper::StatusCode;

use crate::net::{DialError, Reject};
use crate::outbound::socks5::wire::reply;

/// What a client is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refusal {
    /// Nobody there, or somebody who does not want us.
    Refused,
    /// No way to the network.
    Network,
    /// No answer from the host.
    Host,
    /// Nobody answered in time.
    TimedOut,
    /// A rule does not allow it.
    Forbidden,
    /// It cannot be done.
    Failed,
    /// Nothing is to be said.
    Silence,
}

impl From<&DialError> for Refusal {
    fn from(error: &DialError) -> Self {
        if matches!(error, DialError::Rejected(Reject::Drop)) {
            return Self::Silence;
        }
        match error.kind() {
            io::ErrorKind::ConnectionRefused => Self::Refused,
            io::ErrorKind::NetworkUnreachable => Self::Network,
            io::ErrorKind::HostUnreachable => Self::Host,
            io::ErrorKind::PermissionDenied => Self::Forbidden,
            io::ErrorKind::TimedOut => Self::TimedOut,
            _ => Self::Failed,
        }
    }
}

impl Refusal {
    /// RFC 1928 section 6; None: no reply.
    pub(super) fn socks5(self) -> Option<u8> {
        Some(match self {
            Self::Refused => reply::REFUSED,
            Self::Network => reply::NETWORK_UNREACHABLE,
            Self::Host => reply::HOST_UNREACHABLE,
            Self::TimedOut => reply::TTL_EXPIRED,
            Self::Forbidden => reply::NOT_ALLOWED,
            Self::Failed => reply::FAILURE,
            Self::Silence => return None,
        })
    }

    /// RFC 9110 section 15; None: no answer.
    pub(super) fn http(self) -> Option<StatusCode> {
        Some(match self {
            Self::Refused | Self::Network | Self::Host | Self::Failed => StatusCode::BAD_GATEWAY,
            Self::TimedOut => StatusCode::GATEWAY_TIMEOUT,
            Self::Forbidden => StatusCode::FORBIDDEN,
            Self::Silence => return None,
        })
    }
}
