//! What we ask of the operating system: sockets that bypass us, the TUN, and the host's routes, rules and resolver.
//!
//! `cfg(target_os)` appears here alone.

mod dialer;
#[cfg(target_os = "linux")]
mod linux;

#[cfg(target_os = "linux")]
use linux as imp;

pub use dialer::{Dialer, Fwmark, UdpSocket};
pub use imp::holder::tcp_listener;
pub use imp::udp::{Arrival, DatagramSocket};
