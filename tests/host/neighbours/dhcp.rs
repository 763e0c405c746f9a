//! DHCP with the TUN up: the host gets and renews its own lease on the uplink, and gives out others on its LAN.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use nix::sys::signal::Signal;

use super::super::support::client::act_in;
use super::super::support::program::Program;
use super::super::support::sites::{V4, V6};
use super::super::support::topology::{CLIENT_V4, GATEWAY_V4, HOST_LAN_V4, HOST_V4};
use super::super::support::{Dump, Netns, Sites, Topology, run, world};
use super::{TUN, both_rp_filters, profile};

/// What busybox's client calls: it sets address and route, and says what happened.
const SCRIPT: &str = "#!/bin/sh
case $1 in
  bound|renew)
    ip addr replace $ip/24 dev $interface
    ip -4 route replace default via $router ;;
esac
echo \"lease: $1 $ip\"
";

/// A server that has one address to give, on `device` of `ns`.
fn server(ns: &Netns, device: &str, router: &str, address: &str) -> Program {
    let dir = world::fresh_dir("udhcpd");
    let (config, leases) = (dir.join("conf"), dir.join("leases"));
    fs::write(&leases, "").expect("a file on the lab's desk");
    let text = format!(
        "interface {device}\nstart {address}\nend {address}\nlease_file {}\npidfile {}\noption subnet 255.255.255.0\n\
         option router {router}\noption lease 3600\n",
        leases.display(),
        dir.join("pid").display()
    );
    fs::write(&config, text).expect("a file on the lab's desk");
    let mut command = ns.command("busybox");
    command.arg("udhcpd").arg("-f").arg(config);
    let server = Program::start("udhcpd", command);
    server.wait_for(|line| line.contains("started")).unwrap_or_else(|said| panic!("{said}"));
    server
}

/// A client on `device` of `ns`, once it has its lease.
fn client(ns: &Netns, device: &str, address: &str) -> Program {
    let script: PathBuf = world::fresh_dir("udhcpc").join("script");
    fs::write(&script, SCRIPT).expect("a file on the lab's desk");
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).expect("our own file");
    let mut command = ns.command("busybox");
    command.args(["udhcpc", "-f", "-i", device, "-t", "10", "-T", "1", "-s"]).arg(script);
    let client = Program::start("udhcpc", command);
    let bound = client.wait_for(|line| line == format!("lease: bound {address}"));
    bound.unwrap_or_else(|said| panic!("{said}"));
    client
}

/// Renews the lease by asking the server directly, then gives it back and finds a server anew.
fn renew_and_begin_again(client: &Program, address: &str) {
    for (signals, what) in [(&[Signal::SIGUSR1][..], "renew"), (&[Signal::SIGUSR2, Signal::SIGUSR1], "bound")] {
        let from = client.line_count();
        for signal in signals {
            client.signal(*signal);
            if *signal == Signal::SIGUSR2 {
                let released = client.wait_after(from, |line| line.starts_with("lease: deconfig"));
                released.unwrap_or_else(|said| panic!("{said}"));
            }
        }
        let told = client.wait_after(from, |line| line == format!("lease: {what} {address}"));
        told.unwrap_or_else(|said| panic!("{said}"));
    }
}

#[test]
fn leases_are_found_and_renewed_on_the_uplink_and_on_the_lan() {
    run(&["busybox", TUN], || {
        both_rp_filters(Topology::with_lan, |lab| {
            let _sites = Sites::open(&lab);
            for (ns, device) in [(&lab.host, "eth0"), (lab.client(), "eth0")] {
                ns.ip(&format!("-4 addr flush dev {device}"));
            }
            let _servers =
                [server(&lab.gateway, "eth1", GATEWAY_V4, HOST_V4), server(&lab.host, "lan0", HOST_LAN_V4, CLIENT_V4)];
            let at_start = client(&lab.host, "eth0", HOST_V4);
            let before = Dump::take(&lab.host);
            let tunproxy = profile("auto-forward: true", "'MATCH,DIRECT'").start(&lab.host);
            tunproxy.assert_carries(&lab.host);
            renew_and_begin_again(&at_start, HOST_V4);
            let of_client = client(lab.client(), "eth0", CLIENT_V4);
            renew_and_begin_again(&of_client, CLIENT_V4);
            for who in [&lab.host, lab.client()] {
                for site in [V4, V6] {
                    assert_eq!(act_in(who, &format!("ask {site}:7 x")), Ok("x".to_owned()), "{} {site}", who.name());
                }
            }
            assert!(tunproxy.stop().success());
            before.assert_same(&Dump::take(&lab.host));
        });
    });
}
