//! What a start refuses before it changes anything.

use super::overlap::{Overlap, overlap};
use super::plan::{HostOptions, HostPlan};
use super::survey::{NoRoom, Survey};

/// The longest name that an interface can have, in bytes (`IFNAMSIZ` less the final zero).
const LONGEST_NAME: usize = 15;

/// Why there can be no plan.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PlanError {
    /// The name is already an interface's.
    #[error("the interface {0} exists already; choose another name (tun.device), or stop the program that made it")]
    NameTaken(String),
    /// The name cannot be an interface's.
    #[error("{0:?} cannot name an interface: 1 to 15 letters, digits, '-', '_', '.' or ':'")]
    BadName(String),
    /// There is no firewall to close.
    #[error(
        "tun.kill-switch cannot be had without nftables ({0}): install it (apt install nftables), or set \
         tun.kill-switch: false. Nothing was changed"
    )]
    NoKillSwitch(String),
    /// Somebody has addresses that were to be ours.
    #[error(
        "{0}: hosts there could not be told from names, or from ourselves. Choose a range that nobody here uses. Nothing was \
         changed"
    )]
    Overlap(Overlap),
    /// Numbers have run out.
    #[error(transparent)]
    NoRoom(#[from] NoRoom),
}

impl HostPlan {
    /// Whether an interface of that name may be made.
    ///
    /// # Errors
    /// [`PlanError::NameTaken`], [`PlanError::BadName`].
    pub fn check_name(name: &str, survey: &Survey) -> Result<(), PlanError> {
        check_syntax(name)?;
        match survey.links.iter().any(|link| link.name == name) {
            true => Err(PlanError::NameTaken(name.to_owned())),
            false => Ok(()),
        }
    }

    /// Whether a run could start on a host as `survey` says: everything that would make it refuse before it changes
    /// anything.
    ///
    /// # Errors
    /// [`PlanError`]: why not.
    pub fn may_start(options: &HostOptions, survey: &Survey) -> Result<(), PlanError> {
        Self::check_name(&options.tun, survey)?;
        match overlap(options, survey) {
            Some(overlap) => Err(PlanError::Overlap(overlap)),
            None => Self::new(options, survey).map(drop),
        }
    }
}

/// Whether the kernel, a firewall and a shell take `name` for that of an interface which can be ours.
///
/// # Errors
/// [`PlanError::BadName`].
pub(super) fn check_syntax(name: &str) -> Result<(), PlanError> {
    let usable = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.:".contains(&byte);
    let reserved = ["", ".", "..", "lo", "all", "default"].contains(&name);
    match !reserved && name.len() <= LONGEST_NAME && name.bytes().all(usable) {
        true => Ok(()),
        false => Err(PlanError::BadName(name.to_owned())),
    }
}
