//! Two clients of a gateway that is short of memory: one that takes what it gets, and one that hardly notices.

use std::time::{Duration, Instant};

use super::support::client::{Session, act_in};
use super::support::netns::veth;
use super::support::sites::V4;
use super::support::topology::CLIENT_V4;
use super::support::tunproxy::Place;
use super::support::{Netns, Sites, Topology, run};

const TUN: &str = "/dev/net/tun";
const ADDRESS: &str = "10.8.0.2";

/// A second client, on a link of its own.
pub(super) fn second(lab: &Topology) -> Netns {
    let client = Netns::new("lan2");
    veth(&lab.host, "lan1", &client, "eth0");
    lab.host.address("lan1", &["10.8.0.1/24"]);
    client.address("eth0", &[&format!("{ADDRESS}/24")]);
    client.routes(&["default via 10.8.0.1"]);
    client
}

/// How long it takes to get two megabytes.
fn download(ns: &Netns) -> Result<Duration, String> {
    let start = Instant::now();
    act_in(ns, &format!("down {V4}:9000 2000000")).map(|_| start.elapsed())
}

/// Which part of the time in which it was ready to run it did run, between two readings of its time. What is missing is the
/// machine's: others had its processors.
fn share(before: (Duration, Duration), after: (Duration, Duration)) -> f64 {
    let (run, waited) = (after.0.saturating_sub(before.0), after.1.saturating_sub(before.1));
    let ready = run + waited;
    if ready.is_zero() { 1.0 } else { run.as_secs_f64() / ready.as_secs_f64() }
}

#[test]
fn a_modest_client_keeps_its_flows_and_its_speed_beside_one_with_two_thousand() {
    run(&[TUN], || {
        let lab = Topology::with_lan();
        let _sites = Sites::open(&lab);
        let (greedy, modest) = (lab.client().clone(), second(&lab));
        let tunproxy = Place::new(
            "
mode: rule
log-level: warning
memory-limit: 32MB
tun: { enable: true, auto-route: true, dns-hijack: ['any:53'] }
dns: { enable: true, enhanced-mode: fake-ip, nameserver: [192.168.1.1] }
rules: ['MATCH,DIRECT']
",
        )
        .start(&lab.host);
        let (any, echo) = (format!("{ADDRESS}:0"), format!("{V4}:7"));
        let open = || Session::open(&modest, any.parse().expect("an address"), echo.parse().expect("an address"));
        let mut sessions: Vec<Session> = (0..8).map(|_| open()).collect();
        for session in &mut sessions {
            assert_eq!(session.alive().map(drop), Ok(()), "{}", tunproxy.output());
        }
        let measured = || {
            let before = tunproxy.processor_time();
            let took = download(&modest).unwrap_or_else(|error| panic!("{error}\n{}", tunproxy.output()));
            took.mul_f64(share(before, tunproxy.processor_time()))
        };
        let alone = measured();
        let ask = || {
            let greedy = greedy.clone();
            std::thread::spawn(move || act_in(&greedy, &format!("greedy 2000 {V4}:9000")))
        };
        let (mut asking, mut downloads, mut slowest, mut most) = (ask(), 0, Duration::ZERO, 0);
        while downloads <= 3 || !asking.is_finished() {
            // On a machine that is busy with other things it may be over before enough has been measured beside it.
            if asking.is_finished() {
                drop(std::mem::replace(&mut asking, ask()).join().expect("no panic"));
            }
            slowest = slowest.max(measured());
            downloads += 1;
            let [opened, closed] = ["opened", "closed"].map(|word| tunproxy.counted(&lab.host, &["flows", word]));
            most = most.max(opened - closed);
            let session = &mut sessions[downloads % 8];
            assert_eq!(session.alive().map(drop), Ok(()), "{}", tunproxy.output());
        }
        // Two thousand handshakes and their data keep the machine busy as well; starving would take tens of seconds, in which
        // the program has its processor all the time.
        assert!(slowest <= alone * 20 + Duration::from_secs(4), "{alone:?} alone, {slowest:?} beside the other");
        for session in &mut sessions {
            assert_eq!(session.alive().map(drop), Ok(()), "it was idle meanwhile\n{}", tunproxy.output());
        }
        let said = tunproxy.output();
        assert!(said.contains("memory-limit is reached"), "there was enough for both: {said}");
        // Some of its two thousand get no place, or lose it again: it has more than its part.
        drop(asking.join().expect("no panic"));
        assert!(most >= 300, "{CLIENT_V4} had {most} flows at a time\n{said}");
    });
}
