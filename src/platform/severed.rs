//! Connections that were begun through a TUN that goes, or has gone, with its address for their own. IPv6 lets a socket keep
//! an address that the host has lost: what it sends would leave by the uplink, and what it waits for never comes. The rules
//! that refuse ([`RuleAction::UNREACHABLE`]) hold them back for as long as they stand. Before they go, the connections
//! are ended.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;

use super::imp::connections::{self, Ended};
use super::layout::PAST_TUN;
use super::routing::{Family, Rule, RuleAction, SeenLink};
use super::survey::runs::lets_tun_pass;
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
    fn by(rules: &[&Rule]) -> Self {
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
}

/// What belongs to others beside the run that ends.
#[derive(Debug, Default)]
struct Others {
    /// The addresses of their TUNs.
    addresses: BTreeSet<IpAddr>,
    /// What they take of fake addresses.
    fakes: Vec<IpNet>,
}

impl Others {
    /// `ours`: all rules of the run that ends, by which `held` is held back. `own`: the number of its TUN, unless that is gone.
    fn beside(ours: &[&Rule], held: &HeldBack, own: Option<u32>, netlink: &mut Netlink) -> Result<Self, NetlinkError> {
        let mut rules = Vec::new();
        for family in Family::BOTH.into_iter().filter(|family| ours.iter().any(|rule| rule.family == *family)) {
            rules.extend(netlink.rules(family)?);
        }
        rules.retain(|rule| !ours.contains(&rule));
        let mut links = netlink.seen_links()?;
        links.retain(|link| Some(link.index) != own);
        Ok(Self::among(&rules, held, &links, &netlink.addresses()?))
    }

    /// The same, where neither `rules` nor `links` are of the run that ends. Another run is known by its rules, as long as its
    /// TUN is there; it may have the name that the TUN of this one had. A TUN without rules is somebody's whose addresses
    /// are ours as well, unless it has that name. Of what is no TUN an address says nothing: anybody's DHCP server can
    /// give any to an uplink.
    fn among(rules: &[Rule], held: &HeldBack, links: &[SeenLink], addresses: &[(u32, IpNet)]) -> Self {
        let link_of =
            |pass: &Rule| links.iter().find(|link| lets_tun_pass(pass) && pass.iif.as_ref() == Some(&link.name));
        let runs: BTreeSet<u32> = rules.iter().filter_map(|rule| Some(link_of(rule)?.index)).collect();
        let is_twin = |at: u32| {
            links.iter().any(|link| link.index == at && link.kind == "tun" && Some(&link.name) != held.tun.as_ref())
        };
        let theirs = |(at, net): &&(u32, IpNet)| runs.contains(at) || held.from.contains(&net.addr()) && is_twin(*at);
        Self {
            addresses: addresses.iter().filter(theirs).map(|(_, net)| net.addr()).collect(),
            fakes: rules.iter().filter(|rule| link_of(rule).is_some()).flat_map(|pass| fakes(rules, pass)).collect(),
        }
    }

    /// Whether a connection goes on by one of them when the rules of the run that ends are gone. What has an address of that
    /// run alone does not, wherever it goes: a fake address stands for another name elsewhere.
    fn carry(&self, held: &HeldBack, source: IpAddr, destination: IpAddr) -> bool {
        let takes = |fake: &IpNet| fake.contains(&destination);
        self.addresses.contains(&source) || !held.from.contains(&source) && self.fakes.iter().any(takes)
    }
}

/// The fake addresses of the run that has `pass` among its rules.
fn fakes(rules: &[Rule], pass: &Rule) -> impl Iterator<Item = IpNet> {
    let block = pass.priority..pass.priority.saturating_add(PAST_TUN);
    let family = pass.family;
    let of_run = move |rule: &&Rule| rule.family == family && block.contains(&rule.priority);
    let bound = rules.iter().filter(of_run.clone()).find(|rule| rule.oif == pass.iif);
    let always = bound.map(|rule| rule.action);
    rules.iter().filter(of_run).filter(move |rule| Some(rule.action) == always).filter_map(|rule| rule.to)
}

/// Ends what `rules`, all those of one run that still stand, hold back and no other run carries. `own`: the number of that
/// run's TUN, if it is there; one that somebody has renamed has it still. What cannot be ended is told in the log.
pub(super) fn end<'a>(netlink: &mut Netlink, rules: impl Iterator<Item = &'a Rule>, own: Option<u32>) {
    let rules: Vec<&Rule> = rules.collect();
    let held = HeldBack::by(&rules);
    if held.from.is_empty() && held.to.is_empty() {
        return;
    }
    let others = Others::beside(&rules, &held, own, netlink).unwrap_or_else(|error| {
        tracing::warn!("whether another run has the same addresses is not known ({error}): what it carries may end");
        Others::default()
    });
    let carried = Cell::new(0_usize);
    let is_meant = |source, destination| {
        let held_back = held.is_of(source, destination);
        let goes_on = held_back && others.carry(&held, source, destination);
        carried.set(carried.get() + usize::from(goes_on));
        held_back && !goes_on
    };
    match connections::end(is_meant) {
        Ok(Ended { ended, left }) => {
            if ended > 0 {
                tracing::info!("{ended} connections that were begun through the TUN are ended");
            }
            if carried.get() > 0 {
                tracing::debug!("{} connections are left to another run, which has their addresses too", carried.get());
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
    use crate::platform::plan::tests::options;
    use crate::platform::plan::{HostOptions, HostPlan};
    use crate::platform::survey::tests::plain;

    fn held_by(options: &HostOptions) -> HeldBack {
        let plan = HostPlan::new(options, &plain()).unwrap();
        HeldBack::by(&plan.rules.iter().collect::<Vec<_>>())
    }

    fn tun(index: u32, name: &str) -> SeenLink {
        SeenLink { index, name: name.to_owned(), kind: "tun".to_owned(), ..SeenLink::default() }
    }

    /// What a run with these options has beside one that ends.
    fn beside(held: &HeldBack, options: &HostOptions, links: &[SeenLink]) -> Others {
        let plan = HostPlan::new(options, &plain()).unwrap();
        let addresses: Vec<(u32, IpNet)> = options.addresses.iter().map(|net| (77, *net)).collect();
        Others::among(&plan.rules, held, links, &addresses)
    }

    fn goes_on(others: &Others, held: &HeldBack, source: &str, destination: &str) -> bool {
        others.carry(held, source.parse().unwrap(), destination.parse().unwrap())
    }

    #[test]
    fn another_run_carries_what_has_its_addresses_and_of_fake_ones_what_was_not_begun_through_this_one() {
        let held = held_by(&options());
        let within = HostOptions {
            tun: "tun8".to_owned(),
            addresses: vec!["198.19.0.1/30".parse().unwrap()],
            fake: vec!["198.19.0.0/16".parse().unwrap()],
            ..options()
        };
        let others = beside(&held, &within, &[tun(77, "tun8")]);
        assert!(goes_on(&others, &held, "198.19.0.1", "198.19.3.4"), "its own");
        assert!(goes_on(&others, &held, "192.168.1.2", "198.19.3.4"), "bound to an uplink's");
        assert!(!goes_on(&others, &held, "192.168.1.2", "198.18.3.4"), "a name of the run that ends");
        assert!(!goes_on(&others, &held, "198.18.0.1", "198.19.3.4"), "begun through the run that ends");
        assert!(!goes_on(&others, &held, "198.18.0.1", "192.0.2.1"));
        let crashed = beside(&held, &within, &[]);
        assert!(!goes_on(&crashed, &held, "198.19.0.1", "198.19.3.4"), "its TUN is gone");
    }

    #[test]
    fn a_tun_of_the_name_that_a_run_had_is_anothers_where_rules_of_that_other_name_it() {
        let held = held_by(&options());
        let later = beside(&held, &options(), &[tun(77, "tun7")]);
        assert!(goes_on(&later, &held, "198.18.0.1", "192.0.2.1"));
        let addresses = [(77, options().addresses[0])];
        let own = Others::among(&plain().rules, &held, &[tun(77, "tun7")], &addresses);
        assert!(!goes_on(&own, &held, "198.18.0.1", "192.0.2.1"));
    }

    #[test]
    fn of_a_tun_without_rules_only_the_same_address_counts_and_of_an_uplink_none() {
        let held = held_by(&options());
        let addresses = [(77, options().addresses[0]), (77, "10.8.0.2/24".parse().unwrap())];
        let twin = Others::among(&plain().rules, &held, &[tun(77, "tun9")], &addresses);
        assert!(goes_on(&twin, &held, "198.18.0.1", "192.0.2.1"));
        assert!(!goes_on(&twin, &held, "10.8.0.2", "198.18.3.4"));
        let uplink = SeenLink { kind: String::new(), ..tun(77, "eth0") };
        let given = Others::among(&plain().rules, &held, &[uplink], &addresses);
        assert!(!goes_on(&given, &held, "198.18.0.1", "192.0.2.1"));
    }

    #[test]
    fn what_has_the_tuns_address_or_a_fake_peer_is_held_back_and_nothing_else() {
        let held = held_by(&options());
        let is_of = |source: &str, to: &str| held.is_of(source.parse().unwrap(), to.parse().unwrap());
        assert!(is_of("198.18.0.1", "192.0.2.1") && is_of("fdfe:dcba:9877::1", "2001:db8::1"));
        assert!(is_of("192.168.1.2", "198.19.3.4") && is_of("2001:db8::2", "fdfe:dcba:9877::5"));
        assert!(!is_of("192.168.1.2", "192.0.2.1") && !is_of("2001:db8::2", "2001:db8::1"));
        assert_eq!(held.tun.as_deref(), Some("tun7"));
    }
}
