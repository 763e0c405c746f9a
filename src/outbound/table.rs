//! Every outbound of a profile by name and index: the built-in ones, the proxies, the groups.

mod groups;

use std::sync::Arc;

use foldhash::{HashMap, HashMapExt};

use super::kind::{Context, KINDS, Kind, PLANNED};
use super::{Direct, Networks, Outbound, Reject, Select, Unsupported};
use crate::net::Reject as Manner;
use crate::profile::{Fields, Group, Proxy, Report};

/// An outbound's place in the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Index(pub(crate) usize);

/// The outbounds of one profile. Replaced whole on reload; only the selections of groups change in it.
pub struct Outbounds {
    entries: Vec<Entry>,
    names: HashMap<String, Index>,
}

struct Entry {
    outbound: Arc<dyn Outbound>,
    group: Option<Arc<Select>>,
    /// Whether flows can go there at all as things stand.
    usable: bool,
    /// Whether what goes there leaves the host without a proxy. Of a group its present member tells.
    direct: bool,
}

/// Why a member was not selected.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SelectError {
    /// Nothing has this name, or what has it is no group.
    #[error("there is no group `{0}`")]
    NoGroup(String),
    /// The group does not have the member.
    #[error("group `{group}` has no member `{member}`")]
    NoMember {
        /// The group.
        group: String,
        /// The name that is not a member's.
        member: String,
    },
}

impl Outbounds {
    /// DIRECT.
    pub const DIRECT: Index = Index(0);
    /// REJECT.
    pub const REJECT: Index = Index(1);
    /// REJECT-DROP.
    pub const REJECT_DROP: Index = Index(2);
    /// PASS: the rule that names it is skipped. The dispatcher sees to that; whoever dials it is refused.
    pub const PASS: Index = Index(3);

    /// How many entries are not the profile's.
    const BUILT_IN: usize = 5;

    /// Builds what the profile's `proxies` and `groups` say. The mistakes of single entries go to the report; names and
    /// members were checked when the profile was read. If the report has errors, the table is incomplete and must not be
    /// used.
    pub fn build(proxies: &[Proxy], groups: &[Group], context: &Context, report: &mut Report) -> Self {
        let mut table = Self { entries: Vec::new(), names: HashMap::new() };
        table.add_built_in(context);
        for proxy in proxies {
            table.add_proxy(proxy, context, report);
        }
        groups::add(&mut table, groups, report);
        table
    }

    /// The index of the outbound with this very name.
    #[must_use]
    pub fn index(&self, name: &str) -> Option<Index> {
        self.names.get(name).copied()
    }

    /// All names, the built-in ones first, then in the order of the profile.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.iter().map(|entry| entry.outbound.name())
    }

    /// The outbound at `index`.
    #[must_use]
    pub fn outbound(&self, index: Index) -> &Arc<dyn Outbound> {
        &self.entries[index.0].outbound
    }

    /// The group at `index`, if it is one.
    #[must_use]
    pub fn group(&self, index: Index) -> Option<&Arc<Select>> {
        self.entries[index.0].group.as_ref()
    }

    /// What the outbound carries now.
    #[must_use]
    pub fn networks(&self, index: Index) -> Networks {
        self.outbound(index).networks()
    }

    /// Whether `index` is PASS, or a group whose present member is.
    #[must_use]
    pub fn passes(&self, mut index: Index) -> bool {
        while let Some(group) = self.group(index) {
            index = group.now().index;
        }
        index == Self::PASS
    }

    /// Whether flows to `index` leave the host without a proxy as things stand: DIRECT and its like, and groups whose
    /// present member is one.
    #[must_use]
    pub fn goes_direct(&self, mut index: Index) -> bool {
        while let Some(group) = self.group(index) {
            index = group.now().index;
        }
        self.entries[index.0].direct
    }

    /// Makes `member` the one that new flows of `group` take.
    ///
    /// # Errors
    /// One of the two does not exist.
    pub fn select(&self, group: &str, member: &str) -> Result<(), SelectError> {
        let found = self.index(group).and_then(|index| self.group(index));
        let found = found.ok_or_else(|| SelectError::NoGroup(group.to_owned()))?;
        if found.select(member) {
            return Ok(());
        }
        Err(SelectError::NoMember { group: group.to_owned(), member: member.to_owned() })
    }

    fn add_built_in(&mut self, context: &Context) {
        let direct = |name: &str| Arc::new(Direct::new(name, Arc::new(context.egress.clone()), Networks::ALL));
        let pass = "PASS leads nowhere: it only makes a rule be skipped".to_owned();
        self.push(direct("DIRECT"), true, true);
        self.push(Arc::new(Reject::new("REJECT", Manner::Answer)), true, false);
        self.push(Arc::new(Reject::new("REJECT-DROP", Manner::Drop)), true, false);
        self.push(Arc::new(Unsupported::new("PASS", pass)), true, false);
        self.push(direct("COMPATIBLE"), true, true);
    }

    fn add_proxy(&mut self, proxy: &Proxy, context: &Context, report: &mut Report) {
        let Some(mut fields) = Fields::relaxed(&proxy.node, &*proxy.path, report) else { return };
        fields.silent(&["name", "type"]);
        let name = proxy.name.as_str();
        let kind = proxy.kind.to_ascii_lowercase();
        if let Some(found) = KINDS.iter().find(|known| known.name == kind) {
            self.add_known(found, name, fields, context);
        } else if PLANNED.contains(&kind.as_str()) {
            let reason = format!("`{name}`: the proxy kind `{kind}` is not built yet");
            fields.warn("type", format!("{reason}; flows to it are refused"));
            self.push(Arc::new(Unsupported::new(name, reason)), false, false);
        } else {
            let known: Vec<&str> = KINDS.iter().map(|known| known.name).collect();
            fields.error("type", format!("expected a proxy kind ({}), found `{kind}`", known.join(", ")));
            self.push(Arc::new(Unsupported::new(name, format!("`{name}` could not be built"))), false, false);
        }
    }

    fn add_known(&mut self, kind: &Kind, name: &str, mut fields: Fields<'_>, context: &Context) {
        let built = (kind.build)(&mut fields, name, context);
        let chained = fields.optional::<String>("dialer-proxy").filter(|through| !through.is_empty());
        let entry: Option<(Arc<dyn Outbound>, bool)> = match (built, chained) {
            // Going there without the detour would show the server an address that was meant to be hidden.
            (Some(_), Some(through)) => {
                let reason = format!("`{name}`: `dialer-proxy` ({through}) is not built yet");
                fields.warn("dialer-proxy", format!("{reason}; flows to it are refused"));
                Some((Arc::new(Unsupported::new(name, reason)), false))
            }
            (built, _) => built.map(|outbound| (outbound, true)),
        };
        fields.finish();
        if let Some((outbound, usable)) = entry {
            self.push(outbound, usable, usable && kind.name == "direct");
        } else {
            // The name stays known, so that what uses it is not reported as well.
            self.push(Arc::new(Unsupported::new(name, format!("`{name}` could not be built"))), false, false);
        }
    }

    /// Adds an outbound, unless its name is taken: the report then has that error already.
    fn push(&mut self, outbound: Arc<dyn Outbound>, usable: bool, direct: bool) {
        let name = outbound.name().to_owned();
        if !self.names.contains_key(&name) {
            self.names.insert(name, Index(self.entries.len()));
            self.entries.push(Entry { outbound, group: None, usable, direct });
        }
    }
}

#[cfg(test)]
mod tests;
