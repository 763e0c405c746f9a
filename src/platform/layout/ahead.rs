//! The rules that take questions to port 53, and the fake addresses they are answered with, ahead of the rules of others that
//! stand before our block: Tailscale's for its own networks, an administrator's "keep my LAN out of the VPN". Those know a
//! way to the resolver, and would have it. Whatever else they are for stays theirs.

use ipnet::IpNet;

use super::{Layout, Places};
use crate::platform::routing::{Family, Rule, RuleAction};

pub(super) const CAPTURE: u32 = 0;
pub(super) const OWN: u32 = 1;
pub(super) const FOREIGN: u32 = 2;
pub(super) const FROM_TUN: u32 = 3;
pub(super) const FAKE: u32 = 4;
pub(super) const FAKE_GONE: u32 = 5;
pub(super) const INTERFACE: u32 = 6;
pub(super) const OTHER_INTERFACES: u32 = 7;
pub(super) const USERS: u32 = 8;
pub(super) const DNS_UNBOUND: u32 = 9;
pub(super) const DNS_LOCAL_END: u32 = 10;
pub(super) const DNS: u32 = 11;
pub(super) const END: u32 = 12;

/// So many priorities are taken.
pub(in crate::platform) const LENGTH: u32 = END + 1;
/// How far the rule leads here that lets pass what comes out of the TUN.
pub(in crate::platform) const PAST_TUN: u32 = END - FROM_TUN;
/// How far a rule leads here that lets a foreign mark pass.
pub(in crate::platform) const PAST_FOREIGN: u32 = END - FOREIGN;

impl Layout<'_> {
    pub(super) fn ahead_of_others(&self) -> Vec<Rule> {
        let (hijacks, marks) = (self.options.dns_hijack, self.survey.has_nft());
        let fakes = self.ours(&self.options.fake).next().is_some();
        let first = self.survey.ahead(self.numbers.first_priority).first();
        let Some(first) = first.filter(|_| hijacks || fakes || self.options.kill_switch) else { return Vec::new() };
        // What we write bears the mark too, and is to find its client: only of this host, and of the check of its source.
        let capture = self.local(Rule::new(self.family, first + CAPTURE, self.always()));
        let mut rules: Vec<Rule> =
            marks.then_some(Rule { mark: Some(self.numbers.capture), ..capture }).into_iter().collect();
        let places = Places::ahead(first);
        if hijacks || fakes {
            rules.extend(self.passes(&places));
            rules.extend(self.fakes(&places));
        }
        if hijacks {
            rules.extend(self.left_out(&places));
            rules.extend(self.begun_by_questions(first));
            rules.extend(self.dns(&places));
        }
        let end = Rule::new(self.family, places.end, RuleAction::Nop);
        if (hijacks || fakes) && !rules.contains(&end) {
            rules.push(end);
        }
        rules
    }

    /// Questions of sockets that have the TUN's address already: connect(2) looks the way up once more when it has one. With
    /// it they go nowhere else when the TUN is gone, which matters in IPv6, where a socket keeps it.
    fn begun_by_questions(&self, first: u32) -> Vec<Rule> {
        let of = |(at, action)| {
            self.tun_addresses().flat_map(move |ip| {
                let rule =
                    Rule { from: Some(IpNet::from(ip)), ..self.local(Rule::new(self.family, first + at, action)) };
                self.questions(&rule)
            })
        };
        let gone = Some((DNS_LOCAL_END, RuleAction::UNREACHABLE)).filter(|_| self.family == Family::V6);
        [(DNS_UNBOUND, self.always())].into_iter().chain(gone).flat_map(of).collect()
    }
}

#[cfg(test)]
mod tests {
    use crate::platform::layout::tests::listed;
    use crate::platform::plan::HostOptions;
    use crate::platform::plan::tests::options;
    use crate::platform::survey::tests::plain;
    use crate::platform::{Family, NftState, RouteTable, Rule, RuleAction, Survey};

    /// Rules before our block, on a host that keeps its LAN out of every VPN.
    fn ahead(options: &HostOptions, change: impl Fn(&mut Survey), family: Family) -> Vec<String> {
        let mut survey = plain();
        let lan = Rule::new(Family::V4, 1000, RuleAction::Lookup(RouteTable::MAIN));
        survey.rules.push(Rule { to: Some("192.168.1.0/24".parse().unwrap()), origin: 3, ..lan });
        change(&mut survey);
        listed(options, &survey, family).into_iter().filter(|rule| !rule.starts_with("90")).collect()
    }

    #[test]
    fn questions_are_taken_ahead_of_the_rules_of_others_and_nothing_else_is() {
        let wanted = "\
792 fwmark 0x2000000/0x2000000 iif lo lookup 2023
793 fwmark 0x1000000/0x1000000 goto 804
795 iif tun7 goto 804
796 to 198.18.0.0/15 lookup 2023
797 to 198.18.0.0/15 unreachable
801 from 198.18.0.1/32 iif lo ipproto udp dport 53 lookup 2023
801 from 198.18.0.1/32 iif lo ipproto tcp dport 53 lookup 2023
801 from 0.0.0.0/32 iif lo ipproto udp dport 53 lookup 2023
801 from 0.0.0.0/32 iif lo ipproto tcp dport 53 lookup 2023
802 iif lo goto 804
803 ipproto udp dport 53 lookup 2023
803 ipproto tcp dport 53 lookup 2023
804 nop";
        assert_eq!(ahead(&options(), |_| {}, Family::V4).join("\n"), wanted);
        let wanted = "\
792 fwmark 0x2000000/0x2000000 iif lo lookup 2023
793 fwmark 0x1000000/0x1000000 goto 804
795 iif tun7 goto 804
796 to fdfe:dcba:9877::/64 lookup 2023
797 to fdfe:dcba:9877::/64 unreachable
801 from fdfe:dcba:9877::1/128 iif lo ipproto udp dport 53 lookup 2023
801 from fdfe:dcba:9877::1/128 iif lo ipproto tcp dport 53 lookup 2023
802 from fdfe:dcba:9877::1/128 iif lo ipproto udp dport 53 unreachable
802 from fdfe:dcba:9877::1/128 iif lo ipproto tcp dport 53 unreachable
803 ipproto udp dport 53 lookup 2023
803 ipproto tcp dport 53 lookup 2023
804 nop";
        assert_eq!(ahead(&options(), |_| {}, Family::V6).join("\n"), wanted);
    }

    #[test]
    fn whom_the_profile_leaves_out_is_left_out_there_too() {
        let names = |name: &str| vec![name.to_owned()];
        let lan = HostOptions { exclude_interface: names("lan0"), exclude_uid: vec![(7, 7)], ..options() };
        let listed = ahead(&lan, |_| {}, Family::V4);
        let has = |rule: &str| listed.iter().any(|it| it == rule);
        assert!(has("798 iif lan0 goto 804") && has("800 iif lo uidrange 7-7 goto 804"), "{listed:?}");
        let alone = HostOptions { include_interface: names("lan0"), ..options() };
        let listed = ahead(&alone, |_| {}, Family::V6);
        let has = |rule: &str| listed.iter().any(|it| it == rule);
        assert!(has("798 iif lan0 goto 800") && has("799 goto 804") && has("800 nop"), "{listed:?}");
    }

    #[test]
    fn fake_addresses_lead_into_the_tun_there_whoever_takes_the_questions() {
        let asked_elsewhere = HostOptions { dns_hijack: false, ..options() };
        let wanted = "\
792 fwmark 0x2000000/0x2000000 iif lo lookup 2023
793 fwmark 0x1000000/0x1000000 goto 804
795 iif tun7 goto 804
796 to 198.18.0.0/15 lookup 2023
797 to 198.18.0.0/15 unreachable
804 nop";
        assert_eq!(ahead(&asked_elsewhere, |_| {}, Family::V4).join("\n"), wanted);
    }

    #[test]
    fn a_kill_switch_needs_its_mark_there_and_without_nft_there_is_none() {
        let mark = "792 fwmark 0x2000000/0x2000000 iif lo lookup 2023";
        let without = HostOptions { dns_hijack: false, fake: Vec::new(), ..options() };
        assert!(ahead(&without, |_| {}, Family::V4).is_empty());
        let closed = HostOptions { kill_switch: true, ..without };
        assert_eq!(ahead(&closed, |_| {}, Family::V4), [mark]);
        let bare = ahead(&options(), |it| it.nft = NftState::Missing("gone".to_owned()), Family::V4);
        assert!(!bare.iter().any(|rule| rule == mark) && !bare.is_empty(), "{bare:?}");
    }
}
