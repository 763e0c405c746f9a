//! What is broken under a run, and stays so: nobody mends it.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};

use super::super::support::tunproxy::{Place, Tunproxy};
use super::super::support::world::set_resolv_conf;
use super::super::support::{Sites, Topology, run};
use super::{TUN, assert_healthy, desktop, examine, gateway, told};

/// A run that has stopped working: what is broken then stays broken, and nobody carries anything. What it would answer on
/// its control socket is answered in its stead.
struct Frozen {
    tunproxy: Tunproxy,
}

impl Frozen {
    fn of(tunproxy: Tunproxy) -> Self {
        let socket = tunproxy.place().state.join("control.sock");
        let ask = |command: &str| {
            let stream = UnixStream::connect(&socket).expect("a run that answers");
            writeln!(&stream, "{{\"command\":\"{command}\"}}").expect("a question");
            BufReader::new(&stream).lines().next().expect("an answer").expect("a line")
        };
        let answers = ["status", "plan"].map(ask);
        tunproxy.freeze();
        fs::remove_file(&socket).expect("its socket");
        let listener = UnixListener::bind(&socket).expect("a socket in its place");
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let question = BufReader::new(&stream).lines().next().and_then(Result::ok).unwrap_or_default();
                let _ = writeln!(&stream, "{}", answers[usize::from(question.contains("plan"))]);
            }
        });
        Self { tunproxy }
    }

    fn place(&self) -> &Place {
        self.tunproxy.place()
    }

    /// What is found of one severity, but for what comes of nobody answering.
    fn told(&self, lab: &Topology, severity: &str) -> Vec<String> {
        let mut found = told(&examine(self.place(), &lab.host), severity);
        found.retain(|it| !it.starts_with("a question for a name to"));
        found
    }

    #[track_caller]
    fn assert_one(&self, lab: &Topology, severity: &str, words: &[&str]) {
        let told = self.told(lab, severity);
        let [one] = told.as_slice() else { panic!("not one {severity}, but {told:#?}") };
        assert!(words.iter().all(|word| one.contains(word)), "{words:?} in {one}");
    }
}

/// A run that was healthy and has stopped working.
fn frozen(lab: &Topology, place: &Place) -> Frozen {
    let tunproxy = place.start(&lab.host);
    assert_healthy(place, &lab.host);
    let frozen = Frozen::of(tunproxy);
    for severity in ["problem", "warning"] {
        assert_eq!(frozen.told(lab, severity), Vec::<String>::new());
    }
    frozen
}

/// Something is broken on a desktop, and is all that the doctor finds.
fn broken_while_running(break_it: impl Fn(&Topology), words: &[&str]) {
    let lab = Topology::desktop();
    let _sites = Sites::open(&lab);
    let run = frozen(&lab, &desktop());
    break_it(&lab);
    run.assert_one(&lab, "problem", words);
}

#[test]
fn a_rule_that_was_deleted_is_missed() {
    run(&[TUN], || {
        let delete = |lab: &Topology| drop(lab.host.ip("-6 rule del priority 9043"));
        broken_while_running(delete, &["ip -6 rule add priority 9043 lookup 2022", "look again"]);
    });
}

#[test]
fn a_route_and_an_address_that_were_deleted_are_missed() {
    run(&[TUN], || {
        let route = |lab: &Topology| drop(lab.host.ip("route del default table 2022"));
        broken_while_running(route, &["routes of ours are gone", "2022"]);
    });
}

#[test]
fn a_rule_of_another_program_before_ours_is_named() {
    run(&[TUN], || {
        let others = |lab: &Topology| {
            lab.host.ip("route add default via 192.168.1.1 table 52");
            lab.host.ip("rule add priority 8990 lookup 52");
        };
        broken_while_running(others, &["asked before ours", "priority 8990 lookup 52"]);
    });
}

#[test]
fn a_vpn_that_came_after_us_is_to_be_let_pass() {
    run(&[TUN], || {
        let wg_quick = |lab: &Topology| {
            lab.host.ip("route add default via 192.168.1.1 table 51820");
            lab.host.ip("rule add priority 32764 not fwmark 0xca6c lookup 51820");
        };
        broken_while_running(wg_quick, &["0xca6c", "look again"]);
    });
}

#[test]
fn a_tun_that_is_down_is_named() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let run = frozen(&lab, &desktop());
        lab.host.ip("link set tunproxy0 down");
        // Its routes go with that.
        let found = run.told(&lab, "problem");
        assert!(found.iter().any(|it| it.contains("the TUN tunproxy0 is down")), "{found:#?}");
        assert!(found.iter().any(|it| it.contains("routes of ours are gone")), "{found:#?}");
    });
}

#[test]
fn an_mtu_that_does_not_fit_is_a_warning() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let run = frozen(&lab, &desktop());
        lab.host.ip("link set eth0 mtu 1400");
        run.assert_one(&lab, "warning", &["eth0 carries packets of 1400 bytes", "mtu: 1400"]);
        lab.host.ip("link set eth0 mtu 1500");
        lab.host.ip("link set tunproxy0 mtu 1400");
        run.assert_one(&lab, "warning", &["the TUN's MTU is 1400", "ip link set tunproxy0 mtu 1500"]);
    });
}

#[test]
fn a_parameter_that_was_changed_is_named_with_the_way_back() {
    run(&[TUN], || {
        let change = |lab: &Topology| lab.host.sysctl("net.ipv4.conf.tunproxy0.src_valid_mark", "0");
        broken_while_running(change, &["sudo sysctl -w net.ipv4.conf.tunproxy0.src_valid_mark=1"]);
    });
}

#[test]
fn a_strict_reverse_path_filter_is_named_where_it_hurts() {
    run(&[TUN], || {
        let lab = Topology::with_lan().rp_filter("0");
        let _sites = Sites::open(&lab);
        let run = frozen(&lab, &gateway());
        lab.host.sysctl("net.ipv4.conf.eth0.rp_filter", "1");
        run.assert_one(&lab, "problem", &["eth0 has become strict", "look again"]);
    });
}

#[test]
fn a_gateway_that_does_not_forward_or_whose_firewall_drops_is_named() {
    run(&[TUN], || {
        let lab = Topology::with_lan();
        let _sites = Sites::open(&lab);
        let run = frozen(&lab, &gateway());
        lab.host.nft("add table ip filter");
        lab.host.nft("add chain ip filter FORWARD { type filter hook forward priority 0; policy drop; }");
        let advice = "nft insert rule ip filter FORWARD iifname tunproxy0 accept";
        run.assert_one(&lab, "problem", &["ip filter FORWARD drops", advice]);
        lab.host.nft("insert rule ip filter FORWARD iifname tunproxy0 accept");
        lab.host.nft("insert rule ip filter FORWARD oifname tunproxy0 accept");
        assert_eq!(run.told(&lab, "problem"), Vec::<String>::new());
        lab.host.sysctl("net.ipv4.ip_forward", "0");
        run.assert_one(&lab, "problem", &["does not forward IPv4", "sysctl -w net.ipv4.ip_forward=1"]);
    });
}

#[test]
fn a_resolv_conf_that_somebody_changed_while_we_run_is_named() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let run = frozen(&lab, &desktop());
        set_resolv_conf("nameserver fe80::1%eth0\n");
        run.assert_one(&lab, "problem", &["fe80::1%eth0, an address of one link", "look again"]);
    });
}

#[test]
fn a_resolv_conf_that_we_had_written_and_somebody_changed_is_named() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        set_resolv_conf("search lan\n");
        let run = frozen(&lab, &desktop());
        set_resolv_conf("nameserver 192.168.1.1\n");
        run.assert_one(&lab, "problem", &["written something else into it"]);
    });
}
