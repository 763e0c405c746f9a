//! A mistake of ours costs one packet or one turn, not the worker and all its flows.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering::Relaxed;

use crate::dispatch::Counters;

/// Does `act`. None: it panicked, which the panic's own message has said; it is counted, and life goes on.
///
/// What `act` had borrowed is free again then, since guards are dropped on the way. A flow that it was busy with may be
/// left as it was, and ends by its timers.
pub(super) fn contained<T>(counters: &Counters, act: impl FnOnce() -> T) -> Option<T> {
    let done = catch_unwind(AssertUnwindSafe(act)).ok();
    if done.is_none() {
        counters.panics.fetch_add(1, Relaxed);
        tracing::error!("a mistake of this program was contained, and cost what was being done; please report it");
    }
    done
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    #[test]
    fn a_panic_is_counted_and_frees_what_was_borrowed() {
        let (counters, state) = (Counters::default(), RefCell::new(1));
        assert_eq!(contained(&counters, || *state.borrow()), Some(1));
        let done = contained(&counters, || {
            let mut state = state.borrow_mut();
            *state = 2;
            // A mistake, as it were.
            assert_eq!(*state, 3, "injected");
        });
        assert_eq!((done, counters.panics.load(Relaxed), *state.borrow()), (None, 1, 2));
    }
}
