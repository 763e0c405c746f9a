//! Profiles that cannot start here: the doctor says so before, and the start says the same and changes nothing.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::process::Command;

use super::super::support::tunproxy::{Place, Said, binary};
use super::super::support::{Dump, Netns, Sites, Topology, run};
use super::{TUN, assert_healthy, desktop, examine, killed, sh, told};

/// A desktop's profile with more under `tun` and `dns`.
fn with(tun: &str, dns: &str) -> Place {
    Place::new(&format!(
        "ipv6: true\ntun: {{ enable: true{tun} }}\n\
         dns: {{ enable: true, enhanced-mode: fake-ip, nameserver: [9.9.9.9]{dns} }}\nrules: ['MATCH,DIRECT']\n"
    ))
}

/// Of the findings, those about a start. What is at 9.9.9.9 is nobody's business here.
fn about_a_start(place: &Place, ns: &Netns) -> Vec<String> {
    let found = told(&examine(place, ns), "problem");
    found.into_iter().filter(|it| it.starts_with("a start would be refused")).collect()
}

/// Holds that the doctor and the start both say `words`, and that nothing was changed.
#[track_caller]
fn assert_refused(place: &Place, lab: &Topology, words: &[&str]) {
    let before = Dump::take(&lab.host);
    let found = about_a_start(place, &lab.host);
    let [one] = found.as_slice() else { panic!("not one refusal of {words:?}, but {found:#?}") };
    let Err(said) = place.try_start(&lab.host) else { panic!("it has started: {one}") };
    for words in words {
        assert!(one.contains(words) && said.contains(words), "{words}: doctor {one}, start {said}");
    }
    assert!(place.look(&lab.host, "plan", &[]).stdout.contains("refused: "));
    before.assert_same(&Dump::take(&lab.host));
}

#[test]
fn a_device_that_is_there_and_a_name_that_no_tun_can_have_are_told_before_the_start() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        lab.host.ip("link add up0 type veth peer name up1");
        assert_refused(&with(", device: up0", ""), &lab, &["the interface up0 exists already", "tun.device"]);
        assert_eq!(about_a_start(&with(", device: up7", ""), &lab.host), [""; 0]);
        for name in ["lo", "a+b"] {
            let place = with(&format!(", device: '{name}'"), "");
            let said = place.check(&lab.host);
            assert_eq!(said.code, Some(1), "{said:?}");
            assert!(said.stdout.contains(&format!("`{name}` cannot be the name of a device")), "{said:?}");
            assert!(told(&examine(&place, &lab.host), "problem")[0].contains("tun.device"));
        }
    });
}

#[test]
fn addresses_that_the_network_has_already_are_told_before_the_start() {
    run(&[TUN], || {
        let lab = Topology::with_lan();
        let _sites = Sites::open(&lab);
        for (place, words) in [
            (
                with("", ", fake-ip-range: 192.168.0.1/16"),
                "dns.fake-ip-range 192.168.0.1/16 overlaps 192.168.1.10/24, the network of eth0, an uplink",
            ),
            (with("", ", fake-ip-range: 10.7.0.0/28"), "the network of lan0"),
            (with("", ", fake-ip-range6: 'fd00:7::/64'"), "dns.fake-ip-range6 fd00:7::/64 overlaps fd00:7::1/64"),
            (with(", inet6-address: ['2001:db8:2::1/126']", ""), "tun.inet6-address 2001:db8:2::1/126 overlaps"),
            (with(", inet6-address: ['2001:db8:2::10/64']", ""), "2001:db8:2::10/64, the network of eth0"),
        ] {
            assert_refused(&place, &lab, &[words, "hoose a range"]);
        }
        assert_eq!(about_a_start(&with("", ""), &lab.host), [""; 0]);
        assert!(with("", "").start(&lab.host).stop().success());
    });
}

#[test]
fn a_kill_switch_without_nftables_is_told_before_the_start() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let place = with(", kill-switch: true", "");
        assert_eq!(about_a_start(&place, &lab.host), [""; 0]);
        sh("printf '#!/bin/sh\\necho no nf_tables here >&2; exit 1\\n' > /run/nft; chmod 755 /run/nft
            for nft in /usr/sbin/nft /sbin/nft /usr/bin/nft; do [ ! -e $nft ] || mount --bind /run/nft $nft; done");
        let said = place.look(&lab.host, "doctor", &[]);
        let Err(started) = place.try_start(&lab.host) else { panic!("it has started") };
        for words in ["tun.kill-switch cannot be had without nftables (no nf_tables here)", "install it"] {
            assert!(said.stdout.contains(words) && started.contains(words), "{words}: {said:?}, {started}");
        }
        assert!(said.stdout.contains("PROBLEM  a start would be refused"), "{said:?}");
    });
}

#[test]
fn ports_that_somebody_else_serves_are_told_before_the_start() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let place = Place::new(
            "mixed-port: 7890\ntun: { enable: true }\ndns: { enable: true, listen: '127.0.0.1:53', nameserver: [9.9.9.9] }\n\
             rules: ['MATCH,DIRECT']\n",
        );
        assert_eq!(about_a_start(&place, &lab.host), [""; 0]);
        let taken = lab.host.enter(|| {
            let name = std::net::UdpSocket::bind("127.0.0.1:53").expect("a port of this lab");
            (std::net::TcpListener::bind("127.0.0.1:7890").expect("a port of this lab"), name)
        });
        let found = about_a_start(&place, &lab.host);
        assert!(found.len() == 2 && found[0].contains("7890"), "{found:#?}");
        assert!(found[1].contains("dns.listen: cannot listen on 127.0.0.1:53"), "{found:#?}");
        drop(taken);
        assert_eq!(about_a_start(&place, &lab.host), [""; 0]);
    });
}

#[test]
fn a_state_directory_that_everybody_may_write_to_is_warned_of() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let place = desktop();
        fs::create_dir(&place.state).unwrap();
        let mode = |mode| fs::set_permissions(&place.state, fs::Permissions::from_mode(mode)).unwrap();
        mode(0o777);
        let words = ["everybody may write to the state directory", "(mode 0777)", "chmod go-w"];
        let said = place.look(&lab.host, "doctor", &[]);
        assert!(said.succeeded() && words.iter().all(|word| said.stdout.contains(word)), "{said:?}");
        let tunproxy = place.start(&lab.host);
        assert!(words.iter().all(|word| tunproxy.output().contains(word)), "{}", tunproxy.output());
        assert!(tunproxy.stop().success());
        mode(0o755);
        assert!(!place.look(&lab.host, "doctor", &[]).stdout.contains("everybody may write"));
    });
}

#[test]
fn a_journal_that_is_a_link_or_everybodys_is_told_apart_and_the_rules_it_stood_for_still_are() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let place = killed(desktop().start(&lab.host), &lab.host);
        let journal = place.state.join("journal");
        let kept = fs::read(&journal).unwrap();
        fs::set_permissions(&journal, fs::Permissions::from_mode(0o666)).unwrap();
        let look = |words: &[&str]| {
            let found = examine(&place, &lab.host);
            let problem = told(&found, "problem");
            assert!(problem.len() == 1 && words.iter().all(|it| problem[0].contains(it)), "{words:?}: {problem:#?}");
            assert!(!problem[0].contains("another user"), "{problem:#?}");
            let strays = told(&found, "warning");
            assert!(strays.len() == 1 && strays[0].contains("look into empty tables"), "{strays:#?}");
            assert!(strays[0].contains("sudo ip -4 rule delete"), "{strays:#?}");
        };
        look(&["may be written by others (mode 0666)", "chmod go-w"]);
        fs::remove_file(&journal).unwrap();
        symlink("/etc/passwd", &journal).unwrap();
        look(&["is a symbolic link", "delete the link"]);
        fs::remove_file(&journal).unwrap();
        fs::write(&journal, kept).unwrap();
        fs::set_permissions(&journal, fs::Permissions::from_mode(0o600)).unwrap();
        place.clean_up(&lab.host);
        assert_healthy(&place, &lab.host);
    });
}

#[test]
fn a_command_in_an_advice_works_as_it_is_printed() {
    run(&["setpriv", TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let place = desktop();
        sh(&format!("chmod 755 {}; chmod 644 {}", place.profile.parent().unwrap().display(), place.profile.display()));
        for word in ["plan", "doctor"] {
            let mut command = lab.host.command("setpriv");
            command.args(["--reuid=12345", "--regid=12345", "--clear-groups"]).arg(binary());
            command.current_dir(place.profile.parent().unwrap()).args([word, "--profile", "profile.yaml"]);
            let said = Said::of(command.arg("--state-dir").arg(&place.state));
            let unseen = said
                .stdout
                .lines()
                .find(|line| (line.starts_with("unseen ") || line.starts_with("not seen: ")) && line.contains("sudo "));
            let unseen = unseen.unwrap_or_else(|| panic!("{said:?}"));
            let printed = unseen.split("sudo ").nth(1).unwrap().trim_end_matches(')');
            assert!(printed.contains(&place.profile.display().to_string()), "{printed}");
            // From another directory, by root, which the lab is.
            let mut sh: Command = lab.host.command("sh");
            let done = Said::of(sh.current_dir("/").args(["-euc", printed]));
            assert!(done.succeeded() && !done.stdout.contains("CAP_NET_ADMIN"), "{printed}: {done:?}");
        }
    });
}
