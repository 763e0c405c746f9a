//! The rules and routes of a run: which packets go into the TUN and which stay where they were.
//!
//! What is not bound to an address yet goes in; what has an address stays on its path. So accepted connections, the
//! kernel's own replies and everything that was alive before the start live on, without connection tracking.

mod ahead;
mod left_out;
mod places;

use std::net::IpAddr;

use ipnet::IpNet;

use super::plan::HostOptions;
use super::routing::{Family, Ports, Route, RouteKind, RouteTable, Rule, RuleAction};
use super::survey::{Numbers, Survey};
use places::Places;

pub(super) use ahead::{LENGTH as LENGTH_AHEAD, PAST_FOREIGN as PAST_FOREIGN_AHEAD, PAST_TUN as PAST_TUN_AHEAD};
pub(super) use left_out::take_own_traffic;

/// How far a rule of ours that lets a foreign mark pass leads.
pub(super) const PAST_FOREIGN: u32 = offset::END - offset::FOREIGN;
/// How far the rule leads that lets pass what comes out of the TUN; no other of ours leads so far.
pub(super) const PAST_TUN: u32 = offset::END - offset::FROM_TUN;
/// How far our first rule is before the last of those that take questions to port 53.
pub(super) const UNTIL_DNS: u32 = offset::DNS;
/// So far from the first of our block stands the rule that lets pass what comes out of the TUN.
pub(super) const UNTIL_TUN: u32 = offset::FROM_TUN;

/// Offsets of the rules within our block of priorities. The gaps are room for more of a kind.
mod offset {
    pub(super) const OWN: u32 = 0;
    pub(super) const FOREIGN: u32 = 1;
    pub(super) const FROM_TUN: u32 = 2;
    pub(super) const BOUND_TO_TUN: u32 = 3;
    pub(super) const CAPTURE: u32 = 4;
    pub(super) const FAKE: u32 = 5;
    pub(super) const FAKE_GONE: u32 = 6;
    pub(super) const INTERFACE: u32 = 10;
    pub(super) const OTHER_INTERFACES: u32 = 11;
    pub(super) const USERS: u32 = 12;
    pub(super) const DNS_UNBOUND: u32 = 20;
    pub(super) const FROM_TUN_ADDRESS: u32 = 21;
    pub(super) const FROM_TUN_ADDRESS_ELSE: u32 = 22;
    pub(super) const TUN_ADDRESS_GONE: u32 = 23;
    pub(super) const DNS_LOCAL_END: u32 = 24;
    pub(super) const DNS: u32 = 25;
    pub(super) const DNS_END: u32 = 30;
    pub(super) const PRIVATE: u32 = 31;
    pub(super) const MULTICAST: u32 = 32;
    pub(super) const OWN_NETWORK: u32 = 33;
    pub(super) const UNBOUND: u32 = 40;
    pub(super) const BOUND: u32 = 42;
    pub(super) const REST: u32 = 43;
    pub(super) const END: u32 = 90;
}

/// Ranges for which the main table is asked first, though only for routes longer than the range itself: a /1 that
/// some DHCP server hands out covers them too (TunnelVision). RFC 1918, 3927, 6598, 4193, 4291.
pub(super) const PRIVATE: [&str; 7] =
    ["10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "169.254.0.0/16", "100.64.0.0/10", "fc00::/7", "fe80::/10"];
/// Ranges that never leave the link and need its ordinary routes.
pub(super) const MULTICAST: [&str; 3] = ["224.0.0.0/4", "255.255.255.255/32", "ff00::/8"];
/// The unbound source: `0.0.0.0` as a /32. IPv6 look-ups without a source match no `from` at all.
const UNBOUND: &str = "0.0.0.0/32";
/// Two halves that together hold every IPv6 source, and that an absent source matches neither of.
const BOUND_V6: [&str; 2] = ["::/1", "8000::/1"];

const UDP: u8 = 17;
const TCP: u8 = 6;
const DNS_PORT: Ports = Ports { first: 53, last: 53 };
/// Both families show this metric as they are told; left out, IPv6 would take 1024 and IPv4 0.
const METRIC: u32 = 1024;

/// The routes of both tables.
pub(super) fn routes(options: &HostOptions, numbers: &Numbers, ipv6: bool) -> Vec<Route> {
    let families = || Family::BOTH.into_iter().filter(move |family| ipv6 || *family == Family::V4);
    let device = |table, to| Route { table, to, kind: RouteKind::Device(options.tun.clone()), metric: METRIC };
    let mut routes: Vec<Route> = families().map(|family| device(numbers.always, family.everything())).collect();
    // A family without a prefix of its own is taken whole.
    let whole = |family: &Family| !options.route_address.iter().any(|net| Family::of(net) == *family);
    routes.extend(families().filter(whole).map(|family| device(numbers.captured, family.everything())));
    let usable = |net: &&IpNet| ipv6 || net.addr().is_ipv4();
    // Without the wanted prefixes inside: an exclusion holds for all of itself, and a longer route would win.
    let excluded = |net: &&IpNet| options.route_exclude.iter().any(|exclude| exclude.contains(*net));
    let wanted = options.route_address.iter().filter(usable).filter(|net| !excluded(net));
    routes.extend(wanted.map(|net| device(numbers.captured, net.trunc())));
    routes.extend(options.route_exclude.iter().filter(usable).map(|net| Route {
        table: numbers.captured,
        to: net.trunc(),
        kind: RouteKind::Throw,
        metric: METRIC,
    }));
    let mut unique: Vec<Route> = Vec::with_capacity(routes.len());
    for route in routes {
        // What is written twice is wanted once; excluded as a whole, a family has only its exclusion.
        unique.retain(|other| (other.table, other.to) != (route.table, route.to));
        unique.push(route);
    }
    unique
}

/// The rules of both families, by priority.
pub(super) fn rules(options: &HostOptions, numbers: &Numbers, survey: &Survey) -> Vec<Rule> {
    let mut rules = Layout { options, numbers, survey, family: Family::V4 }.rules();
    if survey.ipv6 {
        rules.extend(Layout { options, numbers, survey, family: Family::V6 }.rules());
    }
    rules
}

/// Puts the rules into the order in which they are installed: targets and bypasses, then what nft's marks need, then
/// captures. At no moment does a packet go astray.
pub(super) fn in_order_of_installation(mut rules: Vec<Rule>, numbers: &Numbers) -> Vec<Rule> {
    rules.sort_by_key(|rule| stage(rule, numbers));
    rules
}

/// When a rule is installed; lower first.
pub(super) fn stage(rule: &Rule, numbers: &Numbers) -> u8 {
    match rule.action {
        RuleAction::Nop => 0,
        RuleAction::Lookup(table) if table == numbers.always || table == numbers.captured => {
            // Nothing carries our capture mark, and nothing is bound to the TUN, before nftables is loaded.
            if rule.mark.is_some() || rule.oif.is_some() { 2 } else { CAPTURE_STAGE }
        }
        // Behind what they are the end of, so that they never stand alone while that is made.
        RuleAction::UNREACHABLE => CAPTURE_STAGE,
        _ => 1,
    }
}

/// The stage of the rules that begin to take traffic.
pub(super) const CAPTURE_STAGE: u8 = 3;

struct Layout<'a> {
    options: &'a HostOptions,
    numbers: &'a Numbers,
    survey: &'a Survey,
    family: Family,
}

impl Layout<'_> {
    fn rules(&self) -> Vec<Rule> {
        let places = Places::in_block(self.numbers.first_priority);
        let mut rules = self.ahead_of_others();
        rules.extend(self.marks_and_devices(&places));
        rules.extend(self.left_out(&places));
        let mut taken = self.begun_through_us();
        if self.options.dns_hijack {
            taken.extend(self.dns(&places));
        }
        taken.sort_by_key(|rule| rule.priority);
        rules.extend(taken);
        rules.extend(self.kept_on_their_path());
        rules.extend(self.captures());
        rules.push(self.rule(offset::END, RuleAction::Nop));
        rules
    }

    /// Our sockets and those of other tunnels pass, and what comes out of a TUN.
    fn passes(&self, at: &Places) -> Vec<Rule> {
        let past = |priority| Rule::new(self.family, priority, RuleAction::Goto(at.end));
        let mut rules = vec![Rule { mark: Some(self.numbers.own), ..past(at.own) }];
        let foreign = self.survey.foreign_marks().into_iter();
        rules.extend(foreign.map(|mark| Rule { mark: Some(mark), ..past(at.foreign) }));
        // What another run writes goes its way as what we write does: to a client, and not into our TUN.
        let runs = self.survey.runs().into_iter();
        rules.extend(runs.map(|tun| Rule { iif: Some(tun.to_owned()), ..past(at.foreign) }));
        rules.push(Rule { iif: Some(self.options.tun.clone()), ..past(at.from_tun) });
        rules
    }

    /// What is bound to the TUN, marked or sent to a fake address goes in, and what is to pass does not.
    fn marks_and_devices(&self, places: &Places) -> Vec<Rule> {
        let tun = || Some(self.options.tun.clone());
        let mut rules = self.passes(places);
        rules.extend([
            Rule { oif: tun(), ..self.rule(offset::BOUND_TO_TUN, self.always()) },
            Rule { mark: Some(self.numbers.capture), ..self.rule(offset::CAPTURE, self.always()) },
        ]);
        rules.extend(self.fakes(places));
        rules
    }

    /// Fake addresses lead into the TUN, and nowhere when it is gone.
    fn fakes(&self, at: &Places) -> Vec<Rule> {
        let of = |(at, action)| {
            let fakes = self.ours(&self.options.fake);
            fakes.map(move |fake| Rule { to: Some(fake.trunc()), ..Rule::new(self.family, at, action) })
        };
        [(at.fake, self.always()), (at.fake_gone, RuleAction::UNREACHABLE)].into_iter().flat_map(of).collect()
    }

    /// What has the TUN's address was begun through us. It goes nowhere else: not to the LAN, and not when the TUN is gone,
    /// although a socket of IPv6 keeps an address that the host has lost.
    fn begun_through_us(&self) -> Vec<Rule> {
        // Where a look-up without an address found its route, for that is the one that learns of narrow paths.
        let ends = [
            (offset::FROM_TUN_ADDRESS, RuleAction::Lookup(self.numbers.captured)),
            // Questions to port 53 found theirs there, also where `route-address` leaves the other table without one.
            (offset::FROM_TUN_ADDRESS_ELSE, self.always()),
            (offset::TUN_ADDRESS_GONE, RuleAction::UNREACHABLE),
        ];
        let of = |(at, action)| {
            self.tun_addresses()
                .map(move |ip| Rule { from: Some(IpNet::from(ip)), ..self.local(self.rule(at, action)) })
        };
        ends.into_iter().flat_map(of).collect()
    }

    /// A rule for each way in which questions are asked.
    fn questions(&self, rule: &Rule) -> [Rule; 2] {
        [UDP, TCP].map(|protocol| Rule { protocol: Some(protocol), destination_ports: Some(DNS_PORT), ..rule.clone() })
    }

    /// Port 53, whatever the address. IPv4 takes bound sockets out, because a reverse-path check looks a reply up with
    /// its ports swapped: a plain "dport 53" would make the kernel drop our own upstream's answers.
    fn dns(&self, at: &Places) -> Vec<Rule> {
        let forwarded = self.questions(&Rule::new(self.family, at.dns, self.always()));
        if self.family == Family::V6 {
            return forwarded.into();
        }
        let unbound = |rule| Rule { from: Some(net(UNBOUND)), ..self.local(rule) };
        let mut rules: Vec<Rule> =
            self.questions(&unbound(Rule::new(self.family, at.dns_unbound, self.always()))).into();
        let past = RuleAction::Goto(at.dns_end);
        rules.push(self.local(Rule::new(self.family, at.dns_local_end, past)));
        rules.extend(forwarded);
        rules.push(Rule::new(self.family, at.dns_end, RuleAction::Nop));
        rules
    }

    fn kept_on_their_path(&self) -> Vec<Rule> {
        let main = RuleAction::Lookup(RouteTable::MAIN);
        let mine = |text: &str| Some(net(text)).filter(|net| Family::of(net) == self.family);
        let mut rules: Vec<Rule> = PRIVATE
            .into_iter()
            .filter_map(mine)
            .map(|block| Rule {
                to: Some(block),
                suppress_prefix_length: Some(u32::from(block.prefix_len()) - 1),
                ..self.rule(offset::PRIVATE, main)
            })
            .collect();
        rules.extend(
            MULTICAST
                .into_iter()
                .filter_map(mine)
                .map(|block| Rule { to: Some(block), ..self.rule(offset::MULTICAST, self.to_end()) }),
        );
        let covered = |own: &IpNet| PRIVATE.into_iter().chain(MULTICAST).filter_map(mine).any(|net| net.contains(own));
        let own = self.survey.own_networks();
        let global = own.into_iter().filter(|own| Family::of(own) == self.family && !covered(own));
        rules.extend(global.map(|own| Rule {
            to: Some(own),
            suppress_prefix_length: Some(0),
            ..self.rule(offset::OWN_NETWORK, main)
        }));
        rules
    }

    fn captures(&self) -> Vec<Rule> {
        let captured = RuleAction::Lookup(self.numbers.captured);
        let from = |source, rule| Rule { from: Some(source), ..self.local(rule) };
        let mut rules = Vec::new();
        if self.family == Family::V4 {
            rules.push(from(net(UNBOUND), self.rule(offset::UNBOUND, captured)));
        }
        match self.family {
            Family::V4 => rules.push(self.local(self.rule(offset::BOUND, self.to_end()))),
            Family::V6 => {
                rules.extend(BOUND_V6.map(|half| from(net(half), self.rule(offset::BOUND, self.to_end()))));
            }
        }
        rules.push(self.rule(offset::REST, captured));
        rules
    }

    fn rule(&self, at: u32, action: RuleAction) -> Rule {
        Rule::new(self.family, self.numbers.first_priority + at, action)
    }

    /// Narrows a rule to what this host itself sends.
    fn local(&self, rule: Rule) -> Rule {
        Rule { iif: Some("lo".to_owned()), ..rule }
    }

    fn to_end(&self) -> RuleAction {
        RuleAction::Goto(self.numbers.first_priority + offset::END)
    }

    fn always(&self) -> RuleAction {
        RuleAction::Lookup(self.numbers.always)
    }

    fn ours<'a>(&self, nets: &'a [IpNet]) -> impl Iterator<Item = &'a IpNet> + use<'a> {
        let family = self.family;
        nets.iter().filter(move |net| Family::of(net) == family)
    }

    fn tun_addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.ours(&self.options.addresses).map(IpNet::addr)
    }
}

/// Reads one of the constants above.
fn net(text: &str) -> IpNet {
    text.parse().unwrap_or_default()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::platform::plan::tests::options;
    use crate::platform::survey::Wishes;
    use crate::platform::survey::tests::plain;
    use crate::platform::{Link, MarkMatch, SeenRoute};

    pub(super) fn listed(options: &HostOptions, survey: &Survey, family: Family) -> Vec<String> {
        let numbers = survey.numbers(&Wishes::default()).unwrap();
        rules(options, &numbers, survey)
            .iter()
            .filter(|rule| rule.family == family)
            .map(|rule| rule.to_string().split_once("priority ").unwrap().1.to_owned())
            .collect()
    }

    #[test]
    fn the_ipv4_rules_are_those_of_the_design() {
        let wanted = "\
9000 fwmark 0x1000000/0x1000000 goto 9090
9002 iif tun7 goto 9090
9003 oif tun7 lookup 2023
9004 fwmark 0x2000000/0x2000000 lookup 2023
9005 to 198.18.0.0/15 lookup 2023
9006 to 198.18.0.0/15 unreachable
9020 from 0.0.0.0/32 iif lo ipproto udp dport 53 lookup 2023
9020 from 0.0.0.0/32 iif lo ipproto tcp dport 53 lookup 2023
9021 from 198.18.0.1/32 iif lo lookup 2022
9022 from 198.18.0.1/32 iif lo lookup 2023
9023 from 198.18.0.1/32 iif lo unreachable
9024 iif lo goto 9030
9025 ipproto udp dport 53 lookup 2023
9025 ipproto tcp dport 53 lookup 2023
9030 nop
9031 to 10.0.0.0/8 lookup main suppress_prefixlength 7
9031 to 172.16.0.0/12 lookup main suppress_prefixlength 11
9031 to 192.168.0.0/16 lookup main suppress_prefixlength 15
9031 to 169.254.0.0/16 lookup main suppress_prefixlength 15
9031 to 100.64.0.0/10 lookup main suppress_prefixlength 9
9032 to 224.0.0.0/4 goto 9090
9032 to 255.255.255.255/32 goto 9090
9040 from 0.0.0.0/32 iif lo lookup 2022
9042 iif lo goto 9090
9043 lookup 2022
9090 nop";
        assert_eq!(listed(&options(), &plain(), Family::V4).join("\n"), wanted);
    }

    #[test]
    fn the_ipv6_rules_are_those_of_the_design() {
        let wanted = "\
9000 fwmark 0x1000000/0x1000000 goto 9090
9002 iif tun7 goto 9090
9003 oif tun7 lookup 2023
9004 fwmark 0x2000000/0x2000000 lookup 2023
9005 to fdfe:dcba:9877::/64 lookup 2023
9006 to fdfe:dcba:9877::/64 unreachable
9021 from fdfe:dcba:9877::1/128 iif lo lookup 2022
9022 from fdfe:dcba:9877::1/128 iif lo lookup 2023
9023 from fdfe:dcba:9877::1/128 iif lo unreachable
9025 ipproto udp dport 53 lookup 2023
9025 ipproto tcp dport 53 lookup 2023
9031 to fc00::/7 lookup main suppress_prefixlength 6
9031 to fe80::/10 lookup main suppress_prefixlength 9
9032 to ff00::/8 goto 9090
9033 to 2001:db8:7::/64 lookup main suppress_prefixlength 0
9042 from ::/1 iif lo goto 9090
9042 from 8000::/1 iif lo goto 9090
9043 lookup 2022
9090 nop";
        assert_eq!(listed(&options(), &plain(), Family::V6).join("\n"), wanted);
    }

    #[test]
    fn marks_that_others_route_by_pass_in_both_families() {
        let mut survey = plain();
        let rule = Rule::new(Family::V4, 32764, RuleAction::Lookup(RouteTable(51820)));
        // wg-quick's rule is "not fwmark 0xca6c": the mark is its own carrier's all the same.
        let mark = Some(MarkMatch { mark: 0xca6c, mask: u32::MAX });
        survey.rules.push(Rule { mark, foreign_selectors: true, ..rule });
        for family in Family::BOTH {
            let listed = listed(&options(), &survey, family);
            assert_eq!(listed[1], "9001 fwmark 0xca6c/0xffffffff goto 9090");
        }
    }

    #[test]
    fn without_dns_hijack_port_53_is_a_port_like_others() {
        let options = HostOptions { dns_hijack: false, ..options() };
        for family in Family::BOTH {
            assert!(!listed(&options, &plain(), family).iter().any(|rule| rule.contains("dport 53")));
        }
    }

    #[test]
    fn a_public_prefix_on_the_uplink_is_no_network_of_ours() {
        let mut survey = plain();
        survey.links.push(Link { index: 9, name: "eth1".to_owned() });
        let to = "203.0.113.0/24".parse().unwrap();
        survey.routes.push(SeenRoute { table: RouteTable::MAIN, to, device: Some(2), on_link: true });
        assert!(!listed(&options(), &survey, Family::V4).iter().any(|rule| rule.contains("203.0.113")));
    }

    #[test]
    fn targets_and_bypasses_are_installed_before_captures() {
        let survey = plain();
        let numbers = survey.numbers(&Wishes::default()).unwrap();
        let ordered = in_order_of_installation(rules(&options(), &numbers, &survey), &numbers);
        let takes =
            |rule: &Rule| matches!(rule.action, RuleAction::Lookup(RouteTable(2022 | 2023)) | RuleAction::UNREACHABLE);
        let first_capture = ordered.iter().position(takes).unwrap();
        assert!(ordered[first_capture..].iter().all(takes));
        assert!(ordered[..4].iter().all(|rule| rule.action == RuleAction::Nop || !takes(rule)));
    }

    #[test]
    fn an_excluded_prefix_is_thrown_even_where_it_is_also_wanted() {
        let nets = |list: &[&str]| list.iter().map(|net| net.parse().unwrap()).collect::<Vec<IpNet>>();
        let options = HostOptions {
            route_address: nets(&["203.0.113.0/24", "2001:db8::/32"]),
            route_exclude: nets(&["203.0.113.0/24", "203.0.113.16/28"]),
            ..options()
        };
        let numbers = plain().numbers(&Wishes::default()).unwrap();
        let routes: Vec<String> = routes(&options, &numbers, true).iter().map(ToString::to_string).collect();
        let wanted = "\
0.0.0.0/0 dev tun7 table 2023
::/0 dev tun7 table 2023
2001:db8::/32 dev tun7 table 2022
throw 203.0.113.0/24 table 2022
throw 203.0.113.16/28 table 2022";
        assert_eq!(routes.join("\n"), wanted);
    }

    #[test]
    fn a_family_without_a_prefix_of_its_own_is_taken_whole_and_nothing_inside_an_exclusion_is() {
        let nets = |list: &[&str]| list.iter().map(|net| net.parse().unwrap()).collect::<Vec<IpNet>>();
        let options = HostOptions {
            route_address: nets(&["203.0.113.0/24", "198.51.100.64/26"]),
            route_exclude: nets(&["198.51.100.0/24"]),
            ..options()
        };
        let numbers = plain().numbers(&Wishes::default()).unwrap();
        let routes: Vec<String> = routes(&options, &numbers, true).iter().map(ToString::to_string).collect();
        let captured: Vec<&str> = routes.iter().filter_map(|route| route.strip_suffix(" table 2022")).collect();
        assert_eq!(captured, ["::/0 dev tun7", "203.0.113.0/24 dev tun7", "throw 198.51.100.0/24"]);
    }
}
