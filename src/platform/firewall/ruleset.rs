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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kill_switch_is_known_by_what_its_table_says() {
        let listed = "table inet filter {\n\tcomment \"mine\"\n}\ntable inet tunproxy1 {\n\tcomment \"kill switch of tun7\"\n}\n";
        assert_eq!(kill_switches(listed), [("tunproxy1".to_owned(), "tun7".to_owned())]);
    }
}
