//! nftables, and our table in it.

use super::super::finding::Finding;
use super::super::record::Record;
use super::super::ruleset;
use crate::platform::RuleAction;

const LOST: &str = "answers of UDP servers on the wildcard address, port forwards, inbound IPv6 to a LAN, and DNS \
                    questions of sockets bound to an interface are not taken care of";

pub(super) fn check(record: &Record) -> Vec<Finding> {
    let mut found = table(record);
    found.extend(gates(record));
    found
}

/// Chains of others that stop what the TUN carries.
fn gates(record: &Record) -> Vec<Finding> {
    let own = record.plan().or(record.start.as_ref().and_then(|start| start.plan.as_deref()));
    let Some(plan) =
        own.filter(|plan| plan.rules.iter().any(|rule| rule.action == RuleAction::Lookup(plan.numbers.captured)))
    else {
        return Vec::new();
    };
    let tun = plan.tun.as_str();
    let gates = record.survey.gates_before(tun);
    gates.map(|gate| Finding::problem(gate.harm(tun), format!("let it pass: `sudo {}`", gate.remedy(tun)))).collect()
}

/// Our own table.
fn table(record: &Record) -> Vec<Finding> {
    let firewall = &record.firewall;
    if !firewall.installed {
        return vec![Finding::warning(
            format!("nftables is not installed: {LOST}"),
            "install it (`sudo apt install nftables`, or as your distribution calls it) and restart tunproxy",
        )];
    }
    let rules = match &firewall.ruleset {
        Ok(rules) => rules,
        // Whoever may not look is told so elsewhere.
        Err(_) if !record.rights.network => return Vec::new(),
        Err(why) => {
            return vec![Finding::warning(
                format!("nftables is installed and cannot be used ({why}): {LOST}"),
                "load the kernel's nf_tables (`sudo modprobe nf_tables`), or look what forbids it",
            )];
        }
    };
    let Some(plan) = record.plan().filter(|plan| !plan.rules.is_empty()) else {
        return vec![Finding::fine("nftables can be used")];
    };
    let Some(nft) = &plan.nft else {
        return vec![Finding::warning(
            format!("tunproxy was started without a firewall table, though nftables can be used: {LOST}"),
            "restart tunproxy",
        )];
    };
    let complete = ruleset::has_chains(rules, &format!("inet {}", nft.table), nft.chains());
    match complete {
        true => vec![Finding::fine(format!("the firewall table inet {} is loaded", nft.table))],
        false => vec![Finding::problem(
            format!("the firewall table inet {} is not there, or lacks chains: {LOST}", nft.table),
            "tunproxy loads it again within a second: look again. If it is still away, its log says why it cannot be \
             loaded",
        )],
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::fixture::{only_problem, quiet, running, warnings};
    use super::*;
    use crate::platform::{Gate, Hook, NftState};

    #[test]
    fn a_loaded_table_is_fine_and_one_that_lacks_a_chain_is_not() {
        assert!(only_problem(&check(&running())).is_none());
        let mut record = running();
        record.firewall.ruleset = Ok(record.firewall.ruleset.unwrap().replace("chain caught", "chain other"));
        assert!(only_problem(&check(&record)).unwrap().what.contains("inet tunproxy is not there"));
    }

    #[test]
    fn a_chain_that_stops_the_tun_is_a_problem_with_the_rule_to_add() {
        for mut record in [running(), quiet()] {
            let NftState::Present { gates, .. } = &mut record.survey.nft else { panic!("no nft") };
            let chain = "inet adm input".to_owned();
            gates.push(Gate { chain, hook: Hook::Input, drops: true, rules: Vec::new() });
            let found = check(&record);
            let Some(problem) = only_problem(&found) else { continue };
            let wanted = "nft insert rule inet adm input iifname \"tunproxy0\" ct state established,related accept";
            assert!(problem.advice.contains(wanted), "{problem:?}");
            return;
        }
        panic!("nobody was told");
    }

    #[test]
    fn nftables_that_is_missing_or_of_no_use_is_a_warning_with_what_is_lost() {
        let mut record = quiet();
        record.firewall.ruleset = Err("Operation not supported".to_owned());
        assert!(warnings(&check(&record))[0].contains("Operation not supported"));
        record.rights.network = false;
        assert!(check(&record).is_empty(), "nobody who may not look can tell");
        record.firewall.installed = false;
        assert!(warnings(&check(&record))[0].contains("port forwards"));
    }
}
