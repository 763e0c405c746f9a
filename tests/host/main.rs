//! Tests on real kernels' networks, in namespaces of their own: see `support`.

#[cfg(test)]
#[expect(dead_code, reason = "benchmarks and the files that are not yet listed use the rest")]
#[path = "../support/mod.rs"]
mod support;

mod lab;
