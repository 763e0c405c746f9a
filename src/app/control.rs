//! The control socket: a unix socket in the state directory, one JSON object a line each way.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream as BlockingStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc};

/// A longer line is no command.
const LONGEST: u64 = 64 << 10;
/// Clients at once; the next ones wait.
const CLIENTS: usize = 16;
/// A client that says nothing for so long is let go.
const PATIENCE: Duration = Duration::from_secs(30);

/// What can be asked of a running program.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case")]
pub enum Command {
    /// Whether it is there.
    Ping,
    /// What it does: counters, mode, device.
    Status,
    /// Puts the host back and ends.
    Stop,
}

/// The socket's place below the state directory.
#[must_use]
pub(super) fn path(state: &Path) -> PathBuf {
    state.join("control.sock")
}

/// The listening socket; removed when dropped.
pub(super) struct Control {
    listener: UnixListener,
    path: PathBuf,
}

impl Control {
    /// Listens below `state`. The caller holds the state directory's lock, so a socket that is there is a leftover.
    pub(super) fn bind(state: &Path) -> anyhow::Result<Self> {
        let path = path(state);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("cannot replace {}", path.display()));
            }
            _ => {}
        }
        // Nobody else may connect in the moment between the two calls: the directory is ours alone.
        let listener = UnixListener::bind(&path).with_context(|| format!("cannot listen on {}", path.display()))?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
        Ok(Self { listener, path })
    }

    /// Serves clients until dropped. `status` describes the program; a stop is sent to `stop`.
    pub(super) async fn serve(&self, status: impl Fn() -> serde_json::Value + 'static, stop: mpsc::Sender<()>) {
        let places = Arc::new(Semaphore::new(CLIENTS));
        let status: std::rc::Rc<dyn Fn() -> serde_json::Value> = std::rc::Rc::new(status);
        loop {
            let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
            match self.listener.accept().await {
                Ok((stream, _)) => {
                    let (status, stop) = (std::rc::Rc::clone(&status), stop.clone());
                    tokio::task::spawn_local(async move {
                        // A client that goes away or talks nonsense is its own problem.
                        let _ = tokio::time::timeout(PATIENCE, talk(stream, &*status, &stop)).await;
                        drop(place);
                    });
                }
                // Out of descriptors: the next attempt must not spin.
                Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
            }
        }
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

async fn talk(
    mut stream: UnixStream,
    status: &dyn Fn() -> serde_json::Value,
    stop: &mpsc::Sender<()>,
) -> io::Result<()> {
    let user = stream.peer_cred()?.uid();
    let (reader, mut writer) = stream.split();
    let mut lines = tokio::io::BufReader::new(reader.take(LONGEST)).lines();
    while let Some(line) = lines.next_line().await? {
        let answer = if user != 0 && user != nix::unistd::geteuid().as_raw() {
            serde_json::json!({"error": "only root and the user who runs this program may ask"})
        } else {
            match serde_json::from_str(&line) {
                Ok(Command::Ping) => serde_json::json!({"ok": true, "version": env!("CARGO_PKG_VERSION")}),
                Ok(Command::Status) => status(),
                Ok(Command::Stop) => {
                    let _ = stop.try_send(());
                    serde_json::json!({"ok": true})
                }
                Err(error) => serde_json::json!({"error": format!("not a command: {error}")}),
            }
        };
        writer.write_all(format!("{answer}\n").as_bytes()).await?;
    }
    Ok(())
}

/// Asks the program that runs with the state directory `state`; blocks.
///
/// # Errors
/// Nobody listens there, or the answer is not what was expected.
pub fn ask(state: &Path, command: Command) -> anyhow::Result<serde_json::Value> {
    let path = path(state);
    let mut stream = BlockingStream::connect(&path).with_context(|| {
        format!("no tunproxy answers on {}; is it running, with the same --state-dir?", path.display())
    })?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    writeln!(stream, "{}", serde_json::to_string(&command)?)?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line)?;
    serde_json::from_str(&line).context("the answer cannot be read")
}
