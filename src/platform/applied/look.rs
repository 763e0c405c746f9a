//! Looking whether a plan is true.

use ipnet::IpNet;

use super::settle::Seen;
use super::{Applied, Done, HostError, Step};
use crate::platform::imp::{resolv_conf, sysctl};
use crate::platform::resolver::DnsPlan;
use crate::platform::routing::{Family, LinkState, Route, RouteKind, SeenRoute};
use crate::platform::survey::{NftState, Survey};
use crate::platform::undo::Undo;

/// What is there, read in one go.
#[derive(Debug)]
pub(super) struct Look {
    /// All of it, what is ours included.
    pub(super) survey: Survey,
    /// The interface that has the TUN's name.
    pub(super) link: Option<LinkState>,
    /// The firewall table is in force as far as somebody looked.
    firewall: bool,
    /// systemd-resolved knows what we told it, as far as somebody asked.
    resolved: bool,
}

impl Applied {
    /// Looks at the host; at the firewall and at systemd-resolved only where `seen` says so, because those take longest.
    pub(super) fn look(&mut self, seen: Seen) -> Result<Look, HostError> {
        let numbers = self.plan.numbers;
        let known = if seen.firewall { None } else { self.firewall_seen.clone() };
        let mut survey = Survey::again(known, &[numbers.captured, numbers.always])?;
        match (&survey.nft, &self.firewall_seen) {
            (NftState::Present { .. }, _) => self.firewall_seen = Some(survey.nft.clone()),
            // It answered before: busy, or being replaced by a newer one.
            (NftState::Missing(_), Some(seen)) => survey.nft = seen.clone(),
            (NftState::Missing(_), None) => {}
        }
        let link = self.netlink.link_state(&self.plan.tun)?;
        let firewall = !seen.firewall || self.firewall_in_place();
        let resolved = match &self.plan.dns {
            DnsPlan::Resolved { servers } if seen.resolver => resolv_conf::resolved_knows(&self.plan.tun, servers),
            _ => true,
        };
        Ok(Look { survey, link, firewall, resolved })
    }

    /// The first route of somebody else in a table of ours: it would take traffic there before ours does, or besides.
    pub(super) fn intruder<'a>(&self, look: &'a Look) -> Option<&'a SeenRoute> {
        let tables = [self.plan.numbers.captured, self.plan.numbers.always];
        let index = look.link.map(|link| link.index);
        let refuses = |to: IpNet, table| {
            let same = |route: &&Route| (route.table, route.to) == (table, to);
            self.plan.routes.iter().filter(same).any(|route| !matches!(route.kind, RouteKind::Device(_)))
        };
        // What refuses has no device. A route of ours that is wanted no more is taken away at the end of the same look.
        let ours = |seen: &SeenRoute| match seen.device {
            Some(_) => seen.device == index,
            None => !seen.on_link && (refuses(seen.to, seen.table) || self.has_set(seen)),
        };
        look.survey.routes.iter().find(|seen| tables.contains(&seen.table) && !ours(seen))
    }

    /// Whether a route like this one is on record as ours.
    fn has_set(&self, seen: &SeenRoute) -> bool {
        let same = |route: &Route| (route.table, route.to) == (seen.table, seen.to);
        self.done.iter().any(|done| matches!(done, Done::Change(_, Undo::Route(route)) if same(route)))
    }

    /// The steps of the plan that are not, or no longer, true.
    pub(super) fn not_in_place(&self, look: &Look) -> Vec<Step> {
        let open = |step: &Step| !self.in_place(step, look) && !self.passed_over.contains(step);
        self.plan.steps().into_iter().filter(open).collect()
    }

    fn in_place(&self, step: &Step, look: &Look) -> bool {
        match step {
            Step::Link => look.link.is_some_and(|link| link.up && link.mtu == self.plan.mtu),
            Step::Rule(rule) => look.survey.rules.contains(rule),
            Step::Address(address) => {
                let index = look.link.map(|link| link.index);
                look.survey.addresses.iter().any(|(at, held)| held == address && Some(*at) == index)
            }
            Step::Route(route) => leads(route, look),
            Step::Firewall => look.firewall && self.loaded_as_planned(),
            Step::Sysctl(wanted) => sysctl::read(&wanted.path).is_ok_and(|value| value == wanted.value),
            Step::Resolver => self.resolver_in_place(look),
        }
    }

    fn loaded_as_planned(&self) -> bool {
        if self.plan.has_kill_switch() {
            return self.standing == self.plan.nft;
        }
        self.done
            .iter()
            .any(|done| matches!(done, Done::Firewall(table) if Some(table.nft()) == self.plan.nft.as_ref()))
    }

    fn resolver_in_place(&self, look: &Look) -> bool {
        match &self.plan.dns {
            DnsPlan::Rewrite { text, .. } => {
                let path = std::path::Path::new(resolv_conf::PATH);
                let did = self
                    .done
                    .iter()
                    .any(|done| matches!(done, Done::Change(_, Undo::ResolvConf { ours, .. }) if ours == text));
                did && resolv_conf::read(path).is_some_and(|found| found == *text)
            }
            DnsPlan::Resolved { .. } => self.done.iter().any(|done| matches!(done, Done::Resolved)) && look.resolved,
            DnsPlan::Untouched => true,
        }
    }

    /// Whether the step was done before, so that somebody must have undone it.
    pub(super) fn was_done(&self, step: &Step, look: &Look) -> bool {
        match step {
            Step::Link => true,
            Step::Sysctl(wanted) if wanted.of_tun => true,
            // It stands, and only the plan has another one now.
            Step::Firewall if look.firewall => false,
            _ => self.done.iter().any(|done| stands_for(done, step)),
        }
    }
}

/// Whether `done` is what came of `step`.
pub(super) fn stands_for(done: &Done, step: &Step) -> bool {
    match (done, step) {
        (Done::Change(_, Undo::Rule(ours)), Step::Rule(rule)) => ours == rule,
        (Done::Change(_, Undo::Route(ours)), Step::Route(route)) => ours == route,
        (Done::Change(_, Undo::Address { address: ours, .. }), Step::Address(address)) => ours == address,
        (Done::Change(_, Undo::Sysctl { path, .. }), Step::Sysctl(wanted)) => {
            *path == wanted.path || sysctl::dragged_along(&wanted.path).contains(path)
        }
        (Done::Change(_, Undo::ResolvConf { .. }) | Done::Resolved, Step::Resolver) => true,
        (Done::Firewall(_) | Done::Change(_, Undo::Table(_)), Step::Firewall) => true,
        _ => false,
    }
}

/// Whether a route of ours is in its table, and leads into our interface if it should.
fn leads(route: &Route, look: &Look) -> bool {
    let index = look.link.map(|link| link.index);
    let to_device = matches!(route.kind, RouteKind::Device(_));
    look.survey.routes.iter().any(|seen| {
        let same = (seen.table, seen.to) == (route.table, route.to) && Family::of(&seen.to) == Family::of(&route.to);
        same && seen.on_link == to_device && seen.device == index.filter(|_| to_device)
    })
}
