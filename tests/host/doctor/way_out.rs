//! The way out: gateways that do not answer, rules of others before ours, a host whose parameters nobody can set.

use super::super::support::client::act_in;
use super::super::support::program::PATIENCE;
use super::super::support::sites::V4;
use super::super::support::topology::{GATEWAY_V4, GATEWAY_V6, HOST_V4};
use super::super::support::tunproxy::Place;
use super::super::support::world::{own_etc, poll_until, set_resolv_conf};
use super::super::support::{Sites, Topology, run};
use super::{TUN, assert_healthy, assert_one, desktop, examine, sh, told};

#[test]
fn a_gateway_that_nobody_has_is_named_with_or_without_a_run() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let place = desktop();
        let look = || {
            lab.host.ip("route replace default via 192.168.1.99");
            let words = ["the gateway 192.168.1.99 (eth0) does not answer", "ARP", "IPv4 gets no further"];
            assert_one("problem", &place, &lab.host, &words);
            lab.host.ip(&format!("route replace default via {GATEWAY_V4}"));
            lab.host.ip("-6 route replace default via 2001:db8:2::99");
            let words = ["the gateway 2001:db8:2::99 (eth0) does not answer", "IPv6 gets no further"];
            assert_one("problem", &place, &lab.host, &words);
            lab.host.ip(&format!("-6 route replace default via {GATEWAY_V6}"));
            assert_healthy(&place, &lab.host);
        };
        look();
        let tunproxy = place.start(&lab.host);
        look();
        tunproxy.assert_carries(&lab.host);
        assert!(tunproxy.stop().success());
    });
}

#[test]
fn a_gateway_that_was_there_until_now_is_asked_again() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        // A nameserver of this host alone, so that only the gateway is missed.
        let place = Place::new("ipv6: true\ntun: { enable: true }\nrules: ['MATCH,DIRECT']\n");
        assert_eq!(act_in(&lab.host, &format!("ask {V4}:7 x")), Ok("x".to_owned()));
        lab.gateway.sysctl("net.ipv4.conf.eth1.arp_ignore", "8");
        let known = || lab.host.ip(&format!("neigh show {GATEWAY_V4}")).contains("lladdr").then_some(());
        assert!(poll_until(PATIENCE, known).is_some(), "the kernel thinks that it is there");
        let found = told(&examine(&place, &lab.host), "problem");
        assert!(
            found.iter().any(|it| it.contains(&format!("the gateway {GATEWAY_V4} (eth0) does not answer"))),
            "{found:#?}"
        );
    });
}

#[test]
fn two_default_routes_of_one_metric_are_a_warning() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let place = desktop();
        lab.host.ip("link add eth5 type veth peer name far5");
        lab.host.ip("link set far5 up");
        lab.host.ip("link set eth5 up");
        lab.host.address("eth5", &["192.168.5.10/24"]);
        lab.host.ip("route append default via 192.168.5.1 dev eth5");
        let found = told(&examine(&place, &lab.host), "warning");
        assert!(found.iter().any(|it| it.contains("same metric (0), by eth0 and eth5")), "{found:#?}");
        // Nobody is at the other end.
        assert!(found.iter().any(|it| it.contains("192.168.5.1 (eth5) does not answer")), "{found:#?}");
    });
}

#[test]
fn rules_of_others_that_take_a_part_are_named_with_the_part_and_where_it_goes() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let place = desktop();
        lab.host.ip(&format!("route add default via {GATEWAY_V4} table 77"));
        for rule in [
            "100 ipproto tcp dport 53 lookup 77",
            &format!("101 from {HOST_V4} lookup 77"),
            "102 to 203.0.113.77 unreachable",
            "103 fwmark 0x10 lookup 77",
        ] {
            lab.host.ip(&format!("rule add priority {rule}"));
        }
        let look = |when: &str| {
            let found = examine(&place, &lab.host);
            let warnings = told(&found, "warning");
            // What asks for questions alone is not among them: those we take before it.
            let wanted = [
                format!("what is sent from {HOST_V4}/32 (IPv4) goes by eth0 (table 77), {when} ("),
                format!("what is sent to 203.0.113.77/32 (IPv4) is refused, {when} ("),
            ];
            assert_eq!(warnings.len(), wanted.len(), "{warnings:#?}");
            for words in &wanted {
                assert!(warnings.iter().any(|it| it.contains(words)), "{words}: {warnings:#?}");
            }
            assert!(warnings.iter().any(|it| it.contains("to 203.0.113.77/32 unreachable)")), "{warnings:#?}");
            let fine = told(&found, "fine");
            assert!(fine.iter().any(|it| it.contains("with the mark 0x10 (IPv4) goes by eth0")), "{fine:#?}");
        };
        look("past tunproxy once it runs");
        let tunproxy = place.start(&lab.host);
        look("past tunproxy");
        assert!(tunproxy.stop().success());
    });
}

#[test]
fn a_read_only_proc_sys_is_named_as_such_and_blamed_on_nobody() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let place = desktop();
        sh("mount --bind /proc/sys /proc/sys && mount -o remount,bind,ro /proc/sys");
        let look = |verb: &str| {
            let words =
                ["/proc/sys is read-only", verb, "tunproxy0.accept_local=1", "What that costs", "--sysctl net.ipv4"];
            let found = examine(&place, &lab.host);
            assert_eq!(told(&found, "problem"), [""; 0]);
            let warnings = told(&found, "warning");
            assert!(warnings.len() == 1 && words.iter().all(|it| warnings[0].contains(it)), "{warnings:#?}");
            assert!(!warnings[0].contains("who changed it"), "{warnings:#?}");
        };
        look("cannot set");
        let tunproxy = place.start(&lab.host);
        look("could not set");
        // The run itself says it once, in the same words.
        let line = tunproxy.line("/proc/sys is read-only");
        assert!(line.contains("accept_local=1. What that costs: "), "{line}");
        assert_eq!(tunproxy.output().matches("WARN").count(), 1, "{}", tunproxy.output());
        assert!(tunproxy.stop().success());
    });
}

#[test]
fn ipv6_that_goes_past_a_tun_without_it_is_a_problem_and_strict_route_makes_it_a_warning() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        lab.host.sysctl("net.ipv6.conf.default.disable_ipv6", "1");
        sh("mount --bind /proc/sys /proc/sys && mount -o remount,bind,ro /proc/sys");
        let place = desktop();
        let words = ["IPv6 goes past tunproxy", "/proc/sys is read-only", "strict-route"];
        assert_one("problem", &place, &lab.host, &words);
        let tunproxy = place.start(&lab.host);
        assert_one("problem", &place, &lab.host, &words);
        assert!(tunproxy.stop().success());
        let text = std::fs::read_to_string(&place.profile).unwrap();
        place.rewrite(&text.replace("enable: true }\n", "enable: true, strict-route: true }\n"));
        let tunproxy = place.start(&lab.host);
        let found = examine(&place, &lab.host);
        assert_eq!(told(&found, "problem"), [""; 0]);
        assert!(told(&found, "warning").iter().any(|it| it.contains("IPv6 is unreachable")), "{found:#}");
        assert!(tunproxy.stop().success());
    });
}

#[test]
fn a_kill_switch_that_somebody_flushed_is_missed_by_doctor_and_status() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let place = Place::new(
            "tun: { enable: true, kill-switch: true }\ndns: { enable: true, nameserver: [192.168.1.1] }\n\
             rules: ['MATCH,DIRECT']\n",
        );
        let place = place.start(&lab.host).kill();
        let closed = place.ask(&lab.host, "status").stderr;
        assert!(closed.contains("is closed (firewall table inet"), "{closed}");
        lab.host.nft("flush ruleset");
        let words = "is not in force: its firewall table inet tunproxy is gone, or lacks rules";
        let found = told(&examine(&place, &lab.host), "problem");
        let missed = found.iter().find(|it| it.contains(words)).unwrap_or_else(|| panic!("{found:#?}"));
        assert!(
            missed.contains("Start tunproxy again") && missed.contains("sudo tunproxy cleanup --state-dir"),
            "{missed}"
        );
        let said = place.ask(&lab.host, "status").stderr;
        assert!(said.contains(words), "{said}");
        place.clean_up(&lab.host);
        assert!(!place.ask(&lab.host, "status").stderr.contains(words));
        assert_healthy(&place, &lab.host);
    });
}

#[test]
fn what_a_firewall_keeps_in_and_a_silent_nameserver_in_resolv_conf_are_told() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        own_etc("nameserver 192.168.1.1\n");
        let place = desktop();
        set_resolv_conf("nameserver 192.168.1.77\n");
        assert_one("warning", &place, &lab.host, &["192.168.1.77 in /etc/resolv.conf does not answer"]);
        set_resolv_conf("nameserver 192.168.1.1\n");
        lab.host.nft("add table ip f");
        lab.host.nft("add chain ip f o { type filter hook output priority 0; }");
        lab.host.nft("add rule ip f o udp dport 53 drop");
        let words = ["do not leave this host", "(chain ip f o: `udp dport 53 drop`)", "sudo nft list ruleset"];
        assert_one("problem", &place, &lab.host, &words);
    });
}

#[test]
fn a_default_route_that_a_route_or_a_rule_refuses_before_is_named() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let place = desktop();
        // A run takes questions to port 53 ahead of the rule.
        let followed = |runs: bool, stands: bool| {
            let ahead = || lab.host.ip("-6 rule").lines().any(|rule| rule.contains("dport 53") && is_before(rule, 70));
            let done = poll_until(PATIENCE, || (!runs || ahead() == stands).then_some(()));
            assert!(done.is_some(), "{}", lab.host.ip("-6 rule"));
        };
        let look = |runs| {
            let words = |family: &str| format!("default route for {family}, and the kernel does not take it");
            lab.host.ip("route replace default via 192.168.1.1 metric 100");
            lab.host.ip("route del default via 192.168.1.1 metric 0");
            lab.host.ip("route add unreachable default metric 5");
            assert_one("problem", &place, &lab.host, &[&words("IPv4"), "`unreachable`"]);
            lab.host.ip("route del unreachable default metric 5");
            lab.host.ip("-6 rule add priority 70 to 2001:503::/32 prohibit");
            followed(runs, true);
            assert_one("problem", &place, &lab.host, &[&words("IPv6"), "ip -6 rule"]);
            lab.host.ip("-6 rule del priority 70");
            followed(runs, false);
            lab.host.ip("route replace default via 192.168.1.1");
            lab.host.ip("route del default via 192.168.1.1 metric 100");
            assert_healthy(&place, &lab.host);
        };
        look(false);
        let tunproxy = place.start(&lab.host);
        look(true);
        assert!(tunproxy.stop().success());
    });
}

/// Whether `rule`, as ip(8) shows it, comes before those of `priority`.
fn is_before(rule: &str, priority: u32) -> bool {
    rule.split(':').next().and_then(|first| first.parse().ok()).is_some_and(|first: u32| first < priority)
}

#[test]
fn a_firewall_that_knows_only_its_uplink_is_named_with_the_rule_to_add() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let place = desktop();
        lab.host.nft("add table inet adm");
        lab.host.nft("add chain inet adm input { type filter hook input priority 0; policy drop; }");
        for rule in [
            "iifname lo accept",
            "iifname eth0 ct state established,related accept",
            "meta l4proto { icmp, ipv6-icmp } accept",
            "tcp dport { 22, 80 } accept",
        ] {
            lab.host.nft(&format!("add rule inet adm input {rule}"));
        }
        let advice = "nft insert rule inet adm input iifname \"tunproxy0\" ct state established,related accept";
        let found = told(&examine(&place, &lab.host), "problem");
        assert!(found.iter().any(|it| it.contains("inet adm input drops") && it.contains(advice)), "{found:#?}");
        let checked = place.look(&lab.host, "plan", &[]);
        assert!(checked.stdout.contains(advice), "{checked:?}");
        // What is advised helps, and is not blamed.
        lab.host.nft("insert rule inet adm input iifname tunproxy0 ct state established,related accept");
        assert!(!place.look(&lab.host, "plan", &[]).stdout.contains("inet adm input"));
        let tunproxy = place.start(&lab.host);
        tunproxy.assert_carries(&lab.host);
        assert!(tunproxy.stop().success());
    });
}
