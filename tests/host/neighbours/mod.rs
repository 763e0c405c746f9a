//! What else lives on a host and around it goes on working: what a profile leaves out, containers, other tunnels, the
//! LAN. Each scenario ends with the host as it was, foreign rules, routes and tables included.

pub(crate) mod carrier;
mod containers;
mod dhcp;
mod lan;
mod selection;
pub(crate) mod tunnels;

use super::support::client::{self, Outcome};
use super::support::packet::Packet;
use super::support::sites::V4;
use super::support::topology::{HOST_V4, HOST_V6};
use super::support::tunproxy::{Place, Said};
use super::support::{Capture, Netns, Topology, world};

pub(crate) const TUN: &str = "/dev/net/tun";

/// All traffic as `rules` say, with more keys of `tun`.
pub(crate) fn profile(tun: &str, rules: &str) -> Place {
    Place::new(&format!(
        "
mode: rule
ipv6: true
log-level: info
tun: {{ enable: true, auto-route: true, dns-hijack: ['any:53'], {tun} }}
dns: {{ enable: true, enhanced-mode: fake-ip, nameserver: [192.168.1.1] }}
rules: [{rules}]
"
    ))
}

/// Does `words` as a program of another user.
pub(crate) fn act_as(ns: &Netns, uid: u32, words: &str) -> Outcome {
    let (program, args, environment) = world::client_command(words);
    let mut command = ns.command("setpriv");
    command.args(["--reuid", &uid.to_string(), "--clear-groups"]).arg(program).args(args).envs(environment);
    let said = Said::of(&mut command);
    client::outcome(&said.stdout).unwrap_or_else(|| panic!("no outcome of `{words}` as {uid}: {said:?}"))
}

/// With and without the check that many distributions switch on.
pub(crate) fn both_rp_filters(lab: impl Fn() -> Topology, test: impl Fn(Topology)) {
    for value in ["0", "1"] {
        test(lab().rp_filter(value));
    }
}

/// A capture of the host's uplink that has seen a datagram leave.
fn proven_capture(lab: &Topology) -> Capture {
    let mut capture = Capture::start(&lab.host, "eth0");
    capture.prove(|mark| {
        assert_eq!(client::act_in(&lab.host, &format!("datagram {V4}:7 {mark}")), Ok(mark.to_owned()));
    });
    capture
}

/// Whether the host sent this outside, and not to keep the link working.
fn leaves_the_host(packet: &Packet) -> bool {
    let ours = [HOST_V4, HOST_V6];
    let from_us = packet.ip.is_some_and(|ip| ours.contains(&ip.source.ip().to_string().as_str()));
    from_us && !packet.is_housekeeping()
}

/// Does `act` and returns what `leak` says has left meanwhile.
fn leaks_while(capture: &mut Capture, leak: impl Fn(&Packet) -> bool, act: impl FnOnce()) -> Vec<String> {
    let already = capture.packets().len();
    act();
    let packets = capture.packets();
    packets.iter().skip(already).filter(|packet| leak(packet)).map(ToString::to_string).collect()
}
