//! What is applied is undone: on stop, after failures, after kill -9.

use std::io::{BufRead, BufReader};
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::sys::prctl;
use nix::sys::wait::waitpid;
use tunproxy::platform::{DnsPlan, HostOptions, HostPlan, Journal, Survey, Wishes, cleanup};

use crate::host::{NODE, TUN, add_foreigners, assert_same, build, dump, open_tun, options, plan, within};
use crate::sandbox::sh;
use crate::support::run;
use crate::traffic::{ask, device, serve};

pub(crate) const ORDINARY: &str = "nameserver 192.168.7.9\n";
pub(crate) const LINK_LOCAL: &str = "search lan\nnameserver fe80::1%eth0\n";
/// Has the victim apply once and then wait; also what it says when it has.
const PARKED: &str = "TUNPROXY_TEST_PARKED";
const VICTIM: &str = "TUNPROXY_TEST_VICTIM";

fn gateway() -> HostOptions {
    let nets = |list: &[&str]| list.iter().map(|net| net.parse().expect("a prefix")).collect::<Vec<_>>();
    HostOptions {
        auto_forward: true,
        lan_dns: vec!["lan0".to_owned()],
        route_exclude: nets(&["203.0.113.0/28", "2001:db8:9:1::/64"]),
        ..options()
    }
}

#[test]
fn a_dump_sees_every_kind_of_change() {
    run(&[NODE], || {
        build(ORDINARY);
        for change in [
            "ip rule add priority 77 nop",
            "ip -6 rule add priority 77 nop",
            "ip route add throw 192.0.2.77 table 77",
            "ip -6 route add throw 2001:db8:77::/48 table 77",
            "ip addr add 192.0.2.77/32 dev eth0",
            "ip link set eth0 mtu 1400",
            "nft add table inet other",
            "sysctl -qw net.ipv4.ip_forward=1",
            "sysctl -qw net.ipv6.conf.eth0.accept_ra=2",
            "echo '#' >> /etc/resolv.conf",
            "chmod 600 /etc/resolv.conf",
            "mv /etc/resolv.conf /etc/stub; ln -s stub /etc/resolv.conf",
        ] {
            let before = dump();
            assert_same(&before, &dump());
            sh(change);
            assert_ne!(before, dump(), "{change}");
        }
    });
}

#[test]
fn a_run_leaves_the_host_as_it_was() {
    run(&[NODE], || {
        build(LINK_LOCAL);
        add_foreigners();
        sh(
            "sysctl -qw net.ipv4.conf.all.accept_redirects=0 net.ipv4.conf.lan0.forwarding=1 net.ipv4.conf.eth0.rp_filter=1",
        );
        let before = dump();
        let state = tempfile::tempdir().unwrap();
        let _tun = open_tun(TUN);
        let with_tun = dump();
        let planned = plan(&gateway());
        assert!(planned.warnings.is_empty(), "{:?}", planned.warnings);
        let mut applied = planned.apply(Journal::open(state.path()).unwrap()).unwrap();
        assert!(applied.warnings().is_empty(), "{:?}", applied.warnings());
        assert_eq!(applied.missing().unwrap(), []);
        assert_ne!(with_tun, dump());
        assert!(sh("cat /etc/resolv.conf").contains("nameserver 198.18.0.2\n"));
        assert_eq!(sh("cat /proc/sys/net/ipv4/ip_forward /proc/sys/net/ipv6/conf/eth0/accept_ra"), "1\n2\n");
        let ruleset = sh("nft list ruleset");
        assert!(ruleset.contains("table inet tunproxy1 { # progname nft\n\tflags owner"), "{ruleset}");
        assert!(ruleset.contains("chain lan_dns {") && ruleset.contains("arp daddr ip 198.18.0.1 drop"), "{ruleset}");
        sh("nft flush ruleset");
        assert_eq!(applied.missing().unwrap(), [], "others cannot take our table down");
        sh(
            "nft 'add table inet tunproxy { chain o { type filter hook output priority 0; meta mark 0x2000000 accept; }; }'",
        );
        applied.revert().unwrap();
        drop(_tun);
        assert_same(&before, &dump());
        assert!(!state.path().join("journal").exists());
    });
}

#[test]
fn what_others_undo_is_missed_and_named() {
    run(&[NODE], || {
        build(ORDINARY);
        let before = dump();
        let state = tempfile::tempdir().unwrap();
        let tun = open_tun(TUN);
        let mut applied = plan(&options()).apply(Journal::open(state.path()).unwrap()).unwrap();
        sh("ip rule del priority 9043; ip -6 route flush table 2022; ip addr del fdfe:dcba:9877::1/126 dev tun7");
        let missing: Vec<String> = applied.missing().unwrap().iter().map(ToString::to_string).collect();
        assert_eq!(
            missing,
            ["address fdfe:dcba:9877::1/126", "route ::/0 dev tun7 table 2022", "rule -4 priority 9043 lookup 2022",]
        );
        applied.revert().unwrap();
        drop(tun);
        assert_same(&before, &dump());
    });
}

#[test]
fn dropping_undoes_as_reverting_does() {
    run(&[NODE], || {
        build(LINK_LOCAL);
        let before = dump();
        let state = tempfile::tempdir().unwrap();
        let tun = open_tun(TUN);
        drop(plan(&options()).apply(Journal::open(state.path()).unwrap()).unwrap());
        drop(tun);
        assert_same(&before, &dump());
    });
}

#[test]
fn a_failure_half_way_undoes_what_was_done_and_spares_what_others_did() {
    run(&[NODE], || {
        build(ORDINARY);
        let planned = plan(&options());
        // Somebody takes one of our numbers between the survey and the act.
        sh("ip rule add priority 9043 lookup 2022 protocol kernel");
        let before = dump();
        let state = tempfile::tempdir().unwrap();
        let tun = open_tun(TUN);
        let error = planned.apply(Journal::open(state.path()).unwrap()).unwrap_err().to_string();
        assert!(error.contains("rule -4 priority 9043") && error.contains("start again"), "{error}");
        drop(tun);
        assert_same(&before, &dump());
        assert!(Journal::open(state.path()).unwrap().is_clean());
    });
}

#[test]
fn without_the_capability_the_error_names_it_and_nothing_has_changed() {
    run(&[NODE], || {
        build(ORDINARY);
        let planned = plan(&options());
        let state = tempfile::tempdir().unwrap();
        let before = dump();
        let tun = open_tun(TUN);
        // Capabilities belong to threads.
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let (header, none) = ([0x2008_0522u32, 0], [0u32; 6]);
                // SAFETY: capset(2) reads the two structures, which have these layouts.
                assert_eq!(unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), none.as_ptr()) }, 0);
                let error = planned.apply(Journal::open(state.path()).unwrap()).unwrap_err().to_string();
                assert!(error.contains("CAP_NET_ADMIN") && error.contains("setcap"), "{error}");
            });
        });
        drop(tun);
        assert_same(&before, &dump());
    });
}

#[test]
fn without_nft_the_rest_is_applied_and_one_warning_names_what_is_lost() {
    run(&[NODE], || {
        build(ORDINARY);
        let before = dump();
        let nft = sh("readlink -f $(command -v nft)");
        sh(&format!("mount --bind /dev/null {}", nft.trim()));
        let state = tempfile::tempdir().unwrap();
        let tun = open_tun(TUN);
        let planned = plan(&options());
        assert_eq!(planned.warnings.len(), 1, "{:?}", planned.warnings);
        assert!(planned.nft.is_none());
        let mut applied = planned.apply(Journal::open(state.path()).unwrap()).unwrap();
        assert_eq!(applied.missing().unwrap(), []);
        applied.revert().unwrap();
        drop(tun);
        sh(&format!("umount {}", nft.trim()));
        assert_same(&before, &dump());
    });
}

#[test]
fn resolver_settings_of_every_shape_come_back() {
    run(&[NODE], || {
        build("");
        sh("mkdir -p /run/res; echo '# none' > /run/res/stub");
        for shape in [
            "rm -f /etc/resolv.conf",
            "rm -f /etc/resolv.conf; ln -s ../run/res/stub /etc/resolv.conf",
            "rm -f /etc/resolv.conf; ln -s /run/res/not-there /etc/resolv.conf",
            "rm -f /etc/resolv.conf; printf 'nameserver fe80::1%%eth0' > /etc/resolv.conf; chmod 600 /etc/resolv.conf",
            "printf '# a file of its own mount\\n' > /run/res/mounted; mount --bind /run/res/mounted /etc/resolv.conf",
        ] {
            sh(shape);
            let before = dump();
            let state = tempfile::tempdir().unwrap();
            let tun = open_tun(TUN);
            let planned = plan(&options());
            assert!(matches!(planned.dns, DnsPlan::Rewrite { .. }), "{shape}: {:?}", planned.dns);
            let mut applied = planned.apply(Journal::open(state.path()).unwrap()).unwrap();
            assert!(applied.warnings().is_empty(), "{shape}: {:?}", applied.warnings());
            assert!(sh("cat /etc/resolv.conf").contains("nameserver 198.18.0.2"), "{shape}");
            assert_eq!(sh("cat /run/res/stub"), "# none\n");
            applied.revert().unwrap();
            drop(tun);
            assert_same(&before, &dump());
        }
        sh("umount /etc/resolv.conf");
    });
}

#[test]
fn resolver_settings_that_cannot_be_written_cost_a_warning_that_names_them() {
    run(&[NODE], || {
        build("");
        sh("mount -o remount,bind,ro /etc");
        let before = dump();
        let state = tempfile::tempdir().unwrap();
        let tun = open_tun(TUN);
        let mut applied = plan(&options()).apply(Journal::open(state.path()).unwrap()).unwrap();
        let [warning] = applied.warnings() else { panic!("{:?}", applied.warnings()) };
        assert!(warning.contains("/etc/resolv.conf") && warning.contains("read-only"), "{warning}");
        applied.revert().unwrap();
        drop(tun);
        assert_same(&before, &dump());
    });
}

#[test]
fn resolver_settings_that_somebody_replaced_meanwhile_stay() {
    run(&[NODE], || {
        build("");
        let state = tempfile::tempdir().unwrap();
        let _tun = open_tun(TUN);
        let mut applied = plan(&options()).apply(Journal::open(state.path()).unwrap()).unwrap();
        std::fs::remove_file("/etc/resolv.conf").unwrap();
        symlink("/run/other", "/etc/resolv.conf").unwrap();
        assert_eq!(applied.missing().unwrap().len(), 1);
        applied.revert().unwrap();
        assert_eq!(sh("readlink /etc/resolv.conf"), "/run/other\n");
    });
}

/// How many moments are tried: `TUNPROXY_KILLS`, by hand, for more than a run of all tests can hold.
fn kills() -> u32 {
    std::env::var("TUNPROXY_KILLS").ok().and_then(|text| text.parse().ok()).unwrap_or(25)
}

#[test]
fn after_kill_9_at_any_moment_a_cleanup_puts_the_host_back() {
    run(&[NODE], || {
        build(LINK_LOCAL);
        add_foreigners();
        // Whoever the victim leaves behind becomes our child, so that we can wait for it.
        prctl::set_child_subreaper(true).unwrap();
        let state = tempfile::tempdir().unwrap();
        let before = dump();
        let (mut put_back, mut seed) = (0, std::process::id());
        for _ in 0..kills() {
            let mut victim = Command::new(std::env::current_exe().unwrap())
                .args(["undone::the_victim_of_kill_9", "--exact", "--ignored"])
                .env(VICTIM, state.path())
                .stdout(Stdio::null())
                .spawn()
                .unwrap();
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            // Chance picks the moment: this is no wait for anything.
            std::thread::sleep(Duration::from_micros(u64::from(seed >> 8) % 120_000));
            victim.kill().unwrap();
            victim.wait().unwrap();
            while waitpid(None, None).is_ok() {}
            put_back += usize::from(!cleanup(state.path(), false).unwrap().restored.is_empty());
            assert_same(&before, &dump());
            assert_eq!(cleanup(state.path(), false).unwrap().restored.len(), 0);
        }
        assert!(put_back > 0, "no kill met a run with changes in place");
    });
}

#[test]
fn kill_9_alone_leaves_a_host_on_its_own_routes() {
    run(&[NODE], || {
        build(ORDINARY);
        prctl::set_child_subreaper(true).unwrap();
        let state = tempfile::tempdir().unwrap();
        let everywhere = ["203.0.113.77", "2001:db8:9::9", "10.9.9.9", "203.0.113.9 ipproto udp dport 53"];
        let mut victim = Command::new(std::env::current_exe().unwrap())
            .args(["undone::the_victim_of_kill_9", "--exact", "--ignored", "--nocapture"])
            .env(VICTIM, state.path())
            .env(PARKED, "1")
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(victim.stdout.take().unwrap()).lines();
        let parked = lines.any(|line| line.unwrap().contains(PARKED));
        let before = everywhere.map(device);
        let busy = cleanup(state.path(), false).unwrap_err().to_string();
        victim.kill().unwrap();
        victim.wait().unwrap();
        while waitpid(None, None).is_ok() {}
        assert!(parked, "the victim came to nothing");
        assert_eq!(before, everywhere.map(|_| TUN.to_owned()));
        assert!(busy.contains(&format!("process {}", victim.id())), "{busy}");
        assert_eq!(everywhere.map(device), everywhere.map(|_| "eth0".to_owned()));
        assert!(sh("nft list ruleset").is_empty());
        assert!(!cleanup(state.path(), false).unwrap().restored.is_empty());
    });
}

/// Runs the victim until it has applied and waits, and kills it.
pub(crate) fn kill_parked(state: &Path) {
    let mut victim = Command::new(std::env::current_exe().expect("our own path"))
        .args(["undone::the_victim_of_kill_9", "--exact", "--ignored", "--nocapture"])
        .env(VICTIM, state)
        .env(PARKED, "1")
        .stdout(Stdio::piped())
        .spawn()
        .expect("the victim");
    let mut lines = BufReader::new(victim.stdout.take().expect("piped")).lines();
    let parked = lines.any(|line| line.is_ok_and(|line| line.contains(PARKED)));
    victim.kill().expect("a running victim");
    victim.wait().expect("its end");
    // And that of the nft it has left behind, which is ours now: we are process 1.
    while waitpid(None, None).is_ok() {}
    assert!(parked, "the victim came to nothing");
}

#[test]
fn from_another_network_namespace_nothing_is_forgotten() {
    run(&[NODE], || {
        build(LINK_LOCAL);
        let before = dump();
        let state = tempfile::tempdir().unwrap();
        kill_parked(state.path());
        let (path, crashed) = (state.path().to_owned(), dump());
        let refused = within("lan", move || {
            let start = Journal::open(&path).unwrap().replay().unwrap_err().to_string();
            (start, cleanup(&path, false).unwrap_err().to_string())
        });
        for said in [refused.0, refused.1] {
            assert!(said.contains("another network namespace (net:[") && said.contains("--namespace-gone"), "{said}");
        }
        assert_same(&crashed, &dump());
        assert!(!cleanup(state.path(), false).unwrap().restored.is_empty(), "the journal was kept");
        assert_same(&before, &dump());
    });
}

#[test]
fn a_namespace_that_is_said_to_be_gone_leaves_only_files_to_be_put_back() {
    run(&[NODE], || {
        build(LINK_LOCAL);
        let state = tempfile::tempdir().unwrap();
        kill_parked(state.path());
        let path = state.path().to_owned();
        let report = within("lan", move || cleanup(&path, true).unwrap());
        assert_eq!(report.restored, ["put /etc/resolv.conf back"]);
        assert!(report.died > 0, "{report}");
        assert_eq!(sh("cat /etc/resolv.conf"), LINK_LOCAL);
        assert!(Journal::open(state.path()).unwrap().is_clean());
    });
}

#[test]
fn where_ipv6_cannot_be_switched_on_for_the_tun_the_rest_works_without() {
    run(&[NODE], || {
        build(LINK_LOCAL);
        sh("echo 1 > /proc/sys/net/ipv6/conf/default/disable_ipv6
            mount --bind /proc/sys /proc/sys; mount -o remount,bind,ro /proc/sys");
        let before = dump();
        let state = tempfile::tempdir().unwrap();
        let tun = open_tun(TUN);
        let mut survey = Survey::take().unwrap();
        let warning = survey.settle_ipv6(TUN, false).unwrap();
        assert!(warning.contains("disable_ipv6") && !warning.contains("setcap"), "{warning}");
        let planned = HostPlan::new(&options(), &survey).unwrap();
        let mut applied = planned.apply(Journal::open(state.path()).unwrap()).unwrap();
        assert!(applied.warnings().iter().all(|warning| !warning.contains("IPv6")), "{:?}", applied.warnings());
        assert_eq!(applied.missing().unwrap(), []);
        // Nobody would answer there; so it goes where it went before, and is not dropped on the way.
        serve("net", "NET", "[2001:db8:9::9]:53");
        assert_eq!(ask("", "[2001:db8:9::9]:53"), "NET");
        assert_eq!(device("203.0.113.77"), TUN);
        assert!(!sh("ip -6 rule").contains("9043:"));
        assert!(!sh("cat /etc/resolv.conf").contains("fdfe:"));
        applied.revert().unwrap();
        drop(tun);
        assert_same(&before, &dump());
    });
}

#[test]
fn a_running_resolved_is_told_and_forgets() {
    run(&[NODE], || {
        build("nameserver 127.0.0.53\n");
        // A stand-in for the real one, which notes what it is told.
        sh("mount -t tmpfs none /usr/local/bin; mkdir -p /run/systemd/resolve
            printf '#!/bin/sh\\necho \"$@\" >> /run/told\\n' > /usr/local/bin/resolvectl; chmod +x /usr/local/bin/resolvectl");
        let state = tempfile::tempdir().unwrap();
        let _tun = open_tun(TUN);
        let mut applied = plan(&options()).apply(Journal::open(state.path()).unwrap()).unwrap();
        assert!(applied.warnings().is_empty(), "{:?}", applied.warnings());
        let told = "dns tun7 198.18.0.2 fdfe:dcba:9877::2\ndomain tun7 ~.\ndefault-route tun7 yes\n";
        assert_eq!(sh("cat /run/told"), told);
        assert_eq!(sh("cat /etc/resolv.conf"), "nameserver 127.0.0.53\n");
        applied.revert().unwrap();
        assert_eq!(sh("tail -n 1 /run/told"), "revert tun7\n");
    });
}

#[test]
#[ignore = "run by the test of kill -9, which kills it"]
fn the_victim_of_kill_9() {
    let Some(state) = std::env::var_os(VICTIM) else { return };
    let _tun = open_tun(TUN);
    if std::env::var_os(PARKED).is_some() {
        let _applied = plan(&gateway()).apply(Journal::open(state.as_ref()).unwrap()).unwrap();
        println!("{PARKED}");
        loop {
            std::thread::park();
        }
    }
    loop {
        plan(&gateway()).apply(Journal::open(state.as_ref()).unwrap()).unwrap().revert().unwrap();
    }
}

#[test]
fn wishes_for_free_numbers_are_granted() {
    run(&[NODE], || {
        build(ORDINARY);
        let state = tempfile::tempdir().unwrap();
        let _tun = open_tun(TUN);
        let wishes = Wishes { first_priority: Some(7000), table: Some(300), mark: None };
        let mut applied =
            plan(&HostOptions { wishes, ..options() }).apply(Journal::open(state.path()).unwrap()).unwrap();
        assert!(sh("ip rule").contains("7043:\tfrom all lookup 300"), "{}", sh("ip rule"));
        assert!(sh("ip route show table 300").contains("default dev tun7"));
        applied.revert().unwrap();
    });
}
