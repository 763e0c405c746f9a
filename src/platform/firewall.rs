//! The text of our nftables table: what routing rules alone cannot say.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

mod caught;
mod forged;
mod kill_switch;

use super::closed;
use super::plan::HostOptions;
use super::routing::{Link, MarkMatch};
use super::survey::{NftState, Numbers, Survey};

mod change;

/// The name of our tables, or the beginning of it.
const NAME: &str = "tunproxy";
/// What a table without an owner says of itself, before the name of the TUN.
pub(super) const KILL_SWITCH_OF: &str = "kill switch of ";
/// How long a peer's question is remembered so that the answer leaves by the address that was asked.
const REMEMBERED: &str = "180s";
/// At most so many questions per local address.
const REMEMBERED_SIZE: u32 = 65536;

/// The chain that marks questions for the TUN; empty, it lets them go their own way.
pub(super) const CAPTURE_DNS: &str = "capture_dns";
/// Ends a chain for what does not come from outside. By number, as everything that is asked of each packet.
const FROM_LOOPBACK: &str = "iif \"lo\" return";
/// Ends a chain that is for datagrams only, before it looks anything up.
const OTHER_THAN_UDP: &str = "meta l4proto != udp return";
/// Where what this host sends is marked: on its hook the last, since others give packets marks of theirs there, and take
/// away what they have. A new way is looked for behind each chain of this kind, so the last word counts.
const REROUTED: &str = "route hook output priority 2147483647";

/// A firewall table of ours, as text. Each packet of each flow meets it twice: what decides for most stands first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nft {
    /// The name of both tables (families inet and arp).
    pub table: String,
    /// What nft is told. Each statement ends in a semicolon, so that line breaks do not matter.
    pub text: String,
    /// Of a kill switch: what the tables say of themselves, by which they are known as ours. They stay when we are gone;
    /// tables without it go with us.
    pub comment: Option<String>,
}

/// Tables (inet and arp) that stay until somebody takes them down.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct TableId {
    /// Their name.
    pub(super) name: String,
    /// What they say of themselves. A table of that name without it is somebody else's.
    pub(super) comment: String,
    /// How many rules each chain of the inet table has, by its name: with fewer it does not keep closed what it should. Nothing
    /// where an older version has journalled it; that version passes over this, and both undo the same.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(super) rules: BTreeMap<String, usize>,
}

impl TableId {
    /// Whether `found`, the rules of each chain that the inet table has, keeps closed what it should. What others have added to
    /// it is theirs.
    pub(super) fn is_whole(&self, found: &BTreeMap<String, usize>) -> bool {
        match self.rules.is_empty() {
            // None of ours has a chain without rules.
            true => !found.is_empty() && found.values().all(|rules| *rules > 0),
            false => self.rules.iter().all(|(chain, rules)| found.get(chain).is_some_and(|found| found >= rules)),
        }
    }

    /// Whether a run of ours can have made it.
    pub(super) fn is_ours(&self) -> bool {
        let number = self.name.strip_prefix(NAME);
        let named = number.is_some_and(|number| number.bytes().all(|byte| byte.is_ascii_digit()));
        // The rest is an interface's name, and stands between quotes.
        let ours = self.comment.strip_prefix(KILL_SWITCH_OF);
        named && ours.is_some_and(|tun| !tun.contains(['"', '\\', '\n']))
    }
}

/// Writes the table, or says why there can be none.
pub(super) fn nft(options: &HostOptions, numbers: &Numbers, survey: &Survey) -> Result<Nft, String> {
    let taken = match &survey.nft {
        NftState::Missing(why) => return Err(why.clone()),
        NftState::Present { tables, .. } => tables,
    };
    let table = names().find(|name| !taken.contains(name)).unwrap_or_default();
    let writer = Writer { options, numbers, survey };
    let comment = options.kill_switch.then(|| format!("{KILL_SWITCH_OF}{}", options.tun));
    let mut text = opened("inet", &table, comment.as_deref());
    for chain in writer.chains() {
        text.push_str(&chain);
    }
    text.push_str("};\n");
    let v4 = writer.tun_addresses(false);
    if !v4.is_empty() {
        text.push_str(&opened("arp", &table, comment.as_deref()));
        text.push_str("  chain closed { type filter hook input priority 0; policy accept;\n");
        for address in v4 {
            let _ = writeln!(text, "    iifname != {} arp daddr ip {address} drop;", quoted(&options.tun));
        }
        text.push_str("  };\n};\n");
    }
    Ok(Nft { table, text, comment })
}

/// Names for the table, best first.
fn names() -> impl Iterator<Item = String> {
    std::iter::once(NAME.to_owned()).chain((1..).map(|n: u32| format!("{NAME}{n}")))
}

/// Whether a run of ours may have called its table so.
pub(super) fn is_name_of_ours(table: &str) -> bool {
    table.strip_prefix(NAME).is_some_and(|rest| rest.bytes().all(|byte| byte.is_ascii_digit()))
}

/// Those that are better than `name`, which is one of them.
pub(super) fn names_before(name: &str) -> impl Iterator<Item = String> {
    names().take_while(move |better| better != name)
}

/// "create" fails where a table of that name exists, but takes no chains along (nft 1.0.6 drops them without a word).
fn opened(family: &str, table: &str, comment: Option<&str>) -> String {
    let nature = nature(comment);
    format!("create table {family} {table} {{ {nature} }};\ntable {family} {table} {{ {nature}\n")
}

/// What a table says of itself: that it belongs to whoever made it, or, without an owner, whose it was.
fn nature(comment: Option<&str>) -> String {
    comment.map_or("flags owner;".to_owned(), |comment| format!("comment {};", quoted(comment)))
}

struct Writer<'a> {
    options: &'a HostOptions,
    numbers: &'a Numbers,
    survey: &'a Survey,
}

impl Nft {
    /// How to find the tables again when we are gone, if they are then still there.
    pub(super) fn lasting(&self) -> Option<TableId> {
        let inet = self.chain_rules().into_iter().filter(|(family, ..)| *family == "inet");
        let rules = inet.map(|(_, chain, rules)| (chain.to_owned(), rules)).collect();
        self.comment.clone().map(|comment| TableId { name: self.table.clone(), comment, rules })
    }

    /// The names of the chains of the inet table.
    pub fn chains(&self) -> impl Iterator<Item = &str> {
        let inet = self.text.split("table arp ").next().unwrap_or_default();
        inet.lines().filter_map(|line| line.trim().strip_prefix("chain ")?.split(' ').next())
    }
}

impl Writer<'_> {
    fn chains(&self) -> Vec<String> {
        let mut chains = vec![self.entrance(), self.forwarded_replies(), self.after_port_forward(), self.forged()];
        chains.extend(self.answers_leave_as_asked());
        let own = self.options.takes_own_traffic();
        if own && (self.options.kill_switch || closed::shuts_ipv6(self.options, self.survey)) {
            chains.extend(self.begun());
        }
        if self.options.kill_switch {
            let reroute = if own { self.reroute_all() } else { self.reroute() };
            chains.extend([reroute, self.caught(), self.forward()]);
        } else {
            chains.extend(self.capture_dns());
            chains.extend([self.reroute(), self.caught()]);
        }
        if closed::shuts_ipv6(self.options, self.survey) {
            chains.extend(own.then(|| self.shut()));
            chains.push(self.shut_forward());
        }
        chains.extend(self.lan_dns());
        chains
    }

    /// Linux answers for any of its addresses on any interface; the TUN's own is nobody's business outside. Another run's
    /// TUN is not outside.
    fn entrance(&self) -> String {
        let mut lines = vec![format!("{} return", self.iif_tun()), FROM_LOOPBACK.to_owned()];
        let runs = self.names(self.survey.runs_and_twins(&self.options.addresses));
        lines.extend(runs.map(|names| format!("iifname {{ {names} }} return")));
        let addresses = self.options.addresses.iter().map(IpNet::addr);
        lines.extend(addresses.map(|address| format!("{} daddr {address} drop", family(address))));
        chain("entrance", "filter hook prerouting priority raw", &lines)
    }

    /// Answers of a LAN host to the outside, and of the outside to it, leave as the flow came.
    fn forwarded_replies(&self) -> String {
        let set = set_mark(self.numbers.own);
        let reply = format!("{} fib daddr type != local {set}", self.is_answer());
        let mut lines = vec![format!("{} return", self.iif_tun())];
        lines.extend(self.of_other_runs("iifname"));
        lines.push(reply);
        // Behind those who give packets the mark of their connection back (wg-quick does).
        chain("forwarded_replies", "filter hook prerouting priority mangle + 1", &lines)
    }

    /// Port forwards of the administrator's own keep working; ours, to fake addresses, are captured. Where an uplink's
    /// reverse path is checked strictly, the mark also says that what comes in for our own networks came the right way.
    /// And the check of what we write looks the source up by the other mark, which is therefore set last.
    fn after_port_forward(&self) -> String {
        let (fake, capture) = (self.options.fake.iter(), self.numbers.capture.mark);
        let tun = self.iif_tun();
        let marks = format!("{tun} ct state new ct mark set ct mark | {capture:#x}");
        let mut lines: Vec<String> = self.survey.parameters.marks_connections.then_some(marks).into_iter().collect();
        lines.push(format!("{tun} meta mark set {capture:#x} return"));
        lines.extend(self.of_other_runs("iifname"));
        lines.extend(fake.map(|net| format!("{} daddr {} return", family(net.addr()), net.trunc())));
        lines.push(format!("ct status dnat {}", set_mark(self.numbers.own)));
        if let (Some(uplinks), Some(others)) = self.links_apart() {
            // By the destination's interface: a client that shares the uplink's link is to be captured.
            let inwards = format!("iifname {{ {uplinks} }} fib daddr oifname {{ {others} }}");
            lines.push(format!("{inwards} {}", set_mark(self.numbers.own)));
        }
        chain("after_port_forward", "filter hook prerouting priority -99", &lines)
    }

    /// A UDP server on the wildcard address answers unbound. Whoever asked an address of ours is remembered, and the
    /// answer gets that address, by which it also leaves the right way. One set and one line per local address.
    fn answers_leave_as_asked(&self) -> Vec<String> {
        let mut sets = Vec::new();
        let mut remember =
            vec![OTHER_THAN_UDP.to_owned(), FROM_LOOPBACK.to_owned(), format!("{} return", self.iif_tun())];
        // A spoofed answer from port 53 must not open a hole for our own questions.
        remember.push("udp sport 53 return".to_owned());
        remember.extend(self.never_asked());
        // Nor one that nobody waits for there: a client that is connected to its peer has no such socket, and one that is
        // made later has not been asked.
        let there = if self.survey.parameters.finds_sockets { "socket wildcard 1 " } else { "" };
        let mut resource = vec![OTHER_THAN_UDP.to_owned(), format!("{} return", self.oif_tun("!= "))];
        for address in self.local_addresses() {
            let (family, kind) = (family(address), if address.is_ipv4() { "ipv4_addr" } else { "ipv6_addr" });
            let set = set_name(address);
            sets.push(format!(
                "  set {set} {{ type {kind} . inet_service . inet_service; flags dynamic,timeout; \
                 timeout {REMEMBERED}; size {REMEMBERED_SIZE}; }};\n"
            ));
            remember.push(format!(
                "ct direction original {family} daddr {address} {there}update @{set} \
                 {{ {family} saddr . udp sport . udp dport }}"
            ));
            resource.push(format!("{family} daddr . udp dport . udp sport @{set} {family} saddr set {address}"));
        }
        sets.push(chain("remember", "filter hook input priority -1", &remember));
        sets.push(chain("resource", "filter hook output priority -310", &resource));
        sets
    }

    /// Questions to port 53 enter the TUN even from sockets bound elsewhere. Only where [`Self::reroute`] jumps here,
    /// so that a stop can empty it alone; the rule of the mark must outlast it, or `caught` would drop what is marked.
    fn capture_dns(&self) -> Option<String> {
        let capture = set_mark(self.numbers.capture);
        // Where we take no IPv6, a marked packet of it would find no rule that moves it.
        let family = if self.survey.ipv6 { "" } else { "meta nfproto ipv4 " };
        let line = format!("    {family}meta l4proto {{ udp, tcp }} th dport 53 {capture};\n");
        self.options.dns_hijack.then(|| format!("  chain {CAPTURE_DNS} {{\n{line}  }};\n"))
    }

    /// Replies never enter the TUN. What is left at the end may be a question.
    fn reroute(&self) -> String {
        let mut lines = self.passes();
        lines.push(format!("{} return", self.is_answer()));
        if self.options.dns_hijack && self.options.takes_own_traffic() {
            lines.extend(self.users_left_out());
            lines.push(format!("jump {CAPTURE_DNS}"));
        }
        chain("reroute", REROUTED, &lines)
    }

    /// Whoever is left out asks for names on their own, from bound sockets too.
    fn users_left_out(&self) -> Option<String> {
        let users = self.options.users_left_out(&self.survey.users);
        let ranges: Vec<String> = users.iter().map(|(first, last)| format!("{first}-{last}")).collect();
        (!ranges.is_empty()).then(|| format!("meta skuid {{ {} }} return", ranges.join(", ")))
    }

    /// What this host sends and nobody has to look at again: our own, what is on its way already, and the carriers of
    /// others.
    fn passes(&self) -> Vec<String> {
        let own = self.numbers.own;
        let mut lines = vec![format!("{} return", has_mark(own)), "oif \"lo\" return".to_owned()];
        // Nothing from outside gets to these addresses, so nothing from them answers anybody there.
        let addresses = self.options.addresses.iter().map(IpNet::addr);
        lines.extend(
            addresses.map(|address| format!("{} {} saddr {address} return", self.oif_tun(""), family(address))),
        );
        lines.push(format!("{} {} {} return", self.oif_tun(""), self.is_answer(), set_mark(own)));
        lines.push(format!("{} return", self.oif_tun("")));
        lines.extend(self.of_other_runs("oifname"));
        lines.extend(self.foreign_marks());
        lines.extend(self.marks_taken_away());
        lines
    }

    fn foreign_marks(&self) -> impl Iterator<Item = String> {
        self.survey.foreign_marks().into_iter().map(|mark| format!("{} return", has_mark(mark)))
    }

    /// LAN clients that ask this host itself for names get ours. Never on an uplink: that would be an open resolver.
    fn lan_dns(&self) -> Option<String> {
        let uplinks = self.survey.uplinks();
        let is_uplink =
            |name: &String| self.survey.links.iter().any(|link| link.name == *name && uplinks.contains(&link.index));
        let wanted = |name: &&String| !is_uplink(name) && self.options.takes_interface(name);
        let lan: Vec<String> = self.options.lan_dns.iter().filter(wanted).map(|name| quoted(name)).collect();
        if lan.is_empty() || self.options.dns_servers.is_empty() {
            return None;
        }
        let ask =
            format!("iifname {{ {} }} meta l4proto {{ tcp, udp }} th dport 53 fib daddr type local", lan.join(", "));
        let lines: Vec<String> = self
            .options
            .dns_servers
            .iter()
            .map(|server| format!("{ask} dnat {} to {server}", family(*server)))
            .collect();
        Some(chain("lan_dns", "nat hook prerouting priority dstnat", &lines))
    }

    /// What answers somebody outside. A flow of ours that was silent for longer than the kernel remembers it, 60 s where
    /// a half is closed and 120 s for datagrams, begins for the kernel anew, and from the other side when that speaks
    /// first: what the client then says looks like an answer, and is none. Its connection has the mark of what is captured.
    fn is_answer(&self) -> String {
        let marked = match self.numbers.capture.mark | self.numbers.earlier {
            bits if self.survey.parameters.marks_connections => format!(" ct mark & {bits:#x} == 0"),
            _ => String::new(),
        };
        format!("ct direction reply{marked}")
    }

    fn iif_tun(&self) -> String {
        format!("iif{} {}", self.by(), quoted(&self.options.tun))
    }

    fn oif_tun(&self, comparison: &str) -> String {
        format!("oif{} {comparison}{}", self.by(), quoted(&self.options.tun))
    }

    /// The TUN is meant by its number, which costs a packet less than the name, where the table goes with it. A kill
    /// switch outlives it, and the number may become another interface's.
    fn by(&self) -> &'static str {
        if self.options.kill_switch { "name" } else { "" }
    }

    /// Ends a chain for what another run has taken, or gives out: `by` says which, `iifname` or `oifname`.
    fn of_other_runs(&self, by: &str) -> Option<String> {
        self.names(self.survey.runs()).map(|names| format!("{by} {{ {names} }} return"))
    }

    /// The inside of a set of such names but the TUN's; none for an empty one.
    fn names(&self, names: BTreeSet<&str>) -> Option<String> {
        // A quote ends a name, and a star makes it a pattern.
        let plain = names.into_iter().filter(|name| !name.contains(['"', '*', '\\']) && *name != self.options.tun);
        let list: Vec<String> = plain.map(quoted).collect();
        (!list.is_empty()).then(|| list.join(", "))
    }

    /// The names of the uplinks, and those of all other links but loopback, the TUN and those of other runs.
    fn links_apart(&self) -> (Option<String>, Option<String>) {
        let (uplinks, runs) = (self.survey.uplinks(), self.survey.runs());
        let links = self.survey.links.iter().filter(|link| link.name != "lo" && !runs.contains(link.name.as_str()));
        let (up, other): (Vec<&Link>, Vec<&Link>) = links.partition(|link| uplinks.contains(&link.index));
        let list = |links: Vec<&Link>| self.names(links.into_iter().map(|link| link.name.as_str()).collect());
        (list(up), list(other))
    }

    fn local_addresses(&self) -> Vec<IpAddr> {
        let tun: Vec<IpAddr> = self.options.addresses.iter().map(IpNet::addr).collect();
        let runs = self.survey.runs();
        let of_run = |index: u32| self.survey.link_name(index).is_some_and(|name| runs.contains(name));
        let others = self.survey.addresses.iter().filter(|(index, _)| !of_run(*index));
        let mut found: Vec<IpAddr> = others.map(|(_, net)| net.addr()).collect();
        found.retain(|ip| !ip.is_loopback() && !is_link_local(*ip) && !tun.contains(ip));
        found.sort_unstable();
        found.dedup();
        found
    }

    fn tun_addresses(&self, v6: bool) -> Vec<IpAddr> {
        self.options.addresses.iter().map(IpNet::addr).filter(|ip| ip.is_ipv6() == v6).collect()
    }
}

/// By the address, so that a set means the same when others come and go.
fn set_name(address: IpAddr) -> String {
    format!("asked_{}", address.to_string().replace(['.', ':'], "_"))
}

/// IPv6 only: a socket that talks to one is bound to its link and never meets our captures.
fn is_link_local(ip: IpAddr) -> bool {
    matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local())
}

fn chain(name: &str, hook: &str, lines: &[String]) -> String {
    let mut text = format!("  chain {name} {{ type {hook}; policy accept;\n");
    for line in lines {
        let _ = writeln!(text, "    {line};");
    }
    text.push_str("  };\n");
    text
}

fn family(ip: IpAddr) -> &'static str {
    if ip.is_ipv4() { "ip" } else { "ip6" }
}

/// Interface names were checked when the plan was made: no quote is in them.
fn quoted(name: &str) -> String {
    format!("\"{name}\"")
}

/// Leaves bits that are not the mark's as they are.
fn set_mark(mark: MarkMatch) -> String {
    match mark.mask {
        u32::MAX => format!("meta mark set {:#x}", mark.mark),
        mask if mask != mark.mark => format!("meta mark set meta mark & {:#x} | {:#x}", !mask, mark.mark & mask),
        _ => format!("meta mark set meta mark | {:#x}", mark.mark),
    }
}

fn has_mark(mark: MarkMatch) -> String {
    match mark.mask {
        u32::MAX => format!("meta mark {:#x}", mark.mark),
        mask => format!("meta mark & {mask:#x} == {:#x}", mark.mark & mask),
    }
}

#[cfg(test)]
mod tests;
