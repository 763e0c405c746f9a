//! Tests on real kernels' networks, in namespaces of their own: see `support`.

#[cfg(test)]
#[expect(dead_code, reason = "benchmarks use the rest")]
#[path = "../support/mod.rs"]
mod support;

mod advertisements;
mod bad_input;
mod change;
mod command_line;
mod control;
mod crashed;
mod crowded;
mod datagrams;
mod direct;
mod doctor;
mod echo_ways;
mod exec;
mod failures;
mod fairness;
mod following;
mod forged_sources;
mod forgotten;
mod gateway;
mod half_close;
mod hanging;
mod host_run;
mod icmp;
mod inherited;
mod intruders;
mod kill_switch;
mod kill_switch_gone;
mod kill_switch_tight;
mod lab;
mod leaks;
mod load;
mod loops;
mod lost_state;
mod modes;
mod mtu;
mod names;
mod neighbours;
mod others_rules;
mod plan;
mod nat;
mod profiles;
mod proxies;
mod questions;
mod resolv_conf;
mod restored;
mod rootless;
mod scans;
mod scarce;
mod service;
mod shortage;
mod shut_window;
mod spray;
mod stopping;
mod stubs;
mod supplies;
mod together;
mod system_proxy;
mod tls;
mod unit_file;
mod weather;
mod wording;
