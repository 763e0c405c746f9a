//! Programs of the system that never end: each is given up after a while, and what does not need it is undone all the same.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::support::tunproxy::Place;
use super::support::{Dump, Topology, needs, run, world};

const TUN: &str = "/dev/net/tun";
/// What one call of nft may take, and slack for a slow machine: a service manager waits for 90 s.
const LIMIT: Duration = Duration::from_secs(60);

/// A stand-in for nft that never ends, as long as this lives.
struct Hanging(PathBuf);

impl Hanging {
    fn new() -> Self {
        let nft = needs::find("nft").and_then(|path| path.canonicalize().ok()).expect("nft");
        let stand_in = world::fresh_dir("nft").join("stand-in");
        std::fs::write(&stand_in, "#!/bin/sh\nsleep 1000\n").expect("a script");
        std::fs::set_permissions(&stand_in, std::fs::Permissions::from_mode(0o755)).expect("its mode");
        mount(Some(&stand_in), &nft, None::<&Path>, MsFlags::MS_BIND, None::<&Path>).expect("a stand-in");
        Self(nft)
    }
}

impl Drop for Hanging {
    fn drop(&mut self) {
        // One that is being waited for may still run.
        umount2(&self.0, MntFlags::MNT_DETACH).expect("the real one");
    }
}

fn place(kill_switch: bool) -> Place {
    Place::new(&format!(
        "
mode: rule
tun: {{ enable: true, auto-route: true, dns-hijack: ['any:53'], kill-switch: {kill_switch} }}
dns: {{ enable: true, enhanced-mode: fake-ip, nameserver: [192.168.1.1] }}
rules: ['MATCH,DIRECT']
"
    ))
}

#[test]
fn a_stop_with_an_nft_that_hangs_undoes_the_rest_and_keeps_the_table_in_the_journal() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let before = Dump::take(&lab.host);
        let place = place(true);
        let tunproxy = place.start(&lab.host);
        {
            let _hanging = Hanging::new();
            let start = Instant::now();
            tunproxy.signal(nix::sys::signal::Signal::SIGTERM);
            tunproxy.line("does not end: killed after");
            assert!(!tunproxy.wait().success(), "not all is undone");
            assert!(start.elapsed() < LIMIT, "{:?}", start.elapsed());
            let rules = lab.host.ip("-4 rule") + &lab.host.ip("-6 rule");
            assert!(!rules.contains("90"), "the rules are gone: {rules}");
        }
        assert!(lab.host.nft("list tables").contains("inet tunproxy"), "the table is still there");
        place.clean_up(&lab.host);
        before.assert_same(&Dump::take(&lab.host));
    });
}

#[test]
fn a_start_with_an_nft_that_hangs_does_without_the_table_and_says_so() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let before = Dump::take(&lab.host);
        let tunproxy = {
            let _hanging = Hanging::new();
            place(false).start(&lab.host)
        };
        assert!(tunproxy.output().contains("does not end: killed after 10 s"), "{}", tunproxy.output());
        assert!(tunproxy.stop().success());
        before.assert_same(&Dump::take(&lab.host));
    });
}
