//! The chains by which a kill switch lets nothing out that did not go through the TUN: neither what this host sends nor
//! what it forwards. They need nobody behind them, and stay closed when we are gone. And those by which IPv6 is refused,
//! where the TUN cannot have it.

use ipnet::IpNet;

use super::super::layout::PRIVATE;
use super::forged::of_nets;
use super::{REROUTED, Writer, chain, has_mark, quoted, set_mark};

/// What a DHCP client sends to renew its lease: RFC 2131 section 4.1, RFC 8415 section 7.2.
const DHCP: [&str; 2] = ["udp sport 68 udp dport 67 return", "udp sport 546 udp dport 547 return"];
/// Without neighbours there is no link, and what is sent to one does not get far (RFC 4861 wants a hop limit of 255).
const NEIGHBOURS: &str =
    "icmpv6 type { nd-router-solicit, nd-neighbor-solicit, nd-neighbor-advert } ip6 hoplimit 255 return";
/// What refuses at once. Errors of ICMP get lost on a program that is still in connect(2) (`sock_owned_by_user`), hence the
/// reset; datagrams hear of few: "no route" is not one of them (`icmpv6_err_convert`), "prohibited" is.
const REFUSALS: [&str; 2] = ["meta l4proto tcp reject with tcp reset", "reject with icmpx type admin-prohibited"];
/// When the TUN is gone, what is marked ends in the refusing routes. IPv4 tells so in connect(2) already; IPv6 tries again
/// with an address of the host, and then its segments are dropped one by one.
const GONE_V6: &str = "meta nfproto ipv6 meta l4proto tcp fib daddr . mark type unreachable reject with tcp reset";
const QUESTION: &str = "meta l4proto { udp, tcp } th dport 53";
/// Selects, behind the routes, what was not forwarded: a program may write any source where it may use raw sockets (and in
/// IPv6 with IPV6_FREEBIND), and what is sent for one that is gone has no user.
const OF_THIS_HOST: [&str; 2] = ["meta skuid >= 0", "fib saddr type local"];
/// How long a connection of this host's from a port that was listened on is remembered after its last segment, and how many
/// are: as long as the kernel remembers it (`nf_conntrack_tcp_timeout_established`).
const BEGUN: &str = "flags dynamic,timeout; timeout 5d; size 65536";
/// The ends of a connection as such a set has them: the family's name in the text, the set's, and its type of addresses.
const ENDS: [(&str, &str, &str); 2] = [("ip", "begun_v4", "ipv4_addr"), ("ip6", "begun_v6", "ipv6_addr")];

impl Writer<'_> {
    /// Everything this host sends is marked for the TUN but what may go past it; where the routes cannot move it there, or
    /// there is no TUN, it ends ([`Writer::caught`], and the refusing routes of the two tables).
    pub(super) fn reroute_all(&self) -> String {
        let capture = set_mark(self.numbers.capture);
        let mut lines = self.keeps_the_host_alive();
        if self.options.dns_hijack {
            lines.push(format!("{QUESTION} {capture} return"));
        }
        lines.extend(self.fakes().map(|fakes| format!("{fakes} {capture} return")));
        lines.extend(self.destinations_past_us());
        lines.extend(self.not_wanted());
        lines.push(capture);
        lines.push(GONE_V6.to_owned());
        chain("reroute", REROUTED, &lines)
    }

    /// What is forwarded leaves through the TUN, or comes out of it, or stays among private addresses.
    pub(super) fn forward(&self) -> String {
        let mut lines = vec![format!("{} return", self.iif_tun()), format!("{} return", self.oif_tun(""))];
        lines.extend(self.forwarded_past_us());
        chain("forward", "filter hook forward priority filter", &lines)
    }

    /// IPv6 of this host's own is refused. Before [`Writer::reroute_all`] marks it, which would have it dropped without a word.
    pub(super) fn shut(&self) -> String {
        let mut lines = vec!["meta nfproto ipv4 return".to_owned()];
        lines.extend(self.keeps_the_host_alive());
        if self.options.dns_hijack {
            lines.extend(REFUSALS.map(|refusal| format!("{QUESTION} {refusal}")));
        }
        lines.extend(self.destinations_past_us());
        lines.extend(self.not_wanted());
        lines.extend(REFUSALS.map(str::to_owned));
        chain("shut", "filter hook output priority mangle - 1", &lines)
    }

    /// IPv6 of others is refused.
    pub(super) fn shut_forward(&self) -> String {
        let mut lines = vec!["meta nfproto ipv4 return".to_owned()];
        lines.extend(self.forwarded_past_us());
        chain("shut_forward", "filter hook forward priority filter - 1", &lines)
    }

    /// What of this host's own is going past the TUN although nothing allows it: somebody has taken its mark, or it cannot
    /// be moved. Asks all that [`Writer::reroute_all`] asked, and no mark of what is to be captured, which others may change.
    pub(super) fn goes_past(&self) -> Vec<String> {
        let mut lines = self.needs();
        if self.options.dns_hijack {
            lines.extend(OF_THIS_HOST.map(|sender| format!("{QUESTION} {sender} counter drop")));
        }
        lines
            .extend(self.fakes().flat_map(|fakes| OF_THIS_HOST.map(|sender| format!("{fakes} {sender} counter drop"))));
        lines.extend(self.destinations_past_us());
        lines.extend(self.not_wanted());
        lines.extend(OF_THIS_HOST.map(|sender| format!("{sender} counter drop")));
        lines
    }

    /// What this host must be able to send whatever else holds: its carriers, answers, and what a link is kept up with.
    fn keeps_the_host_alive(&self) -> Vec<String> {
        let mut lines = self.passes();
        lines.extend(self.needs());
        lines
    }

    fn needs(&self) -> Vec<String> {
        let mut lines: Vec<String> = self.users_left_out().into_iter().collect();
        lines.push(format!("{} return", self.is_answer()));
        lines.extend(self.answers_of_listeners());
        lines.push("fib daddr type { local, broadcast, multicast } return".to_owned());
        lines.extend(DHCP.map(str::to_owned));
        lines.push(NEIGHBOURS.to_owned());
        lines
    }

    /// What may be forwarded past the TUN, and a refusal for the rest.
    fn forwarded_past_us(&self) -> Vec<String> {
        let mut lines = vec![format!("{} return", has_mark(self.numbers.own))];
        lines.extend(["iifname", "oifname"].into_iter().filter_map(|by| self.of_other_runs(by)));
        lines.extend(self.foreign_marks());
        lines.extend(self.interfaces_left_out());
        lines.extend([format!("{} return", self.is_answer()), "ct status dnat return".to_owned()]);
        if self.options.dns_hijack {
            lines.extend(REFUSALS.map(|refusal| format!("{QUESTION} {refusal}")));
        }
        lines.push("fib daddr type multicast return".to_owned());
        lines.extend(self.fakes().flat_map(|fakes| REFUSALS.map(|refusal| format!("{fakes} {refusal}"))));
        lines.extend(self.destinations_past_us());
        lines.extend(self.not_wanted());
        lines.extend(REFUSALS.map(str::to_owned));
        lines
    }

    /// What arrives by interfaces that the profile leaves out.
    fn interfaces_left_out(&self) -> Option<String> {
        let (include, exclude) = (&self.options.include_interface, &self.options.exclude_interface);
        let (comparison, names) = if include.is_empty() { ("", exclude) } else { ("!= ", include) };
        let names: Vec<String> = names.iter().map(|name| quoted(name)).collect();
        (!names.is_empty()).then(|| format!("iifname {comparison}{{ {} }} return", names.join(", ")))
    }

    /// Connection tracking begins with this table. A session from outside that is older, and whose server speaks first, is
    /// known by its port alone; a connection of this host's own begins with a SYN. By that it is remembered, since its other
    /// segments look the same once nobody listens there any more. One that finds no room does not begin. Where it is asked of
    /// what leaves, what is forwarded passes there too, and is none of them.
    fn answers_of_listeners(&self) -> Vec<String> {
        let ports: Vec<String> = self.survey.answering.iter().map(u16::to_string).collect();
        let ports = format!("tcp sport {{ {} }}", ports.join(", "));
        let of_family = |(family, set, _)| {
            let ends = format!("{family} saddr . tcp sport . {family} daddr . tcp dport");
            let (begins, goes_on) = ("tcp flags & (syn | ack) == syn", "tcp flags & (syn | ack) != syn");
            [
                format!("{ports} {begins} fib saddr type local update @{set} {{ {ends} }}"),
                format!("{ports} {begins} fib saddr type local {ends} != @{set} drop"),
                format!("{ports} {goes_on} {ends} @{set} update @{set} {{ {ends} }}"),
                format!("{ports} {goes_on} {ends} != @{set} return"),
            ]
        };
        if self.survey.answering.is_empty() { Vec::new() } else { ENDS.into_iter().flat_map(of_family).collect() }
    }

    /// The sets that [`Self::answers_of_listeners`] names.
    pub(super) fn begun(&self) -> Vec<String> {
        let set = |(_, set, address)| {
            format!("  set {set} {{ type {address} . inet_service . {address} . inet_service; {BEGUN}; }};\n")
        };
        if self.survey.answering.is_empty() { Vec::new() } else { ENDS.into_iter().map(set).collect() }
    }

    /// A forged datagram that seems to come from somebody whom a client of this host talks to must not make that an answer,
    /// which would leave past the TUN. So ports that clients get are not asked, but for those that a server may have had
    /// at the start.
    pub(super) fn never_asked(&self) -> Option<String> {
        let (first, last) = self.survey.parameters.ephemeral_ports;
        let servers: Vec<String> = self.survey.unconnected.range(first..=last.max(first)).map(u16::to_string).collect();
        let but =
            if servers.is_empty() { String::new() } else { format!("udp dport != {{ {} }} ", servers.join(", ")) };
        (self.options.kill_switch && last > 0).then(|| format!("udp dport {first}-{last} {but}return"))
    }

    /// Fake addresses: also those in a private range lead nowhere else.
    fn fakes(&self) -> impl Iterator<Item = String> {
        of_nets("daddr ", self.options.fake.clone())
    }

    /// Private ranges, networks of our own, and what the profile excludes.
    fn destinations_past_us(&self) -> Vec<String> {
        let private = PRIVATE.into_iter().filter_map(|net| net.parse().ok());
        let own = self.survey.own_networks();
        self.destinations("", private.chain(own).chain(self.options.route_exclude.iter().copied()))
    }

    /// Where the profile names what is to be captured of a family, the rest of it goes its own way.
    fn not_wanted(&self) -> Vec<String> {
        self.destinations("!= ", self.options.route_address.iter().copied())
    }

    fn destinations(&self, comparison: &str, nets: impl Iterator<Item = IpNet>) -> Vec<String> {
        of_nets(&format!("daddr {comparison}"), nets.collect()).map(|nets| format!("{nets} return")).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::HostOptions;
    use crate::platform::plan::tests::options;
    use crate::platform::survey::tests::plain;
    use crate::platform::survey::{Survey, Wishes};

    fn written(options: HostOptions, survey: &Survey) -> String {
        let options = HostOptions { kill_switch: true, ..options };
        super::super::nft(&options, &survey.numbers(&Wishes::default()).unwrap(), survey).unwrap().text
    }

    fn lines<'a>(text: &'a str, chain: &str) -> Vec<&'a str> {
        let (_, chain) = text.split_once(&format!("chain {chain} {{")).unwrap();
        chain.split("\n  };").next().unwrap().lines().skip(1).map(str::trim).collect()
    }

    #[test]
    fn the_table_is_nobodys_and_knows_the_tun_by_its_name() {
        let text = written(options(), &plain());
        assert!(text.contains("comment \"kill switch of tun7\"") && !text.contains("flags owner"), "{text}");
        assert!(!text.contains("iif \"tun7\"") && !text.contains("oif \"tun7\""), "{text}");
    }

    #[test]
    fn the_last_word_of_both_chains_is_no() {
        let text = written(options(), &plain());
        let [.., mark, gone] = lines(&text, "reroute")[..] else { panic!("{text}") };
        assert_eq!((mark, gone), ("meta mark set meta mark | 0x2000000;", &*format!("{GONE_V6};")));
        assert_eq!(lines(&text, "forward").last(), Some(&"reject with icmpx type admin-prohibited;"));
    }

    #[test]
    fn questions_are_taken_before_private_addresses_are_let_go() {
        let text = written(options(), &plain());
        for chain in ["reroute", "forward"] {
            let lines = lines(&text, chain);
            let at = |words: &str| lines.iter().position(|line| line.contains(words)).unwrap();
            assert!(at("th dport 53") < at("10.0.0.0/8"), "{lines:#?}");
        }
        let without = written(HostOptions { dns_hijack: false, ..options() }, &plain());
        assert!(!lines(&without, "reroute").iter().any(|line| line.contains("dport 53")));
    }

    #[test]
    fn networks_of_our_own_are_let_go_and_an_uplinks_are_not() {
        let text = written(options(), &plain());
        assert!(lines(&text, "reroute").iter().any(|line| line.contains("2001:db8:7::/64")), "{text}");
        assert!(!lines(&text, "reroute").iter().any(|line| line.contains("2001:db8:1::/64")), "{text}");
    }

    #[test]
    fn only_ports_that_are_listened_on_may_speak_first() {
        assert!(!written(options(), &plain()).contains("tcp sport"));
        let survey = Survey { answering: [22, 443].into(), ..plain() };
        let text = written(options(), &survey);
        let ends = "ip saddr . tcp sport . ip daddr . tcp dport";
        let ports = "tcp sport { 22, 443 } tcp flags & (syn | ack)";
        for chain in ["reroute", "caught"] {
            let lines = lines(&text, chain);
            let at = |words: &str| lines.iter().position(|line| *line == words).unwrap_or_else(|| panic!("{lines:#?}"));
            let noted = at(&format!("{ports} == syn fib saddr type local update @begun_v4 {{ {ends} }};"));
            assert!(noted < at(&format!("{ports} != syn {ends} != @begun_v4 return;")), "{lines:#?}");
        }
        assert!(text.find("  set begun_v6 {") < text.find("chain reroute"), "{text}");
    }

    #[test]
    fn ports_that_clients_get_are_asked_only_where_a_server_was_at_the_start() {
        let mut survey = Survey { unconnected: [53, 5000, 51820].into(), ..plain() };
        assert!(!written(options(), &survey).contains("udp dport 3"));
        survey.parameters.ephemeral_ports = (32768, 60999);
        let text = written(options(), &survey);
        assert!(text.contains("udp dport 32768-60999 udp dport != { 51820 } return;"), "{text}");
        survey.unconnected.clear();
        assert!(written(options(), &survey).contains("udp dport 32768-60999 return;"));
    }

    #[test]
    fn what_the_profile_excludes_or_does_not_name_goes_its_own_way() {
        let nets = |list: &[&str]| list.iter().map(|net| net.parse().unwrap()).collect::<Vec<IpNet>>();
        let options = HostOptions {
            route_exclude: nets(&["203.0.113.0/28", "203.0.113.0/24"]),
            route_address: nets(&["203.0.112.0/23", "2001:db8::/32"]),
            ..options()
        };
        let text = written(options, &plain());
        let lines = lines(&text, "reroute");
        assert!(lines.iter().any(|line| line.contains("203.0.113.0/24") && line.contains("10.0.0.0/8")), "{lines:#?}");
        assert!(lines.contains(&"ip daddr != { 203.0.112.0/23 } return;"), "{lines:#?}");
        assert!(lines.contains(&"ip6 daddr != { 2001:db8::/32 } return;"), "{lines:#?}");
        let whole_family = |line: &&str| line.starts_with("meta nfproto") && line.ends_with("return;");
        assert!(!lines.iter().any(whole_family), "{lines:#?}");
        let only_v4 = HostOptions { route_address: nets(&["203.0.112.0/23"]), ..super::tests::options() };
        let text = written(only_v4, &plain());
        for chain in ["reroute", "forward"] {
            let lines = super::tests::lines(&text, chain);
            let past = lines.iter().any(|line| line.contains("ip6 daddr != "));
            assert!(!past, "a family without a prefix is taken whole: {lines:#?}");
        }
    }

    #[test]
    fn whom_the_profile_leaves_out_keeps_going() {
        let users = HostOptions { exclude_uid: vec![(1000, 1000)], ..options() };
        let text = written(users, &plain());
        let lines_of = lines(&text, "reroute");
        let at = |words: &str| lines_of.iter().position(|line| line.contains(words)).unwrap();
        assert!(at("meta skuid { 1000-1000 } return;") < at("th dport 53"), "{lines_of:#?}");
        let named = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        let without_lan = written(HostOptions { exclude_interface: named(&["lan0"]), ..options() }, &plain());
        assert!(lines(&without_lan, "forward").contains(&"iifname { \"lan0\" } return;"), "{without_lan}");
        let lan_alone = written(HostOptions { include_interface: named(&["lan0"]), ..options() }, &plain());
        assert!(lines(&lan_alone, "forward").contains(&"iifname != { \"lan0\" } return;"), "{lan_alone}");
        assert!(!lines(&lan_alone, "reroute").contains(&"meta mark set meta mark | 0x2000000;"), "{lan_alone}");
    }
}
