//! The firewall's rules as `nft list ruleset` prints them, as far as a question is asked of them.

/// A chain on the forward hook that drops by policy.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Dropping<'a> {
    /// `family table chain`.
    pub(super) name: String,
    rules: Vec<&'a str>,
}

impl Dropping<'_> {
    /// Whether a rule of the chain itself accepts what comes from `device`, and one what goes to it.
    pub(super) fn lets_through(&self, device: &str) -> bool {
        let accepts = |way: &str| {
            let wanted = [format!("{way} {device} accept"), format!("{way} \"{device}\" accept")];
            self.rules.iter().any(|rule| {
                let rule = rule.replace("counter ", "");
                rule == "accept" || wanted.contains(&rule)
            })
        };
        accepts("iifname") && accepts("oifname")
    }
}

/// The chains that drop what is forwarded unless a rule allows it.
pub(super) fn dropping_forward(ruleset: &str) -> Vec<Dropping<'_>> {
    let (mut table, mut chain, mut found) = ("", "", Vec::<Dropping<'_>>::new());
    let mut inside = false;
    for line in ruleset.lines() {
        let words = line.trim();
        if let Some(rest) = line.strip_prefix("table ") {
            table = rest.split(" {").next().unwrap_or_default();
        } else if let Some(rest) = words.strip_prefix("chain ") {
            chain = rest.trim_end_matches(" {");
            inside = false;
        } else if words.starts_with("type ") && words.contains("hook forward ") && words.contains("policy drop") {
            found.push(Dropping { name: format!("{table} {chain}"), rules: Vec::new() });
            inside = true;
        } else if inside && let Some(last) = found.last_mut() {
            last.rules.push(words);
        }
    }
    found
}

/// Whether the table of that family and name has all these chains.
pub(super) fn has_chains<'a>(ruleset: &str, table: &str, chains: impl IntoIterator<Item = &'a str>) -> bool {
    let start = format!("table {table} {{");
    let Some(at) = ruleset.lines().position(|line| line.starts_with(&start)) else { return false };
    let body: Vec<&str> = ruleset.lines().skip(at + 1).take_while(|line| *line != "}").map(str::trim).collect();
    chains.into_iter().all(|chain| body.contains(&format!("chain {chain} {{").as_str()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULESET: &str = "table ip filter {
\tchain FORWARD {
\t\ttype filter hook forward priority filter; policy drop;
\t\tiifname \"tun7\" counter accept
\t\toifname \"tun7\" accept
\t}
\tchain OTHER {
\t\taccept
\t}
}
table inet tunproxy { # progname nft
\tflags owner

\tchain reroute {
\t}
}
";

    #[test]
    fn a_chain_lets_through_what_its_own_rules_accept() {
        let chains = dropping_forward(RULESET);
        assert_eq!(chains[0].name, "ip filter FORWARD");
        assert!(chains[0].lets_through("tun7") && !chains[0].lets_through("tun8"));
        assert_eq!(chains.len(), 1);
    }

    #[test]
    fn a_table_is_there_with_all_its_chains_or_it_is_not() {
        assert!(has_chains(RULESET, "inet tunproxy", ["reroute"]));
        assert!(!has_chains(RULESET, "inet tunproxy", ["reroute", "caught"]));
        assert!(!has_chains(RULESET, "inet tunproxy", ["FORWARD"]));
        assert!(!has_chains(RULESET, "inet tunproxy1", ["reroute"]));
    }
}
