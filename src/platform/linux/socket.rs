//! Sockets that carry our mark.

use std::io;
use std::os::fd::AsFd;

use nix::sys::socket::{setsockopt, sockopt};

use crate::platform::Fwmark;

/// Sets `SO_MARK`, so that our own rules let the socket's packets pass (CAP_NET_ADMIN).
pub(in crate::platform) fn set_mark(socket: impl AsFd, mark: Fwmark) -> io::Result<()> {
    setsockopt(&socket, sockopt::Mark, &mark.0).map_err(io::Error::from)
}
