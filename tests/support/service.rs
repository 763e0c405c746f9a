//! The program under test as the shipped unit runs it, as far as that takes no systemd: a user of its own, the unit's
//! capabilities and no others, no new privileges, and a system that is read-only but for the state directory.

use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::mount::{MsFlags, mount};

use super::tunproxy::{Place, Said, binary};
use super::unit::Unit;
use super::{Netns, needs, world};

/// The service's user, who is nobody else: one of the system, as the package makes it.
pub(crate) const USER: u32 = 712;

/// Needed by tests of a service: its user may open the TUN driver.
pub(crate) const OPEN_TUN: &str = needs::OPEN_TUN;

/// Under which rights a run of a [`Place`] is started.
#[derive(Debug, Clone)]
pub(crate) struct Rights {
    /// As the unit names them.
    capabilities: Vec<String>,
    /// The program, where its user finds it.
    program: PathBuf,
}

/// A place whose runs are those of the service.
pub(crate) fn service(profile: &str) -> Place {
    let unit = Unit::shipped();
    let capabilities = unit.words("AmbientCapabilities").into_iter().map(str::to_owned).collect();
    let mut place = Place::new(profile);
    std::fs::create_dir(&place.state).expect("a directory on the lab's desk");
    chown(&place.state, Some(USER), Some(USER)).expect("several users: run the tests as root");
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o700);
    std::fs::set_permissions(&place.state, mode).expect("our own directory");
    place.rights = Some(Rights { capabilities, program: program_for_all() });
    place
}

/// The build folder may be closed to others.
fn program_for_all() -> PathBuf {
    let place = world::fresh_dir("bin").join("tunproxy");
    std::fs::write(&place, "").expect("a file on the lab's desk");
    mount(Some(binary()), &place, None::<&str>, MsFlags::MS_BIND, None::<&str>).expect("a mount of the lab");
    place
}

/// Opens /dev/net/tun to all users of the lab, on a node of its own where the machine's is closed to them.
pub(crate) fn open_tun() {
    if let Some(node) = world::tun_node() {
        mount(Some(&node), "/dev/net/tun", None::<&str>, MsFlags::MS_BIND, None::<&str>).expect("a mount of the lab");
    }
}

impl Rights {
    /// Without one capability of the unit's.
    ///
    /// # Panics
    /// If the unit does not name it.
    #[must_use]
    pub(crate) fn without(mut self, capability: &str) -> Self {
        let before = self.capabilities.len();
        self.capabilities.retain(|name| name != capability);
        assert_eq!(self.capabilities.len() + 1, before, "{capability}");
        self
    }

    /// Where the program is.
    pub(crate) fn program(&self) -> &Path {
        &self.program
    }

    /// `tunproxy` in `ns`, with nothing but these rights; its arguments are still to come.
    pub(crate) fn command(&self, ns: &Netns, place: &Place) -> Command {
        // As ProtectSystem=strict and PrivateTmp= do it; a mount namespace of its own for each command.
        let script = "state=$1; shift
            mount --bind \"$state\" \"$state\"
            mount -t tmpfs -o mode=1777 none /tmp
            mount -o remount,bind,ro /run
            mount -o remount,bind,ro /
            exec \"$@\"";
        let mut command = ns.command("unshare");
        command.args(["--mount", "sh", "-euc", script, "sh"]).arg(&place.state);
        let names = |list: &[String]| {
            let words = list.iter().map(|name| format!(",+{}", name.trim_start_matches("CAP_").to_lowercase()));
            format!("-all{}", words.collect::<String>())
        };
        let sets = names(&self.capabilities);
        command.arg("setpriv").args([format!("--reuid={USER}"), format!("--regid={USER}")]).args([
            "--clear-groups",
            "--no-new-privs",
            &format!("--bounding-set={sets}"),
            &format!("--inh-caps={sets}"),
            &format!("--ambient-caps={sets}"),
        ]);
        command.arg(&self.program);
        command
    }
}

/// What `command`, run under these rights in `ns`, says of itself.
pub(crate) fn under(rights: &Rights, ns: &Netns, place: &Place, script: &str) -> Said {
    let itself = Rights { program: "/bin/sh".into(), ..rights.clone() };
    let mut command = itself.command(ns, place);
    command.args(["-c", script]);
    Said::of(&mut command)
}
