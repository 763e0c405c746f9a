//! What keeps traffic in when nothing carries it: routes that refuse, behind those that lead into the TUN.

use super::plan::HostOptions;
use super::routing::{Family, Route, RouteKind};
use super::survey::{Numbers, Survey};

/// Comes after every other route to the same prefix; one more is what the kernel takes for its own (ip6_null_entry).
const LAST_METRIC: u32 = u32::MAX - 1;

/// Whether IPv6, which the TUN cannot have, is to be unreachable: else it would go past us.
pub(super) fn shuts_ipv6(options: &HostOptions, survey: &Survey) -> bool {
    let wanted = options.strict_route || options.kill_switch;
    options.auto_route && wanted && survey.kernel_ipv6 && !survey.ipv6
}

/// The refusing routes of both tables. They outlive us: with a kill switch behind each route into the TUN, so that what
/// the rules take ends there when the TUN is gone; and for a family that is shut all that the tables hold of it.
pub(super) fn refusals(options: &HostOptions, numbers: &Numbers, survey: &Survey, routes: &[Route]) -> Vec<Route> {
    let refusal = |table, to| Route { table, to, kind: RouteKind::Unreachable, metric: LAST_METRIC };
    let into_tun = routes.iter().filter(|route| options.kill_switch && matches!(route.kind, RouteKind::Device(_)));
    let mut refusals: Vec<Route> = into_tun.map(|route| refusal(route.table, route.to)).collect();
    if shuts_ipv6(options, survey) {
        refusals.extend([numbers.captured, numbers.always].map(|table| refusal(table, Family::V6.everything())));
    }
    refusals
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::plan::HostPlan;
    use crate::platform::plan::tests::options;
    use crate::platform::survey::tests::plain;

    fn refused(options: HostOptions, survey: &Survey) -> Vec<String> {
        let plan = HostPlan::new(&options, survey).unwrap();
        let refusals = plan.routes.iter().filter(|route| route.kind == RouteKind::Unreachable);
        refusals.map(ToString::to_string).collect()
    }

    #[test]
    fn a_kill_switch_stands_behind_every_route_into_the_tun() {
        assert_eq!(refused(options(), &plain()), [""; 0]);
        let wanted = ["0.0.0.0/0 table 2023", "::/0 table 2023", "0.0.0.0/0 table 2022", "::/0 table 2022"];
        let found = refused(HostOptions { kill_switch: true, ..options() }, &plain());
        assert_eq!(found, wanted.map(|route| format!("unreachable {route}")));
    }

    #[test]
    fn a_kill_switch_for_some_prefixes_refuses_those_alone() {
        let route_address = vec!["203.0.113.0/24".parse().unwrap()];
        let found = refused(HostOptions { kill_switch: true, route_address, ..options() }, &plain());
        assert!(found.contains(&"unreachable 203.0.113.0/24 table 2022".to_owned()), "{found:?}");
        assert!(!found.contains(&"unreachable 0.0.0.0/0 table 2022".to_owned()), "{found:?}");
    }

    #[test]
    fn strict_route_makes_a_family_unreachable_that_the_tun_cannot_have() {
        let without = Survey { ipv6: false, ..plain() };
        assert_eq!(refused(options(), &without), [""; 0]);
        let strict = HostOptions { strict_route: true, ..options() };
        assert_eq!(refused(strict.clone(), &plain()), [""; 0], "it has it");
        let wanted = ["unreachable ::/0 table 2022", "unreachable ::/0 table 2023"];
        assert_eq!(refused(strict.clone(), &without), wanted);
        let plan = HostPlan::new(&strict, &without).unwrap();
        let v6: Vec<String> = plan.rules.iter().filter(|it| it.family == Family::V6).map(ToString::to_string).collect();
        assert!(v6.iter().any(|rule| rule.ends_with("9043 lookup 2022")), "{v6:?}");
        assert!(plan.addresses.iter().all(|net| net.addr().is_ipv4()));
        assert_eq!(refused(strict, &Survey { ipv6: false, kernel_ipv6: false, ..plain() }), [""; 0]);
    }
}
