//! The host as it would be without us: what a plan is made from while another is in force.

use std::ffi::OsStr;
use std::path::Path;

use super::{Applied, Done};
use crate::platform::firewall;
use crate::platform::plan::{HostPlan, of_interface};
use crate::platform::routing::Rule;
use crate::platform::survey::{NftState, Parameters, Survey};
use crate::platform::undo::Undo;

impl Applied {
    /// Takes out of `survey` what is there because of us; of /etc/resolv.conf it is not known here. `tun` is the number of
    /// our interface.
    pub(super) fn without_ours(&self, mut survey: Survey, tun: u32) -> Survey {
        let undos: Vec<&Undo> = self.undos_in_force().collect();
        let tables = [self.plan.numbers.captured, self.plan.numbers.always];
        survey.links.retain(|link| link.index != tun);
        survey.device = Some(tun);
        survey.tuns.remove(&tun);
        survey.addresses.retain(|(index, _)| *index != tun);
        survey.routes.retain(|route| !tables.contains(&route.table) && route.device != Some(tun));
        survey.tables.retain(|table| !tables.contains(table));
        let ours = |rule: &Rule| undos.iter().any(|undo| matches!(undo, Undo::Rule(ours) if ours == rule));
        survey.rules.retain(|rule| !ours(rule));
        if let (NftState::Present { tables, kill_switches, .. }, Some(nft)) = (&mut survey.nft, &self.plan.nft) {
            kill_switches.retain(|table| *table != nft.table);
            tables.remove(&nft.table);
            // The name stays ours even where a better one has become free.
            tables.extend(firewall::names_before(&nft.table));
        }
        survey.answering.clone_from(&self.plan.listening);
        survey.unconnected.clone_from(&self.plan.unconnected);
        survey.known_uplinks.clone_from(&self.plan.uplinks);
        survey.ipv6 &= carries_ipv6(&self.plan);
        undos.iter().for_each(|undo| forget_parameter(&mut survey.parameters, undo));
        survey
    }

    fn undos_in_force(&self) -> impl Iterator<Item = &Undo> {
        self.done.iter().filter_map(|done| match done {
            Done::Change(_, undo) => Some(undo),
            Done::Firewall(_) | Done::Resolved => None,
        })
    }
}

/// Whether the TUN was found able to carry IPv6.
fn carries_ipv6(plan: &HostPlan) -> bool {
    let path = of_interface("ipv6", &plan.tun, "disable_ipv6");
    plan.sysctls.iter().any(|sysctl| sysctl.of_tun && sysctl.path == path)
}

/// Has a parameter read as it did before we wrote it.
fn forget_parameter(parameters: &mut Parameters, undo: &Undo) {
    let Undo::Sysctl { path, ours: Some(_), old } = undo else { return };
    match path.as_str() {
        "net/ipv4/ip_forward" => parameters.forward_v4 = old != "0",
        "net/ipv6/conf/all/forwarding" => parameters.forward_v6 = old != "0",
        path => {
            let path = Path::new(path);
            let name = path.parent().and_then(Path::file_name).and_then(OsStr::to_str);
            if let Some(name) = name.filter(|_| path.ends_with("accept_ra") && old == "1") {
                parameters.host_only_advertisements.insert(name.to_owned());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wrote(path: &str, ours: &str, old: &str) -> Undo {
        Undo::Sysctl { path: path.to_owned(), ours: Some(ours.to_owned()), old: old.to_owned() }
    }

    #[test]
    fn what_we_switched_on_reads_as_off_and_what_others_did_as_it_is() {
        let mut parameters = Parameters { forward_v4: true, forward_v6: true, ..Parameters::default() };
        forget_parameter(&mut parameters, &wrote("net/ipv4/ip_forward", "1", "0"));
        assert!(!parameters.forward_v4 && parameters.forward_v6);
        forget_parameter(&mut parameters, &wrote("net/ipv6/conf/eth0/accept_ra", "2", "1"));
        assert!(parameters.host_only_advertisements.contains("eth0"));
    }
}
