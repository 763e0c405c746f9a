//! Programs of the system that never end: each is given up after a while, and what does not need it is undone all the same.
//! And one that fails, but not for ever.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::support::program::{PATIENCE, Program};
use super::support::tunproxy::Place;
use super::support::{Dump, Topology, needs, run, world};

const TUN: &str = "/dev/net/tun";
/// What one call of nft may take, and slack for a slow machine: a service manager waits for 90 s.
const LIMIT: Duration = Duration::from_secs(60);

/// A stand-in for nft, as long as this lives.
struct StandIn {
    nft: PathBuf,
    dir: PathBuf,
}

impl StandIn {
    /// One that never ends.
    fn hanging() -> Self {
        Self::new(": > $here/called\nsleep 1000\n")
    }

    /// One that ends before it has been told anything, the first time that somebody would have it hold a table.
    fn failing_once() -> Self {
        Self::new(
            "if [ \"$1\" = --interactive ] && mkdir $here/called 2>/dev/null; then\n\
             echo 'Error: Could not process rule: Device or resource busy' >&2; exit 1; fi\n\
             exec $here/real \"$@\"\n",
        )
    }

    /// `$here` is where it finds the real one.
    fn new(script: &str) -> Self {
        let nft = needs::find("nft").and_then(|path| path.canonicalize().ok()).expect("nft");
        let dir = world::fresh_dir("nft");
        let stand_in = dir.join("stand-in");
        std::fs::copy(&nft, dir.join("real")).expect("the real one elsewhere");
        std::fs::write(&stand_in, format!("#!/bin/sh\nhere={}\n{script}", dir.display())).expect("a script");
        std::fs::set_permissions(&stand_in, std::fs::Permissions::from_mode(0o755)).expect("its mode");
        mount(Some(&stand_in), &nft, None::<&Path>, MsFlags::MS_BIND, None::<&Path>).expect("a stand-in");
        Self { nft, dir }
    }

    /// The real nft, for others.
    fn real(&self) -> PathBuf {
        self.dir.join("real")
    }

    /// Waits until somebody has begun to wait for it.
    fn until_called(&self) {
        let called = || self.dir.join("called").exists().then_some(());
        world::poll_until(PATIENCE, called).expect("somebody who calls nft");
    }
}

impl Drop for StandIn {
    fn drop(&mut self) {
        // One that is being waited for may still run.
        umount2(&self.nft, MntFlags::MNT_DETACH).expect("the real one");
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
            let _hanging = StandIn::hanging();
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
fn a_stop_does_not_wait_for_an_nft_that_hangs_while_something_is_put_back() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let before = Dump::take(&lab.host);
        let place = place(true);
        let tunproxy = place.start(&lab.host);
        {
            let hanging = StandIn::hanging();
            let real = hanging.real();
            lab.host.run(real.to_str().expect("a name"), &["delete", "table", "inet", "tunproxy"]);
            hanging.until_called();
            let start = Instant::now();
            tunproxy.signal(nix::sys::signal::Signal::SIGTERM);
            let status = tunproxy.wait();
            assert!(!status.success(), "not all is undone");
            // Two seconds for what is being put back, two for what is left of the table.
            world::measured(&format!("the end after {} ms", start.elapsed().as_millis()));
            assert!(start.elapsed() < Duration::from_secs(15), "{:?}", start.elapsed());
        }
        place.clean_up(&lab.host);
        before.assert_same(&Dump::take(&lab.host));
    });
}

#[test]
fn what_was_removed_while_nft_hung_is_back_as_soon_as_it_does_not() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let before = Dump::take(&lab.host);
        let tunproxy = place(true).start(&lab.host);
        {
            let hanging = StandIn::hanging();
            let real = hanging.real();
            lab.host.run(real.to_str().expect("a name"), &["delete", "table", "inet", "tunproxy"]);
            hanging.until_called();
            // What needs no nft is put back meanwhile, and who asks is answered.
            assert!(tunproxy.place().ask(&lab.host, "status").succeeded());
            tunproxy.line("does not end: killed after");
        }
        lab.host.ip("rule del priority 9005 to 198.18.0.0/16");
        let back = || lab.host.nft("list tables").contains("inet tunproxy").then_some(());
        assert!(world::poll_until(LIMIT, back).is_some(), "{}", tunproxy.output());
        assert!(tunproxy.stop().success());
        before.assert_same(&Dump::take(&lab.host));
    });
}

#[test]
fn a_stop_during_a_start_that_hangs_says_what_it_waits_for_and_ends_with_the_start() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let before = Dump::take(&lab.host);
        let place = place(false);
        // What a crash leaves has to be undone first; its socket is there, and nobody listens.
        let place = place.start(&lab.host).kill();
        let mut starting = {
            let hanging = StandIn::hanging();
            let starting = Program::start("tunproxy", place.run_command(&lab.host));
            hanging.until_called();
            let said = place.ask(&lab.host, "stop");
            assert!(said.succeeded() && said.stdout.contains("\"ok\": true"), "{said:?}");
            assert!(said.stderr.contains(&format!("process {} does not answer yet", starting.pid())), "{said:?}");
            assert!(said.stderr.contains("about to start"), "{said:?}");
            starting
        };
        assert!(starting.wait().success(), "{}", starting.output());
        before.assert_same(&Dump::take(&lab.host));
    });
}

#[test]
fn a_start_with_an_nft_that_hangs_does_without_the_table_and_says_so() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let before = Dump::take(&lab.host);
        let tunproxy = {
            let _hanging = StandIn::hanging();
            place(false).start(&lab.host)
        };
        assert!(tunproxy.output().contains("does not end: killed after 10 s"), "{}", tunproxy.output());
        assert!(tunproxy.stop().success());
        before.assert_same(&Dump::take(&lab.host));
    });
}

#[test]
fn a_table_that_could_not_be_loaded_at_the_start_is_told_in_nfts_words_and_comes_when_it_can() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let before = Dump::take(&lab.host);
        let stand_in = StandIn::failing_once();
        let tunproxy = place(false).start(&lab.host);
        let told = tunproxy.line("load the firewall table");
        for words in
            ["Could not process rule: Device or resource busy", "answers of UDP servers", "are not taken care of"]
        {
            assert!(told.contains(words), "{words}: {told}");
        }
        tunproxy.line("the firewall table is set");
        drop(stand_in);
        assert!(lab.host.nft("list tables").contains("inet tunproxy"), "{}", tunproxy.output());
        tunproxy.assert_carries(&lab.host);
        let said = tunproxy.output();
        assert_eq!(said.matches("Device or resource busy").count(), 1, "{said}");
        assert!(tunproxy.stop().success());
        before.assert_same(&Dump::take(&lab.host));
    });
}
