//! Which flows are questions to us (`tun.dns-hijack`).

use std::net::{IpAddr, SocketAddr};

/// The destinations whose TCP and UDP traffic is answered by our own DNS.
#[derive(Debug, Clone, Default)]
pub struct Hijack {
    /// An address, or any, and a port.
    targets: Vec<(Option<IpAddr>, u16)>,
    /// Our DNS addresses.
    own: Vec<IpAddr>,
}

impl Hijack {
    /// Takes what the profile lists; no address means any. `own` are our DNS addresses, taken on port 53 whatever the
    /// profile says.
    #[must_use]
    pub fn new(listed: Vec<(Option<IpAddr>, u16)>, own: &[IpAddr]) -> Self {
        let mut targets = listed;
        targets.extend(own.iter().map(|ip| (Some(*ip), 53)));
        Self { targets, own: own.to_vec() }
    }

    /// Whether `destination` is answered here.
    #[must_use]
    pub fn takes(&self, destination: SocketAddr) -> bool {
        self.targets.iter().any(|(ip, port)| *port == destination.port() && ip.is_none_or(|ip| ip == destination.ip()))
    }

    /// Whom a question to `destination` was meant for, if it was not us.
    #[must_use]
    pub fn meant_for(&self, destination: SocketAddr) -> Option<SocketAddr> {
        (!self.own.contains(&destination.ip())).then_some(destination)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_address_stands_for_any_of_both_families() {
        let hijack = Hijack::new(vec![(None, 53)], &[]);
        assert!(hijack.takes("192.0.2.1:53".parse().unwrap()));
        assert!(hijack.takes("[2001:db8::1]:53".parse().unwrap()));
        assert!(!hijack.takes("192.0.2.1:853".parse().unwrap()));
    }

    #[test]
    fn our_own_address_is_taken_on_port_53_alone() {
        let hijack = Hijack::new(Vec::new(), &["198.18.0.2".parse().unwrap()]);
        assert!(hijack.takes("198.18.0.2:53".parse().unwrap()));
        assert!(!hijack.takes("198.18.0.2:80".parse().unwrap()));
        assert!(!hijack.takes("192.0.2.1:53".parse().unwrap()));
    }

    #[test]
    fn what_is_asked_of_our_own_addresses_is_meant_for_nobody_else() {
        let own = ["198.18.0.2", "fdfe:dcba:9876::2"].map(|ip| ip.parse().unwrap());
        let hijack = Hijack::new(vec![(None, 53), (None, 5353)], &own);
        for ours in ["198.18.0.2:53", "[fdfe:dcba:9876::2]:53", "[fdfe:dcba:9876::2]:5353"] {
            assert_eq!(hijack.meant_for(ours.parse().unwrap()), None, "{ours}");
        }
        let other = "[2001:db8::53]:53".parse().unwrap();
        assert_eq!(hijack.meant_for(other), Some(other));
    }
}
