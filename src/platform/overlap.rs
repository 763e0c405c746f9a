//! Addresses of ours that somebody has already: the fake ranges and the TUN's own beside the networks that this host is in.

use ipnet::IpNet;

use super::plan::HostOptions;
use super::survey::{Survey, is_default_like};

/// Two networks that have addresses in common.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{key} {ours} overlaps {theirs}, {what}")]
pub struct Overlap {
    /// What the profile calls it.
    key: &'static str,
    ours: IpNet,
    theirs: IpNet,
    what: String,
}

/// The first of our networks that overlaps one which this host is in. None without routes of ours: who routes by hand knows.
pub(super) fn overlap(options: &HostOptions, survey: &Survey) -> Option<Overlap> {
    if !options.auto_route {
        return None;
    }
    // The TUN's IPv4 address is the first of the fake range.
    let device = options.addresses.iter().filter(|net| net.addr().is_ipv6());
    let fake = options.fake.iter().map(|net| (key_of(net), net));
    let mut ours = fake.chain(device.map(|net| ("tun.inet6-address", net)));
    ours.find_map(|(key, net)| {
        let theirs = networks(options, survey);
        let (theirs, what) = theirs.into_iter().find(|(theirs, _)| share(net, theirs))?;
        Some(Overlap { key, ours: *net, theirs, what })
    })
}

fn key_of(fake: &IpNet) -> &'static str {
    if fake.addr().is_ipv4() { "dns.fake-ip-range" } else { "dns.fake-ip-range6" }
}

fn share(a: &IpNet, b: &IpNet) -> bool {
    a.contains(b) || b.contains(a)
}

/// The networks that this host is in, each with the words for it: those of its addresses, and those on-link. Not those of
/// other runs, which may have what we want: where both would take it, one does.
fn networks(options: &HostOptions, survey: &Survey) -> Vec<(IpNet, String)> {
    let runs = survey.runs_and_twins(&options.addresses);
    let name = |index: u32| survey.link_name(index).filter(|name| *name != options.tun && !runs.contains(name));
    let uplinks = survey.uplinks();
    let words = |index: u32, name: &str| {
        let uplink = if uplinks.contains(&index) { ", an uplink" } else { "" };
        format!("the network of {name}{uplink}")
    };
    let own = survey.addresses.iter().filter_map(|(index, net)| Some((*net, words(*index, name(*index)?))));
    let on_link = survey.routes.iter().filter(|route| route.on_link && !is_default_like(&route.to));
    let on_link = on_link.filter(|route| is_lived_in(options, survey, &route.to, route.device));
    let on_link = on_link.filter_map(|route| Some((route.to, words(route.device?, name(route.device?)?))));
    own.chain(on_link).collect()
}

/// Whether an on-link route is a network that hosts are in, and none of the pieces of everything that a VPN leads to its
/// device: that has an address in it, or all of it is in a network of ours.
fn is_lived_in(options: &HostOptions, survey: &Survey, to: &IpNet, device: Option<u32>) -> bool {
    let at_home = survey.addresses.iter().any(|(index, net)| Some(*index) == device && to.contains(&net.addr()));
    at_home || options.fake.iter().chain(&options.addresses).any(|ours| ours.trunc().contains(to))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::plan::tests::options;
    use crate::platform::survey::tests::plain;
    use crate::platform::{HostPlan, PlanError};

    fn told(options: &HostOptions) -> Option<String> {
        let told = overlap(options, &plain()).map(|it| it.to_string());
        assert_eq!(told.is_some(), HostPlan::may_start(options, &plain()).is_err());
        told
    }

    #[test]
    fn the_usual_ranges_are_nobodys() {
        assert_eq!(told(&options()), None);
    }

    #[test]
    fn a_fake_range_over_the_network_of_an_uplink_or_a_lan_is_refused() {
        let fake = |net: &str| HostOptions { fake: vec![net.parse().unwrap()], ..options() };
        let words = "dns.fake-ip-range 192.0.2.1/28 overlaps 192.0.2.2/24, the network of eth0, an uplink";
        assert_eq!(told(&fake("192.0.2.1/28")).as_deref(), Some(words));
        assert!(told(&fake("192.168.0.1/16")).unwrap().ends_with("192.168.7.1/24, the network of lan0"));
        assert!(told(&fake("2001:db8:7::/96")).unwrap().starts_with("dns.fake-ip-range6 "));
        assert_eq!(told(&fake("192.168.8.0/24")), None);
        // Who routes by hand knows what he does.
        assert_eq!(told(&HostOptions { auto_route: false, ..fake("192.0.2.1/28") }), None);
    }

    #[test]
    fn an_address_of_the_tun_in_a_network_of_the_host_is_refused_and_its_own_after_the_start_is_not() {
        let with = |net: &str| HostOptions { addresses: vec![net.parse().unwrap()], ..options() };
        assert!(told(&with("2001:db8:1::1/64")).unwrap().starts_with("tun.inet6-address 2001:db8:1::1/64 overlaps"));
        let mut survey = plain();
        let index = 77;
        survey.links.push(crate::platform::Link { index, name: options().tun });
        survey.addresses.extend(options().addresses.iter().map(|net| (index, *net)));
        assert_eq!(overlap(&options(), &survey), None);
    }

    #[test]
    fn another_run_with_the_same_addresses_is_no_network_in_the_way() {
        let mut survey = plain();
        survey.links.push(crate::platform::Link { index: 77, name: "tun9".to_owned() });
        survey.addresses.extend(options().addresses.iter().map(|net| (77, *net)));
        assert!(
            overlap(&options(), &survey).unwrap().to_string().ends_with("the network of tun9"),
            "no TUN, but a LAN"
        );
        survey.tuns.insert(77);
        assert_eq!(overlap(&options(), &survey), None);
        // One with rules may have other addresses, of which a part is ours.
        let mut beside = survey.clone();
        let tun9 = HostOptions { tun: "tun9".to_owned(), ..options() };
        beside.rules.extend(HostPlan::new(&tun9, &plain()).unwrap().rules);
        beside.addresses.push((77, "198.18.64.1/30".parse().unwrap()));
        assert_eq!(overlap(&options(), &beside), None);
        let other: IpNet = format!("{}/24", options().addresses[0].addr()).parse().unwrap();
        survey.addresses.retain(|(index, _)| *index != 77);
        survey.addresses.push((77, other));
        assert!(overlap(&options(), &survey).unwrap().to_string().ends_with("the network of tun9"));
    }

    #[test]
    fn a_piece_of_everything_that_a_vpn_takes_is_no_network_in_the_way() {
        let mut survey = plain();
        survey.links.push(crate::platform::Link { index: 77, name: "wg0".to_owned() });
        survey.addresses.push((77, "10.8.0.2/32".parse().unwrap()));
        let mut piece = survey.routes.iter().find(|route| route.on_link).unwrap().clone();
        (piece.to, piece.device) = ("196.0.0.0/6".parse().unwrap(), Some(77));
        survey.routes.push(piece.clone());
        assert_eq!(overlap(&options(), &survey), None);
        // A network within the fake range is one for whom it was meant, whoever has an address.
        piece.to = "198.18.5.0/24".parse().unwrap();
        survey.routes.push(piece);
        assert!(overlap(&options(), &survey).unwrap().to_string().ends_with("198.18.5.0/24, the network of wg0"));
    }

    #[test]
    fn a_network_that_the_host_joins_later_is_a_warning() {
        let taken = HostOptions { fake: vec!["192.168.7.0/24".parse().unwrap()], ..options() };
        let numbers = plain().numbers(&taken.wishes).unwrap();
        let plan = HostPlan::with_numbers(&taken, &plain(), numbers).unwrap();
        assert!(plan.warnings.iter().any(|it| it.contains("the network of lan0")), "{:?}", plan.warnings);
        assert!(matches!(HostPlan::may_start(&taken, &plain()), Err(PlanError::Overlap(_))));
        // The start is refused for it, which is to be said once.
        let before = HostPlan::new(&taken, &plain()).unwrap();
        assert_eq!(before.all_warnings().collect::<Vec<_>>(), [""; 0]);
    }
}
