//! A kill switch: closed before the one that a crashed run left is taken down, and opened by nobody but a stop.

use std::io;

use super::{Applied, Done, HostError, Report, Step};
use crate::platform::imp::nft;
use crate::platform::plan::HostPlan;

impl HostPlan {
    /// Whether nothing may leave past the TUN, even when we are gone.
    #[must_use]
    pub fn has_kill_switch(&self) -> bool {
        self.nft.as_ref().is_some_and(|nft| nft.comment.is_some())
    }

    /// Whether the kill switch of this plan is in force, as the kernel tells.
    ///
    /// # Errors
    /// Nobody knows: the kernel does not tell (no CAP_NET_ADMIN, no descriptor left).
    pub fn is_closed(&self) -> io::Result<bool> {
        match self.nft.as_ref().filter(|_| self.has_kill_switch()) {
            Some(nft) => nft::is_loaded(nft),
            None => Ok(false),
        }
    }
}

impl Applied {
    /// Undoes what the crashed run had left closed. Ours stands by now: rules, routes and table with other numbers.
    pub(super) fn take_over(&mut self) -> Result<(), HostError> {
        if !self.journal.lock().is_clean() {
            self.taken_over = Some(self.journal.lock().replay()?);
        }
        Ok(())
    }

    /// What was undone of a crashed run whose kill switch was closed until ours was.
    #[must_use]
    pub fn taken_over(&self) -> Option<&Report> {
        self.taken_over.as_ref()
    }

    /// Gives the host up as it is, if a kill switch is closed on it: for an end that nobody asked for. What is left is in
    /// the journal, for the next start or a clean-up. None: there is no kill switch.
    ///
    /// # Errors
    /// It is open, because another program has removed it, and cannot be closed again.
    pub fn leave_closed(&mut self) -> Option<Result<(), HostError>> {
        self.plan.has_kill_switch().then(|| {
            self.reverted = true;
            self.close_again()
        })
    }

    /// The last look at it: what opens it from now on, nobody notices.
    fn close_again(&mut self) -> Result<(), HostError> {
        if !self.firewall_in_place() {
            self.do_on_record(&Step::Firewall)?;
        }
        Ok(())
    }

    pub(super) fn firewall_in_place(&self) -> bool {
        match &self.plan.nft {
            Some(nft) if self.plan.has_kill_switch() => nft::is_loaded(nft).unwrap_or(true),
            _ => self.done.iter().all(|done| !matches!(done, Done::Firewall(table) if !table.is_loaded())),
        }
    }
}
