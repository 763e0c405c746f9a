//! What `status` answers: counters as they stand, and the kill switch as it is found.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;
use tokio::time::{sleep, timeout};

use super::build;
use super::control::Looking;
use super::guard::Board;
use crate::dispatch::Core;
use crate::profile::Profile;

/// How long a look at the firewall may take: whoever asks waits for it.
const LOOK: Duration = Duration::from_secs(3);
/// After which a second look counts: the first may have met the guard at work.
const SECOND_LOOK: Duration = Duration::from_millis(300);

/// The answers of a run that began at `started`; what it has changed on the host stands on `board`.
pub(super) fn status(profile: &Profile, core: &Arc<Core>, board: &Board, started: Instant) -> Box<dyn Fn() -> Looking> {
    let (core, mode, tun) = (Arc::clone(core), profile.mode, profile.tun.enable);
    let (limit, board) = (build::memory_limit(profile), board.clone());
    Box::new(move || {
        let (core, board) = (Arc::clone(&core), board.clone());
        Box::pin(async move {
            serde_json::json!({
                "version": env!("CARGO_PKG_VERSION"),
                "pid": std::process::id(),
                "uptime_seconds": started.elapsed().as_secs(),
                "mode": mode.to_string(),
                "tun": tun,
                "kill_switch": kill_switch(&board).await,
                "memory_limit": limit,
                "fake_addresses": core.dns.fake_names(),
                "flows": core.counters.snapshot(),
                "packets": core.counters.stacks(),
                "dns": core.dns.counters().snapshot(),
            })
        })
    })
}

/// The state of the kill switch, in a word of docs/control.md.
async fn kill_switch(board: &Board) -> &'static str {
    if !board.read().is_some_and(|plan| plan.has_kill_switch()) {
        return "off";
    }
    match look(board).await {
        Some(true) => return "closed",
        Some(false) => {}
        None => return "unknown",
    }
    sleep(SECOND_LOOK).await;
    match look(board).await {
        Some(true) => "closed",
        Some(false) => "open",
        None => "unknown",
    }
}

/// Whether it is closed now; `None` where the firewall does not say. On a thread that nobody waits for at the end.
async fn look(board: &Board) -> Option<bool> {
    let plan = board.read()?;
    let (tell, told) = oneshot::channel();
    let looking = std::thread::Builder::new().name("look".to_owned()).spawn(move || tell.send(plan.is_closed()));
    looking.ok()?;
    timeout(LOOK, told).await.ok()?.ok()?.ok()
}
