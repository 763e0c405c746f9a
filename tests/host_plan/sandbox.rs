//! Shell scripts inside a test's namespaces.

use std::process::Command;

/// Runs a shell script and returns what it printed; fails the test when the script fails.
pub(crate) fn sh(script: &str) -> String {
    let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
    let output = Command::new("sh").args(["-euc", script]).env("PATH", path).output().expect("run sh");
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{script}\n{stdout}{}", String::from_utf8_lossy(&output.stderr));
    stdout
}
