//! Waiting for the turn to change the host while the rest of the run goes on: names are answered, and signals heard.

use crate::platform::Turn;

/// The turn of this process, if it is `wanted`, and whether waiting for it was cut short because `asked` came: whoever asks
/// does not want to wait, and what follows is done without.
pub(super) async fn beside(wanted: bool, asked: impl Future<Output = ()>) -> (Option<Turn>, bool) {
    if !wanted {
        return (None, false);
    }
    let (told, heard) = tokio::sync::oneshot::channel();
    // It waits as long as it does, so it is none that the end of the runtime would wait for. Given up, it gives back the turn.
    let begun = std::thread::Builder::new().name("turn".to_owned()).spawn(move || drop(told.send(Turn::wait())));
    if let Err(error) = begun {
        tracing::debug!("nobody waits for other runs: {error}");
        return (None, false);
    }
    tokio::select! {
        biased;
        turn = heard => (turn.ok(), false),
        () = asked => (None, true),
    }
}

#[cfg(test)]
mod tests {
    use std::future::{pending, ready};

    use super::*;

    #[tokio::test]
    async fn whoever_asks_meanwhile_cuts_the_waiting_short_and_else_the_turn_comes() {
        let first = Turn::wait();
        assert!(first.is_ours());
        let (turn, cut) = beside(true, ready(())).await;
        assert!(turn.is_none() && cut);
        // Else what goes on beside it would not: this is the thread that waits.
        let (second, ()) = tokio::join!(beside(true, pending()), async { drop(first) });
        assert!(second.0.is_some_and(|turn| turn.is_ours()) && !second.1);
        assert!(!beside(false, pending()).await.1);
    }
}
