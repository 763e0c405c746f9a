//! From one text of the table to another, without taking the table down: what has not changed keeps its counters and
//! its memory.

use std::collections::BTreeMap;
use std::fmt::Write;

use super::Nft;

/// A chain or a set of a table, as it stands in the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Block<'a> {
    /// `chain` or `set`.
    kind: &'a str,
    text: &'a str,
}

/// Blocks by family and name. A chain and a set never share a name with us.
type Blocks<'a> = BTreeMap<(&'a str, &'a str), Block<'a>>;

impl Nft {
    /// What nft is to be told, as one batch, so that a loaded table that has our text comes to have that of `new`. None:
    /// there is no such way, and the table has to be loaded anew.
    pub(in crate::platform) fn change_to(&self, new: &Self) -> Option<String> {
        let (old, wanted) = (blocks(&self.text), blocks(&new.text));
        let families = |blocks: &Blocks<'_>| blocks.keys().map(|(family, _)| (*family).to_owned()).collect::<Vec<_>>();
        let same_families = {
            let (mut one, mut other) = (families(&old), families(&wanted));
            one.dedup();
            other.dedup();
            one == other
        };
        if self.table != new.table || !same_families {
            return None;
        }
        let table = &self.table;
        let (mut emptied, mut gone, mut sets) = (String::new(), String::new(), String::new());
        for ((family, name), block) in &old {
            let now = wanted.get(&(*family, *name));
            if now == Some(block) {
                continue;
            }
            match (block.kind, now) {
                ("chain", Some(_)) => _ = writeln!(emptied, "flush chain {family} {table} {name};"),
                ("chain", None) => {
                    _ = writeln!(emptied, "flush chain {family} {table} {name};");
                    _ = writeln!(gone, "delete chain {family} {table} {name};");
                }
                // The elements of another kind of set would mean something else.
                (_, Some(_)) => return None,
                (_, None) => _ = writeln!(sets, "delete set {family} {table} {name};"),
            }
        }
        let mut text = emptied + &gone + &sets;
        for family in ["inet", "arp"] {
            // In the order of the text: sets stand before the chains that name them.
            let mut come: Vec<&Block<'_>> = wanted
                .iter()
                .filter(|(key, block)| key.0 == family && old.get(key) != Some(block))
                .map(|(_, block)| block)
                .collect();
            come.sort_by_key(|block| block.text.as_ptr());
            if come.is_empty() {
                continue;
            }
            let _ = writeln!(text, "table {family} {table} {{ {}", super::nature(new.comment.as_deref()));
            come.iter().for_each(|block| text.push_str(block.text));
            text.push_str("};\n");
        }
        Some(text)
    }
}

impl Nft {
    /// The chains, each as family, name, and how many rules it has.
    pub(in crate::platform) fn chain_rules(&self) -> Vec<(&str, &str, usize)> {
        let chains = blocks(&self.text).into_iter().filter(|(_, block)| block.kind == "chain");
        let rules = |text: &str| text.lines().filter(|line| line.starts_with("    ")).count();
        chains.map(|((family, name), block)| (family, name, rules(block.text))).collect()
    }
}

fn blocks(text: &str) -> Blocks<'_> {
    let mut blocks = Blocks::new();
    let (mut family, mut at) = ("", 0);
    let mut open: Option<(&str, &str, usize)> = None;
    for line in text.split_inclusive('\n') {
        let (start, end) = (at, at + line.len());
        at = end;
        if let Some(rest) = line.strip_prefix("table ") {
            family = rest.split(' ').next().unwrap_or_default();
        }
        let mut words = line.strip_prefix("  ").unwrap_or_default().split(' ');
        if let (Some(kind @ ("chain" | "set")), Some(name)) = (words.next(), words.next()) {
            open = Some((kind, name, start));
        }
        // A set is one line; a chain ends where its own brace closes, and not with a rule that has braces.
        let ends = |kind: &str| line.starts_with("  };") || (kind == "set" && line.trim_end().ends_with("};"));
        if let Some((kind, name, start)) = open.take_if(|(kind, ..)| ends(kind)) {
            blocks.insert((family, name), Block { kind, text: &text[start..end] });
        }
    }
    blocks
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::HostOptions;
    use crate::platform::firewall::nft;
    use crate::platform::plan::tests::options;
    use crate::platform::survey::tests::plain;
    use crate::platform::survey::{Survey, Wishes};

    fn written(survey: &Survey) -> Nft {
        nft(&options(), &survey.numbers(&Wishes::default()).unwrap(), survey).unwrap()
    }

    #[test]
    fn every_chain_and_set_of_the_table_is_found() {
        let nft = written(&plain());
        let found = blocks(&nft.text);
        let names: Vec<&str> = found.keys().filter(|(family, _)| *family == "inet").map(|(_, name)| *name).collect();
        for name in nft.chains() {
            assert!(names.contains(&name), "{name} in {names:?}");
        }
        assert!(names.contains(&"asked_192_0_2_2"), "{names:?}");
        assert!(found.contains_key(&("arp", "closed")));
        let rules = |text: &str| text.lines().filter(|line| line.starts_with("    ")).count();
        let text: String = found.values().map(|block| block.text).collect();
        assert_eq!(rules(&text), rules(&nft.text), "none is left out");
        assert!(found.values().all(|block| block.text.trim_end().ends_with("};")));
    }

    #[test]
    fn an_equal_text_needs_nothing() {
        assert_eq!(written(&plain()).change_to(&written(&plain())), Some(String::new()));
    }

    #[test]
    fn an_address_that_goes_takes_its_set_along_and_leaves_the_others_alone() {
        let mut moved = plain();
        moved.addresses.retain(|(_, net)| net.addr().to_string() != "192.0.2.2");
        moved.addresses.push((2, "198.51.100.9/24".parse().unwrap()));
        let text = written(&plain()).change_to(&written(&moved)).unwrap();
        let at = |words: &str| text.find(words).unwrap_or_else(|| panic!("{words} in {text}"));
        assert!(at("flush chain inet tunproxy remember;") < at("delete set inet tunproxy asked_192_0_2_2;"));
        assert!(at("delete set") < at("  set asked_198_51_100_9 {"));
        assert!(at("  set asked_198_51_100_9 {") < at("chain remember {"));
        assert!(!text.contains("asked_192_168_7_1 { type") && !text.contains("chain entrance"), "{text}");
        assert!(!text.contains("table arp"), "{text}");
    }

    #[test]
    fn a_chain_that_is_needed_no_more_goes() {
        let options = HostOptions { dns_hijack: false, ..options() };
        let without_hijack = nft(&options, &plain().numbers(&Wishes::default()).unwrap(), &plain()).unwrap();
        let text = written(&plain()).change_to(&without_hijack).unwrap();
        assert!(text.contains("delete chain inet tunproxy capture_dns;"), "{text}");
    }

    #[test]
    fn another_name_or_another_family_is_no_change_but_another_table() {
        let nft = written(&plain());
        assert_eq!(nft.change_to(&Nft { table: "tunproxy1".to_owned(), ..nft.clone() }), None);
        let inet_only = nft.text.split("create table arp").next().unwrap().to_owned();
        assert_eq!(nft.change_to(&Nft { text: inet_only, ..nft.clone() }), None);
    }
}
