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

/// Chains that what this host sends comes to, and that drop or refuse some of it: by their policy, or by a rule of theirs or
/// of a chain that they lead to. In words, each with the first of these rules. `ours`: a table that is left out.
pub(super) fn dropping_output(ruleset: &str, ours: Option<&str>) -> Vec<String> {
    let chains = chains(ruleset);
    let sends = |head: &str| ["hook output ", "hook postrouting "].iter().any(|hook| head.contains(hook));
    let of_others = chains.iter().filter(|chain| sends(chain.head) && Some(chain.table) != ours);
    of_others.filter_map(|chain| chain.stops(&chains, &mut Vec::new())).collect()
}

/// A chain, whatever it is for.
#[derive(Debug)]
struct Chain<'a> {
    /// `family table`.
    table: &'a str,
    name: &'a str,
    /// The line that says where it is asked; empty where others lead to it.
    head: &'a str,
    rules: Vec<&'a str>,
}

impl<'a> Chain<'a> {
    /// The chain in words, with what in it stops something, if anything does. `seen`: the names of those that led here.
    fn stops(&self, all: &[Chain<'a>], seen: &mut Vec<&'a str>) -> Option<String> {
        let name = format!("{} {}", self.table, self.name);
        let has = |rule: &&&str, wanted: &[&str]| words(rule).any(|word| wanted.contains(&word));
        if let Some(rule) = self.rules.iter().find(|rule| has(rule, &["drop", "reject"])) {
            return Some(format!("{name}: `{rule}`"));
        }
        seen.push(self.name);
        for rule in &self.rules {
            let to = words(rule).skip_while(|word| !["jump", "goto"].contains(word)).nth(1);
            let next = all.iter().find(|it| it.table == self.table && Some(it.name) == to && !seen.contains(&it.name));
            if let Some(found) = next.and_then(|chain| chain.stops(all, seen)) {
                return Some(found);
            }
        }
        self.head.contains("policy drop").then(|| format!("{name}: `policy drop`"))
    }
}

/// The words of a rule, but for what its author remarks.
fn words(rule: &str) -> impl Iterator<Item = &str> {
    let rule = rule.split(" comment \"").next().unwrap_or_default();
    rule.split_whitespace().map(|word| word.trim_end_matches(','))
}

fn chains(ruleset: &str) -> Vec<Chain<'_>> {
    let (mut table, mut found) = ("", Vec::<Chain<'_>>::new());
    // Of sets and maps, which have lines of their own, nothing is read.
    let mut inside = false;
    for line in ruleset.lines() {
        let text = line.trim();
        if let Some(rest) = line.strip_prefix("table ") {
            table = rest.split(" {").next().unwrap_or_default();
        } else if let Some(name) = text.strip_prefix("chain ") {
            found.push(Chain { table, name: name.trim_end_matches(" {"), head: "", rules: Vec::new() });
            inside = true;
        } else if line == "\t}" {
            inside = false;
        } else if let Some(chain) = found.last_mut().filter(|_| inside) {
            if text.starts_with("type ") && text.contains(" hook ") {
                chain.head = text;
            } else {
                chain.rules.push(text);
            }
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
    fn chains_that_stop_what_this_host_sends_are_named_with_the_rule() {
        let ruleset = "table inet adm {
\tset hosts {
\t\ttype ipv4_addr
\t}
\tchain out {
\t\ttype filter hook output priority filter; policy accept;
\t\toifname \"lo\" accept comment \"never drop\"
\t\ttcp dport != 22 drop
\t}
\tchain strict {
\t\ttype filter hook output priority filter; policy drop;
\t}
\tchain leads {
\t\ttype filter hook postrouting priority filter; policy accept;
\t\tudp dport { 53, 443 } jump more
\t\tgoto leads
\t}
\tchain more {
\t\tjump leads
\t\treject with icmpx admin-prohibited
\t}
\tchain in {
\t\ttype filter hook input priority filter; policy drop;
\t}
}
table inet tunproxy {
\tchain caught {
\t\ttype filter hook output priority filter; policy drop;
\t}
}
";
        let found = dropping_output(ruleset, Some("inet tunproxy"));
        let wanted = [
            "inet adm out: `tcp dport != 22 drop`",
            "inet adm strict: `policy drop`",
            "inet adm more: `reject with icmpx admin-prohibited`",
        ];
        assert_eq!(found, wanted);
        assert!(dropping_output(RULESET, None).is_empty());
    }

    #[test]
    fn a_table_is_there_with_all_its_chains_or_it_is_not() {
        assert!(has_chains(RULESET, "inet tunproxy", ["reroute"]));
        assert!(!has_chains(RULESET, "inet tunproxy", ["reroute", "caught"]));
        assert!(!has_chains(RULESET, "inet tunproxy", ["FORWARD"]));
        assert!(!has_chains(RULESET, "inet tunproxy1", ["reroute"]));
    }
}
