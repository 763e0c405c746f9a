//! What nftables holds, asked of the kernel itself: reading needs no program that would have to be waited for, and leaves
//! out what a host may have millions of, the elements of others' sets without marks.

use std::collections::{BTreeMap, BTreeSet};

use netlink_packet_core::{NetlinkSerializable, NlasIterator, parse_string};
use netlink_sys::protocols::NETLINK_NETFILTER;

use super::mark_sets::{Found, MarkSet};
use super::{DUMP_ATTEMPTS, Netlink, NetlinkError, gates, marks};
use crate::platform::gate::{Gate, Hook};

/// `NFNL_SUBSYS_NFTABLES`: the upper byte of the type of each message.
const SUBSYSTEM: u16 = 10 << 8;
/// Requests (linux/netfilter/nf_tables.h).
const GET_TABLE: u16 = 1;
const GET_CHAIN: u16 = 4;
const GET_RULE: u16 = 7;
const GET_SET: u16 = 10;
const GET_ELEMENTS: u16 = 13;
/// The families by the names that nft has for them (`NFPROTO_*`).
const FAMILIES: [(u8, &str); 6] = [(1, "inet"), (2, "ip"), (3, "arp"), (5, "netdev"), (7, "bridge"), (10, "ip6")];
/// `NF_INET_*`.
const INPUT: u32 = 1;
const FORWARD: u32 = 2;
const OUTPUT: u32 = 3;
const DROP: u32 = 0;
/// `NFNL_UDATA_TABLE_COMMENT` of libnftnl.
const COMMENT: u8 = 0;
/// `NFT_TABLE_F_DORMANT`: the table is there, and none of its chains is asked.
const DORMANT: u32 = 1;

/// A table that somebody has made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::platform) struct SeenTable {
    family: u8,
    /// Its name.
    pub(in crate::platform) name: String,
    /// No other table of this network namespace ever has the same.
    pub(in crate::platform) handle: u64,
    /// What it says of itself.
    pub(in crate::platform) comment: Option<String>,
    /// It is switched off as a whole.
    pub(in crate::platform) dormant: bool,
}

impl SeenTable {
    /// The name of its family.
    pub(in crate::platform) fn family(&self) -> &'static str {
        family_name(self.family)
    }

    /// Whether `other` is this very table, whatever has been changed in it.
    pub(in crate::platform) fn is(&self, other: &Self) -> bool {
        (self.family, &self.name, self.handle) == (other.family, &other.name, other.handle)
    }
}

/// A chain.
#[derive(Debug, Clone, PartialEq, Eq)]
struct SeenChain {
    family: u8,
    table: String,
    name: String,
    /// Of a base chain.
    hook: Option<u32>,
    /// Its policy is drop.
    drops: bool,
    /// It translates addresses: nobody stops anything there.
    translates: bool,
}

impl SeenChain {
    /// Its family, table and name.
    fn whole_name(&self) -> String {
        format!("{} {} {}", family_name(self.family), self.table, self.name)
    }

    /// It sees what this host routes. What a bridge or ARP drops is on its way between ports of that bridge.
    fn is_routed(&self) -> bool {
        matches!(family_name(self.family), "inet" | "ip" | "ip6")
    }
}

/// What a set holds, as long as it has no ranges.
#[derive(Debug)]
struct Keys(Option<Vec<Vec<u8>>>);

impl Default for Keys {
    fn default() -> Self {
        Self(Some(Vec::new()))
    }
}

/// A conversation with nftables of this network namespace. Reads only.
#[derive(Debug)]
pub(in crate::platform) struct Nftables(Netlink);

impl Nftables {
    /// Opens the socket, in the network namespace of the calling thread.
    ///
    /// # Errors
    /// The kernel has no nftables, or none for us.
    pub(in crate::platform) fn open() -> Result<Self, NetlinkError> {
        Netlink::with(NETLINK_NETFILTER).map(Self)
    }

    /// All tables.
    ///
    /// # Errors
    /// No CAP_NET_ADMIN, or a kernel without nftables.
    pub(in crate::platform) fn tables(&mut self) -> Result<Vec<SeenTable>, NetlinkError> {
        self.list(
            "list the firewall's tables",
            &Request::new(GET_TABLE, 0),
            |found: &mut Vec<SeenTable>, family, table| {
                found.push(SeenTable {
                    family,
                    name: text(table, 1).unwrap_or_default(),
                    handle: long(table, 4).unwrap_or_default(),
                    comment: attribute(table, 6).and_then(comment),
                    dormant: number(table, 2).is_some_and(|flags| flags & DORMANT != 0),
                });
            },
        )
    }

    /// Chains whose policy is to drop what this host forwards as a router, as `family table chain`.
    ///
    /// # Errors
    /// As [`Nftables::tables`].
    pub(in crate::platform) fn dropping_forward(&mut self) -> Result<Vec<String>, NetlinkError> {
        let mut chains = self.chains_in_force()?;
        chains.retain(|chain| chain.hook == Some(FORWARD) && chain.drops && chain.is_routed());
        Ok(chains.iter().map(SeenChain::whole_name).collect())
    }

    /// All chains, but for those of tables that are switched off.
    fn chains_in_force(&mut self) -> Result<Vec<SeenChain>, NetlinkError> {
        let mut dormant = self.tables()?;
        dormant.retain(|table| table.dormant);
        let mut chains = self.chains(0)?;
        chains.retain(|chain| !dormant.iter().any(|off| (off.family, &off.name) == (chain.family, &chain.table)));
        Ok(chains)
    }

    /// Chains that stop what comes to this host, or what it sends, unless a rule allows it; without those of tables for
    /// which `ours` holds.
    ///
    /// # Errors
    /// As [`Nftables::tables`].
    pub(in crate::platform) fn gates(&mut self, ours: impl Fn(&str) -> bool) -> Result<Vec<Gate>, NetlinkError> {
        let mut found = Vec::new();
        for chain in self.chains_in_force()?.into_iter().filter(|chain| chain.is_routed() && !chain.translates) {
            let hook = match chain.hook {
                Some(INPUT) => Hook::Input,
                Some(OUTPUT) => Hook::Output,
                _ => continue,
            };
            if ours(&chain.table) {
                continue;
            }
            let drops = chain.drops;
            let request = Request::new(GET_RULE, chain.family).with(1, &chain.table).with(2, &chain.name);
            let act = "list the firewall's rules";
            let rules = self.list(act, &request, |rules: &mut Vec<_>, family, rule| {
                // Kernels before 4.9 do not select.
                let of_it = family == chain.family
                    && text(rule, 1).as_deref() == Some(&chain.table)
                    && text(rule, 2).as_deref() == Some(&chain.name);
                let read = attribute(rule, 4).and_then(|list| gates::of_rule(hook, drops, list));
                rules.extend(read.filter(|_| of_it));
            })?;
            let mut decisions = Vec::new();
            for rule in rules {
                let sets: Result<Vec<_>, _> = rule.sets.iter().map(|(_, set)| self.elements(&chain, set)).collect();
                decisions.extend(rule.decision(hook, &sets?));
            }
            let rules = decisions;
            found.push(Gate { chain: chain.whole_name(), hook, drops, rules });
        }
        found.retain(Gate::is_strict);
        Ok(found)
    }

    /// The chains of a table, each with the number of its rules; none where there is no such table.
    ///
    /// # Errors
    /// As [`Nftables::tables`].
    pub(in crate::platform) fn rules_of(
        &mut self,
        family: &str,
        table: &str,
    ) -> Result<BTreeMap<String, usize>, NetlinkError> {
        let Some((family, _)) = FAMILIES.into_iter().find(|(_, name)| *name == family) else {
            return Ok(BTreeMap::new());
        };
        let chains = self.chains(family)?.into_iter().filter(|chain| chain.table == table);
        let mut found: BTreeMap<String, usize> = chains.map(|chain| (chain.name, 0)).collect();
        let request = Request::new(GET_RULE, family).with(1, table);
        let act = "list the firewall's rules";
        let rules = self.list(act, &request, |rules: &mut Vec<String>, _, rule| {
            // Kernels before 4.9 do not select.
            rules.extend(text(rule, 2).filter(|_| text(rule, 1).as_deref() == Some(table)));
        })?;
        for chain in rules {
            *found.entry(chain).or_default() += 1;
        }
        Ok(found)
    }

    /// Every bit of a mark of a packet or a connection that some rule reads or writes.
    ///
    /// # Errors
    /// As [`Nftables::tables`].
    pub(in crate::platform) fn mark_bits(&mut self) -> Result<u32, NetlinkError> {
        let act = "list the firewall's rules";
        let mut bits = self.list(act, &Request::new(GET_RULE, 0), |bits: &mut u32, _, rule| {
            *bits |= attribute(rule, 4).map_or(0, marks::of_rule);
        })?;
        for set in self.sets_of_marks()? {
            bits |= self.marks_in(&set)?;
        }
        Ok(bits)
    }

    /// What is in a set of the table of `chain`; none where it has ranges, or has just gone.
    fn elements(&mut self, chain: &SeenChain, set: &str) -> Result<Option<Vec<Vec<u8>>>, NetlinkError> {
        let act = "list what a set of the firewall holds";
        let request = Request::new(GET_ELEMENTS, chain.family).with(1, &chain.table).with(2, set);
        let each = |found: &mut Keys, _, list: &[u8]| gates::elements(&mut found.0, list);
        match self.list(act, &request, each) {
            Err(error) if error.is_gone() => Ok(None),
            other => other.map(|found| found.0),
        }
    }

    fn chains(&mut self, family: u8) -> Result<Vec<SeenChain>, NetlinkError> {
        let act = "list the firewall's chains";
        self.list(act, &Request::new(GET_CHAIN, family), |found: &mut Vec<SeenChain>, family, chain| {
            found.push(SeenChain {
                family,
                table: text(chain, 1).unwrap_or_default(),
                name: text(chain, 3).unwrap_or_default(),
                hook: attribute(chain, 4).and_then(|hook| number(hook, 1)),
                drops: number(chain, 5) == Some(DROP),
                translates: text(chain, 7).as_deref() == Some("nat"),
            });
        })
    }

    fn sets_of_marks(&mut self) -> Result<Vec<MarkSet>, NetlinkError> {
        let act = "list the firewall's sets";
        self.list(act, &Request::new(GET_SET, 0), |found: &mut Vec<MarkSet>, family, set| {
            found.extend(MarkSet::read(family, set));
        })
    }

    fn marks_in(&mut self, set: &MarkSet) -> Result<u32, NetlinkError> {
        let act = "list marks that the firewall knows";
        let request = Request::new(GET_ELEMENTS, set.family).with(1, &set.table).with(2, &set.name);
        match self.list(act, &request, |found, _, list| set.add(found, list)) {
            // Somebody has just deleted it.
            Err(error) if error.is_gone() => Ok(0),
            other => other.map(Found::bits),
        }
    }

    /// Has `each` take what is listed: its family and its attributes. Where others never stop changing their tables, what
    /// was found in the last of several attempts counts.
    fn list<T: Default>(
        &mut self,
        act: &str,
        request: &Request,
        each: impl Fn(&mut T, u8, &[u8]),
    ) -> Result<T, NetlinkError> {
        let each = |found: &mut T, _: u16, payload: &[u8]| {
            if let Some((head, attributes)) = payload.split_at_checked(4) {
                each(found, head[0], attributes);
            }
            Ok(())
        };
        let mut last = T::default();
        for _ in 0..DUMP_ATTEMPTS {
            let (found, torn) = self.0.dump_once(act, request, &each)?;
            last = found;
            if !torn {
                break;
            }
        }
        Ok(last)
    }
}

fn family_name(family: u8) -> &'static str {
    FAMILIES.into_iter().find(|(number, _)| *number == family).map_or("unknown", |(_, name)| name)
}

/// The names of `tables`, of any family.
pub(in crate::platform) fn names(tables: &[SeenTable]) -> BTreeSet<String> {
    tables.iter().map(|table| table.name.clone()).collect()
}

/// A request for a list: `struct nfgenmsg`, then attributes.
#[derive(Debug, Clone)]
struct Request {
    kind: u16,
    family: u8,
    attributes: Vec<u8>,
}

impl Request {
    fn new(kind: u16, family: u8) -> Self {
        Self { kind, family, attributes: Vec::new() }
    }

    /// The same, of what bears this name.
    fn with(mut self, kind: u16, name: &str) -> Self {
        // Header, text, a zero at the end; padded to four bytes (NLA_ALIGN, netlink(7)). Names have at most 255 bytes.
        let length = u16::try_from(4 + name.len() + 1).unwrap_or(u16::MAX);
        self.attributes.extend(length.to_ne_bytes());
        self.attributes.extend(kind.to_ne_bytes());
        self.attributes.extend(name.as_bytes());
        self.attributes.push(0);
        self.attributes.resize(self.attributes.len().next_multiple_of(4), 0);
        self
    }
}

impl NetlinkSerializable for Request {
    fn message_type(&self) -> u16 {
        SUBSYSTEM | self.kind
    }

    fn buffer_len(&self) -> usize {
        4 + self.attributes.len()
    }

    fn serialize(&self, buffer: &mut [u8]) {
        // The family, version 0, no resource.
        let all = [self.family, 0, 0, 0].into_iter().chain(self.attributes.iter().copied());
        buffer.iter_mut().zip(all).for_each(|(to, from)| *to = from);
    }
}

/// The attributes in `bytes`, each with its type.
pub(super) fn attributes(bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    NlasIterator::new(bytes).map_while(Result::ok).map(|it| (it.kind(), it.into_inner())).filter_map(|(kind, whole)| {
        let length = usize::from(u16::from_ne_bytes(*whole.first_chunk()?));
        Some((kind, whole.get(4..length)?))
    })
}

pub(super) fn attribute(bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    attributes(bytes).find(|(kind, _)| *kind == wanted).map(|(_, value)| value)
}

/// Numbers in attributes are in network order.
pub(super) fn number(bytes: &[u8], wanted: u16) -> Option<u32> {
    Some(u32::from_be_bytes(*attribute(bytes, wanted)?.first_chunk()?))
}

fn long(bytes: &[u8], wanted: u16) -> Option<u64> {
    Some(u64::from_be_bytes(*attribute(bytes, wanted)?.first_chunk()?))
}

pub(super) fn text(bytes: &[u8], wanted: u16) -> Option<String> {
    parse_string(attribute(bytes, wanted)?).ok()
}

/// What libnftnl keeps of a table for nft: entries of a type, a length, and that many bytes.
fn comment(mut data: &[u8]) -> Option<String> {
    while let [kind, length, rest @ ..] = data {
        let (value, rest) = rest.split_at_checked(usize::from(*length))?;
        if *kind == COMMENT {
            return parse_string(value).ok();
        }
        data = rest;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_bears_names_padded_to_four_bytes() {
        let request = Request::new(GET_RULE, 1).with(1, "abc").with(2, "abcd");
        let mut bytes = vec![0xff; request.buffer_len()];
        request.serialize(&mut bytes);
        let attributes: Vec<_> = attributes(&bytes[4..]).collect();
        assert_eq!(attributes, [(1, &b"abc\0"[..]), (2, &b"abcd\0"[..])]);
        assert_eq!((bytes[0], bytes.len() % 4, request.message_type()), (1, 0, 0xa07));
        assert_eq!(text(&bytes[4..], 2).as_deref(), Some("abcd"));
    }

    #[test]
    fn a_comment_is_found_among_what_else_a_table_bears_and_torn_data_is_none() {
        let data = [7, 2, 1, 1, COMMENT, 5, b'm', b'i', b'n', b'e', 0];
        assert_eq!(comment(&data).as_deref(), Some("mine"));
        for length in 0..data.len() {
            assert_eq!(comment(&data[..length]), None);
        }
        for torn in [&[][..], &[9], &[9, 0, 1, 0], &[0xff; 7]] {
            assert_eq!(attribute(torn, 1), None);
        }
    }
}
