//! Rules of the routing policy.

use std::net::IpAddr;

use ipnet::IpNet;
use netlink_packet_core::{Nla, Parseable};
use netlink_packet_route::rule::{
    RuleAction as Action, RuleAttribute, RuleFlags, RuleMessage, RulePortRange, RuleUidRange,
};
use netlink_packet_route::{IpProtocol, RouteNetlinkMessage};

use super::route::address_family;
use super::{CREATE, Netlink, NetlinkError};
use crate::platform::routing::{Family, MarkMatch, Ports, RouteTable, Rule, RuleAction};

/// What the kernel shows where a rule suppresses nothing.
const NOTHING_SUPPRESSED: u32 = u32::MAX;
/// What newer kernels can select by: DSCP and its mask, the flow label and its mask (`FRA_DSCP` and so on).
const SELECTS_BY_MORE: [u16; 4] = [25, 26, 27, 30];

impl Netlink {
    /// Adds a rule.
    ///
    /// # Errors
    /// An equal rule exists, or no CAP_NET_ADMIN.
    pub fn add_rule(&mut self, rule: &Rule) -> Result<(), NetlinkError> {
        self.act(&format!("add the {rule}"), RouteNetlinkMessage::NewRule(message(rule)), CREATE)
    }

    /// Deletes exactly this rule.
    ///
    /// The kernel takes what a deletion leaves out for "any", so a rule of somebody else with our priority and more
    /// selectors would do for it. Callers therefore look whether the exact rule is there ([`Netlink::rules`]) first.
    ///
    /// # Errors
    /// [`NetlinkError::is_gone`] when there is no such rule; no CAP_NET_ADMIN.
    pub fn delete_rule(&mut self, rule: &Rule) -> Result<(), NetlinkError> {
        self.act(&format!("delete the {rule}"), RouteNetlinkMessage::DelRule(message(rule)), 0)
    }

    /// All rules of a family, in the order in which they apply.
    ///
    /// # Errors
    /// The kernel did not answer.
    pub fn rules(&mut self, family: Family) -> Result<Vec<Rule>, NetlinkError> {
        let act = "list the rules";
        let mut request = RuleMessage::default();
        request.header.family = address_family(family);
        self.dump(act, &RouteNetlinkMessage::GetRule(request), |rules: &mut Vec<Rule>, _, payload| {
            let message = RuleMessage::parse(payload).map_err(|error| NetlinkError::garbled(act, error))?;
            rules.push(rule(family, &message));
            Ok(())
        })
    }
}

fn message(rule: &Rule) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = address_family(rule.family);
    let attributes = &mut message.attributes;
    attributes.push(RuleAttribute::Priority(rule.priority));
    attributes.push(RuleAttribute::Protocol(rule.origin.into()));
    if let Some(from) = rule.from {
        message.header.src_len = from.prefix_len();
        attributes.push(RuleAttribute::Source(from.network()));
    }
    if let Some(to) = rule.to {
        message.header.dst_len = to.prefix_len();
        attributes.push(RuleAttribute::Destination(to.network()));
    }
    attributes.extend(rule.iif.clone().map(RuleAttribute::Iifname));
    attributes.extend(rule.oif.clone().map(RuleAttribute::Oifname));
    if let Some(MarkMatch { mark, mask }) = rule.mark {
        attributes.extend([RuleAttribute::FwMark(mark), RuleAttribute::FwMask(mask)]);
    }
    attributes.extend(rule.protocol.map(|protocol| RuleAttribute::IpProtocol(IpProtocol::from(protocol))));
    attributes.extend(rule.source_ports.map(range).map(RuleAttribute::SourcePortRange));
    attributes.extend(rule.destination_ports.map(range).map(RuleAttribute::DestinationPortRange));
    attributes.extend(rule.uids.map(|(start, end)| RuleAttribute::UidRange(RuleUidRange { start, end })));
    attributes.extend(rule.suppress_prefix_length.map(RuleAttribute::SuppressPrefixLen));
    message.header.action = match rule.action {
        RuleAction::Lookup(table) => {
            attributes.push(RuleAttribute::Table(table.0));
            Action::ToTable
        }
        RuleAction::Goto(priority) => {
            attributes.push(RuleAttribute::Goto(priority));
            Action::Goto
        }
        RuleAction::Nop => Action::Nop,
        RuleAction::Other(action) => Action::from(action),
    };
    message
}

fn range(ports: Ports) -> RulePortRange {
    RulePortRange { start: ports.first, end: ports.last }
}

fn ports(range: RulePortRange) -> Ports {
    Ports { first: range.start, last: range.end }
}

fn rule(family: Family, message: &RuleMessage) -> Rule {
    let mut rule = Rule::new(family, 0, RuleAction::Nop);
    rule.origin = 0;
    rule.inverted = message.header.flags.contains(RuleFlags::Invert);
    rule.foreign_selectors = message.header.tos != 0 || rule.inverted;
    let prefix = |ip: IpAddr, length| IpNet::new(ip, length).ok();
    let (mut table, mut target, mut mark, mut mask) = (u32::from(message.header.table), 0, None, None);
    for attribute in &message.attributes {
        match attribute {
            RuleAttribute::Priority(priority) => rule.priority = *priority,
            RuleAttribute::Protocol(origin) => rule.origin = u8::from(*origin),
            RuleAttribute::Source(ip) => rule.from = prefix(*ip, message.header.src_len),
            RuleAttribute::Destination(ip) => rule.to = prefix(*ip, message.header.dst_len),
            RuleAttribute::Iifname(name) => rule.iif = Some(name.clone()),
            RuleAttribute::Oifname(name) => rule.oif = Some(name.clone()),
            RuleAttribute::FwMark(value) => mark = Some(*value),
            RuleAttribute::FwMask(value) => mask = Some(*value),
            RuleAttribute::IpProtocol(protocol) => rule.protocol = Some(u8::from(*protocol)),
            RuleAttribute::SourcePortRange(range) => rule.source_ports = Some(ports(*range)),
            RuleAttribute::DestinationPortRange(range) => rule.destination_ports = Some(ports(*range)),
            RuleAttribute::UidRange(range) => rule.uids = Some((range.start, range.end)),
            RuleAttribute::SuppressPrefixLen(NOTHING_SUPPRESSED) => {}
            RuleAttribute::SuppressPrefixLen(length) => rule.suppress_prefix_length = Some(*length),
            RuleAttribute::SuppressIfGroup(NOTHING_SUPPRESSED) => {}
            RuleAttribute::SuppressIfGroup(_) => rule.suppresses_group = true,
            RuleAttribute::Table(number) => table = *number,
            RuleAttribute::Goto(priority) => target = *priority,
            RuleAttribute::Realm(_) | RuleAttribute::TunId(_) | RuleAttribute::L3MDev(true) => {
                rule.foreign_selectors = true;
            }
            RuleAttribute::Other(other) if SELECTS_BY_MORE.contains(&other.kind()) => rule.foreign_selectors = true,
            // The dump also carries padding and what newer kernels add; a rule of ours never needs those.
            _ => {}
        }
    }
    if mark.is_some() || mask.is_some() {
        let mark = mark.unwrap_or_default();
        rule.mark = Some(MarkMatch { mark, mask: mask.unwrap_or(u32::MAX) });
    }
    rule.action = match message.header.action {
        Action::ToTable => RuleAction::Lookup(RouteTable(table)),
        Action::Goto => RuleAction::Goto(target),
        Action::Nop => RuleAction::Nop,
        other => RuleAction::Other(u8::from(other)),
    };
    rule
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_that_is_sent_reads_back_as_the_same_rule() {
        let plain = Rule::new(Family::V4, 9020, RuleAction::Lookup(RouteTable(2022)));
        let full = Rule {
            from: Some("0.0.0.0/32".parse().unwrap()),
            to: Some("10.0.0.0/8".parse().unwrap()),
            iif: Some("lo".to_owned()),
            oif: Some("eth0".to_owned()),
            mark: Some(MarkMatch { mark: 1, mask: 3 }),
            protocol: Some(17),
            source_ports: Some(Ports { first: 1, last: 2 }),
            destination_ports: Some(Ports { first: 53, last: 53 }),
            uids: Some((0, 5)),
            suppress_prefix_length: Some(7),
            ..plain.clone()
        };
        let onward = Rule::new(Family::V6, 9001, RuleAction::Goto(9090));
        for sent in [plain, full, onward, Rule::new(Family::V6, 9090, RuleAction::Nop)] {
            assert_eq!(rule(sent.family, &message(&sent)), sent);
        }
    }
}
