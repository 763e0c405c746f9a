//! What is missing on the host or around it, with a run or without.

use std::fs;

use nix::fcntl::{Flock, FlockArg};
use serde_json::Value;

use super::super::support::program::PATIENCE;
use super::super::support::sites::{NAME, V4};
use super::super::support::topology::BLACK_HOLE_V4;
use super::super::support::tunproxy::{Place, Said, binary};
use super::super::support::world::{own_etc, poll_until};
use super::super::support::{Dump, Sites, Topology, run};
use super::{TUN, assert_healthy, assert_one, desktop, examine, killed, sh, told};

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
        let place = killed(desktop().start(&lab.host), &lab.host);
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
        let place = desktop();
        fs::create_dir(&place.state).unwrap();
        let lock = fs::File::create(place.state.join("lock")).unwrap();
        let _held = Flock::lock(lock, FlockArg::LockExclusiveNonblock).unwrap();
        let found = told(&examine(&place, &lab.host), "problem");
        let words = format!("process {} holds the state directory", std::process::id());
        assert!(found[0].contains(&words) && found[0].contains("does not answer"), "{found:#?}");
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
