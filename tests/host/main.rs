//! Tests on real kernels' networks, in namespaces of their own: see `support`.

#[cfg(test)]
#[path = "../support/mod.rs"]
mod support;

mod lab;
