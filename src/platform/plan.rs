//! What is to be true of the host while we run, as plain data, built from options and a survey by pure functions.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::Fwmark;
use super::closed;
use super::firewall::{self, Nft};
use super::layout;
use super::may_start::{PlanError, check_syntax};
use super::overlap::overlap;
use super::resolver::{self, DnsPlan};
use super::routing::{Route, Rule};
use super::survey::{self, Ahead, NftState, Numbers, Survey, Wishes};

/// IPv6 has no smaller links (RFC 8200 section 5): the kernel takes the protocol off a device below this many bytes.
const SMALLEST_MTU: u16 = 1280;

/// What a profile wants of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostOptions {
    /// The TUN's name.
    pub tun: String,
    /// The TUN's addresses with their prefixes. Give it one of IPv6 even where IPv6 is not carried: an unbound
    /// socket then has a source, and the refusal that the TUN writes back finds it at once.
    pub addresses: Vec<IpNet>,
    /// The ranges that fake addresses come from: always routed into the TUN.
    pub fake: Vec<IpNet>,
    /// The TUN's MTU in bytes.
    pub mtu: u32,
    /// Routes and rules are wanted at all; without, only the TUN itself is set up.
    pub auto_route: bool,
    /// Everything to port 53 goes into the TUN.
    pub dns_hijack: bool,
    /// Addresses behind the TUN at which we answer names; for the host's resolver settings and for LAN clients.
    pub dns_servers: Vec<IpAddr>,
    /// LAN interfaces whose questions to this host's own addresses we answer.
    pub lan_dns: Vec<String>,
    /// What is captured; everything, when empty.
    pub route_address: Vec<IpNet>,
    /// What is not, unless it goes to port 53 or to a fake address.
    pub route_exclude: Vec<IpNet>,
    /// Interfaces whose incoming traffic is taken, `lo` for what the host itself sends; all, when empty.
    pub include_interface: Vec<String>,
    /// Interfaces whose incoming traffic is not.
    pub exclude_interface: Vec<String>,
    /// Users whose traffic is taken, first and last; all, when empty. Only what the host itself sends has a user.
    pub include_uid: Vec<(u32, u32)>,
    /// Users whose traffic is not.
    pub exclude_uid: Vec<(u32, u32)>,
    /// Switch the host's forwarding on.
    pub auto_forward: bool,
    /// A family that the TUN cannot have is unreachable.
    pub strict_route: bool,
    /// Nothing leaves past the TUN, whether we run or not, until somebody asks for the end of the run.
    pub kill_switch: bool,
    /// Numbers to take if they are free.
    pub wishes: Wishes,
}

impl HostOptions {
    /// The same without a word of IPv6: what would be sent there, nobody would take.
    fn without_ipv6(&self) -> Self {
        let v4 = |nets: &[IpNet]| nets.iter().copied().filter(|net| net.addr().is_ipv4()).collect();
        Self {
            addresses: v4(&self.addresses),
            fake: v4(&self.fake),
            dns_servers: self.dns_servers.iter().copied().filter(IpAddr::is_ipv4).collect(),
            route_address: v4(&self.route_address),
            route_exclude: v4(&self.route_exclude),
            ..self.clone()
        }
    }
}

/// A kernel parameter to be set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sysctl {
    /// Its path below /proc/sys.
    pub path: String,
    /// The value.
    pub value: String,
    /// It belongs to the TUN and vanishes with it, so nothing needs to be put back.
    pub of_tun: bool,
}

/// What is to be true of the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostPlan {
    /// The TUN's name.
    pub tun: String,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// Its addresses.
    pub addresses: Vec<IpNet>,
    /// Routes of our two tables.
    pub routes: Vec<Route>,
    /// Rules, in the order in which they are installed.
    pub rules: Vec<Rule>,
    /// The firewall table; `None` where nftables is missing or no routing is wanted.
    pub nft: Option<Nft>,
    /// The host's resolver.
    pub dns: DnsPlan,
    /// Kernel parameters, in the order in which they are set.
    pub sysctls: Vec<Sysctl>,
    /// The numbers chosen; [`Numbers::own`] is the mark for our own sockets.
    pub numbers: Numbers,
    /// Ports that were listened on for others when the firewall began to follow connections: see the kill switch.
    pub(super) listening: BTreeSet<u16>,
    /// The same for UDP: ports of sockets without a peer.
    pub(super) unconnected: BTreeSet<u16>,
    /// Interfaces that are uplinks, or were at some time of this run.
    #[serde(default)]
    pub(super) uplinks: BTreeSet<u32>,
    /// Numbers that the profile wishes and that were taken when ours were chosen.
    #[serde(default)]
    pub passed_over: Vec<String>,
    /// What will not work as wished, and what to do about it.
    pub warnings: Vec<String>,
    /// What is worth knowing on a gateway.
    pub notes: Vec<String>,
}

impl HostPlan {
    /// So many priorities of rules are ours, from the first on.
    pub const PRIORITIES: u32 = survey::BLOCK;

    /// Works out what has to change. The TUN need not exist yet; [`HostPlan::check_name`] tells whether it may.
    ///
    /// # Errors
    /// The name cannot be, or no free numbers are left.
    pub fn new(options: &HostOptions, survey: &Survey) -> Result<Self, PlanError> {
        let numbers = survey.numbers(&options.wishes)?;
        let passed_over = wishes_passed_over(&options.wishes, &numbers, survey);
        Ok(Self { passed_over, ..Self::made(options, survey, numbers)? })
    }

    /// What will not work as wished, from the start on or on this host as it has become.
    pub fn all_warnings(&self) -> impl Iterator<Item = &String> {
        self.passed_over.iter().chain(&self.warnings)
    }

    /// The same with numbers that are ours already; `survey` knows nothing of what we have changed.
    ///
    /// # Errors
    /// A name cannot be.
    pub(super) fn with_numbers(options: &HostOptions, survey: &Survey, numbers: Numbers) -> Result<Self, PlanError> {
        let mut plan = Self::made(options, survey, numbers)?;
        // A start refuses it; this is of a network that the host has joined since.
        let shared = overlap(options, survey);
        plan.warnings
            .extend(shared.map(|it| format!("{it}: hosts there are not reached; choose another range and restart")));
        Ok(plan)
    }

    fn made(options: &HostOptions, survey: &Survey, numbers: Numbers) -> Result<Self, PlanError> {
        for name in std::iter::once(&options.tun).chain(&options.lan_dns) {
            check_syntax(name)?;
        }
        let options = &if survey.ipv6 { options.clone() } else { options.without_ipv6() };
        let mut plan = Self {
            tun: options.tun.clone(),
            mtu: options.mtu.max(SMALLEST_MTU.into()),
            addresses: options.addresses.clone(),
            routes: Vec::new(),
            rules: Vec::new(),
            nft: None,
            dns: DnsPlan::Untouched,
            sysctls: tun_sysctls(options, survey),
            numbers,
            listening: survey.answering.clone(),
            unconnected: survey.unconnected.clone(),
            uplinks: survey.ways_out(),
            passed_over: Vec::new(),
            warnings: Vec::new(),
            notes: Vec::new(),
        };
        if options.mtu < SMALLEST_MTU.into() {
            let mtu = options.mtu;
            plan.warnings.push(format!("an MTU of {mtu} is too small for IPv6; taking {SMALLEST_MTU} instead"));
        }
        if options.auto_route {
            plan.route(options, survey)?;
        }
        Ok(plan)
    }

    /// What does not work as long as the firewall table is not loaded.
    pub(super) fn lost_without_table(&self) -> String {
        let has = |name: &str| self.nft.as_ref().is_some_and(|nft| nft.chains().any(|chain| chain == name));
        let lost = lost_without_nft(has("lan_dns"));
        let ipv6 = if has("shut") { ", and IPv6, which the TUN cannot have, goes past the rules" } else { "" };
        format!("until it is loaded, {lost} are not taken care of{ipv6}")
    }

    /// The mark that our own sockets must carry.
    #[must_use]
    pub fn own_mark(&self) -> Fwmark {
        Fwmark(self.numbers.own.mark)
    }

    /// Whether what this host itself sends is taken, as the rules have it.
    #[must_use]
    pub fn takes_own_traffic(&self) -> bool {
        layout::take_own_traffic(&self.rules, self.numbers.first_priority)
    }

    fn route(&mut self, options: &HostOptions, survey: &Survey) -> Result<(), PlanError> {
        let numbers = self.numbers;
        self.routes = layout::routes(options, &numbers, survey.ipv6);
        self.routes.extend(closed::refusals(options, &self.routes));
        self.rules = layout::in_order_of_installation(layout::rules(options, &numbers, survey), &numbers);
        match firewall::nft(options, &numbers, survey) {
            Ok(nft) => self.nft = Some(nft),
            Err(why) if options.kill_switch => return Err(PlanError::NoKillSwitch(why)),
            Err(why) => {
                self.warnings.push(without_nft(&why, options));
                self.warnings.extend(closed::open_ipv6(options, survey));
            }
        }
        if options.dns_hijack && options.takes_own_traffic() {
            self.dns = resolver::plan(survey.resolv_conf.as_deref(), survey.resolved, &options.dns_servers);
        }
        if options.auto_forward {
            self.sysctls.extend(forwarding(survey));
        }
        self.sysctls.extend(strict_uplinks(options, survey));
        self.notes.extend(gateway_notes(options, survey));
        self.warnings.extend(gates_in_the_way(options, survey));
        self.warnings.extend(rules_before_ours(&self.numbers, survey));
        self.warnings.extend(nothing_ahead(options, &self.numbers, survey));
        self.warnings.extend(closed::by_another(survey));
        self.warnings.extend(options.not_there(survey));
        Ok(())
    }
}

fn sysctl(path: String, value: &str, of_tun: bool) -> Sysctl {
    Sysctl { path, value: value.to_owned(), of_tun }
}

/// A dot in an interface's name is a slash nowhere: below /proc/sys the names are directories of their own.
pub(super) fn of_interface(family: &str, name: &str, key: &str) -> String {
    format!("net/{family}/conf/{name}/{key}")
}

fn tun_sysctls(options: &HostOptions, survey: &Survey) -> Vec<Sysctl> {
    let tun = &options.tun;
    // The reverse-path check of what we write looks routes up with the mark that nft sets on it.
    // And a datagram that one client sends another by our own address (RFC 4787 REQ-9) comes to that one from this host.
    let mut sysctls =
        ["src_valid_mark", "accept_local"].map(|key| sysctl(of_interface("ipv4", tun, key), "1", true)).to_vec();
    if survey.ipv6 {
        // Where the administrator switched IPv6 off by default, the TUN must have it all the same, or what is left of
        // it on some interface would leave past us.
        sysctls.push(sysctl(of_interface("ipv6", tun, "disable_ipv6"), "0", true));
    }
    sysctls
}

fn forwarding(survey: &Survey) -> Vec<Sysctl> {
    let mut sysctls = Vec::new();
    if !survey.parameters.forward_v4 {
        sysctls.push(sysctl("net/ipv4/ip_forward".to_owned(), "1", false));
    }
    if survey.ipv6 && !survey.parameters.forward_v6 {
        // A router ignores advertisements and forgets the default routes they gave it, unless told 2 beforehand.
        let uplinks = survey.uplinks();
        let learns = |name: &&str| survey.parameters.host_only_advertisements.contains(*name);
        let names = uplinks.iter().filter_map(|index| survey.link_name(*index)).filter(learns);
        sysctls.extend(names.map(|name| sysctl(of_interface("ipv6", name, "accept_ra"), "2", false)));
        sysctls.push(sysctl("net/ipv6/conf/all/forwarding".to_owned(), "1", false));
    }
    sysctls
}

/// Port forwards arrive on an uplink with our mark's path as their way back; a strict check there must know the mark.
fn strict_uplinks(options: &HostOptions, survey: &Survey) -> Vec<Sysctl> {
    if !survey.parameters.forward_v4 && !options.auto_forward {
        return Vec::new();
    }
    let uplinks = survey.uplinks();
    let strict = |name: &&str| survey.parameters.strict_reverse_path.contains(*name);
    let names = uplinks.iter().filter_map(|index| survey.link_name(*index)).filter(strict);
    names.map(|name| sysctl(of_interface("ipv4", name, "src_valid_mark"), "1", false)).collect()
}

fn wishes_passed_over(wishes: &Wishes, numbers: &Numbers, survey: &Survey) -> Vec<String> {
    let (mut warnings, alone) = (Vec::new(), survey.aside.is_empty()); // a crashed run of ours is in nobody's way
    if let Some(wish) = wishes.table.filter(|wish| alone && *wish != numbers.captured.0) {
        warnings.push(format!("routing table {wish} is in use; taking {} instead", numbers.captured));
    }
    if let Some(wish) = wishes.first_priority.filter(|wish| alone && *wish != numbers.first_priority) {
        let first = numbers.first_priority;
        let why = match survey.has_rules_from(wish) {
            true => format!("rule priorities from {wish} on are in use"),
            false if !survey.is_behind_runs(wish) => {
                format!("rules from {wish} on would come before those of another run, which was here first")
            }
            false => format!("rules from {wish} on would come after another program's that takes all traffic"),
        };
        warnings.push(format!("{why}; taking those from {first} on instead"));
    }
    warnings
}

/// Rules of others that take everything before ours are asked: another proxy's, or a VPN's for all traffic. There was no
/// place before them. And the look-up of this host's own addresses behind ours.
fn rules_before_ours(numbers: &Numbers, survey: &Survey) -> Vec<String> {
    let first_priority = numbers.first_priority;
    let until = first_priority.saturating_add(HostPlan::PRIORITIES);
    let warn = |rule: &Rule| {
        let what = survey.rivals(rule, numbers.own, first_priority)?;
        Some(format!(
            "another rule ({rule}) {what}, and there is no room before it: what it takes does not come to us until it is \
             gone, or has a larger priority"
        ))
    };
    let before = |rule: &&Rule| rule.priority < until;
    let mut warnings: Vec<String> = survey.rules.iter().filter(before).filter_map(warn).collect();
    let together = survey.take_all_together(numbers.own);
    let others = together.len().saturating_sub(1);
    warnings.extend(together.into_iter().take(1).filter(before).map(|rule| {
        format!(
            "another program's rule ({rule}) takes all traffic, together with {others} others, before ours can: nothing will \
             come to us until that program stops, or leaves priorities below {first_priority}"
        )
    }));
    let local = survey.looks_up_local();
    if local > first_priority {
        warnings.push(format!(
            "this host's own addresses are looked up at priority {local}, behind our rules, where there is no room for ours: \
             what comes in for this host may go into the TUN; give that rule (lookup local) a smaller one"
        ));
    }
    warnings
}

/// Questions to port 53 are to be taken ahead of the rules of others, and there is no place.
fn nothing_ahead(options: &HostOptions, numbers: &Numbers, survey: &Survey) -> Option<String> {
    let Ahead::NoRoom(priority) = survey.ahead(numbers.first_priority) else { return None };
    options.dns_hijack.then(|| {
        format!(
            "another program's rule of priority {priority} leaves no room before it: questions to nameservers for which it \
             knows a way do not come to us, and may not be answered; have that program take a larger one"
        )
    })
}

fn without_nft(why: &str, options: &HostOptions) -> String {
    let lost = lost_without_nft(!options.lan_dns.is_empty());
    format!("no firewall table ({why}): {lost} are not taken care of. Install nftables to have them")
}

fn lost_without_nft(lan: bool) -> String {
    let lan = if lan { ", names for LAN clients that ask this host itself" } else { "" };
    format!(
        "answers of UDP servers on the wildcard address, port forwards, inbound IPv6 to the LAN, DNS questions of sockets \
         bound to an interface{lan}"
    )
}

/// Chains of others that stop what the host's own programs are sent by the TUN, or send into it.
#[must_use]
pub fn gates_in_the_way(options: &HostOptions, survey: &Survey) -> Vec<String> {
    if !options.takes_own_traffic() {
        return Vec::new();
    }
    let tun = &options.tun;
    survey.gates_before(tun).map(|gate| format!("{}. Let it pass: {}", gate.harm(tun), gate.remedy(tun))).collect()
}

fn gateway_notes(options: &HostOptions, survey: &Survey) -> Vec<String> {
    let mut notes = Vec::new();
    let off = |on: bool| !on && !options.auto_forward;
    for (on, key) in [
        (survey.parameters.forward_v4, "net.ipv4.ip_forward"),
        (survey.parameters.forward_v6 || !survey.ipv6, "net.ipv6.conf.all.forwarding"),
    ] {
        if off(on) {
            notes.push(format!(
                "{key} is 0: other hosts cannot use this one as their gateway; set it to 1, or tun.auto-forward: true"
            ));
        }
    }
    if let NftState::Present { dropping_forward, .. } = &survey.nft {
        let tun = &options.tun;
        notes.extend(dropping_forward.iter().map(|chain| {
            format!(
                "the chain {chain} drops what is forwarded unless a rule allows it; for LAN clients: \
                 nft insert rule {chain} iifname {tun} accept; nft insert rule {chain} oifname {tun} accept"
            )
        }));
    }
    notes
}

#[cfg(test)]
pub(super) mod tests;
