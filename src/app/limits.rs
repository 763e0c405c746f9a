//! The process's own limits.

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Thousands of flows are thousands of sockets.
pub(super) fn raise_descriptor_limit() {
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}
