//! What `nft list ruleset` prints of others: their tables, their marks, and chains that drop what is forwarded.

use super::KILL_SWITCH_OF;

/// Every bit of a mark that `ruleset`, as `nft list ruleset` prints it, reads or writes.
pub(in crate::platform) fn mark_bits(ruleset: &str) -> u32 {
    ruleset.lines().filter_map(|line| line.split_once("mark ")).fold(0, |bits, (_, rest)| {
        let rest = rest.split(" counter").next().unwrap_or_default();
        rest.split(|it: char| !it.is_ascii_alphanumeric()).filter_map(number).fold(bits, |bits, number| {
            // "mark & 0xffffbfff | 0x4000" touches the bits that its first number leaves out.
            bits | if number.count_ones() > 16 { !number } else { number }
        })
    })
}

fn number(word: &str) -> Option<u32> {
    match word.strip_prefix("0x") {
        Some(hex) => u32::from_str_radix(hex, 16).ok(),
        None => word.parse().ok(),
    }
}

/// The names of the tables in `ruleset`.
pub(in crate::platform) fn table_names(ruleset: &str) -> impl Iterator<Item = String> {
    // Tables stand at the left edge: "table inet filter {".
    ruleset.lines().filter_map(|line| line.strip_prefix("table ")?.split(' ').nth(1).map(str::to_owned))
}

/// The inet tables that say of themselves that they are a kill switch of ours: their names, each with its TUN.
pub(in crate::platform) fn kill_switches(ruleset: &str) -> Vec<(String, String)> {
    let ours = format!("comment \"{KILL_SWITCH_OF}");
    let mut found = Vec::new();
    let mut table = "";
    for line in ruleset.lines() {
        match line.strip_prefix("table inet ") {
            Some(rest) => table = rest.split(' ').next().unwrap_or_default(),
            None if line == "}" => table = "",
            None => {
                let tun = line.trim_start().strip_prefix(&ours).filter(|_| !table.is_empty());
                found.extend(tun.map(|tun| (table.to_owned(), tun.trim_end_matches('"').to_owned())));
            }
        }
    }
    found
}

/// The kill switches among them that still say no: somebody may have emptied a table without deleting it. None of ours has
/// a chain without rules.
pub(in crate::platform) fn closed(ruleset: &str) -> Vec<(String, String)> {
    kill_switches(ruleset).into_iter().filter(|(table, _)| !is_emptied(ruleset, table)).collect()
}

fn is_emptied(ruleset: &str, table: &str) -> bool {
    let head = format!("table inet {table} {{");
    let lines = ruleset.lines().skip_while(|line| *line != head).skip(1).take_while(|line| *line != "}");
    let mut rules_of_chains: Vec<usize> = Vec::new();
    for line in lines {
        if line.starts_with("\tchain ") {
            rules_of_chains.push(0);
        } else if line.starts_with("\t\t") && !line.starts_with("\t\ttype ") {
            rules_of_chains.last_mut().into_iter().for_each(|rules| *rules += 1);
        }
    }
    rules_of_chains.is_empty() || rules_of_chains.contains(&0)
}

/// Chains on the forward hook that drop by policy, as `family table chain`.
pub(in crate::platform) fn dropping_forward(ruleset: &str) -> Vec<String> {
    let (mut table, mut chain, mut found) = ("", "", Vec::new());
    for line in ruleset.lines() {
        let words = line.trim();
        if let Some(rest) = line.strip_prefix("table ") {
            table = rest.split(" {").next().unwrap_or_default();
        } else if let Some(rest) = words.strip_prefix("chain ") {
            chain = rest.trim_end_matches(" {");
        } else if words.starts_with("type ") && words.contains("hook forward ") && words.contains("policy drop") {
            found.push(format!("{table} {chain}"));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULESET: &str = "table ip filter {
\tchain FORWARD {
\t\ttype filter hook forward priority filter; policy drop;
\t\tmeta mark & 0x00004000 == 0x00004000 counter packets 7 bytes 9 drop
\t}
\tchain MASQ {
\t\tmeta mark set meta mark & 0xffffbfff | 0x00080000
\t\tct mark 51820 accept
\t}
}
table inet tunproxy {
}
";

    #[test]
    fn a_kill_switch_is_known_by_what_its_table_says() {
        let listed = "table inet filter {\n\tcomment \"mine\"\n}\ntable inet tunproxy1 {\n\tcomment \"kill switch of tun7\"\n}\n";
        assert_eq!(kill_switches(listed), [("tunproxy1".to_owned(), "tun7".to_owned())]);
    }

    #[test]
    fn a_table_that_somebody_has_emptied_closes_nothing() {
        let table = |rules: &str| {
            format!(
                "table inet tunproxy {{\n\tcomment \"kill switch of tun7\"\n\n\tset a {{\n\t\ttype ipv4_addr\n\t}}\n\n\
                 \tchain reroute {{\n\t\ttype route hook output priority mangle; policy accept;\n{rules}\t}}\n}}\n"
            )
        };
        assert_eq!(closed(&table("\t\tmeta mark set 2\n")).len(), 1);
        assert_eq!(closed(&table("")), []);
        assert_eq!(closed("table inet tunproxy {\n\tcomment \"kill switch of tun7\"\n}\n"), []);
    }

    #[test]
    fn a_ruleset_gives_up_its_tables_marks_and_dropping_chains() {
        assert_eq!(table_names(RULESET).collect::<Vec<_>>(), ["filter", "tunproxy"]);
        assert_eq!(mark_bits(RULESET), 0x4000 | 0x80000 | 51820);
        assert_eq!(dropping_forward(RULESET), ["ip filter FORWARD"]);
    }
}
