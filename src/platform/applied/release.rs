//! The first half of going back: new traffic goes its own way again, and open flows are still carried.

use super::{Applied, Done, HostError};
use crate::platform::firewall::CAPTURE_DNS;
use crate::platform::imp::sysctl;
use crate::platform::layout::{self, CAPTURE_STAGE};
use crate::platform::plan::HostPlan;
use crate::platform::routing::{Family, Rule};
use crate::platform::undo::Undo;

impl Applied {
    /// Gives up what takes new traffic: the resolver, the rules that capture, and what the firewall marks of this host's
    /// own. What open flows live on stays until [`Applied::revert`]: were it gone, their packets would leave past the
    /// rules. So on a host that forwards, the rules that take the flows of other hosts stay too. A kill switch gives up
    /// nothing here: it opens when the last flow has ended, and new ones are carried until then.
    ///
    /// # Errors
    /// What could not be undone; [`Applied::revert`] tries again.
    pub fn release(&mut self) -> Result<(), HostError> {
        if self.plan.has_kill_switch() {
            return Ok(());
        }
        self.back.get_or_insert_default();
        let forwarding = Family::BOTH.into_iter().filter(|family| forwards(*family)).collect::<Vec<_>>();
        let (mut kept, mut void, mut failed) = (Vec::new(), Vec::new(), Vec::new());
        while let Some(done) = self.done.pop() {
            if !takes_new_traffic(&done, &self.plan, &forwarding) {
                kept.push(done);
                continue;
            }
            match self.undo(&done) {
                Ok(undone) => void.extend(undone.map(|(id, _)| id)),
                Err(error) => {
                    failed.push(error);
                    kept.push(done);
                }
            }
        }
        let tables = kept.iter_mut().filter_map(|done| match done {
            Done::Firewall(table) => Some(table),
            Done::Change(..) | Done::Resolved => None,
        });
        let unfinished = tables.filter_map(|table| table.flush(CAPTURE_DNS).err());
        failed.extend(unfinished.map(|error| format!("empty the firewall chain {CAPTURE_DNS}: {error}")));
        kept.reverse();
        self.done = kept;
        self.journal.lock().void(&void)?;
        if failed.is_empty() { Ok(()) } else { Err(HostError::NotUndone(failed)) }
    }
}

fn takes_new_traffic(done: &Done, plan: &HostPlan, forwarding: &[Family]) -> bool {
    match done {
        Done::Resolved | Done::Change(_, Undo::ResolvConf { .. }) => true,
        Done::Change(_, Undo::Rule(rule)) => {
            layout::stage(rule, &plan.numbers) >= CAPTURE_STAGE && !carries_open_flows(rule, plan, forwarding)
        }
        Done::Change(..) | Done::Firewall(_) => false,
    }
}

fn carries_open_flows(rule: &Rule, plan: &HostPlan, forwarding: &[Family]) -> bool {
    let of_the_host = rule.from.is_some_and(|from| plan.addresses.iter().any(|ours| ours.addr() == from.addr()));
    // Fake addresses lead nowhere else.
    let of_fakes = rule.to.is_some();
    let of_others = rule.from.is_none() && rule.iif.is_none() && forwarding.contains(&rule.family);
    of_the_host || of_fakes || of_others
}

/// Whether this host forwards for others now.
fn forwards(family: Family) -> bool {
    let path = match family {
        Family::V4 => "net/ipv4/ip_forward",
        Family::V6 => "net/ipv6/conf/all/forwarding",
    };
    sysctl::read(path).is_ok_and(|value| value != "0")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::plan::tests::options;
    use crate::platform::survey::tests::plain;

    fn released(forwarding: &[Family]) -> Vec<String> {
        let plan = HostPlan::new(&options(), &plain()).unwrap();
        let first = plan.numbers.first_priority;
        let given_up =
            |rule: &&Rule| takes_new_traffic(&Done::Change(None, Undo::Rule((*rule).clone())), &plan, forwarding);
        let mut names: Vec<String> = plan
            .rules
            .iter()
            .filter(given_up)
            .map(|rule| format!("{:?} B+{}", rule.family, rule.priority - first))
            .collect();
        names.sort();
        names.dedup();
        names
    }

    #[test]
    fn a_desktop_gives_up_all_that_is_not_bound_to_the_tun() {
        assert_eq!(released(&[]), ["V4 B+20", "V4 B+25", "V4 B+40", "V4 B+43", "V6 B+25", "V6 B+43"]);
    }

    #[test]
    fn a_gateway_keeps_what_its_clients_flows_live_on() {
        assert_eq!(released(&Family::BOTH), ["V4 B+20", "V4 B+40"]);
    }
}
