//! What a run goes without where a capability is missing: the part that needs it, and no other.

use std::net::SocketAddr;
use std::num::NonZeroU16;

use anyhow::bail;

use crate::platform::{Capability, first_open_port, may_administer_network};
use crate::profile::Profile;

/// The part of `profile` that this process has the rights for. What is left out is told in one warning for each
/// capability.
///
/// # Errors
/// Without the right nothing would go where the profile says.
pub(super) fn within(profile: &Profile) -> anyhow::Result<Profile> {
    if profile.routing_mark.is_some() && !profile.tun.enable && !may_administer_network() {
        bail!("routing-mark: marking sockets takes the capability {}", Capability::NetAdmin.name());
    }
    let mut profile = profile.clone();
    if !Capability::NetBindService.is_held() {
        let first_open = first_open_port();
        let lost = close_ports_below(&mut profile, first_open);
        if !lost.is_empty() {
            tracing::warn!(
                "the capability {} is missing, which ports below {first_open} take; going on without {}",
                Capability::NetBindService.name(),
                lost.join(", ")
            );
        }
    }
    Ok(profile)
}

/// Takes the ports below `first_open` out of `profile`; returns them as the profile names them.
fn close_ports_below(profile: &mut Profile, first_open: u16) -> Vec<String> {
    let mut lost = Vec::new();
    let listen = &mut profile.listen;
    for (key, port) in
        [("port", &mut listen.port), ("socks-port", &mut listen.socks_port), ("mixed-port", &mut listen.mixed_port)]
    {
        let low = |port: &mut NonZeroU16| port.get() < first_open;
        lost.extend(port.take_if(low).map(|port| format!("{key}: {port}")));
    }
    // Port 0 is any that is free.
    let low = |at: &mut SocketAddr| (1..first_open).contains(&at.port());
    lost.extend(profile.dns.listen.take_if(low).map(|at| format!("dns.listen: {at}")));
    lost
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_ports_below_the_limit_are_given_up_and_each_is_named() {
        let text = "port: 80\nsocks-port: 1080\nmixed-port: 443\ndns: {enable: true, listen: '127.0.0.1:53', \
                    nameserver: [192.0.2.1]}\nrules: ['MATCH,DIRECT']\n";
        let (profile, report) = crate::profile::read("profile.yaml", text.as_bytes());
        let mut profile = profile.unwrap_or_else(|| panic!("{report}"));
        assert_eq!(close_ports_below(&mut profile.clone(), 0), Vec::<String>::new());
        let lost = close_ports_below(&mut profile, 1024);
        assert_eq!(lost, ["port: 80", "mixed-port: 443", "dns.listen: 127.0.0.1:53"]);
        assert_eq!(profile.listen.socks_port.map(NonZeroU16::get), Some(1080));
        assert_eq!((profile.listen.port, profile.listen.mixed_port, profile.dns.listen), (None, None, None));
    }
}
