//! Where the state of a run is, and what of it this user cannot see.

use std::path::Path;

use nix::unistd::{AccessFlags, access, geteuid};

/// Where the state of a run by root is, by default.
pub const STATE_OF_ROOT: &str = "/var/lib/tunproxy";

/// Whether there is a default state directory of root's that this user, who looks at `state`, may not enter: what a run by
/// root does or has left is then not to be seen.
pub(super) fn hides_from_us(state: &Path) -> bool {
    let roots = Path::new(STATE_OF_ROOT);
    !geteuid().is_root()
        && state != roots
        && roots.exists()
        && access(roots, AccessFlags::R_OK | AccessFlags::X_OK).is_err()
}

/// The option that names `state` on a command line; none for root's own.
pub(super) fn option(state: &Path) -> String {
    if state == Path::new(STATE_OF_ROOT) { String::new() } else { format!(" --state-dir {}", state.display()) }
}
