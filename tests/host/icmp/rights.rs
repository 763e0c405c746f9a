//! Echo requests without the right to raw sockets.

use super::super::support::client::act_in;
use super::super::support::program::Program;
use super::super::support::sites::NAME;
use super::super::support::topology::{GATEWAY_V4, GATEWAY_V6, HOST_LAN_V6};
use super::super::support::tunproxy::Place;
use super::super::support::{Sites, Topology, run};
use super::{FOUR, HOP_V4, HOP_V6, SIX, TUN, hops, ping, profile, ttl};

/// A run without CAP_NET_RAW.
fn without_raw_sockets(lab: &Topology, place: &Place) -> Program {
    let full = place.run_command(&lab.host);
    let mut bare = lab.host.command("setpriv");
    bare.args(["--inh-caps=-net_raw", "--bounding-set=-net_raw"]).arg(full.get_program()).args(full.get_args());
    let program = Program::start("tunproxy", bare);
    program.wait_for(|line| line.starts_with("tunproxy ready")).unwrap_or_else(|said| panic!("{said}"));
    program
}

#[test]
fn without_the_capability_ping_alone_is_lost_with_one_warning() {
    run(&["ping", "setpriv", TUN], || {
        let lab = Topology::with_lan();
        let _sites = Sites::open(&lab);
        let program = without_raw_sockets(&lab, &profile("'MATCH,DIRECT'"));
        for (site, words) in [(FOUR, "Packet filtered"), (SIX, "Administratively prohibited")] {
            for _ in 0..2 {
                let said = ping(&lab.host, site);
                assert!(said.code == Some(1) && said.stdout.contains(words), "{said:?}\n{}", program.output());
            }
        }
        assert_eq!(act_in(&lab.host, &format!("ask {FOUR}:7 x")), Ok("x".to_owned()));
        assert_eq!(program.output().matches("CAP_NET_RAW").count(), 1, "{}", program.output());
    });
}

#[test]
fn without_the_capability_ping_sockets_serve_as_well() {
    run(&["ping", "traceroute", "setpriv", TUN], || {
        let lab = Topology::with_lan();
        let _sites = Sites::open(&lab);
        lab.host.sysctl("net.ipv4.ping_group_range", "0 0");
        let program = without_raw_sockets(&lab, &profile("'MATCH,DIRECT'"));
        for site in [FOUR, SIX] {
            for ns in [&lab.host, lab.client()] {
                assert!(ttl(&ping(ns, site)).is_some_and(|ttl| (50..64).contains(&ttl)), "{}", program.output());
                assert!(ping(ns, &format!("-M dont -s 4000 {site}")).succeeded(), "{}", program.output());
            }
        }
        assert_eq!(hops(&lab.host, FOUR), [HOP_V4, GATEWAY_V4, FOUR]);
        assert_eq!(hops(lab.client(), SIX), [HOST_LAN_V6, HOP_V6, GATEWAY_V6, SIX]);
        let said = ping(&lab.host, "192.0.2.1");
        assert!(said.stdout.contains(&format!("From {GATEWAY_V4}")), "{said:?}\n{}", program.output());
        assert!(!program.output().contains("CAP_NET_RAW"), "{}", program.output());
    });
}

#[test]
fn a_command_in_exec_pings_as_its_user_may() {
    run(&["ping", "traceroute"], || {
        let lab = Topology::with_lan();
        let _sites = Sites::open(&lab);
        let place = profile("'MATCH,DIRECT'");
        place.assert_encloses(&lab.host);
        for site in [FOUR, SIX, NAME] {
            let said = place.exec(&lab.host, "ping", &["-n", "-c", "1", "-W", "10", site]);
            assert!(ttl(&said).is_some(), "{said:?}");
        }
        let said = place.exec(&lab.host, "ping", &["-n", "-c", "1", "-W", "10", "192.0.2.1"]);
        assert!(said.stdout.contains(&format!("From {GATEWAY_V4}")), "{said:?}");
    });
}
