//! Tests on real kernels' networks, in namespaces of their own: see `support`.

#[cfg(test)]
#[expect(dead_code, reason = "benchmarks use the rest")]
#[path = "../support/mod.rs"]
mod support;

mod bad_input;
mod command_line;
mod control;
mod datagrams;
mod direct;
mod exec;
mod failures;
mod gateway;
mod host_run;
mod lab;
mod load;
mod modes;
mod mtu;
mod names;
mod nat;
mod profiles;
mod proxies;
mod stopping;
mod system_proxy;
mod tls;
mod weather;
