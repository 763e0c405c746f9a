//! What a host looks like before we touch it, as plain data, and the numbers that are free on it.

use std::collections::BTreeSet;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::gate::Gate;
use super::plan::of_interface;
use super::routing::{Family, Link, MarkMatch, RouteTable, Rule, RuleAction, SeenRoute};
use super::{Fwmark, HostError, imp};
use marks::free_bit;

mod ahead;
mod before;
mod marks;
mod networks;
mod pieces;
pub(super) mod runs;
mod takes;

pub(super) use ahead::Ahead;
pub(super) use networks::{is_default_like, is_public};
pub use takes::takes_everything;

/// Priorities that one run takes: rules stand at the first of them plus an offset below this.
pub(super) const BLOCK: u32 = 100;
/// Where the search for a free block of priorities begins.
const FIRST_PRIORITY: u32 = 9000;
/// The look-up of the main table has this priority; ours must all come before it.
const MAIN_PRIORITY: u32 = 32766;
/// Where the search for free tables begins: the number that Clash profiles usually wish for.
const FIRST_TABLE: u32 = 2022;

/// nftables as found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NftState {
    /// It cannot be used, and why.
    Missing(String),
    /// It can.
    Present {
        /// The names of all tables, of any family.
        tables: BTreeSet<String>,
        /// Every bit of a mark that some rule reads or writes.
        mark_bits: u32,
        /// Chains on the forward hook whose policy is drop, as `family table chain`.
        dropping_forward: Vec<String>,
        /// Chains that stop what comes to this host, or what it sends, unless a rule allows it.
        gates: Vec<Gate>,
        /// The tables of kill switches, whoever's run closed them.
        kill_switches: Vec<String>,
    },
}

impl NftState {
    /// A firewall without rules.
    #[must_use]
    pub fn empty() -> Self {
        Self::Present {
            tables: BTreeSet::new(),
            mark_bits: 0,
            dropping_forward: Vec::new(),
            gates: Vec::new(),
            kill_switches: Vec::new(),
        }
    }
}

/// The kernel parameters that the layout depends on.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Parameters {
    /// `net.ipv4.ip_forward` is on.
    pub forward_v4: bool,
    /// `net.ipv6.conf.all.forwarding` is on.
    pub forward_v6: bool,
    /// Interfaces whose reverse-path filter is strict (1), by name.
    pub strict_reverse_path: BTreeSet<String>,
    /// Ports that clients get when they ask for none, first and last (`ip_local_port_range`).
    pub ephemeral_ports: (u16, u16),
    /// nftables can ask for the socket that a packet is for.
    pub finds_sockets: bool,
    /// nftables can mark connections.
    pub marks_connections: bool,
    /// nftables can ask, of what is forwarded, by which interface the way back to its source is.
    pub finds_ways_back: bool,
    /// Interfaces that accept router advertisements only as long as they do not forward (`accept_ra` 1).
    pub host_only_advertisements: BTreeSet<String>,
}

/// Everything of a host that the plan depends on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Survey {
    /// The interfaces.
    pub links: Vec<Link>,
    /// The number of our own, where that is left out of them.
    pub device: Option<u32>,
    /// The indices of those that are TUNs (or TAPs).
    pub tuns: BTreeSet<u32>,
    /// The addresses, with the index of the interface that holds each.
    pub addresses: Vec<(u32, IpNet)>,
    /// All rules of both families, except those of `aside`.
    pub rules: Vec<Rule>,
    /// Rules of a crashed run of ours that still stand ([`Survey::set_aside`]): their numbers are in use, and their marks
    /// are nobody's choice of a path.
    pub aside: Vec<Rule>,
    /// Default routes of any table, and the on-link routes of the main table.
    pub routes: Vec<SeenRoute>,
    /// Tables that hold any route.
    pub tables: BTreeSet<RouteTable>,
    /// Interfaces by which the main table sends something public to a gateway, by family.
    pub gateways: BTreeSet<(Family, u32)>,
    /// Interfaces that were uplinks at some time of this run.
    pub known_uplinks: BTreeSet<u32>,
    /// nftables.
    pub nft: NftState,
    /// Every bit of a mark that some rule reads or writes which nft does not show: one of iptables where it is not
    /// nftables', or any where there is no nft.
    pub other_marks: u32,
    /// Kernel parameters.
    pub parameters: Parameters,
    /// The kernel knows IPv6, and nothing keeps the TUN from having it ([`Survey::settle_ipv6`]).
    pub ipv6: bool,
    /// The kernel knows IPv6: interfaces may have it, whether the TUN can or not.
    pub kernel_ipv6: bool,
    /// TCP ports that somebody listens on.
    pub listening: BTreeSet<u16>,
    /// Of those, the ones to which somebody outside may be connected.
    pub answering: BTreeSet<u16>,
    /// UDP ports of sockets without a peer: servers', and some clients'.
    pub unconnected: BTreeSet<u16>,
    /// The text of /etc/resolv.conf; `None` when there is none to read.
    pub resolv_conf: Option<String>,
    /// systemd-resolved runs.
    pub resolved: bool,
    /// The users that exist in our namespace, first and last of each range.
    pub users: Vec<(u32, u32)>,
}

/// A wish that the host has no room for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoRoom {
    /// No 100 neighbouring priorities before the main table's rule.
    #[error("no {BLOCK} neighbouring rule priorities are free below {MAIN_PRIORITY} (see `ip rule` and `ip -6 rule`)")]
    Priorities,
    /// No two tables. There are 2^32 of them.
    #[error("no two routing tables are free (see `ip route show table all`)")]
    Tables,
    /// Too few bits.
    #[error("no two bits of the firewall mark are free (see `ip rule` and `nft list ruleset`)")]
    Marks,
}

/// The numbers of one run, each free when the survey was taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Numbers {
    /// The first priority of our block.
    pub first_priority: u32,
    /// T: what is captured; `throw` routes make holes in it.
    pub captured: RouteTable,
    /// D: always the TUN.
    pub always: RouteTable,
    /// Our own sockets, and replies that must leave as they came.
    pub own: MarkMatch,
    /// What the firewall wants captured.
    pub capture: MarkMatch,
    /// Bits by which a crashed run had packets captured that still stood when this one began: connections live longer
    /// than rules, and still have them.
    #[serde(default)]
    pub earlier: u32,
}

/// Numbers that a profile asks for; taken where they are free.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Wishes {
    /// `iproute2-rule-index`.
    pub first_priority: Option<u32>,
    /// `iproute2-table-index`.
    pub table: Option<u32>,
    /// `routing-mark`: matched exactly, all 32 bits.
    pub mark: Option<Fwmark>,
}

impl Survey {
    /// The chains that surely stop a TUN of this name.
    pub fn gates_before<'a>(&'a self, tun: &'a str) -> impl Iterator<Item = &'a Gate> {
        let gates = match &self.nft {
            NftState::Present { gates, .. } => gates.as_slice(),
            NftState::Missing(_) => &[],
        };
        let index = self.links.iter().find(|link| link.name == tun).map(|link| link.index).or(self.device);
        let concerns = |gate: &&Gate| self.ipv6 || !gate.chain.starts_with("ip6 ");
        gates.iter().filter(concerns).filter(move |gate| gate.stops(tun, index))
    }

    /// Looks at the host. Changes nothing.
    ///
    /// # Errors
    /// The kernel does not answer.
    pub fn take() -> Result<Self, HostError> {
        let mut survey = Self::begin()?;
        survey.ask_nft();
        Ok(survey)
    }

    /// The same, but for what only nft can tell ([`Survey::ask_nft`]).
    ///
    /// # Errors
    /// As [`Survey::take`].
    pub fn begin() -> Result<Self, HostError> {
        imp::survey::take(None, &[], true)
    }

    /// Has nft tell what it can do, for which it takes longest. One that cannot tell counts as missing.
    pub fn ask_nft(&mut self) {
        if let NftState::Present { .. } = self.nft {
            match imp::nft::knows() {
                Ok(knows) => {
                    self.parameters.finds_sockets = knows.sockets;
                    self.parameters.marks_connections = knows.connection_marks;
                    self.parameters.finds_ways_back = knows.ways_back;
                }
                Err(why) => self.nft = NftState::Missing(why),
            }
        }
    }

    /// Looks at the host again, with all routes of `tables`; at the firewall only where `nft` does not say what is known. The
    /// marks in its rules, of which there may be very many, matter to a start alone.
    ///
    /// # Errors
    /// The kernel does not answer.
    pub(super) fn again(nft: Option<NftState>, tables: &[RouteTable]) -> Result<Self, HostError> {
        imp::survey::take(nft, tables, false)
    }

    /// Tries whether the TUN called `tun`, which must be there, can have IPv6, and takes note for the plan. A kernel
    /// without, or a container whose new interfaces have it switched off and whose /proc/sys is read-only, lets nobody
    /// add an address of it: IPv4 is then taken alone. Returns what that costs, where it was not plain before. `shut`:
    /// what cannot be taken is to be unreachable.
    ///
    /// What it sets goes with the TUN.
    pub fn settle_ipv6(&mut self, tun: &str, shut: bool) -> Option<String> {
        let path = of_interface("ipv6", tun, "disable_ipv6");
        let error = imp::sysctl::write(&path, "0").err().filter(|_| self.ipv6)?;
        self.ipv6 = false;
        let becomes =
            if shut { "is unreachable" } else { "goes past the rules; tun.strict-route makes it unreachable" };
        Some(format!(
            "IPv6 cannot be switched on for the TUN (set {path} to 0: {error}): only IPv4 is taken, names get no IPv6 \
             addresses from us, and IPv6, where this host has it, {becomes}"
        ))
    }

    /// Sets rules apart that a crashed run of ours left and that stand until the next run is in force.
    pub fn set_aside(&mut self, ours: &[Rule]) {
        let (aside, rules) = std::mem::take(&mut self.rules).into_iter().partition(|rule| ours.contains(rule));
        self.rules = rules;
        self.aside = aside;
    }

    /// Every rule that stands, whoever made it.
    fn all_rules(&self) -> impl Iterator<Item = &Rule> {
        self.rules.iter().chain(&self.aside)
    }

    /// What [`Survey::settle_ipv6`] would come to for a TUN that is not there yet, as far as can be seen without trying.
    pub fn foresee_ipv6(&mut self) -> Option<String> {
        let path = of_interface("ipv6", "default", "disable_ipv6");
        let off = imp::sysctl::read(&path).is_ok_and(|value| value != "0");
        if !self.ipv6 || !off || imp::sysctl::is_writable(&path) {
            return None;
        }
        self.ipv6 = false;
        Some(format!("IPv6 is off for new interfaces ({path}) and cannot be switched on: only IPv4 would be taken"))
    }

    /// Picks numbers that nobody uses.
    ///
    /// # Errors
    /// [`NoRoom`] names what has run out.
    pub fn numbers(&self, wishes: &Wishes) -> Result<Numbers, NoRoom> {
        let (captured, always) = self.free_tables(wishes.table)?;
        let mut used = self.mark_bits();
        let own = match wishes.mark {
            Some(mark) => MarkMatch { mark: mark.0, mask: u32::MAX },
            None => MarkMatch::bits(free_bit(used).ok_or(NoRoom::Marks)?),
        };
        used |= own.mark;
        let capture = MarkMatch::bits(free_bit(used).ok_or(NoRoom::Marks)?);
        let first_priority = self.free_priorities(wishes.first_priority, own).ok_or(NoRoom::Priorities)?;
        Ok(Numbers { first_priority, captured, always, own, capture, earlier: self.earlier_captures() })
    }

    /// Of our rules by mark only those that capture lead to a table.
    fn earlier_captures(&self) -> u32 {
        let leads = |rule: &&Rule| matches!(rule.action, RuleAction::Lookup(_));
        let marks = self.aside.iter().filter(leads).filter_map(|rule| rule.mark);
        marks.filter(|mark| mark.mask != u32::MAX).fold(0, |bits, mark| bits | mark.mark)
    }

    fn free_tables(&self, wish: Option<u32>) -> Result<(RouteTable, RouteTable), NoRoom> {
        let named = self.all_rules().filter_map(|rule| match rule.action {
            RuleAction::Lookup(table) => Some(table),
            _ => None,
        });
        let used: BTreeSet<RouteTable> = self.tables.iter().copied().chain(named).collect();
        // 0 is "unspecified", 253 to 255 are default, main and local.
        let free = |number: &u32| !matches!(number, 0 | 253..=255) && !used.contains(&RouteTable(*number));
        let mut numbers = wish.into_iter().chain(FIRST_TABLE..u32::MAX).filter(free);
        let captured = numbers.next().ok_or(NoRoom::Tables)?;
        let always = numbers.find(|number| *number != captured).ok_or(NoRoom::Tables)?;
        Ok((RouteTable(captured), RouteTable(always)))
    }

    /// Our numbers with other tables, neither of them one of `numbers`: another program has routes there. The same where none
    /// are free.
    pub(super) fn with_other_tables(&self, numbers: Numbers) -> Numbers {
        let taken = [numbers.captured, numbers.always].into_iter().chain(self.tables.iter().copied()).collect();
        let others = Self { tables: taken, ..self.clone() }.free_tables(None);
        others.map_or(numbers, |(captured, always)| Numbers { captured, always, ..numbers })
    }

    /// The name of an interface.
    #[must_use]
    pub fn link_name(&self, index: u32) -> Option<&str> {
        self.links.iter().find(|link| link.index == index).map(|link| link.name.as_str())
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A host with one uplink (eth0) and a LAN with global IPv6 (lan0).
    pub(in crate::platform) fn plain() -> Survey {
        let link = |index, name: &str| Link { index, name: name.to_owned() };
        let route = |to: &str, device, on_link| SeenRoute {
            table: RouteTable::MAIN,
            to: to.parse().unwrap(),
            device: Some(device),
            on_link,
        };
        let rule = |priority, table| Rule::new(Family::V4, priority, RuleAction::Lookup(RouteTable(table)));
        Survey {
            links: vec![link(1, "lo"), link(2, "eth0"), link(3, "lan0")],
            device: None,
            tuns: BTreeSet::new(),
            addresses: vec![
                (1, "127.0.0.1/8".parse().unwrap()),
                (2, "192.0.2.2/24".parse().unwrap()),
                (2, "2001:db8:1::2/64".parse().unwrap()),
                (3, "192.168.7.1/24".parse().unwrap()),
                (3, "2001:db8:7::1/64".parse().unwrap()),
            ],
            rules: vec![rule(0, 255), rule(32766, 254), rule(32767, 253)],
            aside: Vec::new(),
            routes: vec![
                route("0.0.0.0/0", 2, false),
                route("192.0.2.0/24", 2, true),
                route("192.168.7.0/24", 3, true),
                route("::/0", 2, false),
                route("2001:db8:1::/64", 2, true),
                route("2001:db8:7::/64", 3, true),
            ],
            tables: [RouteTable(254), RouteTable(255)].into(),
            gateways: BTreeSet::new(),
            known_uplinks: BTreeSet::new(),
            nft: NftState::Present {
                tables: BTreeSet::new(),
                mark_bits: 0,
                dropping_forward: Vec::new(),
                gates: Vec::new(),
                kill_switches: Vec::new(),
            },
            other_marks: 0,
            parameters: Parameters { marks_connections: true, finds_ways_back: true, ..Parameters::default() },
            ipv6: true,
            kernel_ipv6: true,
            listening: BTreeSet::new(),
            answering: BTreeSet::new(),
            unconnected: BTreeSet::new(),
            resolv_conf: Some("nameserver 192.0.2.53\n".to_owned()),
            resolved: false,
            users: vec![(0, u32::MAX - 1)],
        }
    }

    pub(super) fn marked(priority: u32, mark: u32, mask: u32) -> Rule {
        let rule = Rule::new(Family::V6, priority, RuleAction::Lookup(RouteTable(51820)));
        Rule { mark: Some(MarkMatch { mark, mask }), ..rule }
    }

    #[test]
    fn an_empty_host_gives_the_numbers_of_the_design() {
        let numbers = plain().numbers(&Wishes::default()).unwrap();
        assert_eq!(numbers.first_priority, 9000);
        assert_eq!((numbers.captured, numbers.always), (RouteTable(2022), RouteTable(2023)));
        assert_eq!((numbers.own.mark, numbers.capture.mark), (0x0100_0000, 0x0200_0000));
    }

    #[test]
    fn a_foreign_rule_anywhere_in_the_block_moves_the_whole_block() {
        let mut survey = plain();
        survey.rules.push(marked(9099, 1, 1));
        assert_eq!(survey.numbers(&Wishes::default()).unwrap().first_priority, 9100);
        survey.rules.push(marked(9100, 1, 1));
        assert_eq!(survey.numbers(&Wishes::default()).unwrap().first_priority, 9200);
    }

    #[test]
    fn a_wish_is_taken_when_it_is_free_and_else_passed_over() {
        let mut survey = plain();
        let wishes = Wishes { first_priority: Some(7000), table: Some(100), mark: Some(Fwmark(0x0200_0001)) };
        let numbers = survey.numbers(&wishes).unwrap();
        assert_eq!((numbers.first_priority, numbers.captured), (7000, RouteTable(100)));
        assert_eq!(numbers.own, MarkMatch { mark: 0x0200_0001, mask: u32::MAX });
        assert_eq!(numbers.capture.mark & numbers.own.mark, 0);
        survey.tables.insert(RouteTable(100));
        survey.rules.push(marked(7050, 1, 1));
        let numbers = survey.numbers(&wishes).unwrap();
        assert_eq!((numbers.first_priority, numbers.captured), (9000, RouteTable(2022)));
    }

    #[test]
    fn wishes_that_cannot_be_are_passed_over() {
        for wish in [0, 32700, u32::MAX] {
            let wishes = Wishes { first_priority: Some(wish), table: Some(254), mark: None };
            let numbers = plain().numbers(&wishes).unwrap();
            assert_eq!((numbers.first_priority, numbers.captured), (9000, RouteTable(2022)));
        }
    }

    #[test]
    fn tables_that_only_a_rule_names_are_taken_too() {
        let mut survey = plain();
        survey.rules.push(Rule::new(Family::V6, 100, RuleAction::Lookup(RouteTable(2022))));
        survey.tables.insert(RouteTable(2024));
        let numbers = survey.numbers(&Wishes::default()).unwrap();
        assert_eq!((numbers.captured, numbers.always), (RouteTable(2023), RouteTable(2025)));
    }

    #[test]
    fn a_full_list_of_rules_is_an_error_and_not_an_endless_search() {
        let mut survey = plain();
        survey.rules.extend((0..32767).step_by(50).map(|priority| marked(priority, 1, 1)));
        assert_eq!(survey.numbers(&Wishes::default()), Err(NoRoom::Priorities));
    }

    #[test]
    fn what_a_crashed_run_left_is_in_use_and_yet_nobodys_choice_of_path() {
        let mut survey = plain();
        let ours = marked(9004, 0x0100_0000, 0x0100_0000);
        survey.rules.push(ours.clone());
        survey.set_aside(std::slice::from_ref(&ours));
        assert_eq!((survey.aside.as_slice(), survey.foreign_marks().len()), ([ours].as_slice(), 0));
        let numbers = survey.numbers(&Wishes::default()).unwrap();
        assert_eq!((numbers.first_priority, numbers.own.mark), (9100, 0x0200_0000));
    }

    #[test]
    fn a_selector_for_unmarked_packets_is_nobodys_choice_of_path() {
        let mut survey = plain();
        survey.rules.extend([marked(5210, 0x80000, 0xff0000), marked(5220, 0, 0xff0000)]);
        assert_eq!(survey.foreign_marks(), [MarkMatch { mark: 0x80000, mask: 0xff0000 }].into());
    }
}
