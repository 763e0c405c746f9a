//! One client that uses up what all flows take from: local ports, and descriptors for dials that nobody answers.

use std::net::SocketAddr;
use std::time::Duration;

use socket2::{Domain, Socket, Type};

use super::fairness::second;
use super::support::client::{Session, act_in};
use super::support::sites::{NAME, V4};
use super::support::topology::BLACK_HOLE_V4;
use super::support::tunproxy::{Place, Tunproxy};
use super::support::world::poll_until;
use super::support::{Netns, Sites, Topology, run};

const TUN: &str = "/dev/net/tun";
/// So many the host under test has for everybody.
const PORTS: u64 = 300;

fn start(lab: &Topology) -> Tunproxy {
    Place::new(
        "
mode: rule
log-level: warning
tun: { enable: true, auto-route: true, dns-hijack: ['any:53'] }
dns: { enable: true, enhanced-mode: fake-ip, nameserver: [192.168.1.1] }
rules: ['MATCH,DIRECT']
",
    )
    .start(&lab.host)
}

fn echo() -> String {
    format!("{V4}:7")
}

#[test]
fn a_client_with_more_sockets_than_there_are_local_ports_leaves_some_to_names_and_to_others() {
    run(&[TUN, "dig"], || {
        let lab = Topology::with_lan();
        let _sites = Sites::open(&lab);
        let modest = second(&lab);
        lab.host.sysctl("net.ipv4.ip_local_port_range", &format!("40000 {}", 40_000 + PORTS - 1));
        let tunproxy = start(&lab);
        let said = || tunproxy.output();
        let greedy = lab.client().spawn(|| super::support::client::act(&format!("hold {} {}", 2 * PORTS, echo())));
        let associations = || tunproxy.counted(&lab.host, &["flows", "associations"]);
        let many = || (associations() >= PORTS / 2).then_some(());
        assert!(poll_until(Duration::from_secs(20), many).is_some(), "{}", said());
        for round in 0..10 {
            for ns in [&modest, &lab.host] {
                assert_eq!(act_in(ns, &format!("datagram {V4}:7 x 5")), Ok("x".to_owned()), "{round}: {}", said());
            }
        }
        assert_eq!(act_in(&modest, &format!("ask {NAME}:7 x")), Ok("x".to_owned()), "{}", said());
        let answer = lab.host.run("dig", &["+short", "+tries=1", "@192.168.1.1", "other.example.test"]);
        assert!(answer.contains("198.18."), "{answer}");
        // Two workers that open one each at the same moment see each other's a moment later.
        let half = || (associations() <= PORTS / 2).then_some(());
        assert!(poll_until(Duration::from_secs(5), half).is_some(), "{} of {PORTS}", associations());
        assert_eq!(greedy.join().expect("no panic"), Ok((2 * PORTS).to_string()), "{}", said());
        assert!(!said().contains("ports are left"), "{}", said());
    });
}

#[test]
fn ports_that_have_run_out_are_named_and_come_from_associations() {
    run(&[TUN], || {
        let lab = Topology::with_lan();
        let _sites = Sites::open(&lab);
        let tunproxy = start(&lab);
        let words = format!("datagrams 60 {}", echo());
        assert_eq!(act_in(lab.client(), &words), Ok("60".to_owned()), "{}", tunproxy.output());
        // There were enough at the start.
        lab.host.sysctl("net.ipv4.ip_local_port_range", "40000 40039");
        let taken: Vec<_> =
            lab.host.enter(|| std::iter::from_fn(|| std::net::UdpSocket::bind("0.0.0.0:0").ok()).take(40).collect());
        // One or another may be an association's.
        assert!(taken.len() >= 30, "and now another program has all that there are: {}", taken.len());
        assert!(act_in(lab.client(), &format!("datagram {} x 2", echo())).is_err());
        let told = tunproxy.line("no local UDP ports are left");
        assert!(told.contains("net.ipv4.ip_local_port_range is 40000 to 40039"), "{told}");
        let left = tunproxy.counted(&lab.host, &["flows", "associations"]);
        assert!((10..60).contains(&left), "what helps nobody is not done for ever: {left}");
        drop(taken);
        let words = format!("datagrams 20 {}", echo());
        assert_eq!(act_in(lab.client(), &words), Ok("20".to_owned()), "{}", tunproxy.output());
    });
}

/// Begins connections that nobody will ever answer.
fn dial_into_nothing(ns: &Netns, many: u16) -> Vec<Socket> {
    ns.enter(move || {
        let dial = |n| {
            let socket = Socket::new(Domain::IPV4, Type::STREAM.nonblocking(), None).expect("a socket");
            let to: SocketAddr = format!("{BLACK_HOLE_V4}:{}", 1000 + n).parse().expect("an address");
            let begun = socket.connect(&to.into()).map_err(|error| error.raw_os_error());
            assert_eq!(begun, Err(Some(libc::EINPROGRESS)));
            socket
        };
        (0..many).map(dial).collect()
    })
}

#[test]
fn a_client_that_dials_into_nothing_leaves_descriptors_to_the_others() {
    run(&[TUN, "prlimit"], || {
        let lab = Topology::with_lan();
        let _sites = Sites::open(&lab);
        let modest = second(&lab);
        let tunproxy = start(&lab);
        // As it started it lets a client dial 256 times on each worker: more than there are descriptors now.
        tunproxy.limit_descriptors(&lab.host, 256);
        let said = || tunproxy.output();
        let any: SocketAddr = "0.0.0.0:0".parse().expect("an address");
        let mut idle = Session::open(&modest, any, echo().parse().expect("an address"));
        assert_eq!(idle.alive().map(drop), Ok(()));
        let dials = dial_into_nothing(lab.client(), 300);
        let full = || (tunproxy.descriptors() >= 190).then_some(());
        assert!(poll_until(Duration::from_secs(5), full).is_some(), "{}\n{}", tunproxy.descriptors(), said());
        for round in 0..5 {
            for ns in [&lab.host, &modest] {
                assert_eq!(act_in(ns, &format!("ask {} x", echo())), Ok("x".to_owned()), "{round}: {}", said());
                assert_eq!(act_in(ns, &format!("datagram {} x 5", echo())), Ok("x".to_owned()), "{round}: {}", said());
            }
        }
        assert!(tunproxy.counted(&lab.host, &["flows", "given_up"]) > 0, "{}", said());
        assert_eq!(tunproxy.counted(&lab.host, &["flows", "evicted"]), 0, "no flow had to go: {}", said());
        assert_eq!(idle.alive().map(drop), Ok(()), "{}", said());
        drop(dials);
    });
}
