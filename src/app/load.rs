//! From a file to a profile that can be run, with everything that is wrong with it.

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;

use super::{advice, build};
use crate::net::{BoxFuture, Lookup, LookupError, Name};
use crate::outbound::{Context, Egress, Outbounds, Roots};
use crate::platform::Dialer;
use crate::profile::{self, Mode, Position, Profile, Report};

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

/// Like [`load`], and builds all that a run would build without touching the host.
#[must_use]
pub fn check(path: &Path) -> Loaded {
    let mut loaded = load(path);
    let Some(profile) = loaded.profile.as_ref().filter(|_| !loaded.report.has_errors()) else { return loaded };
    let outbounds = outbounds(profile, &context(), &mut Report::default());
    if let Err(error) = build::rehearse(profile, &outbounds) {
        loaded.report.error(Position::default(), "", format!("{error:#}"));
    }
    if !opens_something(profile) {
        loaded
            .report
            .warn(Position::default(), "", "the profile opens nothing, so that only `exec` can run it")
            .hint("set tun.enable, a port such as mixed-port, or dns.listen");
    }
    loaded
}

/// Whether a run of `profile` would have anything to do.
pub(super) fn opens_something(profile: &Profile) -> bool {
    let listen = &profile.listen;
    let ports = [listen.port, listen.socks_port, listen.mixed_port];
    profile.tun.enable || profile.dns.listen.is_some() || ports.iter().any(Option::is_some)
}

fn examine((profile, mut report): (Option<Profile>, Report)) -> Loaded {
    if let Some(profile) = &profile {
        let outbounds = outbounds(profile, &context(), &mut report);
        if !report.has_errors() && profile.mode == Mode::Rule {
            advice::on_rules(profile, &outbounds, &mut report);
        }
    }
    Loaded { profile, report }
}

fn context() -> Context {
    Context { egress: Egress::new(Dialer::default(), Arc::new(Nobody)), roots: Roots::default() }
}

/// The outbounds of `profile`; mistakes go to `report`.
pub(super) fn outbounds(profile: &Profile, context: &Context, report: &mut Report) -> Outbounds {
    Outbounds::build(&profile.proxies, &profile.groups, context, report)
}

/// The names of the proxies that flows can go to as things stand: those that rules lead to, by the present members of groups.
pub(super) fn used(profile: &Profile) -> HashSet<String> {
    let outbounds = outbounds(profile, &context(), &mut Report::default());
    let targets: Vec<&str> = match profile.mode {
        Mode::Rule => profile.rules.iter().map(|placed| &*placed.rule.target).collect(),
        Mode::Global => vec!["GLOBAL"],
        Mode::Direct => Vec::new(),
    };
    let end = |name: &str| {
        let mut index = outbounds.index(name)?;
        while let Some(group) = outbounds.group(index) {
            index = group.now().index;
        }
        Some(outbounds.outbound(index).name().to_owned())
    };
    targets.into_iter().filter_map(end).collect()
}

/// Checking asks for no name.
struct Nobody;

impl Lookup for Nobody {
    fn lookup<'a>(&'a self, _name: &'a Name) -> BoxFuture<'a, Result<Arc<[std::net::IpAddr]>, LookupError>> {
        Box::pin(std::future::ready(Err(LookupError::NoAddress)))
    }
}

#[cfg(test)]
mod tests;
