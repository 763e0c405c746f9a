//! Tests on real kernels' networks, in namespaces of their own: see `support`.

#[cfg(test)]
#[expect(dead_code, reason = "benchmarks use the rest")]
#[path = "../support/mod.rs"]
mod support;

mod bad_input;
mod change;
mod command_line;
mod control;
mod datagrams;
mod direct;
mod exec;
mod following;
mod gateway;
mod host_run;
mod lab;
mod modes;
mod names;
mod profiles;
mod proxies;
mod restored;
mod stopping;
mod system_proxy;
mod tls;
