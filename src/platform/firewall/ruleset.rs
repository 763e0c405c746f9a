//! What `nft list ruleset` prints of kill switches, for those who have it as text.

use super::KILL_SWITCH_OF;

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

#[cfg(test)]
mod tests {
    use super::*;

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
}
