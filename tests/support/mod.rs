//! A lab on one machine: hosts, links, servers and a witness, all inside namespaces that a test makes for itself.
//!
//! ```text
//! lab::run ─► this test again, as root of fresh user + mount + network + pid namespaces   world, needs
//!               Netns, veth ─► Topology (internet ─ gateway ─ host under test ─ LAN client)   netns, topology
//!               Uplinks: the same with two ways out, which come and go                  uplinks
//!               peers: DNS, HTTP, TLS, echo, digest, SOCKS5, CONNECT in this process           peers
//!               Program: danted, microsocks, tinyproxy, iperf3, tunproxy                       program, third_party, tunproxy
//!               service, unit: tunproxy with the rights of the shipped systemd unit
//!               sites: those of these servers that most tests talk to                         sites
//!               client: what a program on the host would do, and what it saw                   client
//!               escapes: somebody who tries every way out                                       escapes
//!               frames: what a neighbour may put on the link                                    frames
//!               Capture, Dump: what left the host, and what was changed on it                  capture, dump
//! ```
//!
//! Nothing here can touch the machine a test runs on: `/etc/resolv.conf`, `/run` and the network are the test's own,
//! and the pid namespace takes every process with it when the test ends, however it ends.

pub(crate) mod capture;
pub(crate) mod client;
pub(crate) mod dump;
pub(crate) mod escapes;
pub(crate) mod frames;
pub(crate) mod forged;
pub(crate) mod lengths;
pub(crate) mod load;
pub(crate) mod needs;
pub(crate) mod netns;
pub(crate) mod packet;
pub(crate) mod peers;
pub(crate) mod probe;
pub(crate) mod program;
pub(crate) mod service;
pub(crate) mod sites;
pub(crate) mod third_party;
pub(crate) mod topology;
pub(crate) mod tunproxy;
pub(crate) mod uplinks;
pub(crate) mod unit;
pub(crate) mod weather;
pub(crate) mod world;

pub(crate) use capture::Capture;
pub(crate) use dump::Dump;
pub(crate) use netns::Netns;
pub(crate) use peers::Peers;
pub(crate) use sites::Sites;
pub(crate) use topology::Topology;
pub(crate) use world::run;
