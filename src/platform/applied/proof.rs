//! Whether the host is as it was, read from the host.

use std::time::{Duration, Instant};

use super::{Applied, HostError};
use crate::platform::proof;
use crate::platform::undo::Undo;

/// How long the kernel may take to let go of an interface whose last descriptor is closed.
const LETTING_GO: Duration = Duration::from_secs(2);

/// What has been undone since the end of the run began.
#[derive(Debug, Default)]
pub(super) struct Back {
    /// Undone, or found undone.
    pub(super) undone: Vec<Undo>,
    /// The same for what no [`Undo`] tells of: a table with an owner, what systemd-resolved was told.
    pub(super) others: usize,
    /// The handles of tables that went with their owner.
    pub(super) tables: Vec<u64>,
    /// Left, because somebody changed it since.
    pub(super) left: usize,
}

/// What a look at the host found after all of a run was undone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Proof {
    /// How many changes were undone.
    pub undone: usize,
    /// How many were left, because somebody changed them since.
    pub left: usize,
    /// What is in place in spite of that.
    pub still: Vec<String>,
}

impl Applied {
    /// Reads the host again after [`Applied::revert`], when the device has been let go of.
    ///
    /// # Errors
    /// The host cannot be read.
    pub fn prove(&mut self) -> Result<Proof, HostError> {
        let back = std::mem::take(&mut self.back).unwrap_or_default();
        let undos: Vec<&Undo> = back.undone.iter().collect();
        let mut still: Vec<String> =
            proof::still_in_place(&mut self.netlink, &undos)?.into_iter().map(|undo| format!("to {undo}")).collect();
        if !back.tables.is_empty() {
            // By their handles: another run may have taken the name meanwhile.
            let there = proof::firewall()?.into_iter().filter(|table| back.tables.contains(&table.handle));
            still.extend(there.map(|table| format!("to delete the firewall table {} {}", table.family(), table.name)));
        }
        if !self.device_goes()? {
            still.push(format!("to delete the TUN {}", self.plan.tun));
        }
        Ok(Proof { undone: back.undone.len() + back.others, left: back.left, still })
    }

    fn device_goes(&mut self) -> Result<bool, HostError> {
        let end = Instant::now() + LETTING_GO;
        while self.netlink.link_state(&self.plan.tun)?.is_some() {
            if Instant::now() > end {
                return Ok(false);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(true)
    }
}
