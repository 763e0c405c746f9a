//! Which flows are questions to us (`tun.dns-hijack`).

use std::net::{IpAddr, SocketAddr};

/// The destinations whose TCP and UDP traffic is answered by our own DNS.
#[derive(Debug, Clone, Default)]
pub struct Hijack {
    /// An address, or any, and a port.
    targets: Vec<(Option<IpAddr>, u16)>,
}

impl Hijack {
    /// Takes what the profile lists; an unspecified address means any. `own` are our DNS addresses, taken on port 53
    /// whatever the profile says.
    #[must_use]
    pub fn new(listed: &[SocketAddr], own: &[IpAddr]) -> Self {
        let listed = listed.iter().map(|target| {
            let any = target.ip().is_unspecified();
            ((!any).then_some(target.ip()), target.port())
        });
        Self { targets: listed.chain(own.iter().map(|ip| (Some(*ip), 53))).collect() }
    }

    /// Whether `destination` is answered here.
    #[must_use]
    pub fn takes(&self, destination: SocketAddr) -> bool {
        self.targets
            .iter()
            .any(|(ip, port)| *port == destination.port() && ip.is_none_or(|ip| ip == destination.ip()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unspecified_address_stands_for_any_of_both_families() {
        let hijack = Hijack::new(&["0.0.0.0:53".parse().unwrap()], &[]);
        assert!(hijack.takes("192.0.2.1:53".parse().unwrap()));
        assert!(hijack.takes("[2001:db8::1]:53".parse().unwrap()));
        assert!(!hijack.takes("192.0.2.1:853".parse().unwrap()));
    }

    #[test]
    fn our_own_address_is_taken_on_port_53_alone() {
        let hijack = Hijack::new(&[], &["198.18.0.2".parse().unwrap()]);
        assert!(hijack.takes("198.18.0.2:53".parse().unwrap()));
        assert!(!hijack.takes("198.18.0.2:80".parse().unwrap()));
        assert!(!hijack.takes("192.0.2.1:53".parse().unwrap()));
    }
}
