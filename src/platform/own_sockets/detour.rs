//! Why what bears our mark comes back: the rule or the route that leads it into the TUN, and where it should have gone.

use std::net::{IpAddr, SocketAddr};

use super::OwnSockets;
use crate::platform::routing::{Family, Link, MarkMatch, RouteTable, Rule, RuleAction, SeenRoute};
use crate::platform::{Netlink, NetlinkError};

/// Rules and routes of one family, as far as they are for one destination.
struct Seen {
    rules: Vec<Rule>,
    routes: Vec<SeenRoute>,
    links: Vec<Link>,
}

impl OwnSockets {
    /// What to say when packets of ours for `destination` have come back.
    pub(super) fn words(&self, destination: SocketAddr) -> String {
        let (tun, to) = (&self.tun, destination.ip());
        let seen = Seen::of(to).ok();
        let mark = self.mark.map_or(0, |mark| mark.0);
        let leaves = seen.as_ref().and_then(|seen| seen.leaves_by(to, tun));
        let instead = leaves.map_or_else(String::new, |device| format!(" instead of leaving by {device}"));
        let marked = self.mark.map_or_else(String::new, |mark| format!(" mark {:#x}", mark.0));
        let why = match seen.as_ref().and_then(|seen| seen.culprit(to, mark, tun)) {
            Some(Rule { action: RuleAction::Lookup(RouteTable::MAIN), .. }) => {
                format!("a route of the table main leads there: `ip route get {to}{marked}` shows it")
            }
            Some(rule) => format!("another program's {rule} leads there before ours lets them pass; have it removed"),
            None => format!("a rule or a route of another program leads there: `ip route get {to}{marked}` shows it"),
        };
        format!(
            "our own packets for {destination} came back to us by {tun}{instead}: {why}. They are refused, and so is \
             whatever else comes back; this is said once a minute"
        )
    }
}

impl Seen {
    fn of(to: IpAddr) -> Result<Self, NetlinkError> {
        let mut netlink = Netlink::open()?;
        let family = if to.is_ipv4() { Family::V4 } else { Family::V6 };
        let mut rules = netlink.rules(family)?;
        rules.sort_by_key(|rule| rule.priority);
        let routes = netlink.routes(family, |route| route.to.contains(&to))?;
        Ok(Self { rules, routes, links: netlink.links()? })
    }

    /// The device by which the main table sends, if that is not the TUN.
    fn leaves_by(&self, to: IpAddr, tun: &str) -> Option<&str> {
        let device = self.best(RouteTable::MAIN, to)?.device?;
        self.links.iter().find(|link| link.index == device && link.name != tun).map(|link| link.name.as_str())
    }

    /// The rule by which an unbound socket with `mark` is led into the TUN.
    fn culprit(&self, to: IpAddr, mark: u32, tun: &str) -> Option<&Rule> {
        let tun = self.links.iter().find(|link| link.name == tun)?.index;
        let mut from = 0;
        for rule in &self.rules {
            if rule.priority < from || !selects(rule, to, mark) {
                continue;
            }
            match rule.action {
                RuleAction::Goto(target) => from = target,
                RuleAction::Lookup(table) => {
                    let suppressed = rule.suppress_prefix_length;
                    let counts =
                        |route: &&SeenRoute| suppressed.is_none_or(|most| u32::from(route.to.prefix_len()) > most);
                    if let Some(device) = self.best(table, to).filter(counts).and_then(|route| route.device) {
                        return (device == tun).then_some(rule);
                    }
                }
                RuleAction::Nop | RuleAction::Other(_) => {}
            }
        }
        None
    }

    fn best(&self, table: RouteTable, to: IpAddr) -> Option<&SeenRoute> {
        let fitting = self.routes.iter().filter(|route| route.table == table && route.to.contains(&to));
        fitting.max_by_key(|route| route.to.prefix_len())
    }
}

/// Whether a rule is for what a socket of ours sends, as far as can be told.
fn selects(rule: &Rule, to: IpAddr, mark: u32) -> bool {
    let of_mark = rule.mark.is_none_or(|MarkMatch { mark: wanted, mask }| mark & mask == wanted & mask);
    let of_host = rule.iif.as_deref().is_none_or(|name| name == "lo") && rule.oif.is_none();
    let unbound = rule.from.is_none_or(|from| from.addr().is_unspecified());
    let there = rule.to.is_none_or(|net| net.contains(&to));
    match rule.inverted {
        true => !(of_mark && of_host && unbound && there),
        false => of_mark && of_host && unbound && there && !rule.foreign_selectors,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: u32 = 0x100_0000;

    fn host(strangers: Vec<Rule>) -> Seen {
        let rule = |priority, action| Rule::new(Family::V4, priority, action);
        let lookup = |priority, table| rule(priority, RuleAction::Lookup(RouteTable(table)));
        let pass = Rule { mark: Some(MarkMatch { mark: OWN, mask: OWN }), ..rule(9000, RuleAction::Goto(9090)) };
        let mut rules = vec![lookup(0, 255), pass, lookup(9043, 2022), rule(9090, RuleAction::Nop), lookup(32766, 254)];
        rules.extend(strangers);
        rules.sort_by_key(|rule| rule.priority);
        let route = |table, to: &str, device| SeenRoute {
            table: RouteTable(table),
            to: to.parse().unwrap(),
            device: Some(device),
            on_link: false,
        };
        let routes = vec![route(254, "0.0.0.0/0", 2), route(2022, "0.0.0.0/0", 9), route(254, "203.0.113.0/24", 3)];
        let link = |index, name: &str| Link { index, name: name.to_owned() };
        Seen { rules, routes, links: vec![link(2, "eth0"), link(3, "eth1"), link(9, "tun7")] }
    }

    #[test]
    fn the_rule_is_found_that_stands_before_ours_and_the_device_that_it_should_have_been() {
        let to = "203.0.113.10".parse().unwrap();
        assert_eq!(host(Vec::new()).culprit(to, OWN, "tun7"), None);
        let strange = Rule { origin: 3, ..Rule::new(Family::V4, 100, RuleAction::Lookup(RouteTable(2022))) };
        let elsewhere = Rule { to: Some("192.0.2.0/24".parse().unwrap()), priority: 90, ..strange.clone() };
        let seen = host(vec![elsewhere, strange.clone()]);
        assert_eq!(seen.culprit(to, OWN, "tun7"), Some(&strange));
        assert_eq!(seen.leaves_by(to, "tun7"), Some("eth1"));
        let mark = Some(MarkMatch { mark: 7, mask: u32::MAX });
        assert_eq!(host(vec![Rule { mark, ..strange }]).culprit(to, OWN, "tun7"), None, "it is not for our mark");
    }

    #[test]
    fn a_route_of_the_main_table_is_found_too() {
        let mut seen = host(Vec::new());
        let to = "203.0.113.10".parse().unwrap();
        seen.routes.iter_mut().filter(|route| route.to.prefix_len() == 24).for_each(|route| route.device = Some(9));
        let culprit = seen.culprit(to, OWN, "tun7").map(|rule| rule.action);
        assert_eq!(culprit, Some(RuleAction::Lookup(RouteTable::MAIN)));
        assert_eq!(seen.leaves_by(to, "tun7"), None);
    }
}
