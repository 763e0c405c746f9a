//! What we change on a host, tried on hosts made for it: each test has namespaces of its own.

#[cfg(test)]
#[expect(dead_code, unused_imports, reason = "tests/host uses the rest")]
#[path = "../support/mod.rs"]
mod support;

mod closed;
mod doubtful;
mod halves;
mod host;
mod marks;
mod netlink;
mod proof;
mod sandbox;
mod traffic;
mod undone;
