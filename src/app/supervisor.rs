//! What a service manager is told (sd_notify(3)). Where there is none, these do nothing.

use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::rc::Rc;
use std::time::Duration;

use futures_util::future::join_all;
use sd_notify::NotifyState;

use super::worker::Worker;

/// Of the time within which a sign is wanted: one may come late, and one may be lost.
const SIGNS: u32 = 3;
/// A shorter time than this between two signs is a mistake of whoever asks.
const SHORTEST: Duration = Duration::from_millis(10);
/// How long a manager may take that is busy with other things, as at boot. All that we do ourselves waits meanwhile.
const PATIENCE: Duration = Duration::from_secs(5);

/// Traffic flows; `status` says what of.
pub(super) fn ready(status: &str) {
    tell(&[NotifyState::Ready, NotifyState::Status(status)], Some(PATIENCE));
}

/// The stop has begun.
pub(super) fn stopping() {
    tell(&[NotifyState::Stopping, NotifyState::Status("stopping: open flows may finish")], None);
}

/// Gives the signs of life that the service manager wants (`WatchdogSec=`), each once every thread has answered: one that
/// hangs ends the run from outside. Never returns where nobody asks for any.
pub(super) async fn give_signs(workers: Rc<Vec<Worker>>) {
    let Some(limit) = sd_notify::watchdog_enabled() else { return std::future::pending().await };
    let mut turns = tokio::time::interval((limit / SIGNS).max(SHORTEST));
    loop {
        turns.tick().await;
        // A worker that has ended is nobody's hang: its end is told by other means.
        join_all(workers.iter().map(Worker::pulse)).await;
        tell(&[NotifyState::Watchdog], None);
    }
}

/// Says it to whoever started us. A manager that does not listen, or not in time, is no reason to fail.
fn tell(states: &[NotifyState<'_>], patience: Option<Duration>) {
    let Some(manager) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let message: String = states.iter().map(|state| format!("{state}\n")).collect();
    if let Err(error) = send(&manager, &message, patience) {
        tracing::debug!("the service manager does not hear us: {error}");
    }
}

/// Without `patience` it is said if it can be said at once.
fn send(manager: &OsStr, message: &str, patience: Option<Duration>) -> io::Result<()> {
    let address = match manager.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(manager)?,
    };
    let socket = UnixDatagram::unbound()?;
    match patience {
        Some(patience) => socket.set_write_timeout(Some(patience))?,
        None => socket.set_nonblocking(true)?,
    }
    socket.send_to_addr(message.as_bytes(), &address).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manager_by_path_or_by_abstract_name_hears_it_and_a_deaf_one_holds_nobody_up() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let name = format!("tunproxy-test-{}", std::process::id());
        let by_name = SocketAddr::from_abstract_name(&name).unwrap();
        for (manager, address) in [
            (path.clone().into_os_string(), SocketAddr::from_pathname(&path).unwrap()),
            (format!("@{name}").into(), by_name),
        ] {
            let socket = UnixDatagram::bind_addr(&address).unwrap();
            send(&manager, "READY=1\n", Some(PATIENCE)).unwrap();
            let mut heard = [0; 64];
            assert_eq!(socket.recv(&mut heard).unwrap(), 8);
            // Its queue is of some length.
            let deaf = (0..100_000).find_map(|_| send(&manager, "WATCHDOG=1\n", None).err());
            assert_eq!(deaf.map(|error| error.kind()), Some(io::ErrorKind::WouldBlock));
        }
        assert!(send(OsStr::new("/nobody/is/here"), "READY=1\n", None).is_err());
    }
}
