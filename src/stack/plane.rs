//! smoltcp's side: an interface for each family, shared by all flows of a stack.

use std::num::NonZeroU16;
use std::time::Instant;

use smoltcp::iface::Interface;
use smoltcp::phy::DeviceCapabilities;
use smoltcp::wire::HardwareAddress;

use super::frame::Transmit;
use super::port::{Port, capabilities};
use super::{Config, since};

/// smoltcp's side of one family.
pub(super) struct Plane {
    pub(super) interface: Interface,
    pub(super) capabilities: DeviceCapabilities,
}

impl Plane {
    pub(super) fn new(config: &Config, v6: bool, now: Instant) -> Self {
        let capabilities = capabilities(config.mtu, config.offload, v6);
        let mut settings = smoltcp::iface::Config::new(HardwareAddress::Ip);
        settings.random_seed = config.seed.rotate_left(u32::from(v6));
        let mut port =
            Port { incoming: None, transmit: &mut Nowhere, capabilities: &capabilities, cut: None, last: None };
        let mut interface = Interface::new(settings, &mut port, since(now, now));
        interface.set_any_ip(true);
        Self { interface, capabilities }
    }
}

/// A device for the moment before there is one.
struct Nowhere;

impl Transmit for Nowhere {
    fn ready(&mut self) -> bool {
        false
    }

    fn transmit(&mut self, _: usize, _: Option<NonZeroU16>, _: &mut dyn FnMut(&mut [u8])) {}
}
