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

#[test]
fn marks_are_found_in_what_sets_and_maps_concatenate_and_in_ranges() {
    run(&["nft"], || {
        each_touches(
            "nft 'table ip t { LINE; chain c { type filter hook output priority 0; }; }'",
            "nft delete table ip t",
            &[
                ("set s { type mark . ipv4_addr; elements = { 0x1000000 . 10.1.2.3 }; }", 0x100_0000),
                ("set s { type ipv4_addr . mark; elements = { 10.1.2.3 . 0x2000000, 10.1.2.4 . 0x20 }; }", 0x200_0020),
                ("set s { type ipv4_addr . inet_service; elements = { 10.1.2.3 . 80 }; }", 0),
                ("set s { type ipv6_addr . mark . inet_service; elements = { 2001:db8::1 . 0x400 . 80 }; }", 0x400),
                ("set s { type ether_addr . mark; elements = { 02:00:00:00:00:01 . 0x4000 }; }", 0x4000),
                ("set s { type ifname . mark; elements = { eth0 . 0x8000 }; }", 0x8000),
                ("set s { typeof ct mark . meta mark; elements = { 0x10 . 0x200 }; }", 0x210),
                ("set s { type mark . ipv4_addr; flags interval; elements = { 0x10-0x1f . 10.0.0.0/8 }; }", 0x1f),
                ("set s { type ipv4_addr . mark; flags interval; elements = { 10.0.0.0/8 . 0x40 }; }", 0x40),
                ("set s { type mark; flags interval; elements = { 0x1000000-0xfffffff, 0x80 }; }", 0x0fff_ffff),
                ("set s { type mark; flags interval; elements = { 0xffff0000-0xffffffff }; }", 0xffff_0000),
                ("map m { type mark . ipv4_addr : verdict; elements = { 0x800 . 10.1.2.3 : accept }; }", 0x800),
                ("map m { type ipv4_addr . inet_service : mark; elements = { 10.1.2.3 . 80 : 0x2000 }; }", 0x2000),
                ("map m { type mark . ipv4_addr : mark; elements = { 0x1 . 10.1.2.3 : 0x8 }; }", 9),
                ("map m { typeof meta l4proto . ct mark : verdict; elements = { tcp . 0x77 : drop }; }", 0x77),
            ],
        );
        each_touches(
            "nft 'table ip t { chain c { type filter hook output priority 0; LINE; }; }'",
            "nft delete table ip t",
            &[
                ("meta mark . ip saddr { 0x1000000 . 10.1.2.3 } accept", 0x100_0000),
                ("ip saddr . ct mark vmap { 10.1.2.3 . 0x2000000 : accept }", 0x200_0000),
                ("meta mark set ip saddr . meta mark map { 10.1.2.3 . 0x4 : 0x40 }", 0x44),
                ("ct mark set meta mark . tcp dport map { 0x100 . 80 : 0x8000 }", 0x8100),
                ("meta mark & 0xff00 . ip saddr { 0x100 . 10.1.2.3 } accept", 0xff00),
                ("ip saddr . meta mark & 0xfffff0 { 10.1.2.3 . 0x10 } accept", 0xff_fff0),
                ("meta mark 0x1000000-0xfffffff accept", 0x0fff_ffff),
                ("meta mark { 0x1000000-0xfffffff } accept", 0x0fff_ffff),
                ("socket mark 0x20000 accept", 0x2_0000),
                (
                    "iifname . ip saddr . tcp dport . ct mark . meta mark { lo . 10.1.2.3 . 1 . 0x20 . 0x10 } accept",
                    0x30,
                ),
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
