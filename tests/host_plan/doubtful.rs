//! Changes that fail half way, and changes of others that take away half of ours: what is in place is undone, what is not is
//! forgotten, and what is half there counts as not there.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use tunproxy::platform::{
    Family, HostOptions, Journal, Netlink, NftState, Seen, Step, Survey, Turn, cleanup, cleanup_closed,
};

use crate::host::{NODE, TUN, assert_same, build, dump, open_tun, options, plan};
use crate::sandbox::sh;
use crate::support::run;
use crate::undone::{ORDINARY, kill_parked};

/// Which process the holder is to hold.
const HELD: &str = "TUNPROXY_TEST_HELD";
/// How long it does. Whoever waits for the end of the held one waits for as long.
const HOLD: Duration = Duration::from_secs(40);

fn closed() -> HostOptions {
    HostOptions { kill_switch: true, ..options() }
}

/// Has `script` stand in for nft, which it finds at $REAL, until `umount` of the returned path.
fn stand_in(dir: &Path, script: &str) -> String {
    let nft = sh("readlink -f $(command -v nft)").trim().to_owned();
    let (real, file) = (dir.join("real"), dir.join("stand-in"));
    fs::copy(&nft, &real).expect("the real one elsewhere");
    fs::write(&file, format!("#!/bin/sh\nREAL={}\n{script}\n", real.display())).expect("a script");
    fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).expect("its mode");
    mount(Some(&file), nft.as_str(), None::<&str>, MsFlags::MS_BIND, None::<&str>).expect("a stand-in");
    nft
}

#[test]
fn a_kill_switch_that_nft_loads_in_part_or_without_its_comment_is_taken_down_again() {
    run(&[NODE, "nft"], || {
        build(ORDINARY);
        let before = dump();
        for edit in ["/fib daddr type multicast return/d", "s/comment \"[^\"]*\";//"] {
            let (state, bin) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
            let tun = open_tun(TUN);
            let planned = plan(&closed());
            let script =
                format!("if [ \"$*\" = '--file -' ]; then sed '{edit}' | $REAL \"$@\"; else exec $REAL \"$@\"; fi");
            let nft = stand_in(bin.path(), &script);
            let error = planned.apply(Journal::open(state.path()).unwrap()).unwrap_err().to_string();
            umount2(nft.as_str(), MntFlags::MNT_DETACH).unwrap();
            assert!(error.contains("loaded it in part only"), "{edit}: {error}");
            drop(tun);
            assert_same(&before, &dump());
            assert!(Journal::open(state.path()).unwrap().is_clean());
        }
    });
}

#[test]
fn a_kill_switch_whose_loading_nobody_saw_the_end_of_is_taken_down_again() {
    run(&[NODE, "nft"], || {
        build(ORDINARY);
        let before = dump();
        let (state, bin) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let tun = open_tun(TUN);
        let planned = plan(&closed());
        // It does its work, and then says that it has not.
        let once = bin.path().join("once");
        let script = format!("$REAL \"$@\" || exit 1; [ -e {0} ] || {{ : > {0}; exit 1; }}", once.display());
        let nft = stand_in(bin.path(), &script);
        assert!(planned.apply(Journal::open(state.path()).unwrap()).is_err());
        umount2(nft.as_str(), MntFlags::MNT_DETACH).unwrap();
        drop(tun);
        assert_same(&before, &dump());
        assert!(Journal::open(state.path()).unwrap().is_clean());
    });
}

#[test]
fn what_a_clean_up_has_undone_is_forgotten_even_where_something_is_left() {
    run(&[NODE], || {
        build(ORDINARY);
        let before = dump();
        let state = tempfile::tempdir().unwrap();
        kill_parked(state.path());
        // A parameter that nobody can put back.
        let path = "/proc/sys/net/ipv4/ip_forward";
        sh(&format!("mount --bind {path} {path}; mount -o remount,bind,ro {path}"));
        let error = cleanup(state.path(), false).unwrap_err().to_string();
        assert!(error.contains("ip_forward"), "{error}");
        assert_eq!(Journal::open(state.path()).unwrap().rules(), [], "they are gone, and may be another's by now");
        // What another makes in the same place is not touched by the next attempt.
        sh("ip rule add priority 9043 lookup 2022 protocol kernel");
        cleanup(state.path(), false).unwrap_err();
        assert!(sh("ip rule").contains("9043:"), "{}", sh("ip rule"));
        sh(&format!("ip rule del priority 9043; umount {path}"));
        assert_eq!(cleanup(state.path(), false).unwrap().restored.len(), 1);
        assert_same(&before, &dump());
    });
}

#[test]
fn a_kill_switch_that_is_switched_off_as_a_whole_is_not_in_force() {
    run(&[NODE, "nft"], || {
        build(ORDINARY);
        let before = dump();
        let state = tempfile::tempdir().unwrap();
        let tun = open_tun(TUN);
        let planned = plan(&closed());
        let mut applied = planned.clone().apply(Journal::open(state.path()).unwrap()).unwrap();
        assert!(applied.plan().is_closed().unwrap());
        let switch_off = "nft 'add table inet tunproxy { flags dormant; }'";
        sh(switch_off);
        assert!(sh("nft list table inet tunproxy").contains("flags dormant"));
        assert_eq!(applied.missing().unwrap(), [Step::Firewall]);
        assert!(!applied.plan().is_closed().unwrap());
        let settled = applied.settle(&closed(), Seen::EVERYTHING).unwrap();
        assert_eq!((settled.restored, settled.failed), (vec![Step::Firewall], Vec::new()));
        assert!(!sh("nft list ruleset").contains("dormant"));
        // The same of one that a crash left.
        drop(applied);
        drop(tun);
        assert!(!cleanup_closed(state.path(), false).unwrap().found_open);
        sh(switch_off);
        assert!(cleanup_closed(state.path(), false).unwrap().found_open);
        cleanup(state.path(), false).unwrap();
        assert_same(&before, &dump());
    });
}

#[test]
fn a_kill_switch_is_loaded_again_though_the_journal_cannot_be_written() {
    run(&[NODE, "nft"], || {
        build(ORDINARY);
        let before = dump();
        let dir = tempfile::tempdir().unwrap();
        // A file system of its own, that can be filled.
        sh(&format!("mount -t tmpfs -o size=256k none {}", dir.path().display()));
        let tun = open_tun(TUN);
        let mut applied = plan(&closed()).apply(Journal::open(dir.path()).unwrap()).unwrap();
        let journalled = sh(&format!("wc -c < {}/journal", dir.path().display())).trim().to_owned();
        // A network that is new asks for a change that outlives us.
        sh("ip link add lan1 type veth peer name lan1p; ip link set lan1 up; ip addr add 10.77.0.1/24 dev lan1
            nft delete table inet tunproxy");
        sh(&format!("cat /dev/zero > {}/full 2>&1 || true", dir.path().display()));
        // More than what is left of the journal's last page.
        let route_exclude = (0..60).map(|at| format!("203.0.113.{}/32", at * 4 + 1).parse().unwrap()).collect();
        let with_new = HostOptions { route_exclude, ..closed() };
        let settled = applied.settle(&with_new, Seen::EVERYTHING);
        assert!(sh("nft list ruleset").contains("kill switch of tun7"), "{settled:?}");
        let settled = settled.unwrap();
        assert!(settled.failed.iter().any(|failed| failed.contains("journal")), "{settled:?}");
        assert!(settled.restored.contains(&Step::Firewall), "{settled:?}");
        assert!(!sh("ip route show table all").contains("203.0.113.129"), "it could not be recorded");
        // With room again, the rest follows.
        sh(&format!("rm {}/full", dir.path().display()));
        let settled = applied.settle(&with_new, Seen::EVERYTHING).unwrap();
        assert_eq!(settled.failed, [""; 0]);
        assert!(sh("ip route show table all").contains("203.0.113.129"));
        assert_ne!(sh(&format!("wc -c < {}/journal", dir.path().display())).trim(), journalled);
        applied.revert().unwrap();
        drop((tun, applied));
        sh(&format!("ip link del lan1; umount {}", dir.path().display()));
        assert_same(&before, &dump());
    });
}

#[test]
fn a_stop_does_not_wait_for_an_owner_of_the_table_that_is_held_up() {
    run(&[NODE, "nft"], || {
        build(ORDINARY);
        let before = dump();
        let state = tempfile::tempdir().unwrap();
        let tun = open_tun(TUN);
        let mut applied = plan(&options()).apply(Journal::open(state.path()).unwrap()).unwrap();
        let owner = sh("pgrep -x nft").trim().to_owned();
        let mut holder = holder(&owner);
        let begun = Instant::now();
        applied.revert().unwrap();
        drop(tun);
        assert!(begun.elapsed() < HOLD / 2, "{:?}", begun.elapsed());
        holder.kill().unwrap();
        holder.wait().unwrap();
        assert_same(&before, &dump());
    });
}

/// Starts a process that keeps the end of `pid` from those who wait for it: a traced process is its tracer's to bury.
fn holder(pid: &str) -> Child {
    let mut holder = Command::new(std::env::current_exe().expect("our own path"))
        .args(["doubtful::the_holder_of_a_process", "--exact", "--ignored", "--nocapture"])
        .env(HELD, pid)
        .stdout(Stdio::piped())
        .spawn()
        .expect("a holder");
    let output = std::io::BufReader::new(holder.stdout.take().expect("piped"));
    let holds = std::io::BufRead::lines(output).any(|line| line.is_ok_and(|line| line.contains(HELD)));
    assert!(holds, "nobody holds it");
    holder
}

#[test]
#[ignore = "run by the test of a stop"]
fn the_holder_of_a_process() {
    let Some(held) = std::env::var(HELD).ok().and_then(|pid| pid.parse::<libc::pid_t>().ok()) else { return };
    // SAFETY: ptrace(2) takes no memory of ours with this request.
    let seized = unsafe { libc::ptrace(libc::PTRACE_SEIZE, held, 0, 0) };
    assert_eq!(seized, 0, "{}", std::io::Error::last_os_error());
    println!("{HELD}");
    std::thread::sleep(HOLD);
}

#[test]
fn rules_that_move_wait_for_a_run_that_is_about_to_start_and_keep_off_what_it_took() {
    run(&[NODE], || {
        build(ORDINARY);
        let before = dump();
        let state = tempfile::tempdir().unwrap();
        let tun = open_tun(TUN);
        let mut applied = plan(&options()).apply(Journal::open(state.path()).unwrap()).unwrap();
        sh("ip link add wg0 type veth peer name wgp; ip link set wg0 up; ip route add default dev wg0 table 51820
            ip rule add priority 8950 not fwmark 0xca6c lookup 51820");
        let turn = Turn::wait();
        assert!(turn.is_ours());
        let (told, heard) = mpsc::channel();
        let mover = std::thread::spawn(move || {
            let settled = applied.settle(&options(), Seen::default());
            told.send(applied.plan().numbers.first_priority).unwrap();
            (applied, settled)
        });
        assert!(heard.recv_timeout(Duration::from_millis(300)).is_err(), "it waits");
        // What the start makes in the place that was free.
        sh("for at in 8800 8802 8843; do ip rule add priority $at nop protocol kernel; done");
        drop(turn);
        let (mut applied, settled) = mover.join().unwrap();
        assert_eq!(settled.unwrap().failed, [""; 0]);
        assert_eq!(heard.recv().unwrap(), 8700);
        applied.revert().unwrap();
        drop((tun, applied));
        sh("for at in 8800 8802 8843; do ip rule del priority $at; done; ip rule del priority 8950; ip link del wg0");
        assert_same(&before, &dump());
    });
}

#[test]
fn a_look_at_a_changed_firewall_does_not_read_all_of_its_rules() {
    run(&[NODE, "nft"], || {
        build(ORDINARY);
        let state = tempfile::tempdir().unwrap();
        let _tun = open_tun(TUN);
        let mut applied = plan(&options()).apply(Journal::open(state.path()).unwrap()).unwrap();
        let rules = state.path().join("rules");
        let rule = "add rule inet many c ip saddr 10.1.2.3 tcp dport 22 meta mark & 0x100 == 0x100 counter\n";
        sh("nft 'add table inet many; add chain inet many c'");
        // What one message may hold is bounded.
        fs::write(&rules, rule.repeat(250)).unwrap();
        sh(&format!("for _ in $(seq 40); do nft -f {}; done", rules.display()));
        let (whole, bits) = spent(|| match Survey::take().unwrap().nft {
            NftState::Present { mark_bits, .. } => mark_bits,
            NftState::Missing(why) => panic!("{why}"),
        });
        assert_eq!(bits & 0x100, 0x100, "a start reads them");
        let (again, _) = spent(|| applied.settle(&options(), Seen::EVERYTHING).unwrap());
        assert!(again < whole / 2, "{again:?} of {whole:?}");
        applied.revert().unwrap();
    });
}

#[test]
fn a_bridge_that_drops_between_its_ports_drops_nothing_that_this_host_forwards() {
    run(&["nft"], || {
        let dropping = || match Survey::take().unwrap().nft {
            NftState::Present { dropping_forward, .. } => dropping_forward,
            NftState::Missing(why) => panic!("{why}"),
        };
        let chain = "{ chain f { type filter hook forward priority 0; policy drop; }; }";
        sh(&format!("nft 'add table bridge b {chain}'"));
        assert_eq!(dropping(), [""; 0]);
        for family in ["ip", "ip6", "inet"] {
            sh(&format!("nft 'add table {family} t {chain}'"));
            assert_eq!(dropping(), [format!("{family} t f")]);
            sh(&format!("nft delete table {family} t"));
        }
    });
}

#[test]
fn a_neighbour_that_is_verified_stays_what_somebody_said_it_is() {
    run(&[], || {
        sh("ip link add eth0 type veth peer name far; ip link set eth0 up; ip link set far up
            ip addr add 192.0.2.2/24 dev eth0; ip addr add 2001:db8:1::2/64 dev eth0 nodad
            ip route add default via 192.0.2.1
            ip neigh add 192.0.2.1 lladdr 02:00:00:00:00:01 dev eth0 nud stale extern_learn
            ip -6 neigh add 2001:db8:1::1 lladdr 02:00:00:00:00:01 dev eth0 nud stale router
            ip -6 route add default via 2001:db8:1::1 dev eth0");
        let mut netlink = Netlink::open().unwrap();
        for (family, flag) in [(Family::V4, "extern_learn"), (Family::V6, "router")] {
            let (gateways, direct) = netlink.default_ways(family).unwrap();
            assert_eq!((gateways.len(), direct.len()), (1, 0));
            assert!(sh("ip neigh").contains(flag));
            netlink.verify_neighbour(&gateways[0]).unwrap();
            let found = sh("ip neigh");
            let line = found.lines().find(|line| line.contains(&gateways[0].address.to_string())).unwrap_or(&found);
            assert!(line.contains(flag) && !line.contains("STALE"), "{found}");
        }
    });
}

/// The time that this thread has spent in `act`, whatever else the machine does.
fn spent<T>(act: impl FnOnce() -> T) -> (Duration, T) {
    let now = || {
        let usage = nix::sys::resource::getrusage(nix::sys::resource::UsageWho::RUSAGE_THREAD).expect("of a thread");
        let of = |time: nix::sys::time::TimeVal| {
            Duration::from_micros(u64::try_from(time.tv_sec() * 1_000_000 + time.tv_usec()).expect("a time"))
        };
        of(usage.user_time()) + of(usage.system_time())
    };
    let begun = now();
    let result = act();
    (now() - begun, result)
}
