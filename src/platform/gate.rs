//! Chains of others that stop what comes to this host, or leaves it, unless a rule allows it: whether a TUN is stopped too.

use super::routing::Family;

/// As long as the name of an interface is compared (IFNAMSIZ).
pub(super) const LONGEST_NAME: usize = 16;

/// What such a chain looks at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hook {
    /// What comes to this host.
    Input,
    /// What it sends.
    Output,
}

/// A base chain on one of these hooks, as far as interfaces are asked in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gate {
    /// `family table chain`.
    pub chain: String,
    /// What it looks at.
    pub hook: Hook,
    /// Its policy is drop.
    pub drops: bool,
    /// Its rules that decide about what a TUN carries, in their order.
    pub rules: Vec<Decision>,
}

/// One rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    /// The interfaces that it is about: all of these hold.
    pub interfaces: Vec<Interface>,
    /// It asks other things as well, which nobody can answer for every packet.
    pub partly: bool,
    /// It may let the packet pass; otherwise it stops it.
    pub lets_pass: bool,
}

/// A question for the interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// Whom it means.
    pub which: Which,
    /// It holds for all others.
    pub not: bool,
}

/// Whom a question for an interface means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Which {
    /// By the first bytes of its name, which is filled up with zeros.
    Name(Vec<u8>),
    /// By the kernel's number.
    Index(u32),
    /// One of these names.
    OneOf(Vec<Vec<u8>>),
}

impl Interface {
    fn holds(&self, name: &str, index: Option<u32>) -> bool {
        let is = match &self.which {
            Which::Index(wanted) => index == Some(*wanted),
            Which::Name(start) => padded(name).starts_with(start),
            Which::OneOf(names) => names.contains(&padded(name)),
        };
        is != self.not
    }
}

fn padded(name: &str) -> Vec<u8> {
    let mut bytes = name.as_bytes().to_vec();
    bytes.resize(bytes.len().max(LONGEST_NAME), 0);
    bytes
}

impl Gate {
    /// Whether it surely stops what comes by the TUN of this name, or goes there. `index`: the kernel's number for it, once it
    /// has one.
    #[must_use]
    pub fn stops(&self, tun: &str, index: Option<u32>) -> bool {
        for rule in self.rules.iter().filter(|rule| rule.interfaces.iter().all(|it| it.holds(tun, index))) {
            if rule.lets_pass {
                return false;
            }
            if !rule.partly {
                return true;
            }
        }
        self.drops
    }

    /// Whether it is asked about packets of this family.
    #[must_use]
    pub fn concerns(&self, family: Family) -> bool {
        !self.chain.starts_with(if family == Family::V4 { "ip6 " } else { "ip " })
    }

    /// Whether it stops anything that no rule allows.
    #[must_use]
    pub fn is_strict(&self) -> bool {
        self.drops || self.rules.iter().any(|rule| !rule.lets_pass && !rule.partly)
    }

    /// The command that has it let pass what a TUN carries.
    #[must_use]
    pub fn remedy(&self, tun: &str) -> String {
        let chain = &self.chain;
        match self.hook {
            Hook::Input => format!("nft insert rule {chain} iifname \"{tun}\" ct state established,related accept"),
            Hook::Output => format!("nft insert rule {chain} oifname \"{tun}\" accept"),
        }
    }

    /// What it does to a TUN that it stops.
    #[must_use]
    pub fn harm(&self, tun: &str) -> String {
        let chain = &self.chain;
        match self.hook {
            Hook::Input => format!(
                "the firewall chain {chain} drops what comes to this host by {tun}: its connections and its names get no \
                 answer while tunproxy runs"
            ),
            Hook::Output => format!(
                "the firewall chain {chain} drops what this host sends by {tun}, which is everything while tunproxy runs"
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(name: &[u8], not: bool, partly: bool, lets_pass: bool) -> Decision {
        Decision { interfaces: vec![Interface { which: Which::Name(name.to_vec()), not }], partly, lets_pass }
    }

    fn stops(drops: bool, rules: Vec<Decision>) -> bool {
        let chain = "inet adm input".to_owned();
        Gate { chain, hook: Hook::Input, drops, rules }.stops("tun7", Some(9))
    }

    #[test]
    fn a_chain_that_knows_only_other_interfaces_stops_ours() {
        assert!(stops(true, vec![rule(b"lo\0", false, false, true), rule(b"eth0\0", false, true, true)]));
        assert!(stops(false, vec![rule(b"eth0\0", true, false, false)]));
        let set = Interface { which: Which::OneOf(vec![padded("lo"), padded("eth0")]), not: false };
        assert!(stops(true, vec![Decision { interfaces: vec![set], partly: true, lets_pass: true }]));
        let index = |number| Interface { which: Which::Index(number), not: false };
        let by_index = |number| Decision { interfaces: vec![index(number)], partly: false, lets_pass: true };
        assert!(stops(true, vec![by_index(1)]) && !stops(true, vec![by_index(9)]));
    }

    #[test]
    fn one_that_might_let_us_pass_is_not_blamed() {
        assert!(!stops(false, Vec::new()), "nothing is stopped");
        assert!(!stops(true, vec![rule(b"tun7\0", false, true, true)]));
        assert!(!stops(true, vec![rule(b"tun", false, false, true)]), "a name that ends in a star");
        assert!(!stops(true, vec![rule(b"eth0\0", true, false, true)]), "all but the uplink");
        let anything = Decision { interfaces: Vec::new(), partly: true, lets_pass: true };
        assert!(!stops(true, vec![anything]), "ct state established");
        assert!(!stops(false, vec![rule(b"tun7\0", false, true, false)]), "only a part of ours is dropped");
    }
}
