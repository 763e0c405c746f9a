//! Network namespaces and the links between them.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::{io, path::Path};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::{SigHandler, Signal};

use super::{needs, program, world};

/// One host of the lab: a network namespace, and maybe a resolv.conf of its own. Gone when the last copy is dropped.
#[derive(Clone)]
pub(crate) struct Netns(Arc<Inner>);

struct Inner {
    name: String,
    file: File,
    resolv_conf: Option<String>,
}

impl Netns {
    /// A namespace with its loopback up, IPv6 without duplicate address detection or router solicitations.
    ///
    /// # Panics
    /// If the kernel refuses it.
    pub(crate) fn new(name: &str) -> Self {
        Self::with(name, None)
    }

    /// Like [`Netns::new`], but its programs see `resolv_conf` as `/etc/resolv.conf`. Programs of every other
    /// namespace share the one that [`world::set_resolv_conf`] writes.
    ///
    /// # Panics
    /// If the kernel refuses it.
    pub(crate) fn with_resolv_conf(name: &str, resolv_conf: &str) -> Self {
        Self::with(name, Some(resolv_conf.to_owned()))
    }

    fn with(name: &str, resolv_conf: Option<String>) -> Self {
        expect_success(tool("ip").args(["netns", "add", name]));
        let file = File::open(format!("/run/netns/{name}")).expect("the namespace just made");
        let ns = Self(Arc::new(Inner { name: name.to_owned(), file, resolv_conf }));
        for (key, value) in [("accept_dad", "0"), ("accept_ra", "0"), ("router_solicitations", "0")] {
            ns.sysctl(&format!("net.ipv6.conf.default.{key}"), value);
        }
        ns.sysctl("net.ipv6.conf.all.accept_dad", "0");
        ns.ip("link set lo up");
        ns
    }

    /// The name given to it.
    pub(crate) fn name(&self) -> &str {
        &self.0.name
    }

    /// Runs `ip` with these words, which must succeed.
    ///
    /// # Panics
    /// With what `ip` said, if it fails.
    pub(crate) fn ip(&self, words: &str) -> String {
        expect_success(self.command("ip").args(words.split_whitespace()))
    }

    /// Loads an nftables script, which must succeed.
    ///
    /// # Panics
    /// With what `nft` said, if it fails.
    pub(crate) fn nft(&self, script: &str) -> String {
        expect_success(self.command("nft").arg(script))
    }

    /// Adds addresses like `192.0.2.1/24` or `2001:db8::1/64`, usable at once.
    pub(crate) fn address(&self, device: &str, addresses: &[&str]) {
        for address in addresses {
            let nodad = if address.contains(':') { "nodad" } else { "" };
            self.ip(&format!("addr add {address} dev {device} {nodad}"));
        }
    }

    /// Adds routes, each as `ip route add` takes it.
    pub(crate) fn routes(&self, routes: &[&str]) {
        for route in routes {
            self.ip(&format!("{} route add {route}", if route.contains(':') { "-6" } else { "-4" }));
        }
    }

    /// Sets a sysctl of this namespace by its dotted name.
    ///
    /// # Panics
    /// If it does not exist or is refused.
    pub(crate) fn sysctl(&self, key: &str, value: &str) {
        let path = format!("/proc/sys/{}", key.replace('.', "/"));
        let value = value.to_owned();
        self.enter(move || fs::write(&path, value).unwrap_or_else(|error| panic!("{path}: {error}")));
    }

    /// Runs `act` on a thread of this namespace and waits for it. Sockets made there stay there.
    ///
    /// # Panics
    /// With the panic of `act`.
    pub(crate) fn enter<T: Send + 'static>(&self, act: impl FnOnce() -> T + Send + 'static) -> T {
        self.spawn(act).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// Runs `act` on a thread of this namespace.
    ///
    /// # Panics
    /// If the thread cannot be started.
    pub(crate) fn spawn<T: Send + 'static>(&self, act: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
        let ns = self.clone();
        let entered = move || {
            setns(ns.0.file.as_fd(), CloneFlags::CLONE_NEWNET).expect("our own namespace");
            act()
        };
        thread::Builder::new().name(self.0.name.clone()).spawn(entered).expect("a thread")
    }

    /// A command that will run in this namespace.
    pub(crate) fn command(&self, program: impl AsRef<Path>) -> Command {
        let program = program.as_ref();
        let found = program.to_str().and_then(needs::find).unwrap_or_else(|| program.to_owned());
        let mut command = Command::new(found);
        for name in world::private_environment() {
            command.env_remove(name);
        }
        let ns = self.clone();
        let own_resolv_conf = ns.0.resolv_conf.as_ref().map(|content| {
            let file = Path::new(world::DESK).join(format!("resolv.conf.{}", ns.0.name));
            fs::write(&file, content).expect("a file on the lab's desk");
            file
        });
        // SAFETY: between fork and exec only system calls are made, on memory prepared before the fork.
        unsafe {
            command.pre_exec(move || {
                // Whoever runs the tests may have it ignored: a shell does, for its jobs in the background.
                nix::sys::signal::signal(Signal::SIGINT, SigHandler::SigDfl)?;
                setns(ns.0.file.as_fd(), CloneFlags::CLONE_NEWNET)?;
                own_resolv_conf.as_deref().map_or(Ok(()), bind_resolv_conf)
            });
        }
        command
    }

    /// Runs a program to its end and returns what it wrote to stdout; it must succeed.
    ///
    /// # Panics
    /// With its output, if it fails.
    pub(crate) fn run(&self, program: &str, args: &[&str]) -> String {
        expect_success(self.command(program).args(args))
    }
}

fn bind_resolv_conf(file: &Path) -> io::Result<()> {
    const NONE: Option<&str> = None;
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE)?;
    Ok(mount(Some(file), "/etc/resolv.conf", NONE, MsFlags::MS_BIND, NONE)?)
}

impl Drop for Inner {
    fn drop(&mut self) {
        let path = format!("/run/netns/{}", self.name);
        let _ = umount2(path.as_str(), MntFlags::MNT_DETACH);
        let _ = fs::remove_file(path);
    }
}

/// A link between two hosts, up on both ends.
///
/// # Panics
/// If a name is taken.
pub(crate) fn veth(a: &Netns, a_device: &str, b: &Netns, b_device: &str) {
    a.ip(&format!("link add {a_device} type veth peer name {b_device} netns {}", b.name()));
    a.ip(&format!("link set {a_device} up"));
    b.ip(&format!("link set {b_device} up"));
}

/// A program of this machine, found as [`needs::find`] does.
fn tool(program: &str) -> Command {
    Command::new(needs::find(program).unwrap_or_else(|| program.into()))
}

fn expect_success(command: &mut Command) -> String {
    let output = program::output(command);
    assert!(output.status.success(), "{command:?}: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}
