//! What another program removes of ours while we run is back within a second, with a line that names it.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};

use super::support::client::act_in;
use super::support::program::PATIENCE;
use super::support::sites::{V4, V6};
use super::support::tunproxy::{Place, Tunproxy};
use super::support::{Dump, Netns, Sites, Topology, run, world};

const TUN: &str = "/dev/net/tun";

fn profile(more: &str) -> Place {
    Place::new(&format!(
        "
mode: rule
ipv6: true
log-level: info
tun: {{ enable: true, auto-route: true, dns-hijack: ['any:53']{more} }}
dns: {{ enable: true, enhanced-mode: fake-ip, nameserver: [192.168.1.1] }}
rules: ['MATCH,DIRECT']
"
    ))
}

/// What is ours on the host, a line each; in which order rules of one priority stand does not matter.
fn ours(host: &Netns) -> BTreeSet<String> {
    let mut lines = BTreeSet::new();
    for words in ["-4 rule", "-6 rule", "-4 route show table 2022", "-6 route show table 2022"] {
        lines.extend(host.ip(words).lines().map(|line| format!("{words}: {}", line.trim())));
    }
    for words in ["-4 route show table 2023", "-6 route show table 2023", "-o addr show dev tunproxy0"] {
        lines.extend(host.ip(words).lines().map(|line| format!("{words}: {}", line.trim())));
    }
    let link = host.ip("-o link show dev tunproxy0");
    lines.extend(link.split_once("qlen").map(|(link, _)| link.to_owned()));
    lines.extend(host.run("nft", &["--stateless", "--terse", "list", "ruleset"]).lines().map(str::to_owned));
    lines.insert(std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default());
    lines
}

/// Does `act`, and waits until everything is as it was and the log names what was gone.
fn comes_back<T>(host: &Netns, tunproxy: &Tunproxy, act: impl FnOnce() -> T, named: &str) {
    let before = ours(host);
    let (begun, _line) = tunproxy.line_after(
        || {
            let begun = Instant::now();
            act();
            begun
        },
        &["WARN", named, "it is back"],
    );
    let told = begun.elapsed();
    let same = world::poll_until(PATIENCE, || (ours(host) == before).then_some(()));
    let now = ours(host);
    let (gone, new) = (before.difference(&now).collect::<Vec<_>>(), now.difference(&before).collect::<Vec<_>>());
    assert!(same.is_some(), "{named}: gone {gone:#?}, new {new:#?}\n{}", tunproxy.output());
    world::measured(&format!("{named}: back after {} ms", told.as_millis()));
    // A second on a machine that does nothing else; the tests share theirs.
    assert!(told < Duration::from_secs(5), "{named}: {told:?}");
}

/// Our rules by priority, each as the words that delete it.
fn rules(host: &Netns) -> Vec<(String, Vec<String>)> {
    let mut found: Vec<(String, Vec<String>)> = Vec::new();
    for family in ["-4", "-6"] {
        for line in host.ip(&format!("{family} rule")).lines() {
            let (priority, selectors) = line.split_once(':').expect("a rule");
            if !priority.starts_with("90") || priority.len() != 4 {
                continue;
            }
            let words = format!("{family} rule del priority {priority} {}", selectors.trim());
            match found.iter_mut().find(|(known, _)| known == priority) {
                Some((_, list)) => list.push(words),
                None => found.push((priority.to_owned(), vec![words])),
            }
        }
    }
    found
}

#[test]
fn every_rule_comes_back() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let before = Dump::take(&lab.host);
        let tunproxy = profile("").start(&lab.host);
        let rules = rules(&lab.host);
        assert!(rules.len() > 12, "{rules:?}");
        for (priority, deletions) in rules {
            let act = || deletions.iter().for_each(|words| drop(lab.host.ip(words)));
            comes_back(&lab.host, &tunproxy, act, &format!("priority {priority}"));
        }
        tunproxy.assert_carries(&lab.host);
        assert!(tunproxy.stop().success());
        before.assert_same(&Dump::take(&lab.host));
    });
}

#[test]
fn all_rules_at_once_come_back_as_after_a_restart_of_a_network_service() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let before = Dump::take(&lab.host);
        let tunproxy = profile("").start(&lab.host);
        let deletions: Vec<String> = rules(&lab.host).into_iter().flat_map(|(_, list)| list).collect();
        let act = || deletions.iter().for_each(|words| drop(lab.host.ip(words)));
        // One line counts them, or two where the first were seen before the last were gone.
        comes_back(&lab.host, &tunproxy, act, "rules (priorit");
        tunproxy.assert_carries(&lab.host);
        for site in [V4, V6] {
            assert_eq!(act_in(&lab.host, &format!("ask {site}:7 x")), Ok("x".to_owned()), "{site}");
        }
        assert!(tunproxy.stop().success());
        before.assert_same(&Dump::take(&lab.host));
    });
}

#[test]
fn routes_addresses_and_the_links_own_settings_come_back() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let before = Dump::take(&lab.host);
        let tunproxy = profile(", route-exclude-address: [203.0.113.64/28]").start(&lab.host);
        let host = &lab.host;
        for (words, named) in [
            ("-4 route del default table 2022", "route 0.0.0.0/0 dev tunproxy0 table 2022"),
            ("-4 route del default table 2023", "route 0.0.0.0/0 dev tunproxy0 table 2023"),
            ("-6 route del default table 2022", "route ::/0 dev tunproxy0 table 2022"),
            ("-6 route del default table 2023", "route ::/0 dev tunproxy0 table 2023"),
            ("-4 addr del 198.18.0.1/30 dev tunproxy0", "address 198.18.0.1/30"),
            ("-6 addr flush dev tunproxy0", "address fd"),
            ("link set tunproxy0 mtu 1280", "link settings"),
            // Too little for IPv6: the kernel takes it off the device, addresses, routes and parameters included.
            ("link set tunproxy0 mtu 1000", "link settings"),
            ("link set tunproxy0 down", "link settings"),
        ] {
            comes_back(host, &tunproxy, || host.ip(words), named);
            tunproxy.assert_carries(host);
        }
        assert!(tunproxy.stop().success());
        before.assert_same(&Dump::take(host));
    });
}

/// The process that holds the firewall table.
fn nft_of(tunproxy: &Tunproxy) -> nix::unistd::Pid {
    let parent = format!("PPid:\t{}\n", tunproxy.pid());
    let processes = std::fs::read_dir("/proc").expect("/proc").flatten();
    let found = processes.filter_map(|entry| {
        let status = std::fs::read_to_string(entry.path().join("status")).ok()?;
        // Those that are only asked something come and go.
        let holds = std::fs::read_to_string(entry.path().join("cmdline")).ok()?.contains("--interactive");
        let ours = status.starts_with("Name:\tnft\n") && status.contains(&parent) && holds;
        ours.then(|| entry.file_name().to_string_lossy().parse().ok()).flatten()
    });
    let pids: Vec<i32> = found.collect();
    assert_eq!(pids.len(), 1, "{pids:?}");
    nix::unistd::Pid::from_raw(pids[0])
}

#[test]
fn the_firewall_table_comes_back_when_its_holder_is_killed() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let before = Dump::take(&lab.host);
        let tunproxy = profile("").start(&lab.host);
        for _ in 0..3 {
            let kill = || nix::sys::signal::kill(nft_of(&tunproxy), nix::sys::signal::Signal::SIGKILL).unwrap();
            comes_back(&lab.host, &tunproxy, kill, "the firewall table");
        }
        lab.host.nft("flush ruleset");
        tunproxy.assert_carries(&lab.host);
        assert!(tunproxy.stop().success());
        before.assert_same(&Dump::take(&lab.host));
    });
}

#[test]
fn forwarding_that_somebody_switches_off_comes_back() {
    run(&[TUN], || {
        let lab = Topology::with_lan();
        let _sites = Sites::open(&lab);
        for key in ["net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"] {
            lab.host.sysctl(key, "0");
        }
        let before = Dump::take(&lab.host);
        let tunproxy = profile(", auto-forward: true").start(&lab.host);
        for (key, named) in
            [("net.ipv4.ip_forward", "net/ipv4/ip_forward = 1"), ("net.ipv6.conf.all.forwarding", "all/forwarding = 1")]
        {
            comes_back(&lab.host, &tunproxy, || lab.host.sysctl(key, "0"), named);
        }
        for site in [V4, V6] {
            assert_eq!(act_in(lab.client(), &format!("ask {site}:7 x")), Ok("x".to_owned()), "{site}");
        }
        assert!(tunproxy.stop().success());
        before.assert_same(&Dump::take(&lab.host));
    });
}

const LINK_LOCAL: &str = "search lan\nnameserver fe80::1%eth0\n";

fn resolv_conf() -> String {
    std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default()
}

/// Waits until /etc/resolv.conf holds `words`.
fn until_resolv_conf(tunproxy: &Tunproxy, words: &str) {
    let holds = || resolv_conf().contains(words).then_some(());
    assert!(world::poll_until(PATIENCE, holds).is_some(), "{words}: {}\n{}", resolv_conf(), tunproxy.output());
}

/// As programs that are careful do it.
fn replace_resolv_conf(text: &str) {
    std::fs::write("/etc/resolv.conf.new", text).expect("a file of ours");
    std::fs::rename("/etc/resolv.conf.new", "/etc/resolv.conf").expect("a file in its place");
}

#[test]
fn a_resolver_file_that_is_replaced_is_judged_anew_and_the_last_will_of_others_stays() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        world::own_etc(LINK_LOCAL);
        let tunproxy = profile("").start(&lab.host);
        until_resolv_conf(&tunproxy, "nameserver 198.18.0.2");
        // Again one that would be asked past us: ours comes back, with the search list of theirs.
        let theirs = "search office\nnameserver fe80::2%eth0\n";
        let (begun, _) = tunproxy.line_after(
            || {
                replace_resolv_conf(theirs);
                Instant::now()
            },
            &["WARN", "somebody has replaced /etc/resolv.conf"],
        );
        until_resolv_conf(&tunproxy, "search office");
        until_resolv_conf(&tunproxy, "nameserver 198.18.0.2");
        world::measured(&format!("resolv.conf: rewritten after {} ms", begun.elapsed().as_millis()));
        // Written in place, and in two steps, as dhclient does.
        std::fs::write("/etc/resolv.conf", "").unwrap();
        std::fs::write("/etc/resolv.conf", "search dhcp\nnameserver fe80::3%eth0\n").unwrap();
        until_resolv_conf(&tunproxy, "search dhcp\n");
        until_resolv_conf(&tunproxy, "nameserver 198.18.0.2");
        // One whose nameservers come to us anyway is left as it is.
        let ((), _) = tunproxy.line_after(
            || replace_resolv_conf("nameserver 192.168.1.1\n"),
            &["somebody has replaced /etc/resolv.conf"],
        );
        // It is looked at once more when something else happens, and still left.
        comes_back(&lab.host, &tunproxy, || lab.host.ip("-4 rule del priority 9043"), "priority 9043 ");
        assert_eq!(resolv_conf(), "nameserver 192.168.1.1\n");
        replace_resolv_conf(theirs);
        until_resolv_conf(&tunproxy, "nameserver 198.18.0.2");
        assert!(tunproxy.stop().success());
        assert_eq!(resolv_conf(), theirs, "what was written last by others is there after us");
        assert_eq!(
            std::fs::read_dir("/etc")
                .unwrap()
                .flatten()
                .filter(|it| it.file_name().to_string_lossy().contains("tunproxy"))
                .count(),
            0
        );
    });
}

#[test]
fn a_resolver_file_that_is_deleted_or_becomes_a_link_is_dealt_with_and_comes_back_as_such() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        world::own_etc("nameserver 192.168.1.1\n");
        let place = profile("");
        let tunproxy = place.start(&lab.host);
        std::fs::remove_file("/etc/resolv.conf").unwrap();
        until_resolv_conf(&tunproxy, "nameserver 198.18.0.2");
        std::fs::write("/run/stub", "# nobody yet\n").unwrap();
        std::os::unix::fs::symlink("/run/stub", "/etc/resolv.conf.new").unwrap();
        std::fs::rename("/etc/resolv.conf.new", "/etc/resolv.conf").unwrap();
        until_resolv_conf(&tunproxy, "nameserver 198.18.0.2");
        assert_eq!(std::fs::read_to_string("/run/stub").unwrap(), "# nobody yet\n");
        // A kill in this state: what comes back is the link.
        place_is_cleaned(tunproxy, &lab.host);
        assert_eq!(std::fs::read_link("/etc/resolv.conf").unwrap(), Path::new("/run/stub"));
        // Now somebody gives the file behind the link a nameserver: ours is needed no more.
        let tunproxy = place.start(&lab.host);
        until_resolv_conf(&tunproxy, "nameserver 198.18.0.2");
        let ((), _) = tunproxy.line_after(
            || std::fs::write("/run/stub", "nameserver 192.168.1.1\n").unwrap(),
            &["put /etc/resolv.conf back: it is needed no more"],
        );
        assert_eq!(std::fs::read_link("/etc/resolv.conf").unwrap(), Path::new("/run/stub"));
        assert!(tunproxy.stop().success());
        assert_eq!(resolv_conf(), "nameserver 192.168.1.1\n");
    });
}

fn place_is_cleaned(tunproxy: Tunproxy, host: &Netns) {
    tunproxy.kill().clean_up(host);
}

#[test]
fn somebody_who_deletes_again_and_again_is_answered_once_a_second_and_named_in_one_line() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let before = Dump::take(&lab.host);
        let tunproxy = profile("").start(&lab.host);
        let host = &lab.host;
        let gone = || !host.ip("-4 rule").contains("9043:");
        let told = || tunproxy.output().contains("again and again");
        let (mut deleted, start) = (0, Instant::now());
        while !told() {
            assert!(start.elapsed() < 2 * PATIENCE, "nobody complains: {}", tunproxy.output());
            if !gone() {
                host.ip("-4 rule del priority 9043");
                deleted += 1;
            }
        }
        // From now on it is slow: between two restorations lies a second.
        let (mut times, start) = (Vec::new(), Instant::now());
        while times.len() < 4 {
            assert!(start.elapsed() < 2 * PATIENCE, "it stays away: {}", tunproxy.output());
            if !gone() {
                host.ip("-4 rule del priority 9043");
                times.push(Instant::now());
            }
        }
        let fastest = times.windows(2).map(|two| two[1] - two[0]).min().expect("several");
        println!(
            "measured: {deleted} deletions until it was named; then one restoration in {fastest:?} at the fastest"
        );
        assert!(fastest > Duration::from_millis(800), "{fastest:?}");
        let lines = tunproxy.output().lines().filter(|line| line.contains("9043")).count();
        assert!(lines <= deleted + 1, "{lines} lines for {deleted} deletions");
        assert!(tunproxy.stop().success());
        before.assert_same(&Dump::take(host));
    });
}

#[test]
fn a_device_that_is_deleted_ends_the_run_with_an_error_that_says_so_and_the_host_put_back() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let before = Dump::take(&lab.host);
        let place = profile("");
        let tunproxy = place.start(&lab.host);
        lab.host.ip("link del tunproxy0");
        tunproxy.line("the TUN device tunproxy0 is gone");
        assert!(!tunproxy.wait().success());
        before.assert_same(&Dump::take(&lab.host));
        let tunproxy = place.start(&lab.host);
        tunproxy.assert_carries(&lab.host);
        assert!(!tunproxy.output().contains("an earlier run"), "{}", tunproxy.output());
        assert!(tunproxy.stop().success());
    });
}

/// What a process has done so far: the sum of its threads' switches.
fn switches(tunproxy: &Tunproxy) -> u64 {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", tunproxy.pid())).expect("a running program").flatten();
    let of = |status: String| {
        let lines = status.lines().filter_map(|line| line.split_once("ctxt_switches:"));
        lines.filter_map(|(_, number)| number.trim().parse::<u64>().ok()).sum::<u64>()
    };
    tasks.filter_map(|task| std::fs::read_to_string(task.path().join("status")).ok()).map(of).sum()
}

#[test]
fn an_idle_host_is_left_in_peace() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let tunproxy = profile("").start(&lab.host);
        comes_back(&lab.host, &tunproxy, || lab.host.ip("-4 rule del priority 9043"), "priority 9043 ");
        // Until it has looked at what it did itself.
        let quiet = world::poll_until(PATIENCE, || {
            let before = switches(&tunproxy);
            std::thread::sleep(Duration::from_secs(2));
            (switches(&tunproxy) == before).then_some(())
        });
        assert!(quiet.is_some(), "it never sleeps for two seconds");
    });
}

#[test]
fn what_happened_while_nobody_could_listen_is_found_all_the_same() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let tunproxy = profile("").start(&lab.host);
        // More than the kernel keeps for a listener.
        let noise = "rule add priority 77 nop\nrule del priority 77\n".repeat(3000);
        std::fs::write("/run/noise", noise).unwrap();
        let asleep = || {
            tunproxy.freeze();
            lab.host.run("ip", &["-batch", "/run/noise"]);
            lab.host.ip("-4 rule del priority 9043");
            tunproxy.signal(nix::sys::signal::Signal::SIGCONT);
        };
        comes_back(&lab.host, &tunproxy, asleep, "priority 9043 ");
        assert!(tunproxy.stop().success());
    });
}

/// Puts a stand-in for resolvectl in the path: it notes what it is told, and answers by what it knows.
fn stand_in_for_resolved(host: &Netns) {
    let script = r#"#!/bin/sh
echo "$@" >> /run/told
case "$#$1" in
2dns) echo "Link 7 ($2): $(cat /run/known 2>/dev/null)" ;;
*dns) shift 2; echo "$@" > /run/known ;;
esac
"#;
    std::fs::write("/run/resolvectl", script).expect("a file of ours");
    let prepare = "mount -t tmpfs none /usr/local/bin; install -m 755 /run/resolvectl /usr/local/bin/resolvectl
                   mkdir -p /run/systemd/resolve; echo nameserver 127.0.0.53 > /run/systemd/resolve/stub-resolv.conf";
    host.run("sh", &["-c", prepare]);
}

#[test]
fn a_resolved_that_has_forgotten_us_is_told_again() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        world::own_etc("nameserver 127.0.0.53\n");
        stand_in_for_resolved(&lab.host);
        let tunproxy = profile("").start(&lab.host);
        let told = || std::fs::read_to_string("/run/told").unwrap_or_default().matches("default-route").count();
        assert_eq!(told(), 1);
        // A restart of it: nothing is known any more, and its files are written anew.
        let ((), _) = tunproxy.line_after(
            || {
                std::fs::remove_file("/run/known").unwrap();
                std::fs::write("/run/systemd/resolve/stub-resolv.conf", "nameserver 127.0.0.53\n").unwrap();
            },
            &["WARN", "the host's resolver settings", "it is back"],
        );
        assert_eq!(told(), 2);
        // It remembers: there is nothing to be done.
        std::fs::write("/run/systemd/resolve/stub-resolv.conf", "nameserver 127.0.0.53\n").unwrap();
        comes_back(&lab.host, &tunproxy, || lab.host.ip("-4 rule del priority 9043"), "priority 9043 ");
        assert_eq!(told(), 2);
        assert!(tunproxy.stop().success());
        let told = std::fs::read_to_string("/run/told").unwrap();
        assert!(told.ends_with("revert tunproxy0\n"), "{told}");
    });
}

#[test]
fn what_somebody_takes_out_of_a_kill_switch_is_back_and_it_follows_the_host() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let before = Dump::take(&lab.host);
        let tunproxy = profile(", kill-switch: true").start(&lab.host);
        for (line, named) in [
            ("flush chain inet tunproxy reroute", "the firewall table"),
            ("flush table inet tunproxy", "the firewall table"),
            ("flush chain arp tunproxy closed", "the firewall table"),
            ("delete table inet tunproxy", "the firewall table"),
            ("flush ruleset", "the firewall table"),
        ] {
            comes_back(&lab.host, &tunproxy, || lab.host.nft(line), named);
        }
        for family in ["-4", "-6"] {
            let route = format!("{family} route del unreachable default table 2022 metric 4294967294");
            comes_back(&lab.host, &tunproxy, || lab.host.ip(&route), "unreachable");
        }
        lab.host.address("eth0", &["192.168.1.77/24"]);
        let follows = || lab.host.nft("list table inet tunproxy").contains("update @asked_192_168_1_77").then_some(());
        assert!(world::poll_until(PATIENCE, follows).is_some(), "{}", tunproxy.output());
        assert!(lab.host.nft("list table inet tunproxy").contains("kill switch of tunproxy0"));
        lab.host.ip("addr del 192.168.1.77/24 dev eth0");
        tunproxy.assert_carries(&lab.host);
        assert!(tunproxy.stop().success());
        before.assert_same(&Dump::take(&lab.host));
    });
}
