//! From a file to a profile that can be run, with everything that is wrong with it.

use std::path::Path;
use std::sync::Arc;

use crate::net::{BoxFuture, Lookup, LookupError, Name};
use crate::outbound::{Context, Egress, Outbounds, Roots};
use crate::platform::Dialer;
use crate::profile::{self, Node, Profile, Report};
use crate::session::Network;

/// A profile that was read, and what there is to say about it.
pub struct Loaded {
    /// What it means; absent when it cannot be read at all.
    pub profile: Option<Profile>,
    /// Its mistakes and warnings.
    pub report: Report,
}

/// Reads and checks the profile at `path`, down to the options of each outbound. Touches nothing but the file.
#[must_use]
pub fn load(path: &Path) -> Loaded {
    examine(profile::load(path))
}

/// The same for a profile that is no file; `name` is what messages call it.
pub(super) fn read(name: &str, text: &[u8]) -> Loaded {
    examine(profile::read(name, text))
}

fn examine((profile, mut report): (Option<Profile>, Report)) -> Loaded {
    if let Some(profile) = &profile {
        let egress = Egress::new(Dialer::default(), Arc::new(Nobody));
        let context = Context { egress, roots: Roots::default() };
        let outbounds = outbounds(profile, &context, &mut report);
        if !report.has_errors() {
            warn_of_udp_without_way(profile, &outbounds, &mut report);
        }
    }
    Loaded { profile, report }
}

/// The outbounds of `profile`; mistakes go to `report`.
pub(super) fn outbounds(profile: &Profile, context: &Context, report: &mut Report) -> Outbounds {
    let proxies: Vec<Node> = profile.proxies.iter().map(|proxy| proxy.node.clone()).collect();
    let groups: Vec<Node> = profile.groups.iter().map(|group| group.node.clone()).collect();
    Outbounds::build(&proxies, &groups, context, report)
}

/// As in mihomo, UDP passes over a rule whose outbound carries none. Where no later rule takes it, it goes DIRECT,
/// which nobody wrote.
fn warn_of_udp_without_way(profile: &Profile, outbounds: &Outbounds, report: &mut Report) {
    let carries = |name: &str| outbounds.index(name).is_none_or(|at| outbounds.networks(at).carries(Network::Udp));
    // Only a later rule that takes everything, or UDP as such, surely ends the fall.
    let catches =
        |kind: &str, payload: &str| kind == "MATCH" || (kind == "NETWORK" && payload.eq_ignore_ascii_case("udp"));
    for (index, placed) in profile.rules.iter().enumerate() {
        if carries(&placed.rule.target) || tcp_only(placed.rule.kind, &placed.rule.payload) {
            continue;
        }
        let later = profile.rules[index + 1..]
            .iter()
            .find(|later| catches(later.rule.kind, &later.rule.payload) && carries(&later.rule.target));
        if later.is_none_or(|later| &*later.rule.target == "DIRECT") {
            let message = format!("`{}` carries no UDP, so UDP flows of this rule end on DIRECT", placed.rule.target);
            report
                .warn(placed.place, &*placed.path, message)
                .hint("add `udp: true` to the proxy if its server relays UDP, or a rule NETWORK,udp,REJECT behind it");
        }
    }
}

fn tcp_only(kind: &str, payload: &str) -> bool {
    kind == "NETWORK" && payload.eq_ignore_ascii_case("tcp")
}

/// Checking asks for no name.
struct Nobody;

impl Lookup for Nobody {
    fn lookup<'a>(&'a self, _name: &'a Name) -> BoxFuture<'a, Result<Arc<[std::net::IpAddr]>, LookupError>> {
        Box::pin(std::future::ready(Err(LookupError::NoAddress)))
    }
}
