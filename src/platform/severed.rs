//! Connections that were begun through a TUN that goes, or has gone, with its address for their own. IPv6 lets a socket keep
//! an address that the host has lost: what it sends would leave by the uplink, and what it waits for never comes. The rules
//! that refuse ([`RuleAction::UNREACHABLE`]) hold them back for as long as they stand. Before they go, the connections
//! are ended.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;

use super::imp::connections::{self, Ended};
use super::routing::{Rule, RuleAction};
use super::{Netlink, NetlinkError};

/// What the rules of one run hold back.
#[derive(Debug, Default)]
struct HeldBack {
    /// From the TUN's addresses.
    from: BTreeSet<IpAddr>,
    /// To fake addresses.
    to: Vec<IpNet>,
    tun: Option<String>,
}

impl HeldBack {
    fn by<'a>(rules: impl Iterator<Item = &'a Rule>) -> Self {
        let mut held = Self::default();
        for rule in rules {
            if rule.action == RuleAction::UNREACHABLE {
                held.from.extend(rule.from.map(|net| net.addr()));
                held.to.extend(rule.to);
            }
            held.tun = rule.oif.clone().or(held.tun);
        }
        held
    }

    fn is_of(&self, source: IpAddr, destination: IpAddr) -> bool {
        self.from.contains(&source) || self.to.iter().any(|fake| fake.contains(&destination))
    }

    /// Whether another interface has the address of the TUN: another run's, whose connections are alive.
    fn is_shared(&self, netlink: &mut Netlink) -> Result<bool, NetlinkError> {
        let tun = self.tun.as_deref().and_then(|tun| netlink.index(tun).ok());
        Ok(netlink.addresses()?.iter().any(|(index, net)| Some(*index) != tun && self.from.contains(&net.addr())))
    }
}

/// Ends what `rules`, all those of one run, hold back. What cannot be ended is told in the log.
pub(super) fn end<'a>(netlink: &mut Netlink, rules: impl Iterator<Item = &'a Rule>) {
    let held = HeldBack::by(rules);
    if held.from.is_empty() && held.to.is_empty() {
        return;
    }
    match held.is_shared(netlink) {
        Ok(false) => {}
        Ok(true) => return,
        Err(error) => tracing::debug!("whether another run has the same addresses is not known: {error}"),
    }
    match connections::end(|source, destination| held.is_of(source, destination)) {
        Ok(Ended { ended, left }) => {
            if ended > 0 {
                tracing::info!("{ended} connections that were begun through the TUN are ended");
            }
            if let Some((many, error)) = left {
                tracing::warn!(
                    "{many} connections that were begun through the TUN cannot be ended ({error}): over IPv6, what they \
                     send leaves by the uplink now. End the programs that have them (ss --tcp --udp)"
                );
            }
        }
        Err(error) => {
            tracing::warn!("whether connections that were begun through the TUN live on is not known: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::plan::HostPlan;
    use crate::platform::plan::tests::options;
    use crate::platform::survey::tests::plain;

    #[test]
    fn what_has_the_tuns_address_or_a_fake_peer_is_held_back_and_nothing_else() {
        let plan = HostPlan::new(&options(), &plain()).unwrap();
        let held = HeldBack::by(plan.rules.iter());
        let is_of = |source: &str, to: &str| held.is_of(source.parse().unwrap(), to.parse().unwrap());
        assert!(is_of("198.18.0.1", "192.0.2.1") && is_of("fdfe:dcba:9877::1", "2001:db8::1"));
        assert!(is_of("192.168.1.2", "198.19.3.4") && is_of("2001:db8::2", "fdfe:dcba:9877::5"));
        assert!(!is_of("192.168.1.2", "192.0.2.1") && !is_of("2001:db8::2", "2001:db8::1"));
        assert_eq!(held.tun.as_deref(), Some("tun7"));
    }
}
