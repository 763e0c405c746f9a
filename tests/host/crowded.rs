//! A host whose firewall holds hundreds of thousands of addresses that are none of our business.

use std::fmt::Write;
use std::time::{Duration, Instant};

use super::support::tunproxy::{Place, Tunproxy};
use super::support::{Dump, Netns, Topology, run, world};

const TUN: &str = "/dev/net/tun";
/// Addresses in the set, and in a rule by itself.
const MANY: u32 = 200_000;
const SOME: u32 = 2_000;
/// So many get into one transaction of somebody who is not root outside.
const BATCH: u32 = 2_000;
/// To read them all takes seconds and hundreds of megabytes; what we look at takes milliseconds.
const LIMIT: Duration = Duration::from_secs(5);
const MEMORY: u64 = 60 << 20;

fn addresses(numbers: std::ops::Range<u32>) -> String {
    let mut list = String::new();
    for number in numbers {
        // No two are neighbours, so that they do not become one range.
        let _ = write!(list, "{}, ", std::net::Ipv4Addr::from((20 << 24) + number * 2));
    }
    list.trim_end_matches(", ").to_owned()
}

/// Gives the host a firewall such as block lists make it.
fn crowd(host: &Netns) {
    let file = world::fresh_dir("rules").join("many");
    let load = |rules: String| {
        std::fs::write(&file, rules).expect("a file of rules");
        host.run("nft", &["--file", file.to_str().expect("a name")]);
    };
    load(format!(
        "table inet others {{
           set many {{ type ipv4_addr; }};
           chain forward {{ type filter hook forward priority 0; policy drop; ip saddr @many drop; ip daddr {{ {} }} drop; }};
         }};",
        addresses(0..SOME)
    ));
    for first in (0..MANY).step_by(BATCH as usize) {
        load(format!("add element inet others many {{ {} }}", addresses(first..first + BATCH)));
    }
}

fn place(more: &str) -> Place {
    Place::new(&format!(
        "
mode: rule
log-level: info
tun: {{ enable: true, auto-route: true, dns-hijack: ['any:53']{more} }}
dns: {{ enable: true, enhanced-mode: fake-ip, nameserver: [192.168.1.1] }}
rules: ['MATCH,DIRECT']
"
    ))
}

fn timed<T>(what: &str, act: impl FnOnce() -> T) -> T {
    let begun = Instant::now();
    let outcome = act();
    world::measured(&format!("{what} beside {MANY} addresses of others: {} ms", begun.elapsed().as_millis()));
    assert!(begun.elapsed() < LIMIT, "{what}: {:?}", begun.elapsed());
    outcome
}

/// The most memory that a process has had so far, in bytes.
fn most_memory(pid: impl std::fmt::Display) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("a process");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("its memory");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") << 10
}

/// Its children, by their numbers.
fn children(tunproxy: &Tunproxy) -> Vec<String> {
    let pid = tunproxy.pid();
    let of = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    of.split_whitespace().map(str::to_owned).collect()
}

fn nothing_of_it_is_read(more: &str) {
    let lab = Topology::desktop();
    let before = Dump::take(&lab.host);
    crowd(&lab.host);
    let place = place(more);
    let tunproxy = timed("a start", || place.start(&lab.host));
    // A change of theirs, and one of ours by which it is seen that it was looked at.
    timed("putting back a rule", || {
        lab.host.nft("add rule inet others forward accept");
        tunproxy.line_after(|| lab.host.ip("rule del priority 9005 to 198.18.0.0/16"), &["it is back"])
    });
    for pid in children(&tunproxy).into_iter().chain([tunproxy.pid().to_string()]) {
        let most = most_memory(&pid);
        world::measured(&format!("process {pid}: {} MB at most", most >> 20));
        assert!(most < MEMORY, "process {pid} has had {most} bytes");
    }
    let said = timed("doctor", || place.look(&lab.host, "doctor", &[]));
    assert!(said.stdout.contains("tunproxy"), "{said:?}");
    timed("a stop", || assert!(tunproxy.stop().success()));
    lab.host.nft("delete table inet others");
    before.assert_same(&Dump::take(&lab.host));
}

#[test]
fn what_a_firewall_of_others_holds_costs_us_nothing() {
    run(&[TUN, "nft"], || nothing_of_it_is_read(""));
}

#[test]
fn what_a_firewall_of_others_holds_costs_a_kill_switch_nothing() {
    run(&[TUN, "nft"], || nothing_of_it_is_read(", kill-switch: true"));
}
