//! DHCP with the TUN up: the host gets and renews its own lease on the uplink, and gives out others on its LAN.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use nix::sys::signal::Signal;

use super::super::support::client::act_in;
use super::super::support::program::Program;
use super::super::support::sites::{V4, V6};
use super::super::support::topology::{CLIENT_V4, GATEWAY_V4, HOST_LAN_V4, HOST_V4};
use super::super::support::{Capture, Dump, Netns, Sites, Topology, run, world};
use super::{TUN, both_rp_filters, profile};

/// What busybox's client calls: it sets address and routes, and says what happened. Whoever gets classless routes lets
/// the router alone (RFC 3442).
const SCRIPT: &str = "#!/bin/sh
event=$1
case $event in
  bound|renew)
    ip addr replace $ip/24 dev $interface
    ip -4 route flush dev $interface scope global
    set -- ${staticroutes:-0.0.0.0/0 $router}
    while [ $# -ge 2 ]; do
      ip -4 route replace $1 via $2 dev $interface
      shift 2
    done ;;
esac
echo \"lease: $event $ip\"
";

/// A server that has one address to give, on `device` of `ns`.
fn server(ns: &Netns, device: &str, router: &str, address: &str) -> Program {
    let dir = world::fresh_dir("udhcpd");
    fs::write(dir.join("leases"), "").expect("a file on the lab's desk");
    server_in(&dir, ns, device, address, &format!("option router {router}"))
}

/// The same with these options, and the leases that an earlier one has left in `dir`.
fn server_in(dir: &Path, ns: &Netns, device: &str, address: &str, options: &str) -> Program {
    let (config, leases) = (dir.join("conf"), dir.join("leases"));
    let text = format!(
        "interface {device}\nstart {address}\nend {address}\nlease_file {}\npidfile {}\noption subnet 255.255.255.0\n\
         {options}\noption lease 3600\n",
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
    command.args(["udhcpc", "-f", "-i", device, "-t", "10", "-T", "1", "-O", "staticroutes", "-s"]).arg(script);
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

/// Asks the server directly for another hour, and waits until the script has done what comes of it.
fn renew(client: &Program, address: &str) {
    let from = client.line_count();
    client.signal(Signal::SIGUSR1);
    let told = client.wait_after(from, |line| line == format!("lease: renew {address}"));
    told.unwrap_or_else(|said| panic!("{said}"));
}

/// All that a server can take over by option 121: every address, in halves, and a site's prefix once more.
const CLASSLESS: &str = "option staticroutes 0.0.0.0/0 192.168.1.1, 0.0.0.0/1 192.168.1.1, 128.0.0.0/1 192.168.1.1, \
                         203.0.113.0/24 192.168.1.1";
/// A site that the rules refuse.
const REFUSED: &str = "203.0.113.20";

#[test]
fn a_renewed_lease_with_classless_routes_leads_our_own_flows_and_nothing_past_us() {
    run(&["busybox", TUN], || {
        both_rp_filters(Topology::desktop, |lab| {
            let _sites = Sites::open(&lab);
            let refused = format!("{REFUSED}:7");
            let _refused = lab.sites.tcp_echo(refused.parse().expect("an address"));
            lab.host.ip("-4 addr flush dev eth0");
            let leases = world::fresh_dir("udhcpd");
            fs::write(leases.join("leases"), "").expect("a file on the lab's desk");
            let serve = |options: &str| server_in(&leases, &lab.gateway, "eth1", HOST_V4, options);
            let follow = |mut server: Program, options: &str| {
                // It leaves its leases to the next.
                server.signal(Signal::SIGTERM);
                server.wait();
                serve(options)
            };
            let server = serve(CLASSLESS);
            let lease = client(&lab.host, "eth0", HOST_V4);
            let before = Dump::take(&lab.host);
            assert!(lab.host.ip("route").contains("203.0.113.0/24 via 192.168.1.1"), "{}", lab.host.ip("route"));
            assert_eq!(act_in(&lab.host, &format!("ask {refused} x")), Ok("x".to_owned()), "it is there without us");
            let router = "option router 192.168.1.1";
            let server = follow(server, router);
            renew(&lease, HOST_V4);
            assert!(!lab.host.ip("route").contains("203.0.113.0/24"), "{}", lab.host.ip("route"));

            let rules = format!("'IP-CIDR,{REFUSED}/32,REJECT', 'MATCH,DIRECT'");
            let tunproxy = profile("", &rules).start(&lab.host);
            let mut capture = Capture::start(&lab.host, "eth0");
            let holds = |what: &str, capture: &mut Capture| {
                tunproxy.assert_carries(&lab.host);
                let ask = |to: &str| act_in(&lab.host, &format!("ask {to} x"));
                assert_eq!(ask(&refused), Err("ECONNREFUSED".to_owned()), "{what}\n{}", tunproxy.output());
                for site in [V4, V6] {
                    capture.prove(|mark| {
                        let outcome = act_in(&lab.host, &format!("datagram {site}:7 {mark}"));
                        assert_eq!(outcome, Ok(mark.to_owned()), "{what} {site}\n{}", tunproxy.output());
                    });
                    assert_eq!(ask(&format!("{site}:7")), Ok("x".to_owned()), "{what} {site}\n{}", tunproxy.output());
                }
                capture.assert_nothing("packets to a site that is refused", |packet| {
                    packet.ip.is_some_and(|ip| ip.destination.ip().to_string() == REFUSED)
                });
            };
            holds("with a router", &mut capture);
            let server = follow(server, CLASSLESS);
            renew(&lease, HOST_V4);
            assert!(lab.host.ip("route").contains("128.0.0.0/1 via 192.168.1.1"), "{}", lab.host.ip("route"));
            holds("with classless routes", &mut capture);
            let server = follow(server, router);
            renew(&lease, HOST_V4);
            holds("with a router again", &mut capture);
            let _server = follow(server, CLASSLESS);
            renew(&lease, HOST_V4);
            assert!(tunproxy.stop().success());
            before.assert_same(&Dump::take(&lab.host));
        });
    });
}
