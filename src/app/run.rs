//! The foreground run: everything up, `ready`, and on a signal everything back.

use std::path::Path;

use crate::profile::Profile;

/// Runs `profile` until a signal or `stop`.
pub fn run(_profile: &Profile, _state: &Path) -> anyhow::Result<()> {
    anyhow::bail!("not wired")
}
