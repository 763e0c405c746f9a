//! Making a plan true, keeping the way back, and going it.

use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ipnet::IpNet;
use parking_lot::Mutex;

use super::cleanup::Report;
use super::firewall::Nft;
use super::imp::nft::{OwnedTable, Ready};
use super::imp::{resolv_conf, sysctl};
use super::journal::{Journal, JournalError};
use super::layout::{self, CAPTURE_STAGE};
use super::not_set::not_set;
use super::plan::{HostPlan, Sysctl};
use super::resolver::DnsPlan;
use super::routing::{Route, Rule};
use super::survey::NftState;
use super::undo::Undo;
use super::{Netlink, NetlinkError, QUEUE_LENGTH, may_administer_network};

mod closing;
mod look;
mod ours;
mod proof;
mod release;
mod rewriting;
mod settle;
mod undoing;

pub use proof::Proof;
pub use settle::{Change, Seen, SettleError, Settled};

/// Why the host could not be changed, or changed back.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// The kernel refused an act.
    #[error("{source}{}", advice(source))]
    Netlink {
        /// The act and the errno.
        #[from]
        source: NetlinkError,
    },
    /// The journal cannot be written or read.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// A file cannot be written or read.
    #[error("{act}: {source}")]
    Io {
        /// What was tried, in words.
        act: String,
        /// What the system says.
        source: io::Error,
    },
    /// An earlier run has not been cleaned up after.
    #[error("an earlier run left changes behind; replay its journal first (`tunproxy cleanup`)")]
    Leftovers,
    /// An earlier run left changes in a network namespace that is not this one.
    #[error(
        "an earlier run left changes in another network namespace{}, recorded in {}. Run `tunproxy cleanup` there \
         (nsenter --net=...), with the same --state-dir; if that namespace is gone, as after the restart of a \
         container, `tunproxy cleanup --namespace-gone`",
        namespace.map(|inode| format!(" (net:[{inode}])")).unwrap_or_default(), journal.display()
    )]
    Elsewhere {
        /// The journal.
        journal: PathBuf,
        /// The namespace's inode, as `ls -l /proc/PID/ns/net` shows it.
        namespace: Option<u64>,
    },
    /// Some changes could not be undone; the journal keeps them.
    #[error("not undone: {}", .0.join("; "))]
    NotUndone(Vec<String>),
    /// Applying failed, and what had been done could not all be undone either.
    #[error("{why}; moreover, {left}")]
    Stuck {
        /// What failed first.
        why: Box<HostError>,
        /// What is still in place.
        left: Box<HostError>,
    },
}

impl HostError {
    pub(super) fn io(act: impl fmt::Display, source: io::Error) -> Self {
        Self::Io { act: act.to_string(), source }
    }
}

/// What a person can do about a refusal.
fn advice(error: &NetlinkError) -> String {
    match error.source.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) if may_administer_network() => {
            ". The capability CAP_NET_ADMIN is there: a container's settings or a security module forbid it".to_owned()
        }
        Some(libc::EPERM | libc::EACCES) => {
            let program = std::env::current_exe().map_or("tunproxy".to_owned(), |path| path.display().to_string());
            format!(
                ". This needs the capability CAP_NET_ADMIN: run it with sudo, or give it once with \
                 `sudo setcap cap_net_admin,cap_net_raw,cap_net_bind_service+ep {program}`"
            )
        }
        Some(libc::EEXIST) => ". Another program made the same just now; start again".to_owned(),
        Some(libc::ENODEV) => ". The interface has gone; was it deleted?".to_owned(),
        Some(libc::EAFNOSUPPORT | libc::EOPNOTSUPP) => {
            ". The kernel lacks what this needs (CONFIG_IP_MULTIPLE_TABLES, CONFIG_IPV6_MULTIPLE_TABLES, CONFIG_TUN)"
                .to_owned()
        }
        _ => String::new(),
    }
}

/// The refusal of a start, with what to do.
const NO_KILL_SWITCH: &str = "close the kill switch (without it, set tun.kill-switch: false)";

/// One change of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// The TUN's MTU and flags.
    Link,
    /// An address of the TUN.
    Address(IpNet),
    /// A route.
    Route(Route),
    /// A rule.
    Rule(Rule),
    /// The firewall table.
    Firewall,
    /// A kernel parameter.
    Sysctl(Sysctl),
    /// The host's resolver.
    Resolver,
}

impl Step {
    /// Whether a start without it would be no start.
    fn is_essential(&self, plan: &HostPlan) -> bool {
        match self {
            Self::Firewall => plan.has_kill_switch(),
            Self::Sysctl(_) | Self::Resolver => false,
            Self::Link | Self::Address(_) | Self::Route(_) | Self::Rule(_) => true,
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Link => f.write_str("the TUN's link settings"),
            Self::Address(address) => write!(f, "address {address}"),
            Self::Route(route) => write!(f, "route {route}"),
            Self::Rule(rule) => rule.fmt(f),
            Self::Firewall => f.write_str("the firewall table"),
            Self::Sysctl(sysctl) => write!(f, "{} = {}", sysctl.path, sysctl.value),
            Self::Resolver => f.write_str("the host's resolver settings"),
        }
    }
}

/// What has been done, and cannot be told by an [`Undo`] alone.
#[derive(Debug)]
enum Done {
    Change(Option<u64>, Undo),
    Firewall(OwnedTable),
    Resolved,
}

/// A plan that is true of the host now. Dropping it undoes everything, as [`Applied::revert`] does, but cannot say how
/// that went; with a kill switch, which only [`Applied::revert`] opens, it undoes nothing.
#[derive(Debug)]
pub struct Applied {
    plan: HostPlan,
    journal: Arc<Mutex<Journal>>,
    netlink: Netlink,
    done: Vec<Done>,
    /// What is to load the firewall table, from the start on.
    ready: Option<io::Result<Ready>>,
    warnings: Vec<String>,
    taken_over: Option<Report>,
    /// What a kill switch's table was loaded as last.
    standing: Option<Nft>,
    /// Parameters that could not be set, which is not tried again.
    passed_over: Vec<Step>,
    /// The firewall as it was when somebody looked last.
    firewall_seen: Option<NftState>,
    settling: settle::Settling,
    reverted: bool,
    /// From the moment on in which the host is given back.
    back: Option<proof::Back>,
}

impl HostPlan {
    /// Makes the plan true: the TUN's own settings, routes, targets and bypasses, the firewall, then what captures
    /// traffic, and the resolver last. Every inverse that could outlive us is on disk before the first act.
    ///
    /// What the host can do without (firewall, kernel parameters, resolver) costs a warning, not the start; a kill switch
    /// cannot be done without. One that a crashed run left closed is taken down when this plan is in force.
    ///
    /// # Errors
    /// The act that failed and what to do. Everything done until then has been undone.
    pub fn apply(self, journal: Journal) -> Result<Applied, HostError> {
        if !journal.is_clean() && !journal.is_closed() {
            return Err(HostError::Leftovers);
        }
        let mut netlink = Netlink::open()?;
        // While nothing is ours yet that could be taken for theirs.
        journal.end_connections(&mut netlink);
        // Whatever somebody comes to call it.
        let settling = settle::Settling::of(netlink.index(&self.tun).ok());
        let mut applied = Applied {
            plan: self,
            journal: Arc::new(Mutex::new(journal)),
            netlink,
            done: Vec::new(),
            ready: None,
            warnings: Vec::new(),
            taken_over: None,
            standing: None,
            passed_over: Vec::new(),
            firewall_seen: None,
            settling,
            reverted: false,
            back: None,
        };
        let done = applied.run().and_then(|()| match applied.take_over() {
            // Ours is closed by now. What is left of the other is on record.
            Err(error) if applied.plan.has_kill_switch() => {
                applied.warnings.push(format!("of the earlier run's kill switch, {error}"));
                Ok(())
            }
            other => other,
        });
        match done {
            Ok(()) => Ok(applied),
            Err(why) => match applied.undo_all() {
                Ok(()) => Err(why),
                Err(left) => Err(HostError::Stuck { why: Box::new(why), left: Box::new(left) }),
            },
        }
    }

    /// All changes, in the order in which they are made.
    pub(super) fn steps(&self) -> Vec<Step> {
        let (of_tun, of_host): (Vec<&Sysctl>, Vec<&Sysctl>) = self.sysctls.iter().partition(|sysctl| sysctl.of_tun);
        let captures = |rule: &Rule| layout::stage(rule, &self.numbers) >= CAPTURE_STAGE;
        let (last, first): (Vec<&Rule>, Vec<&Rule>) = self.rules.iter().partition(|rule| captures(rule));
        let rules = |list: Vec<&Rule>| list.into_iter().cloned().map(Step::Rule).collect::<Vec<_>>();
        let mut steps: Vec<Step> = of_tun.into_iter().cloned().map(Step::Sysctl).collect();
        steps.extend(self.addresses.iter().copied().map(Step::Address));
        steps.push(Step::Link);
        steps.extend(self.routes.iter().cloned().map(Step::Route));
        steps.extend(rules(first));
        steps.extend(of_host.into_iter().cloned().map(Step::Sysctl));
        if self.nft.is_some() {
            steps.push(Step::Firewall);
        }
        steps.extend(rules(last));
        if self.dns != DnsPlan::Untouched {
            steps.push(Step::Resolver);
        }
        steps
    }
}

impl Applied {
    /// Changes that are no longer in place, because somebody else undid them.
    ///
    /// # Errors
    /// The kernel did not answer.
    pub fn missing(&mut self) -> Result<Vec<Step>, HostError> {
        let look = self.look(Seen::EVERYTHING)?;
        Ok(self.not_in_place(&look))
    }

    /// What could not be done, and what that costs. Those of the plan itself are in [`HostPlan::warnings`].
    #[must_use]
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// The plan that is in force.
    #[must_use]
    pub fn plan(&self) -> &HostPlan {
        &self.plan
    }

    /// The journal, for whoever looks after its directory. While somebody has it, nothing is recorded.
    #[must_use]
    pub fn journal(&self) -> Arc<Mutex<Journal>> {
        Arc::clone(&self.journal)
    }

    /// A descriptor that hangs up when the holder of the firewall table has ended.
    #[must_use]
    pub fn lifeline(&self) -> Option<BorrowedFd<'_>> {
        self.done.iter().find_map(|done| match done {
            Done::Firewall(table) => Some(table.lifeline()),
            Done::Change(..) | Done::Resolved => None,
        })
    }

    /// Undoes everything, last change first, and forgets the journal. Reset the flows of clients before: the
    /// addresses that they use vanish here. The state directory is held until this value, and what [`Applied::journal`] gave, are dropped.
    ///
    /// # Errors
    /// What could not be undone; the journal keeps it, and `cleanup` tries again.
    pub fn revert(&mut self) -> Result<(), HostError> {
        self.undo_all()
    }

    fn run(&mut self) -> Result<(), HostError> {
        // It starts while routes and rules are set.
        self.ready = self.plan.nft.as_ref().map(Ready::begin);
        let steps: Vec<(Step, Vec<Undo>)> =
            self.plan.steps().into_iter().map(|step| (step.clone(), self.undos(&step))).collect();
        let lasting = steps.iter().flat_map(|(_, undos)| undos).filter(|undo| undo.outlives_us());
        let mut ids = self.journal.lock().record(lasting)?.into_iter();
        let mut failed = Vec::new();
        for (step, undos) in steps {
            let mut number = |undo: Undo| (undo.outlives_us().then(|| ids.next()).flatten(), undo);
            let undos: Vec<(Option<u64>, Undo)> = undos.into_iter().map(&mut number).collect();
            match self.perform(&step) {
                Ok(done) => {
                    self.done.extend(undos.into_iter().map(|(id, undo)| Done::Change(id, undo)));
                    self.done.extend(done);
                }
                Err(error) => {
                    let (doubtful, never): (Vec<_>, Vec<_>) =
                        undos.into_iter().partition(|(_, undo)| undo.may_be_in_place(&error));
                    self.done.extend(doubtful.into_iter().map(|(id, undo)| Done::Change(id, undo)));
                    // Somebody else may have made just this, so its inverse is not ours to carry out.
                    let mut void: Vec<u64> = never.into_iter().filter_map(|(id, _)| id).collect();
                    if step.is_essential(&self.plan) {
                        void.extend(ids);
                        self.journal.lock().void(&void)?;
                        return Err(error);
                    }
                    self.journal.lock().void(&void)?;
                    self.do_without(step, error, &mut failed);
                }
            }
        }
        self.warnings.extend(told_of(&failed));
        Ok(())
    }

    /// Takes note of what could not be done. A parameter stays as it is; the others are tried again while the run goes on, for
    /// who was in the way may be so no more.
    fn do_without(&mut self, step: Step, error: HostError, parameters: &mut Vec<(Sysctl, HostError)>) {
        let told = error.to_string();
        match step {
            Step::Sysctl(ref sysctl) => {
                parameters.push((sysctl.clone(), error));
                self.passed_over.push(step);
                return;
            }
            Step::Firewall => self.warnings.push(format!("{told}: {}", self.plan.lost_without_table())),
            _ => self.warnings.push(told.clone()),
        }
        self.settling.failed.push(told);
    }

    /// How the step will be undone, as far as data can say; in the order of recording, undone last to first.
    fn undos(&self, step: &Step) -> Vec<Undo> {
        match step {
            Step::Address(address) => vec![Undo::Address { device: self.plan.tun.clone(), address: *address }],
            Step::Route(route) => vec![Undo::Route(route.clone())],
            Step::Rule(rule) => vec![Undo::Rule(rule.clone())],
            Step::Sysctl(wanted) if !wanted.of_tun => sysctl_undos(wanted),
            Step::Resolver => match &self.plan.dns {
                DnsPlan::Rewrite { text, .. } => {
                    resolv_conf::undo(Path::new(resolv_conf::PATH), text).into_iter().collect()
                }
                DnsPlan::Untouched | DnsPlan::Resolved { .. } => Vec::new(),
            },
            Step::Firewall => self.plan.nft.as_ref().and_then(Nft::lasting).map(Undo::Table).into_iter().collect(),
            Step::Link | Step::Sysctl(_) => Vec::new(),
        }
    }

    /// Makes one change. What comes back is what only this process can undo.
    fn perform(&mut self, step: &Step) -> Result<Option<Done>, HostError> {
        let tun = self.plan.tun.as_str();
        match step {
            Step::Link => {
                // First: a link of less than 1280 bytes has no IPv6, nor settings of it.
                self.netlink.set_mtu(tun, self.plan.mtu)?;
                if self.plan.addresses.iter().any(|net| net.addr().is_ipv6()) {
                    self.netlink.set_no_link_local(tun)?;
                    self.netlink.delete_link_local(tun)?;
                }
                self.netlink.set_queue_length(tun, QUEUE_LENGTH)?;
                self.netlink.link_up(tun)?;
            }
            Step::Address(address) => self.netlink.add_address(tun, *address)?,
            Step::Route(route) => self.netlink.add_route(route)?,
            Step::Rule(rule) => self.netlink.add_rule(rule)?,
            Step::Sysctl(Sysctl { path, value, .. }) => {
                let written = sysctl::write(path, value);
                written.map_err(|source| HostError::io(format!("set {path} to {value}"), source))?;
            }
            Step::Firewall => {
                let act = if self.plan.has_kill_switch() { NO_KILL_SWITCH } else { "load the firewall table" };
                return self.load_firewall().map_err(|source| HostError::io(act, source));
            }
            Step::Resolver => return self.set_resolver(),
        }
        Ok(None)
    }

    fn load_firewall(&mut self) -> io::Result<Option<Done>> {
        let Some(nft) = self.plan.nft.clone() else { return Ok(None) };
        let ready = self.ready.take().unwrap_or_else(|| Ready::begin(&nft))?;
        let owned = ready.load(&nft)?;
        if owned.is_none() {
            self.standing = Some(nft);
        }
        Ok(owned.map(Done::Firewall))
    }

    fn set_resolver(&self) -> Result<Option<Done>, HostError> {
        match &self.plan.dns {
            DnsPlan::Untouched => Ok(None),
            DnsPlan::Resolved { servers } => {
                let told = resolv_conf::tell_resolved(&self.plan.tun, servers);
                told.map_err(|source| HostError::io("tell systemd-resolved about the TUN", source))?;
                Ok(Some(Done::Resolved))
            }
            DnsPlan::Rewrite { text, .. } => {
                let written = resolv_conf::replace(Path::new(resolv_conf::PATH), text);
                written.map_err(|source| HostError::io(format!("rewrite {}", resolv_conf::PATH), source))?;
                Ok(None)
            }
        }
    }
}

/// One warning for all parameters that could not be set.
fn told_of(failed: &[(Sysctl, HostError)]) -> Option<String> {
    failed.iter().for_each(|(_, error)| tracing::debug!("{error}"));
    let (_, first) = failed.first()?;
    let why = match sysctl::are_read_only() {
        true => "/proc/sys is read-only here, as in most containers".to_owned(),
        false => first.to_string(),
    };
    let wanted: Vec<&Sysctl> = failed.iter().map(|(sysctl, _)| sysctl).collect();
    Some(format!("{why}: tunproxy could not set {}. `tunproxy doctor` says what to do", not_set(&wanted)))
}

/// A switch that drags others along: they come back after it, because undoing goes from the last to the first.
pub(super) fn sysctl_undos(wanted: &Sysctl) -> Vec<Undo> {
    let old = |path: String, ours| Some(Undo::Sysctl { old: sysctl::read(&path).ok()?, path, ours });
    let dragged = sysctl::dragged_along(&wanted.path).into_iter().filter_map(|path| old(path, None));
    dragged.chain(old(wanted.path.clone(), Some(wanted.value.clone()))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_for_want_of_a_capability_names_it_and_the_command_that_gives_it() {
        let source = io::Error::from_raw_os_error(libc::EPERM);
        let refused = NetlinkError { act: "add the rule".to_owned(), source, said: None };
        let text = HostError::from(refused).to_string();
        assert!(text.contains("add the rule") && text.contains("CAP_NET_ADMIN"), "{text}");
        // Advice that has been followed already is none.
        assert_eq!(text.contains("sudo setcap"), !may_administer_network(), "{text}");
    }
}
