//! nftables, and our table in it.

use super::super::finding::Finding;
use super::super::record::Record;
use super::super::ruleset;
use crate::platform::{HostPlan, RuleAction};

const LOST: &str = "answers of UDP servers on the wildcard address, port forwards, inbound IPv6 to a LAN, and DNS \
                    questions of sockets bound to an interface are not taken care of";

/// What a program is told whose packet the firewall drops on its way out (EPERM).
const FORBIDDEN: &str = "Operation not permitted";

/// Whether something that was to be sent was dropped on this host itself, by what the sender was told.
pub(super) fn is_of_our_own(why: &str) -> bool {
    why.contains(FORBIDDEN)
}

/// Whether nobody has answered.
pub(super) fn is_silence(why: &str) -> bool {
    why.starts_with("no answer in")
}

/// Of somebody whose answers would be dropped on this host, by that chain.
pub(super) fn unheard(whom: &str, chain: &str) -> Finding {
    Finding::warning(
        format!(
            "{whom} does not answer, or is not heard: the host's own firewall drops what comes back (chain {chain})"
        ),
        "have that chain let answers pass, as is said of the way out, and look again",
    )
}

/// That it was, in words, with the chains that may be why.
pub(super) fn dropped_here(record: &Record) -> String {
    let chains = culprits(record);
    let which = if chains.is_empty() { String::new() } else { format!(" (chain {})", chains.join("; or ")) };
    format!("the host's own firewall drops what it sends{which}")
}

/// What to do about that.
pub(super) fn let_out(record: &Record) -> &'static str {
    match culprits(record).is_empty() {
        true => {
            "a chain on the output hook drops them: find it (`sudo nft list ruleset`, `sudo iptables -S OUTPUT`), and let pass \
             what tunproxy sends, as any program of root's"
        }
        false => {
            "let pass there what tunproxy sends, as any program of root's (`sudo nft list ruleset` shows the chain as a whole)"
        }
    }
}

fn culprits(record: &Record) -> Vec<String> {
    let ours = record.plan().and_then(|plan| plan.nft.as_ref()).map(|nft| format!("inet {}", nft.table));
    let rules = record.firewall.ruleset.as_deref().unwrap_or_default();
    ruleset::dropping_output(rules, ours.as_deref())
}

pub(super) fn check(record: &Record) -> Vec<Finding> {
    let mut found = table(record);
    found.extend(gates(record));
    found
}

/// Chains of others that stop what the TUN carries.
fn gates(record: &Record) -> Vec<Finding> {
    let takes = |plan: &&HostPlan| {
        let captures = plan.rules.iter().any(|rule| rule.action == RuleAction::Lookup(plan.numbers.captured));
        // What only others send never comes to this host, nor from it.
        captures && plan.takes_own_traffic()
    };
    let Some(plan) = record.plan_or_start().filter(takes) else { return Vec::new() };
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
    use super::super::super::fixture::{only_problem, plan_of, quiet, running, warnings};
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
    fn a_gateway_that_leaves_its_own_traffic_out_is_stopped_by_no_such_chain() {
        let mut record = quiet();
        let NftState::Present { gates, .. } = &mut record.survey.nft else { panic!("no nft") };
        let chain = "inet adm input".to_owned();
        gates.push(Gate { chain, hook: Hook::Input, drops: true, rules: Vec::new() });
        assert!(only_problem(&check(&record)).is_some());
        for selection in ["exclude-interface: [lo]", "include-interface: [eth0]"] {
            record.start.as_mut().unwrap().plan = Some(Box::new(plan_of(selection, &record.survey)));
            assert!(only_problem(&check(&record)).is_none(), "{selection}");
        }
        let with_own = plan_of("include-interface: [eth0, lo]", &record.survey);
        record.start.as_mut().unwrap().plan = Some(Box::new(with_own));
        assert!(only_problem(&check(&record)).is_some());
    }

    #[test]
    fn what_was_dropped_here_is_told_with_the_chain_and_ours_is_not_named() {
        let mut record = running();
        assert_eq!(dropped_here(&record), "the host's own firewall drops what it sends");
        let chain = "\tchain o {\n\t\ttype filter hook output priority 0; policy accept;\n\t\tudp dport 53 drop\n\t}\n";
        let ours = record.firewall.ruleset.unwrap();
        record.firewall.ruleset = Ok(format!("table ip f {{\n{chain}}}\n{ours}"));
        assert!(dropped_here(&record).ends_with("(chain ip f o: `udp dport 53 drop`)"), "{}", dropped_here(&record));
        record.firewall.ruleset = Ok(format!("table inet tunproxy {{\n{chain}}}\n"));
        assert!(culprits(&record).is_empty());
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
