//! Bits of marks that the firewalls of others touch, in whatever way they are written: none of ours is among them.

use tunproxy::platform::{NftState, Survey, Wishes};

use crate::sandbox::sh;
use crate::support::run;

/// Those that a survey finds in the firewall.
fn found() -> u32 {
    let survey = Survey::take().expect("a kernel that answers");
    let NftState::Present { mark_bits, .. } = survey.nft else { panic!("{:?}", survey.nft) };
    mark_bits | survey.other_marks
}

/// What each line touches, loaded by itself.
fn each_touches(load: &str, unload: &str, lines: &[(&str, u32)]) {
    for (line, bits) in lines {
        sh(&load.replace("LINE", line));
        assert_eq!(found(), *bits, "{line}: {:#x}", found());
        sh(unload);
        assert_eq!(found(), 0, "{line}");
    }
}

#[test]
fn marks_are_found_in_every_kind_of_rule_of_nftables() {
    run(&["nft"], || {
        each_touches(
            "nft 'table ip t { set s { type mark; elements = { 0x400 }; }; \
             chain c { type filter hook output priority 0; LINE; }; }'",
            "nft delete table ip t",
            // The set is there each time.
            &[
                ("accept", 0x400),
                ("meta mark & 0x4000 == 0x4000 counter drop", 0x4400),
                ("meta mark set meta mark & 0xffffbfff | 0x00080000", 0x84400),
                ("ct mark 0xca6c accept", 0xca6c | 0x400),
                ("ip daddr 10.1.2.3 tcp dport 22 meta mark set 0x1000000", 0x0100_0400),
                ("meta mark 0x2000000 ip saddr 10.1.2.3 accept", 0x0200_0400),
                ("meta mark { 0x10, 0x20 } accept", 0x430),
                ("meta mark vmap { 0x1000 : accept }", 0x1400),
                ("meta mark set ip saddr map { 10.1.2.3 : 0x8000 }", 0x8400),
                ("ct mark set meta mark", 0x400),
                ("meta mark set meta mark ^ 0x200", 0x600),
                ("meta mark 0x10-0x1f accept", 0x41f),
                ("ct mark set ct mark | 0x40000000", 0x4000_0400),
                ("meta skuid 1000 meta priority 0x10001 accept", 0x400),
            ],
        );
    });
}

/// What is the same in both programs.
const OF_IPTABLES: &[(&str, u32)] = &[
    ("-m mark --mark 0x1000000/0x1000000 -j ACCEPT", 0x100_0000),
    ("-p tcp --dport 80 -j MARK --set-xmark 0x40000/0xff0000", 0xff_0000),
    ("-j MARK --set-mark 0x7", 7),
    ("-m connmark --mark 0x2000000/0x2000000 -j ACCEPT", 0x200_0000),
    ("-j CONNMARK --set-xmark 0x3000000/0x3000000", 0x300_0000),
    ("-j CONNMARK --restore-mark --nfmask 0xf0 --ctmask 0xf0", 0xf0),
    ("-d 10.0.0.1 -j ACCEPT", 0),
];

#[test]
fn marks_are_found_in_rules_of_iptables_whichever_kind_it_is() {
    run(&["nft", "iptables-legacy", "iptables-nft"], || {
        for program in ["iptables-nft", "iptables-legacy", "ip6tables-legacy"] {
            let lines =
                OF_IPTABLES.iter().filter(|(line, _)| !(program.starts_with("ip6") && line.contains("10.0.0.1")));
            let lines: Vec<_> = lines.copied().collect();
            each_touches(&format!("{program} -t mangle -A OUTPUT LINE"), &format!("{program} -t mangle -F"), &lines);
        }
    });
}

#[test]
fn a_mark_in_the_way_in_a_table_that_nft_does_not_show_makes_us_pick_another() {
    run(&["nft", "iptables-legacy"], || {
        let numbers = |survey: &Survey| survey.numbers(&Wishes::default()).unwrap();
        let before = numbers(&Survey::take().unwrap());
        sh("iptables-legacy -t mangle -A PREROUTING -j CONNMARK --set-xmark 0x1000000/0x1000000
            ip6tables-legacy -t mangle -A OUTPUT -j MARK --set-xmark 0x2000000/0x2000000");
        assert!(!sh("nft list ruleset").contains("0x01000000"), "it is not nftables' own");
        let after = numbers(&Survey::take().unwrap());
        assert_eq!((before.own.mark, before.capture.mark), (0x100_0000, 0x200_0000));
        assert_eq!((after.own.mark, after.capture.mark), (0x400_0000, 0x800_0000));
    });
}

#[test]
fn to_look_for_the_marks_of_iptables_makes_no_table_of_it() {
    run(&["nft"], || {
        let names = || sh("cat /proc/net/ip_tables_names /proc/net/ip6_tables_names");
        assert_eq!(names(), "");
        Survey::take().unwrap();
        assert_eq!(names(), "");
    });
}
