//! That the host is as it was is said only after a second look, which sees what is not.

use tunproxy::platform::{HostOptions, Journal};

use crate::host::{NODE, TUN, assert_same, build, dump, open_tun, options, plan};
use crate::sandbox::sh;
use crate::support::run;
use crate::undone::LINK_LOCAL;

fn gateway(kill_switch: bool) -> HostOptions {
    let route_exclude = vec!["203.0.113.0/28".parse().expect("a prefix")];
    HostOptions { auto_forward: true, kill_switch, route_exclude, ..options() }
}

#[test]
fn a_second_look_finds_nothing_where_all_was_undone() {
    run(&[NODE], || {
        build(LINK_LOCAL);
        let before = dump();
        for kill_switch in [false, true] {
            let state = tempfile::tempdir().unwrap();
            let tun = open_tun(TUN);
            let mut applied = plan(&gateway(kill_switch)).apply(Journal::open(state.path()).unwrap()).unwrap();
            applied.release().unwrap();
            applied.revert().unwrap();
            drop(tun);
            let proof = applied.prove().unwrap();
            assert_eq!((proof.left, proof.still), (0, Vec::new()));
            assert!(proof.undone > 40, "{}", proof.undone);
            assert_same(&before, &dump());
        }
    });
}

#[test]
fn a_second_look_names_whatever_is_in_place_all_the_same() {
    run(&[NODE], || {
        build(LINK_LOCAL);
        let after = |kill_switch: bool, change: &str| {
            let state = tempfile::tempdir().unwrap();
            let tun = open_tun(TUN);
            let mut applied = plan(&gateway(kill_switch)).apply(Journal::open(state.path()).unwrap()).unwrap();
            applied.revert().unwrap();
            drop(tun);
            sh(change);
            applied.prove().unwrap().still
        };
        for (kill_switch, change, undo, words) in [
            (
                false,
                "ip rule add priority 9043 lookup 2022 protocol kernel",
                "ip rule del priority 9043",
                "delete rule -4 priority 9043",
            ),
            (
                false,
                "ip route add throw 203.0.113.0/28 table 2022 proto kernel metric 1024",
                "ip route flush table 2022",
                "delete route throw 203.0.113.0/28",
            ),
            (false, "sysctl -qw net.ipv4.ip_forward=1", "sysctl -qw net.ipv4.ip_forward=0", "set net/ipv4/ip_forward"),
            (
                true,
                "nft 'add table inet tunproxy { comment \"kill switch of tun7\"; }'",
                "nft delete table inet tunproxy",
                "delete the firewall table tunproxy",
            ),
        ] {
            let still = after(kill_switch, change);
            sh(undo);
            assert!(still.iter().any(|line| line.contains(words)), "{words} in {still:?}");
        }
        assert_eq!(after(false, "true"), [""; 0]);
        // Ours went with its owner: whoever has made one of that name since is another run.
        assert_eq!(after(false, "nft add table inet tunproxy"), [""; 0]);
    });
}
