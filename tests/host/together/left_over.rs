//! Two runs of which one leaves something to the other: each has the names and the flows that are its own.

use std::time::Duration;

use super::TUN;
use super::end;
use super::side_by_side::{APART, Held, USUAL, place};
use super::without_nft::WithoutNft;
use crate::neighbours::act_as;
use crate::support::sites::{NAME, V4, V6};
use crate::support::topology::{CLIENT_V4, CLIENT_V6, HOST_LAN_V4, HOST_LAN_V6};
use crate::support::tunproxy::{Said, Tunproxy};
use crate::support::{Dump, Netns, Sites, Topology, client, run, world};

/// Has `test` done with nftables and without.
fn with_and_without_nft(lab: impl Fn() -> Topology, test: impl Fn(&Topology)) {
    for hidden in [false, true] {
        let lab = lab();
        let _sites = Sites::open(&lab);
        let before = Dump::take(&lab.host);
        let hidden = hidden.then(WithoutNft::hide);
        test(&lab);
        if let Some(hidden) = hidden {
            hidden.assert_was_hidden(&lab.host);
        }
        before.assert_same(&Dump::take(&lab.host));
    }
}

/// Waits until the run that stands first lets pass what the other's TUN brings: it looks at the host a moment after that has
/// started, and its rules are the sign that it has.
fn wait_until_known(host: &Netns, tun: &str) {
    let rule = format!("iif {tun} goto");
    // In the block of each, in both families.
    let known = || ["-4 rule", "-6 rule"].iter().all(|list| host.ip(list).matches(&rule).count() == 2).then_some(());
    world::poll_until(Duration::from_secs(20), known).unwrap_or_else(|| panic!("{}", host.ip("-4 rule")));
}

/// Does each act, and holds that `taking` carried it.
fn assert_carried(taking: &Tunproxy, other: &Tunproxy, act: impl Fn(&str) -> client::Outcome) {
    let seen = other.output().matches("INFO flow:").count();
    for site in [V4, V6] {
        let words = format!("destination={site}:7001 ");
        let (said, _) = taking.line_after(|| act(&format!("ask {site}:7001 words")), &[&words]);
        assert_eq!(said.as_deref(), Ok("words"), "{}", taking.output());
        assert_eq!(act(&format!("datagram {site}:7 words")).as_deref(), Ok("words"), "{}", taking.output());
    }
    assert_eq!(other.output().matches("INFO flow:").count(), seen, "{}", other.output());
}

fn answer_as(host: &Netns, uid: u32) -> String {
    let mut dig = host.command("setpriv");
    dig.args(["--reuid", &uid.to_string(), "--clear-groups", "dig", "+short", "+tries=1", "+timeout=10", NAME, "A"]);
    Said::of(&mut dig).stdout
}

#[test]
fn whom_the_first_leaves_out_the_second_takes_names_and_flows() {
    run(&[TUN, "dig", "setpriv"], || {
        with_and_without_nft(Topology::desktop, |lab| {
            let first = place("tun1", USUAL, ", exclude-uid: [1000]").start(&lab.host);
            let second = place("tun2", APART, "").start(&lab.host);
            wait_until_known(&lab.host, "tun2");
            for (uid, taking, other, ranges) in
                [(0, &first, &second, USUAL), (1000, &second, &first, APART), (0, &first, &second, USUAL)]
            {
                assert!(answer_as(&lab.host, uid).starts_with(&ranges.fake[..7]), "{uid}");
                assert_carried(taking, other, |words| act_as(&lab.host, uid, words));
                assert_eq!(act_as(&lab.host, uid, &format!("ask {NAME}:7 words")).as_deref(), Ok("words"), "{uid}");
            }
            end(first);
            end(second);
        });
    });
}

/// Behind the LAN's client there is a network with public addresses, which no rule of ours knows.
fn with_a_network_behind() -> Topology {
    let lab = Topology::with_lan();
    let client = lab.client();
    for (family, address, by, gateway) in
        [("-4", "192.0.2.77", CLIENT_V4, HOST_LAN_V4), ("-6", "2001:db8:99::77", CLIENT_V6, HOST_LAN_V6)]
    {
        client.ip(&format!("{family} addr add {address} dev lo"));
        lab.host.ip(&format!("{family} route add {address} via {by}"));
        client.ip(&format!("{family} route replace default via {gateway} src {address}"));
    }
    lab
}

#[test]
fn a_network_behind_another_router_gets_what_either_run_writes_to_it() {
    run(&[TUN, "dig"], || {
        with_and_without_nft(with_a_network_behind, |lab| {
            let client = lab.client();
            let first = place("tun1", USUAL, "").start(&lab.host);
            let second = place("tun2", APART, "").start(&lab.host);
            assert_carried(&first, &second, |words| client::act_in(client, words));
            end(first);
            let third = place("tun3", USUAL, ", exclude-interface: [lan0]").start(&lab.host);
            assert_carried(&second, &third, |words| client::act_in(client, words));
            end(second);
            // What the first of them leaves out comes to the one behind it, and what that writes passes the first.
            let last = place("tun4", APART, "").start(&lab.host);
            wait_until_known(&lab.host, "tun4");
            assert_carried(&last, &third, |words| client::act_in(client, words));
            end(third);
            end(last);
        });
    });
}

#[test]
fn where_room_runs_out_the_one_that_stays_moves_down_and_its_flows_and_names_stay() {
    run(&[TUN, "dig"], || {
        with_and_without_nft(Topology::desktop, |lab| {
            let host = &lab.host;
            let at_the_end = |device: &str, ranges, more: &str| {
                place(device, ranges, &format!(", iproute2-rule-index: 32500{more}")).start(host)
            };
            let places = || -> Vec<String> {
                let own = |rule: &&str| rule.contains("iif tun") && rule.contains("goto");
                let rules = host.ip("-4 rule");
                let lines = rules.lines().filter(own).filter_map(|rule| rule.split(':').next());
                lines.filter(|priority| priority.ends_with("02")).map(str::to_owned).collect()
            };
            let first = at_the_end("tun1", USUAL, &format!(", route-exclude-address: [{V4}/32]"));
            let mut second = at_the_end("tun2", APART, "");
            assert_eq!(places(), ["32502", "32602"]);
            let mut held = Held::open(host, &format!("{V4}:7"));
            end(first);
            for number in 3..6 {
                second.line("ours move from priority 32600 to 32500");
                held.assert_answers();
                assert_eq!(places(), ["32502"]);
                let third = at_the_end(&format!("tun{number}"), if number % 2 == 0 { APART } else { USUAL }, "");
                assert_eq!(places(), ["32502", "32602"]);
                assert_carried(&second, &third, |words| client::act_in(host, words));
                held.assert_answers();
                end(second);
                assert!(client::act_in(host, &format!("ask {NAME}:7 words")).is_ok());
                held = Held::open(host, &format!("{V4}:7"));
                second = third;
            }
            end(second);
        });
    });
}
