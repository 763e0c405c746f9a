//! Containers behind a bridge with masquerade and published ports, as Docker and libvirt make them, and the firewall of
//! an administrator.

use std::thread;

use super::super::support::client::{Session, act_in};
use super::super::support::netns::veth;
use super::super::support::packet::Packet;
use super::super::support::peers::digest::of_pattern;
use super::super::support::peers::{Peer, Record};
use super::super::support::program::PATIENCE;
use super::super::support::sites::{NAME, V4, V6, zone};
use super::super::support::topology::{GATEWAY_V4, HOST_LAN_V4, HOST_LAN_V6, HOST_V4, HOST_V6};
use super::super::support::{Dump, Netns, Peers, Sites, Topology, run, world};
use super::{TUN, both_rp_filters, leaks_while, leaves_the_host, profile, proven_capture};

/// Where its port 80 is published.
const PUBLISHED: u16 = 8080;

/// The rules that a container engine makes: source translation for what leaves the bridge, destination translation for
/// the published port, for others and for the host itself.
const ENGINE: &str = "
table ip engine {
  chain post { type nat hook postrouting priority srcnat; ip saddr 172.17.0.0/16 oifname != \"br0\" masquerade; }
  chain pre { type nat hook prerouting priority dstnat; fib daddr type local meta l4proto { tcp, udp } th dport 8080 dnat to 172.17.0.2:80; }
  chain out { type nat hook output priority -100; ip daddr != 127.0.0.0/8 fib daddr type local meta l4proto { tcp, udp } th dport 8080 dnat to 172.17.0.2:80; }
}
table ip6 engine {
  chain post { type nat hook postrouting priority srcnat; ip6 saddr fd00:17::/64 oifname != \"br0\" masquerade; }
  chain pre { type nat hook prerouting priority dstnat; fib daddr type local meta l4proto { tcp, udp } th dport 8080 dnat to [fd00:17::2]:80; }
  chain out { type nat hook output priority -100; ip6 daddr != ::1 fib daddr type local meta l4proto { tcp, udp } th dport 8080 dnat to [fd00:17::2]:80; }
}";

/// A container with an echo server on its port 80, TCP and UDP.
struct Container {
    ns: Netns,
    asked_by: Record,
    _servers: Vec<Peer>,
    _thread: Peers,
}

impl Container {
    fn start(lab: &Topology) -> Self {
        let ns = Netns::with_resolv_conf("container", &format!("nameserver {GATEWAY_V4}\n"));
        lab.host.ip("link add br0 type bridge");
        lab.host.ip("link set br0 up");
        lab.host.address("br0", &["172.17.0.1/16", "fd00:17::1/64"]);
        veth(&lab.host, "veth0", &ns, "eth0");
        lab.host.ip("link set veth0 master br0");
        ns.address("eth0", &["172.17.0.2/16", "fd00:17::2/64"]);
        ns.routes(&["default via 172.17.0.1", "default via fd00:17::1"]);
        // It says "unknown" until its first port forwards.
        let up = || lab.host.ip("link show br0").contains("state UP").then_some(());
        assert!(world::poll_until(PATIENCE, up).is_some(), "{}", lab.host.ip("link show br0"));
        lab.host.nft(ENGINE);
        let (thread, asked_by) = (Peers::new(&ns), Record::default());
        let at = |any: &str| format!("{any}:80").parse().expect("an address");
        let servers = ["0.0.0.0", "[::]"]
            .into_iter()
            .flat_map(|any| [thread.tcp_echo(at(any)), thread.udp_echo(at(any), &asked_by)])
            .collect();
        Self { ns, asked_by, _servers: servers, _thread: thread }
    }

    /// Asks for its published port from the internet, the LAN and the host itself, at every address of the host.
    fn assert_published(&self, lab: &Topology) {
        let (uplink, lan) =
            ([HOST_V4.to_owned(), format!("[{HOST_V6}]")], [HOST_LAN_V4.to_owned(), format!("[{HOST_LAN_V6}]")]);
        let everywhere: Vec<&String> = uplink.iter().chain(&lan).collect();
        let asked =
            [(&lab.internet, uplink.iter().collect()), (lab.client(), everywhere.clone()), (&lab.host, everywhere)];
        for (from, addresses) in asked {
            for address in addresses {
                for act in ["ask", "datagram"] {
                    let outcome = act_in(from, &format!("{act} {address}:{PUBLISHED} x"));
                    assert_eq!(outcome, Ok("x".to_owned()), "{act} {address} from {}", from.name());
                }
            }
        }
    }
}

/// What is in the firewall but ours.
fn foreign_tables(host: &Netns) -> String {
    let all = host.run("nft", &["-s", "list", "ruleset"]);
    let ours = ["table inet tunproxy", "table arp tunproxy"];
    let tables = all.split("\n}\n").filter(|table| !ours.iter().any(|name| table.trim_start().starts_with(name)));
    tables.map(|table| format!("{table}\n}}\n")).collect()
}

#[test]
fn a_container_is_carried_by_the_rules_and_its_published_port_works_from_everywhere() {
    run(&["curl", "dig", TUN], || {
        both_rp_filters(Topology::with_lan, |lab| {
            let _sites = Sites::open(&lab);
            let container = Container::start(&lab);
            container.assert_published(&lab);
            let (before, foreign) = (Dump::take(&lab.host), foreign_tables(&lab.host));
            assert!(foreign.contains("table ip engine"), "{foreign}");
            let tunproxy = profile(
                "auto-forward: true",
                "'DST-PORT,9000,DIRECT', 'DOMAIN,www.example.test,DIRECT', 'MATCH,REJECT'",
            )
            .start(&lab.host);
            assert_eq!(foreign_tables(&lab.host), foreign, "nothing of ours is in a table of others");
            // Out: by the rules, in bulk, with its names.
            for site in [V4, V6] {
                assert_eq!(
                    act_in(&container.ns, &format!("connect {site}:7")),
                    Err("ECONNREFUSED".to_owned()),
                    "{site}"
                );
                for direction in ["up", "down"] {
                    let outcome = act_in(&container.ns, &format!("{direction} {site}:9000 10000000"));
                    assert_eq!(outcome, Ok(of_pattern(10_000_000)), "{direction} {site}");
                }
            }
            let by_name = container.ns.run("curl", &["-sS", "--connect-timeout", "20", &format!("http://{NAME}/")]);
            assert!(by_name.contains(&format!("host={NAME} path=/")), "{by_name}");
            for server in [GATEWAY_V4, "203.0.113.53", "2001:db8:1::53"] {
                let answer = container.ns.run("dig", &["+short", &format!("@{server}"), NAME, "A"]);
                assert!(answer.starts_with("198.18."), "{server}: {answer}");
            }
            // In: from everywhere, and the container sees who asks.
            container.assert_published(&lab);
            assert!(
                container.asked_by.count(|from| from.starts_with("10.7.0.2:")) > 0,
                "{:?}",
                container.asked_by.all()
            );
            assert_eq!(foreign_tables(&lab.host), foreign);
            assert!(tunproxy.stop().success());
            before.assert_same(&Dump::take(&lab.host));
        });
    });
}

#[test]
fn sessions_to_a_published_port_live_through_start_run_and_stop_and_answer_by_the_nic_they_came_in() {
    run(&[TUN], || {
        both_rp_filters(Topology::with_lan, |lab| {
            let _sites = Sites::open(&lab);
            let container = Container::start(&lab);
            let open = |from: &str, to: &str| {
                Session::open(
                    &lab.internet,
                    format!("{from}:0").parse().unwrap(),
                    format!("{to}:{PUBLISHED}").parse().unwrap(),
                )
            };
            let pair = || [open("203.0.113.60", HOST_V4), open("[2001:db8:1::60]", &format!("[{HOST_V6}]"))];
            let mut sessions = Vec::from(pair());
            let all_alive = |sessions: &mut Vec<Session>, when: &str| {
                for session in sessions {
                    assert_eq!(session.alive().map(drop), Ok(()), "{when}");
                }
            };
            let mut uplink = proven_capture(&lab);
            let tunproxy = profile("auto-forward: true", "'MATCH,REJECT'").start(&lab.host);
            all_alive(&mut sessions, "at the start");
            sessions.extend(pair());
            let answers = leaks_while(
                &mut uplink,
                |packet| leaves_the_host(packet) && packet.contains(b"line "),
                || {
                    all_alive(&mut sessions, "while it runs");
                },
            );
            assert!(answers.len() >= 4, "the answers leave by the uplink: {answers:?}");
            let outcome = act_in(&container.ns, &format!("connect {V4}:80"));
            assert_eq!(outcome, Err("ECONNREFUSED".to_owned()), "it is at work");
            assert!(tunproxy.stop().success());
            all_alive(&mut sessions, "at the stop");
        });
    });
}

/// Addresses of the internet that the administrator forbids: the first to this host, the second to those behind it.
const FORBIDDEN: [[&str; 2]; 2] = [["203.0.113.66", "[2001:db8:1::66]"], ["203.0.113.67", "[2001:db8:1::67]"]];
const ADMINISTRATOR: &str = "
table inet administrator {
  chain in { type filter hook input priority 0; meta l4proto { tcp, udp } th dport 2222 drop; }
  chain out { type filter hook output priority 0; ip daddr 203.0.113.66 drop; ip6 daddr 2001:db8:1::66 drop; }
  chain through {
    type filter hook forward priority 0;
    ip daddr 203.0.113.67 drop; ip6 daddr 2001:db8:1::67 drop;
    ip saddr 172.17.0.2 drop; ip6 saddr fd00:17::2 drop;
    iifname \"eth0\" meta l4proto { tcp, udp } th dport 9100 drop;
  }
}";

/// What the administrator forbids does not go through: all at once, because each takes its second.
fn assert_forbidden(lab: &Topology, container: &Container) {
    let echo = |host: &str| format!("{host}:7");
    let mut tries: Vec<(&Netns, String)> = FORBIDDEN[0].map(|host| (&lab.host, echo(host))).into();
    tries.extend(FORBIDDEN[1].map(|host| (lab.client(), echo(host))));
    tries.extend([V4, V6].map(|site| (&container.ns, echo(site))));
    tries.extend([HOST_V4, &format!("[{HOST_V6}]")].map(|host| (&lab.internet, format!("{host}:2222"))));
    tries.extend(["10.7.0.2", "[fd00:7::2]"].map(|host| (&lab.internet, format!("{host}:9100"))));
    thread::scope(|scope| {
        for (ns, to) in &tries {
            scope.spawn(move || {
                let tcp = act_in(ns, &format!("connect {to} 1"));
                assert_eq!(tcp, Err("ETIMEDOUT".to_owned()), "{to} from {}", ns.name());
            });
            // The host itself is told: EPERM.
            scope.spawn(move || {
                let udp = act_in(ns, &format!("datagram {to} x 1"));
                assert!(
                    udp.as_ref().is_err_and(|why| why == "EAGAIN" || why == "EPERM"),
                    "{to} from {}: {udp:?}",
                    ns.name()
                );
            });
        }
    });
}

#[test]
fn what_an_administrator_drops_stays_dropped() {
    run(&[TUN], || {
        both_rp_filters(Topology::with_lan, |lab| {
            let _sites = Sites::with(&lab, zone().address("forbidden.test", "203.0.113.66"));
            let container = Container::start(&lab);
            let (at_host, at_client, record) = (Peers::new(&lab.host), Peers::new(lab.client()), Record::default());
            let at = |text: String| text.parse().unwrap();
            let mut servers = Vec::new();
            for host in FORBIDDEN.concat() {
                servers.push(lab.sites.tcp_echo(at(format!("{host}:7"))));
                servers.push(lab.sites.udp_echo(at(format!("{host}:7")), &record));
            }
            for any in ["0.0.0.0", "[::]"] {
                servers.push(at_host.tcp_echo(at(format!("{any}:2222"))));
                servers.push(at_host.udp_echo(at(format!("{any}:2222")), &record));
                servers.push(at_client.tcp_echo(at(format!("{any}:9100"))));
                servers.push(at_client.udp_echo(at(format!("{any}:9100")), &record));
            }
            assert_eq!(act_in(&lab.host, "ask 203.0.113.66:7 x"), Ok("x".to_owned()), "there is something to forbid");
            lab.host.nft(ADMINISTRATOR);
            let (before, foreign) = (Dump::take(&lab.host), foreign_tables(&lab.host));
            assert_forbidden(&lab, &container);
            let mut capture = proven_capture(&lab);
            let tunproxy = profile("auto-forward: true", "'MATCH,DIRECT'").start(&lab.host);
            let forbidden = |packet: &Packet| {
                let to = packet.ip.map(|ip| ip.destination.ip().to_string()).unwrap_or_default();
                FORBIDDEN.concat().iter().any(|host| host.trim_matches(['[', ']']) == to)
            };
            let leaks = leaks_while(&mut capture, forbidden, || {
                assert_forbidden(&lab, &container);
                // By name the address is ours to dial, and the same chain stops us.
                let by_name = act_in(&lab.host, "connect forbidden.test:7 2");
                assert!(by_name.is_err(), "{by_name:?}");
            });
            assert_eq!(leaks, Vec::<String>::new());
            assert_eq!(act_in(&lab.host, &format!("ask {V4}:7 x")), Ok("x".to_owned()), "the rest is carried");
            assert_eq!(act_in(lab.client(), &format!("ask {V6}:7 x")), Ok("x".to_owned()));
            assert_eq!(foreign_tables(&lab.host), foreign);
            assert!(tunproxy.stop().success());
            before.assert_same(&Dump::take(&lab.host));
        });
    });
}

#[test]
fn a_forward_chain_that_drops_is_named_with_rules_that_help_when_they_are_added() {
    run(&[TUN], || {
        both_rp_filters(Topology::with_lan, |lab| {
            let _sites = Sites::open(&lab);
            for family in ["ip", "ip6"] {
                lab.host.nft(&format!("add table {family} filter"));
                lab.host.nft(&format!(
                    "add chain {family} filter FORWARD {{ type filter hook forward priority filter; policy drop; }}"
                ));
            }
            let before = Dump::take(&lab.host);
            let tunproxy = profile("auto-forward: true", "'MATCH,DIRECT'").start(&lab.host);
            for (family, site) in [("ip", V4), ("ip6", V6)] {
                assert_eq!(act_in(lab.client(), &format!("connect {site}:7 1")), Err("ETIMEDOUT".to_owned()), "{site}");
                let said = tunproxy.line(&format!("the chain {family} filter FORWARD drops what is forwarded"));
                let (_, commands) = said.split_once("for LAN clients: ").expect("the rules to add");
                for command in commands.split("; ") {
                    lab.host.nft(command.strip_prefix("nft ").expect("a command of nft"));
                }
                assert_eq!(act_in(lab.client(), &format!("ask {site}:7 x")), Ok("x".to_owned()), "{site}");
                assert_eq!(act_in(lab.client(), &format!("datagram {site}:7 x")), Ok("x".to_owned()), "{site}");
            }
            assert!(tunproxy.stop().success());
            for family in ["ip", "ip6"] {
                lab.host.nft(&format!("flush chain {family} filter FORWARD"));
            }
            before.assert_same(&Dump::take(&lab.host));
        });
    });
}
