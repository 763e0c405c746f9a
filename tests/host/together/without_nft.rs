//! Hosts without nftables.

use std::path::{Path, PathBuf};

use nix::mount::MsFlags;

use super::place;
use crate::support::Netns;

/// No nft is there as long as this is. It hides it from this test's namespace alone.
pub(super) struct WithoutNft(Vec<PathBuf>);

impl WithoutNft {
    pub(super) fn hide() -> Self {
        let places = ["/usr/sbin/nft", "/sbin/nft", "/usr/local/sbin/nft", "/usr/bin/nft"].map(PathBuf::from);
        let there = places.into_iter().filter(|place| std::fs::read(place).is_ok_and(|program| !program.is_empty()));
        Self(there.filter(|place| cover(place)).collect())
    }

    /// Holds that a run in `ns` finds none.
    pub(super) fn assert_was_hidden(&self, ns: &Netns) {
        let planned = place("tun9", "").look(ns, "plan", &[]);
        assert!(planned.succeeded() && (planned.stdout + &planned.stderr).contains("no firewall table"));
    }
}

/// What no program can be started from stands for one that is missing. False: it is covered, by another of its names.
fn cover(place: &Path) -> bool {
    if std::fs::read(place).is_ok_and(|program| program.is_empty()) {
        return false;
    }
    nix::mount::mount(Some("/dev/null"), place, None::<&str>, MsFlags::MS_BIND, None::<&str>).expect("a cover");
    true
}

impl Drop for WithoutNft {
    fn drop(&mut self) {
        self.0.iter().for_each(|place| nix::mount::umount(place).expect("the real one"));
    }
}
