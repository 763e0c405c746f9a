//! Tests on real kernels' networks, in namespaces of their own: see `support`.

#[cfg(test)]
#[expect(dead_code, reason = "what the files that are not listed below need; goes when all are")]
#[path = "../support/mod.rs"]
mod support;

mod lab;
