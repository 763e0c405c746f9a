//! Keeps the state directory of a run where it is: what somebody deletes of it comes back.

use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use parking_lot::Mutex;
use tokio::time::{sleep, timeout};

use super::control::Control;
use crate::platform::{DirectoryWatch, Journal};

/// Whoever deletes a directory deletes the files in it one by one: so long it takes.
const MOMENT: Duration = Duration::from_millis(200);
/// What failed is tried again when something has changed there, or after this; then after twice as long, and so on.
const FIRST_RETRY: Duration = Duration::from_secs(1);
/// The longest of these times.
const LAST_RETRY: Duration = Duration::from_secs(60);

/// Puts back what is missing of the files in `state`, whenever something is. Ends with the run.
pub(super) async fn keep(state: &Path, journal: Arc<Mutex<Journal>>, control: Rc<Control>) {
    let shown = state.display();
    let (mut lost, mut failed, mut retry) = (false, String::new(), FIRST_RETRY);
    loop {
        // Opened before the look, so that nothing is missed between the two.
        let watch = match DirectoryWatch::open(state) {
            Ok(watch) => watch,
            Err(error) => return tracing::warn!("that somebody deletes {shown} would go unnoticed: {error}"),
        };
        let back = put_back(&journal, &control);
        let changed = match back {
            Ok(was_missing) => {
                if was_missing && !std::mem::replace(&mut lost, true) {
                    tracing::warn!(
                        "somebody has deleted the state directory {shown}, or files in it; they are back, and so is what undoes \
                         our changes after a crash. (Further times are told with log-level: debug)"
                    );
                } else if was_missing {
                    tracing::debug!("the state directory {shown} was deleted again; it is back");
                }
                (failed, retry) = (String::new(), FIRST_RETRY);
                watch.changed().await
            }
            Err(error) => {
                let words = format!("{error:#}");
                if failed != words {
                    tracing::error!(
                        "somebody has deleted the state directory {shown}, or files in it, and they cannot be put back: {words}. \
                         Until they are, nobody can ask this run, and after a crash `cleanup` does not know what to undo"
                    );
                    failed = words;
                }
                // What was tried has changed something itself, which is nothing to wake up for.
                drop(watch);
                let until = retry;
                retry = (retry * 2).min(LAST_RETRY);
                match DirectoryWatch::open(state) {
                    // No sooner, whatever changes there: the attempt itself may take its time.
                    Ok(watch) => {
                        sleep(FIRST_RETRY.min(until)).await;
                        timeout(until, watch.changed()).await.unwrap_or(Ok(()))
                    }
                    Err(_) => {
                        sleep(until).await;
                        Ok(())
                    }
                }
            }
        };
        if changed.is_err() {
            return;
        }
        sleep(MOMENT).await;
    }
}

/// True: something was missing.
fn put_back(journal: &Mutex<Journal>, control: &Control) -> anyhow::Result<bool> {
    let state = journal.lock().put_back()?;
    let socket = control.put_back().context("cannot listen there")?;
    Ok(state || socket)
}
