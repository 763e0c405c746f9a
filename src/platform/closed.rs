//! What keeps traffic in when nothing carries it: routes that refuse, behind those that lead into the TUN. And whether a run
//! that ended has left it so.

use std::io;

use super::Netlink;
use super::imp::nft;
use super::plan::HostOptions;
use super::routing::{Route, RouteKind};
use super::survey::{NftState, Survey};

/// Comes after every other route to the same prefix; one more is what the kernel takes for its own (ip6_null_entry).
const LAST_METRIC: u32 = u32::MAX - 1;

/// Whether IPv6, which the TUN cannot have, is to be unreachable: else it would go past us. The firewall sees to it
/// ([`super::firewall`]): were it routes alone, a socket whose look-up fails would be given an address of the host, and by
/// that find its way out (`ip6_dst_lookup_tail`).
pub(super) fn shuts_ipv6(options: &HostOptions, survey: &Survey) -> bool {
    let wanted = options.auto_route && (options.strict_route || options.kill_switch);
    wanted && survey.kernel_ipv6 && !survey.ipv6 && matches!(survey.nft, NftState::Present { .. })
}

/// What `strict-route` cannot do on this host.
pub(super) fn open_ipv6(options: &HostOptions, survey: &Survey) -> Option<String> {
    let open = options.strict_route && survey.kernel_ipv6 && !survey.ipv6;
    let told =
        "tun.strict-route needs nftables to make IPv6 unreachable, which the TUN cannot have: it goes past the rules";
    open.then(|| told.to_owned())
}

/// A kill switch that is closed on this host and that is none of ours: what we send ends there too.
pub(super) fn by_another(survey: &Survey) -> Option<String> {
    let NftState::Present { kill_switches, .. } = &survey.nft else { return None };
    // One that a crashed run of ours left goes as soon as this one is in force.
    let table = kill_switches.first().filter(|_| survey.aside.is_empty())?;
    Some(format!(
        "the kill switch of another run is closed (firewall table {table}): nothing gets past it. `tunproxy cleanup` with \
         the --state-dir of that run opens it; if that directory is lost, docs/host-changes.md says how to do it by hand"
    ))
}

/// A kill switch by its firewall table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KillSwitch {
    /// The table's name.
    pub table: String,
    /// The TUN that it lets out.
    pub tun: String,
}

impl KillSwitch {
    /// Those that are in force on this host, whoever has made them.
    ///
    /// # Errors
    /// The firewall may not be looked at.
    pub fn all() -> io::Result<Vec<Self>> {
        Ok(nft::closed()?.into_iter().map(|(table, tun)| Self { table, tun }).collect())
    }
}

/// The kill switch that is closed on this host without a TUN behind it: of a run that ended. None where the firewall may not
/// be looked at.
#[must_use]
pub fn left_closed() -> Option<KillSwitch> {
    let netlink = Netlink::open().ok()?;
    KillSwitch::all().ok()?.into_iter().find(|found| netlink.index(&found.tun).is_err_and(|error| error.is_gone()))
}

/// The refusing routes of a kill switch, behind each route into the TUN, so that what the rules take ends there when the
/// TUN is gone. They outlive us.
pub(super) fn refusals(options: &HostOptions, routes: &[Route]) -> Vec<Route> {
    let refusal = |route: &Route| Route { kind: RouteKind::Unreachable, metric: LAST_METRIC, ..route.clone() };
    let into_tun = routes.iter().filter(|route| options.kill_switch && matches!(route.kind, RouteKind::Device(_)));
    into_tun.map(refusal).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::plan::HostPlan;
    use crate::platform::plan::tests::options;
    use crate::platform::survey::tests::plain;

    fn refused(options: &HostOptions, survey: &Survey) -> Vec<String> {
        let plan = HostPlan::new(options, survey).unwrap();
        let refusals = plan.routes.iter().filter(|route| route.kind == RouteKind::Unreachable);
        refusals.map(ToString::to_string).collect()
    }

    #[test]
    fn a_kill_switch_stands_behind_every_route_into_the_tun() {
        assert_eq!(refused(&options(), &plain()), [""; 0]);
        let wanted = ["0.0.0.0/0 table 2023", "::/0 table 2023", "0.0.0.0/0 table 2022", "::/0 table 2022"];
        let found = refused(&HostOptions { kill_switch: true, ..options() }, &plain());
        assert_eq!(found, wanted.map(|route| format!("unreachable {route}")));
    }

    #[test]
    fn a_kill_switch_of_another_run_is_named() {
        let mut survey = plain();
        let NftState::Present { kill_switches, .. } = &mut survey.nft else { panic!("no nft") };
        kill_switches.push("tunproxy3".to_owned());
        let warnings = HostPlan::new(&options(), &survey).unwrap().warnings;
        assert!(warnings.iter().any(|warning| warning.contains("firewall table tunproxy3")), "{warnings:?}");
        assert!(HostPlan::new(&options(), &plain()).unwrap().warnings.is_empty());
    }

    #[test]
    fn a_kill_switch_for_some_prefixes_refuses_those_alone() {
        let route_address = vec!["203.0.113.0/24".parse().unwrap()];
        let found = refused(&HostOptions { kill_switch: true, route_address, ..options() }, &plain());
        assert!(found.contains(&"unreachable 203.0.113.0/24 table 2022".to_owned()), "{found:?}");
        assert!(!found.contains(&"unreachable 0.0.0.0/0 table 2022".to_owned()), "{found:?}");
    }

    #[test]
    fn strict_route_shuts_a_family_that_the_tun_cannot_have_and_no_other() {
        let without = Survey { ipv6: false, ..plain() };
        let strict = HostOptions { strict_route: true, ..options() };
        let shut = |options: &HostOptions, survey: &Survey| {
            let plan = HostPlan::new(options, survey).unwrap();
            assert!(plan.addresses.iter().all(|net| survey.ipv6 || net.addr().is_ipv4()));
            plan.nft.is_some_and(|nft| nft.text.contains("chain shut {"))
        };
        assert!(shut(&strict, &without) && shut(&HostOptions { kill_switch: true, ..options() }, &without));
        assert!(!shut(&options(), &without) && !shut(&strict, &plain()));
        assert!(!shut(&strict, &Survey { kernel_ipv6: false, ..without.clone() }));
        // Nothing of it outlives us.
        assert_eq!(refused(&strict, &without), [""; 0]);
        let bare = Survey { nft: NftState::Missing("gone".to_owned()), ..without };
        let warnings = HostPlan::new(&strict, &bare).unwrap().warnings;
        assert!(warnings.iter().any(|warning| warning.contains("strict-route")), "{warnings:?}");
    }
}
