//! `doctor`: on a healthy host it finds no problem, and where one thing is broken it names exactly that.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Command;

use nix::sys::signal::Signal;
use serde_json::Value;

use super::support::client::act_in;
use super::support::program::PATIENCE;
use super::support::sites::{NAME, V4};
use super::support::topology::{BLACK_HOLE_V4, HOST_LAN_V4};
use super::support::tunproxy::{Place, Said, Tunproxy, binary};
use super::support::world::{own_etc, poll_until, set_resolv_conf};
use super::support::{Dump, Netns, Sites, Topology, run};

const TUN: &str = "/dev/net/tun";

fn desktop() -> Place {
    Place::new(
        "ipv6: true\ntun: { enable: true }\n\
         dns: { enable: true, enhanced-mode: fake-ip, nameserver: [192.168.1.1] }\nrules: ['MATCH,DIRECT']\n",
    )
}

fn gateway() -> Place {
    Place::new(&format!(
        "ipv6: true\ntun: {{ enable: true, auto-forward: true }}\n\
         dns: {{ enable: true, listen: '{HOST_LAN_V4}:53', enhanced-mode: fake-ip, nameserver: [192.168.1.1] }}\n\
         rules: ['MATCH,DIRECT']\n"
    ))
}

/// What the doctor says, after it was seen to have changed nothing.
fn examine(place: &Place, ns: &Netns) -> Value {
    let before = Dump::take(ns);
    let said = place.look(ns, "doctor", &["--format", "json"]);
    before.assert_same(&Dump::take(ns));
    let found: Value = serde_json::from_str(&said.stdout).unwrap_or_else(|error| panic!("{error}: {said:?}"));
    let unseen = 3 * i32::from(found["unseen"] != serde_json::json!([]));
    assert_eq!(said.code, Some(if told(&found, "problem").is_empty() { unseen } else { 1 }), "{said:?}");
    found
}

/// What was found of one severity: "what -> what to do". What the machine that runs the tests lacks is its own business.
fn told(found: &Value, severity: &str) -> Vec<String> {
    let of_the_machine =
        |it: &Value| it["severity"] == "warning" && ["system", "rights"].iter().any(|word| it["check"] == *word);
    let findings = found["findings"].as_array().expect("findings").iter();
    let of_it = findings.filter(|finding| finding["severity"] == severity && !of_the_machine(finding));
    of_it.map(|it| format!("{} -> {}", it["what"].as_str().unwrap_or(""), it["do"].as_str().unwrap_or(""))).collect()
}

/// Holds that nothing is wrong.
#[track_caller]
fn assert_healthy(place: &Place, ns: &Netns) {
    let found = examine(place, ns);
    assert_eq!((told(&found, "problem"), told(&found, "warning")), (Vec::new(), Vec::new()), "{found:#}");
    assert_eq!(found["unseen"].as_array().map(Vec::len), Some(0), "{found:#}");
}

/// Holds that there is one problem, and that it is told with all of `words`.
#[track_caller]
fn assert_one(severity: &str, place: &Place, ns: &Netns, words: &[&str]) {
    let found = examine(place, ns);
    let told = told(&found, severity);
    let [one] = told.as_slice() else { panic!("not one {severity}, but {told:#?} in {found:#}") };
    assert!(words.iter().all(|word| one.contains(word)), "{words:?} in {one}");
}

fn sh(script: &str) {
    let said = Said::of(Command::new("sh").args(["-euc", script]));
    assert!(said.succeeded(), "{script}: {said:?}");
}

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
        tunproxy.signal(Signal::SIGSTOP);
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
fn a_healthy_desktop_has_no_problem_before_while_and_after_a_run() {
    run(&[TUN], || {
        let lab = Topology::desktop().rp_filter("1");
        let _sites = Sites::open(&lab);
        let place = desktop();
        assert_healthy(&place, &lab.host);
        assert!(!place.state.exists());
        let tunproxy = place.start(&lab.host);
        assert_eq!(act_in(&lab.host, &format!("ask {NAME}:7 x")), Ok("x".to_owned()));
        assert_healthy(&place, &lab.host);
        tunproxy.assert_carries(&lab.host);
        assert!(tunproxy.stop().success());
        assert_healthy(&place, &lab.host);
        let text = place.look(&lab.host, "doctor", &[]);
        assert!(text.succeeded() && text.stdout.ends_with(" warnings\n"), "{text:?}");
    });
}

#[test]
fn a_healthy_gateway_has_no_problem() {
    run(&[TUN], || {
        let lab = Topology::with_lan().rp_filter("1");
        let _sites = Sites::open(&lab);
        let place = gateway();
        assert_healthy(&place, &lab.host);
        let tunproxy = place.start(&lab.host);
        assert_healthy(&place, &lab.host);
        assert!(tunproxy.stop().success());
    });
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
fn without_a_default_route_that_is_the_problem() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let place = desktop();
        lab.host.ip("-6 route del default");
        assert_healthy(&place, &lab.host);
        lab.host.ip("route del default");
        assert_one("problem", &place, &lab.host, &["there is no default route", "DHCP"]);
        lab.host.ip("route add default via 192.168.1.1");
        lab.gateway.ip("link set eth1 down");
        // The kernel passes the news on when it has time.
        let told_everywhere = || {
            let routes = ["-4 route show dev eth0", "-6 route show dev eth0"].map(|words| lab.host.ip(words));
            let link = lab.host.ip("link show dev eth0");
            let knows = routes.iter().all(|routes| routes.lines().all(|route| route.contains("linkdown")));
            (knows && !link.contains("state UP")).then_some(())
        };
        assert!(poll_until(PATIENCE, told_everywhere).is_some(), "{}", lab.host.ip("-6 route show dev eth0"));
        let found = told(&examine(&place, &lab.host), "problem");
        assert!(found[0].contains("eth0") && found.iter().any(|it| it.contains("no carrier")), "{found:#?}");
    });
}

#[test]
fn leftovers_of_a_crash_are_to_be_cleaned_up_and_then_all_is_well() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let place = desktop().start(&lab.host).kill();
        let words = ["ended without putting the host back", "sudo tunproxy cleanup"];
        assert_one("problem", &place, &lab.host, &words);
        // From another state directory they are seen as well.
        assert_one("warning", &desktop(), &lab.host, &["look into empty tables", "cleanup --state-dir"]);
        place.clean_up(&lab.host);
        assert_healthy(&place, &lab.host);
    });
}

#[test]
fn a_run_that_does_not_answer_is_named_with_its_process() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let tunproxy = desktop().start(&lab.host);
        fs::remove_file(tunproxy.place().state.join("control.sock")).unwrap();
        let pid = fs::read_to_string(tunproxy.place().state.join("lock")).unwrap();
        let found = told(&examine(tunproxy.place(), &lab.host), "problem");
        assert!(found[0].contains(&format!("process {pid} holds the state directory")), "{found:#?}");
    });
}

#[test]
fn a_resolv_conf_that_leads_nowhere_is_named() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        own_etc("nameserver 192.168.1.1\n");
        let place = desktop();
        assert_healthy(&place, &lab.host);
        for (script, words) in [
            ("rm /etc/resolv.conf", "there is no /etc/resolv.conf"),
            ("ln -s /run/not-there /etc/resolv.conf", "a link to /run/not-there"),
            ("rm /etc/resolv.conf; echo 'search lan' > /etc/resolv.conf", "names no nameserver"),
        ] {
            sh(script);
            assert_one("problem", &place, &lab.host, &[words, "nameserver"]);
        }
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

#[test]
fn a_nameserver_that_is_silent_and_one_that_fails_are_named() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let with = |server: &str| {
            Place::new(&format!(
                "tun: {{ enable: true }}\ndns: {{ enable: true, nameserver: [{server}] }}\nrules: ['MATCH,DIRECT']\n"
            ))
        };
        assert_healthy(&with("192.168.1.1"), &lab.host);
        assert_one("problem", &with(BLACK_HOLE_V4), &lab.host, &[BLACK_HOLE_V4, "no answer", "dns.nameserver"]);
        // Past the run, too: through it, every question has an answer.
        let tunproxy = desktop().start(&lab.host);
        tunproxy.place().rewrite(&format!(
            "tun: {{ enable: true }}\n\
             dns: {{ enable: true, enhanced-mode: fake-ip, nameserver: [{BLACK_HOLE_V4}] }}\nrules: ['MATCH,DIRECT']\n"
        ));
        assert_one("problem", tunproxy.place(), &lab.host, &[BLACK_HOLE_V4, "no answer"]);
    });
}

#[test]
fn proxies_that_cannot_be_reached_are_told_from_those_that_can() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let place = Place::new(&format!(
            "ipv6: true\ntun: {{ enable: true }}\n\
             dns: {{ enable: true, enhanced-mode: fake-ip, nameserver: [192.168.1.1] }}\n\
             proxies:\n\
             - {{ name: alive, type: http, server: {NAME}, port: 80 }}\n\
             - {{ name: closed, type: socks5, server: {V4}, port: 1081 }}\n\
             - {{ name: nowhere, type: socks5, server: no-such-name.test, port: 1080 }}\n\
             - {{ name: silent, type: socks5, server: {BLACK_HOLE_V4}, port: 1080 }}\n\
             rules: ['DST-PORT,1,closed', 'DST-PORT,2,nowhere', 'DST-PORT,3,silent', 'MATCH,alive']\n"
        ));
        let look = || {
            let told = told(&examine(&place, &lab.host), "problem");
            assert_eq!(told.len(), 3, "{told:#?}");
            for (name, why) in [("closed", "refused"), ("nowhere", "name"), ("silent", "no answer")] {
                assert!(told.iter().any(|it| it.contains(name) && it.contains(why)), "{name}: {told:#?}");
            }
        };
        look();
        // While it runs, everything would be answered inside: they are asked past it.
        let tunproxy = place.start(&lab.host);
        look();
        assert!(tunproxy.stop().success());
    });
}

#[test]
fn without_nftables_the_doctor_says_what_is_lost() {
    run(&[TUN], || {
        let lab = Topology::desktop().rp_filter("1");
        let _sites = Sites::open(&lab);
        let place = desktop();
        let before = Dump::take(&lab.host);
        sh("printf '#!/bin/sh\\necho no nf_tables here >&2; exit 1\\n' > /run/nft; chmod 755 /run/nft
            for nft in /usr/sbin/nft /sbin/nft /usr/bin/nft; do [ ! -e $nft ] || mount --bind /run/nft $nft; done");
        let look = || {
            let said = place.look(&lab.host, "doctor", &["--format", "json"]);
            serde_json::from_str::<Value>(&said.stdout).unwrap_or_else(|error| panic!("{error}: {said:?}"))
        };
        let found = look();
        assert!(told(&found, "warning")[0].contains("no nf_tables here"), "{found:#}");
        assert_eq!(told(&found, "problem"), Vec::<String>::new());
        let tunproxy = place.start(&lab.host);
        let found = look();
        assert!(told(&found, "problem")[0].contains("rp_filter is 1"), "{found:#}");
        assert!(tunproxy.stop().success());
        sh("for nft in /usr/sbin/nft /sbin/nft /usr/bin/nft; do umount $nft 2>/dev/null || true; done");
        before.assert_same(&Dump::take(&lab.host));
    });
}

#[test]
fn a_state_directory_that_takes_nothing_and_a_missing_node_are_named() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let place = desktop();
        fs::create_dir(&place.state).unwrap();
        sh(&format!("mount -t tmpfs -o ro none {}", place.state.display()));
        assert_one("problem", &place, &lab.host, &["nothing can be written to the state directory", "--state-dir"]);
        sh(&format!("umount {}; mount -t tmpfs none /dev/net", place.state.display()));
        assert_one("problem", &place, &lab.host, &["/dev/net/tun is missing", "modprobe tun"]);
    });
}

#[test]
fn anybody_may_ask_and_is_told_what_was_not_seen() {
    run(&["setpriv", TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let tunproxy = desktop().start(&lab.host);
        let by_anybody = |state: &str| {
            let mut command = lab.host.command("setpriv");
            command.args(["--reuid=12345", "--regid=12345", "--clear-groups"]).arg(binary());
            command.args(["doctor", "--format", "json", "--state-dir", state]);
            let said = Said::of(&mut command);
            serde_json::from_str::<Value>(&said.stdout).unwrap_or_else(|error| panic!("{error}: {said:?}"))
        };
        let of_root = by_anybody(&tunproxy.place().state.display().to_string());
        let own = by_anybody("/run/lab/nobody");
        for found in [&of_root, &own] {
            assert_eq!(told(found, "problem"), Vec::<String>::new(), "{found:#}");
            assert!(found["unseen"].to_string().contains("CAP_NET_ADMIN"), "{found:#}");
        }
        assert!(of_root["unseen"].to_string().contains("ask as its user"), "{of_root:#}");
        assert!(told(&own, "warning")[0].contains("another state directory"), "{own:#}");
        assert!(tunproxy.stop().success());
    });
}

#[test]
fn a_profile_with_mistakes_is_named_and_none_is_needed() {
    run(&[], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let wrong = Place::new("tun: { enable: maybe }\nrules: ['MATCH,DIRECT']\n");
        assert_one("problem", &wrong, &lab.host, &["the profile cannot be run", "tun.enable"]);
        let without = Said::of(lab.host.command(binary()).args(["doctor", "--state-dir", "/run/lab/nobody"]));
        assert!(without.succeeded(), "{without:?}");
    });
}
