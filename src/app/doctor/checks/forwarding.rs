//! What a gateway needs beside the rules: forwarding, chains that let it through, and a reverse-path filter that knows us.

use super::super::finding::Finding;
use super::super::record::Record;
use super::super::ruleset;

pub(super) fn check(record: &Record) -> Vec<Finding> {
    let mut found = strict(record);
    if record.is_gateway() {
        found.extend(switches(record));
        found.extend(chains(record));
        if found.is_empty() {
            found.push(Finding::fine("other hosts can use this one as their gateway"));
        }
    }
    found
}

/// The switches that a gateway needs on. Those that `tun.auto-forward` throws at the start are not missed before it.
fn switches(record: &Record) -> Vec<Finding> {
    let at_start = record.plan().is_none() && record.profile.as_ref().is_some_and(|profile| profile.auto_forward);
    if at_start {
        return Vec::new();
    }
    let v6 = record.survey.ipv6;
    let off = [
        (record.survey.parameters.forward_v4, "net.ipv4.ip_forward", "IPv4"),
        (record.survey.parameters.forward_v6 || !v6, "net.ipv6.conf.all.forwarding", "IPv6"),
    ];
    let off = off.into_iter().filter(|(on, ..)| !on);
    off.map(|(_, name, family)| {
        Finding::problem(
            format!("this host does not forward {family} ({name} is 0), so that it is no gateway for others"),
            format!(
                "switch it on: `sudo sysctl -w {name}=1`, or write `tun: {{ auto-forward: true }}` and restart tunproxy"
            ),
        )
    })
    .collect()
}

/// Chains that drop what is forwarded, unless they let the TUN's traffic through.
fn chains(record: &Record) -> Vec<Finding> {
    let Ok(rules) = &record.firewall.ruleset else { return Vec::new() };
    let tun = match (record.plan(), &record.profile) {
        (Some(plan), _) => plan.tun.as_str(),
        (None, Some(profile)) => profile.device.as_str(),
        (None, None) => return Vec::new(),
    };
    let dropping = ruleset::dropping_forward(rules).into_iter().filter(|chain| !chain.lets_through(tun));
    dropping
        .map(|chain| {
            let name = chain.name;
            Finding::problem(
                format!("the firewall chain {name} drops what other hosts send through this one"),
                format!(
                    "let it through: `sudo nft insert rule {name} iifname {tun} accept; sudo nft insert rule {name} \
                     oifname {tun} accept`"
                ),
            )
        })
        .collect()
}

/// A strict reverse-path filter needs the firewall table, and on a gateway's uplink our mark.
fn strict(record: &Record) -> Vec<Finding> {
    let strict = &record.survey.parameters.strict_reverse_path;
    if strict.is_empty() {
        return Vec::new();
    }
    let Some(plan) = record.plan().filter(|plan| !plan.rules.is_empty()) else { return Vec::new() };
    if plan.nft.is_none() {
        let names: Vec<&str> = strict.iter().map(String::as_str).collect();
        return vec![Finding::problem(
            format!(
                "the reverse-path filter is strict (rp_filter is 1 on {}), and tunproxy has no firewall table, without \
                 which that filter drops what comes back through the TUN",
                names.join(", ")
            ),
            "install nftables and restart tunproxy; or set rp_filter to 2 (`sudo sysctl -w net.ipv4.conf.all.rp_filter=2`)",
        )];
    }
    if !record.survey.parameters.forward_v4 {
        return Vec::new();
    }
    let unmarked = record.uplinks().into_iter().filter(|uplink| {
        let path = format!("net/ipv4/conf/{}/src_valid_mark", uplink.name);
        strict.contains(&uplink.name) && record.parameter(&path) == Some("0")
    });
    unmarked
        .map(|uplink| {
            let name = &uplink.name;
            Finding::problem(
                format!(
                    "the reverse-path filter of {name} has become strict (rp_filter is 1): port forwards that come in \
                     there are dropped"
                ),
                format!(
                    "tunproxy sets what is needed for that within a second: look again. If it is still so, set it back: \
                     `sudo sysctl -w net.ipv4.conf.{name}.rp_filter=2`"
                ),
            )
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::super::fixture::{only_problem, quiet, running};
    use super::*;

    fn gateway(mut record: Record) -> Record {
        let profile = record.profile.as_mut().unwrap();
        (profile.gateway, profile.auto_forward) = (true, true);
        record.survey.parameters.forward_v4 = true;
        record.survey.parameters.forward_v6 = true;
        record
    }

    #[test]
    fn a_desktop_needs_none_of_this_and_a_gateway_that_forwards_is_fine() {
        assert!(check(&quiet()).is_empty() && check(&running()).is_empty());
        assert!(only_problem(&check(&gateway(running()))).is_none());
    }

    #[test]
    fn forwarding_that_was_switched_off_is_named() {
        let mut record = gateway(running());
        record.survey.parameters.forward_v4 = false;
        assert!(only_problem(&check(&record)).unwrap().advice.contains("sysctl -w net.ipv4.ip_forward=1"));
        // A start will see to it.
        let mut record = gateway(quiet());
        record.survey.parameters.forward_v4 = false;
        assert!(only_problem(&check(&record)).is_none());
    }

    #[test]
    fn a_chain_that_drops_is_named_until_it_lets_us_through() {
        let chain = |rules: &str| {
            format!(
                "table ip filter {{\n\tchain FORWARD {{\n\t\ttype filter hook forward priority filter; policy drop;\n{rules}\t}}\n}}\n"
            )
        };
        let mut record = gateway(running());
        record.firewall.ruleset = Ok(chain(""));
        let found = check(&record);
        assert!(
            only_problem(&found).unwrap().advice.contains("nft insert rule ip filter FORWARD iifname tunproxy0 accept")
        );
        let let_through = "\t\tiifname \"tunproxy0\" accept\n\t\toifname \"tunproxy0\" accept\n";
        record.firewall.ruleset = Ok(chain(let_through));
        assert!(only_problem(&check(&record)).is_none());
    }

    #[test]
    fn a_strict_filter_hurts_without_the_firewall_table_and_on_a_gateways_uplink() {
        let strict = |mut record: Record| {
            record.survey.parameters.strict_reverse_path = ["eth0".to_owned()].into();
            record
        };
        let path = || "net/ipv4/conf/eth0/src_valid_mark".to_owned();
        assert!(check(&strict(running())).is_empty());
        let mut record = strict(gateway(running()));
        record.parameters.insert(path(), "1".to_owned());
        assert!(only_problem(&check(&record)).is_none());
        record.parameters.insert(path(), "0".to_owned());
        assert!(only_problem(&check(&record)).unwrap().what.contains("eth0 has become strict"));
        let mut record = strict(running());
        if let super::super::super::record::RunState::Answers { plan: Some(plan), .. } = &mut record.run {
            plan.nft = None;
        }
        assert!(only_problem(&check(&record)).unwrap().what.contains("no firewall table"));
    }
}
