//! One opening for many that wait: a client's first burst to many peers is one association, not one for each.

use std::cell::{Cell, RefCell};

use tokio::sync::Notify;

use crate::net::DialError;

/// An opening under way.
#[derive(Default)]
pub(super) struct Slot {
    over: Cell<bool>,
    failed: RefCell<Option<DialError>>,
    done: Notify,
}

impl Slot {
    /// Waits for the opening to end.
    ///
    /// # Errors
    /// What it failed with. Without an error it either succeeded or was given up: look again.
    pub(super) async fn wait(&self) -> Result<(), DialError> {
        let done = self.done.notified();
        if !self.over.get() {
            done.await;
        }
        self.failed.borrow().as_ref().map_or(Ok(()), |error| Err(error.again()))
    }

    /// Tells those who wait what went wrong, once the opening [ends](Self::end).
    pub(super) fn fail(&self, error: &DialError) {
        *self.failed.borrow_mut() = Some(error.again());
    }

    /// The opening is over.
    pub(super) fn end(&self) {
        self.over.set(true);
        self.done.notify_waiters();
    }
}
