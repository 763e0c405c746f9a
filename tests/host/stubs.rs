//! A stub on this host is the system's nameserver: we find real addresses through it, while programs that ask it, or
//! anybody else, get fake ones, and no question of theirs leaves.

use std::net::SocketAddr;

use super::leaks::at;
use super::support::packet::{Packet, protocol};
use super::support::peers::Peers;
use super::support::program::{PATIENCE, Program};
use super::support::sites::{NAME, V4, zone};
use super::support::third_party::{dnsmasq, unbound};
use super::support::topology::{GATEWAY_V4, GATEWAY_V6, HOST_LAN_V4, HOST_V4, HOST_V6};
use super::support::tunproxy::{Place, Said, Tunproxy};
use super::support::{Capture, Sites, Topology, run, world};

const TUN: &str = "/dev/net/tun";
const STUB: &str = "127.0.0.1";
/// A name that programs ask for and nobody connects to.
const OTHER: &str = "other.example.test";
/// One that gets a real address.
const REAL: &str = "real.example.test";

fn profile(tun: &str, nameserver: &str) -> Place {
    Place::new(&format!(
        "
mode: rule
ipv6: true
log-level: info
mixed-port: 7890
tun: {{ enable: true{tun} }}
dns: {{ enable: true, ipv6: true, enhanced-mode: fake-ip, fake-ip-filter: [{REAL}]{nameserver} }}
rules: ['DOMAIN,{NAME},DIRECT', 'DOMAIN-SUFFIX,home.test,DIRECT', 'DOMAIN-SUFFIX,site.test,DIRECT', 'MATCH,REJECT']
"
    ))
}

/// Where nameservers listen at `ip`.
fn names_at(ip: &str) -> SocketAddr {
    SocketAddr::new(ip.parse().expect("an address"), 53)
}

/// A lab whose host asks a stub on the loopback, and a capture on its uplink.
fn lab() -> (Topology, Sites, Capture) {
    lab_that_asks(STUB)
}

/// A lab whose host asks `nameserver`.
fn lab_that_asks(nameserver: &str) -> (Topology, Sites, Capture) {
    let lab = Topology::desktop();
    let zone = (0..4).fold(zone().address(REAL, V4), |zone, number| zone.address(&format!("n{number}.site.test"), V4));
    let sites = Sites::with(&lab, zone);
    world::set_resolv_conf(&format!("nameserver {nameserver}\n"));
    let mut open = Capture::start(&lab.host, "eth0");
    assert_eq!(dig(&lab, GATEWAY_V4, OTHER, &["A"]).trim(), V4);
    let tracer = format!("{}.{NAME}", "0f".repeat(16));
    assert_eq!(dig(&lab, GATEWAY_V4, &tracer, &["A"]), "");
    assert_eq!(open.packets().iter().filter(|packet| is_of_a_program(packet)).count(), 2, "they would be seen");
    let mut capture = Capture::start(&lab.host, "eth0");
    capture.prove(|mark| {
        let sent = super::support::client::act_in(&lab.host, &format!("datagram {V4}:7 {mark}"));
        assert_eq!(sent, Ok(mark.to_owned()));
    });
    (lab, sites, capture)
}

fn fetch(lab: &Topology, options: &[&str], name: &str) -> Said {
    let mut curl = lab.host.command("curl");
    Said::of(curl.args(["-sS", "--max-time", "20"]).args(options).arg(format!("http://{name}/stub")))
}

fn dig(lab: &Topology, server: &str, name: &str, more: &[&str]) -> String {
    let mut dig = lab.host.command("dig");
    Said::of(dig.args(["+short", "+tries=1", "+timeout=20", &format!("@{server}"), name]).args(more)).stdout
}

/// A question on the wire for a name that we have no reason to look up; over TCP any is suspected that bears it.
fn is_of_a_program(packet: &Packet) -> bool {
    let to_53 =
        packet.ip.is_some_and(|ip| matches!(ip.protocol, protocol::TCP | protocol::UDP) && ip.destination.port() == 53);
    let bears = |label: &[u8]| packet.bytes.windows(label.len()).any(|window| window.eq_ignore_ascii_case(label));
    // A tracer's label has 32 letters.
    to_53 && (bears(b"\x05other\x07example") || packet.bytes.windows(33).any(|it| it[0] == 32 && is_hex(&it[1..])))
}

fn is_hex(label: &[u8]) -> bool {
    label.iter().all(u8::is_ascii_hexdigit)
}

/// Programs get fake addresses, whomever they ask, and what goes DIRECT finds its way.
fn works(lab: &Topology, tunproxy: &Tunproxy, stub: &str, when: &str) {
    let said = fetch(lab, &[], NAME);
    assert!(said.stdout.contains(&format!("host={NAME} path=/stub")), "{when}: {said:?}\n{}", tunproxy.output());
    for server in [stub, GATEWAY_V4, GATEWAY_V6, "203.0.113.53"] {
        for name in [NAME, OTHER] {
            assert!(dig(lab, server, name, &["A"]).starts_with("198.18."), "{when}: {server} {name}");
        }
        assert_eq!(dig(lab, server, REAL, &["A"]).trim(), V4, "{when}: {server}");
    }
}

/// What both the nameserver and the uplink have seen is ours.
fn nothing_left(sites: &Sites, capture: &mut Capture) {
    let asked = sites.dns.queries.all();
    assert!(asked.iter().any(|query| query.contains(NAME)), "the nameserver was asked: {asked:?}");
    assert_eq!(asked.iter().filter(|query| query.contains("other.")).count(), 1, "before the start: {asked:?}");
    capture.assert_nothing("a question of a program", is_of_a_program);
}

/// With this stub, in each way to say that it is to be asked, over crashes of us and restarts of it.
fn any_stub_will_do(start: impl Fn(&Topology, &[&str]) -> Program) {
    any_stub_at_will_do(STUB, start);
}

/// The same with one at the address `ip` of the host.
fn any_stub_at_will_do(ip: &str, start: impl Fn(&Topology, &[&str]) -> Program) {
    let (lab, sites, mut capture) = lab_that_asks(ip);
    let _sixth = lab.at_gateway.dns(at(&format!("[{GATEWAY_V6}]:53")), zone().address(REAL, V4));
    let mut stub = Some(start(&lab, &[GATEWAY_V4]));
    assert_eq!(dig(&lab, ip, NAME, &["A"]).trim(), V4, "the stub works");
    let itself = format!(", nameserver: ['{}']", names_at(ip));
    for (tun, nameserver) in [("", ""), (", kill-switch: true", ", nameserver: [system]"), ("", &itself)] {
        let place = profile(tun, nameserver);
        // It has no memory of what was before: a real address in it would be given to programs.
        drop(stub.take());
        stub = Some(start(&lab, &[GATEWAY_V4]));
        let tunproxy = place.start(&lab.host);
        works(&lab, &tunproxy, ip, "at first");
        let place = tunproxy.kill();
        let tunproxy = place.start(&lab.host);
        works(&lab, &tunproxy, ip, "after a crash, with fake addresses in the stub's memory");
        drop(stub.take());
        stub = Some(start(&lab, &[GATEWAY_V6]));
        works(&lab, &tunproxy, ip, "with another nameserver behind it");
        assert_eq!(tunproxy.counted(&lab.host, &["dns", "looped"]), 0);
        assert!(tunproxy.stop().success());
    }
    nothing_left(&sites, &mut capture);
}

#[test]
fn names_are_found_through_a_forwarding_dnsmasq_and_what_it_alone_knows_too() {
    run(&["curl", "dig", "dnsmasq", TUN], || {
        any_stub_will_do(|lab, behind| dnsmasq(&lab.host, names_at(STUB), behind));
    });
}

#[test]
fn names_are_found_through_a_dnsmasq_that_is_tied_to_the_uplink() {
    run(&["curl", "dig", "dnsmasq", TUN], || {
        // As NetworkManager has it.
        any_stub_will_do(|lab, behind| dnsmasq(&lab.host, names_at(STUB), &[&format!("{}@eth0", behind[0])]));
    });
}

#[test]
fn names_are_found_through_a_dnsmasq_on_an_address_of_this_host_in_the_network() {
    run(&["curl", "dig", "dnsmasq", TUN], || {
        any_stub_at_will_do(HOST_V4, |lab, behind| dnsmasq(&lab.host, names_at(HOST_V4), behind));
    });
}

#[test]
fn names_are_found_through_a_dnsmasq_on_an_ipv6_address_of_this_host_in_the_network() {
    run(&["curl", "dig", "dnsmasq", TUN], || {
        any_stub_at_will_do(HOST_V6, |lab, behind| dnsmasq(&lab.host, names_at(HOST_V6), behind));
    });
}

#[test]
fn an_address_that_comes_to_this_host_and_goes_to_another_is_a_stub_s_for_that_time() {
    run(&["curl", "dig", "dnsmasq", TUN], || {
        // Of the network of another address, so that the kernel sends to it from that.
        let (ip, net) = ("192.168.1.53", "192.168.1.53/24");
        let (lab, sites, mut capture) = lab_that_asks(ip);
        let tunproxy = profile("", "").start(&lab.host);
        assert!(!fetch(&lab, &[], "n2.site.test").succeeded(), "nobody is there");
        let until_found = |name: &str| {
            let found = world::poll_until(PATIENCE, || fetch(&lab, &["-f"], name).succeeded().then_some(()));
            assert!(found.is_some(), "{name}: {}", tunproxy.output());
        };
        lab.host.address("eth0", &[net]);
        let stub = dnsmasq(&lab.host, names_at(ip), &[GATEWAY_V4]);
        until_found("n0.site.test");
        works(&lab, &tunproxy, ip, "while it is here");
        let doctor = tunproxy.place().look(&lab.host, "doctor", &[]).stdout;
        // What it hands out to programs, and so to this one, is ours.
        assert!(!doctor.is_empty() && !doctor.contains("hands our fake addresses back"), "{doctor}");
        drop(stub);
        lab.host.ip(&format!("address delete {net} dev eth0"));
        lab.gateway.address("eth1", &[net]);
        let away = lab.at_gateway.dns(names_at(ip), zone().address("n1.site.test", V4));
        until_found("n1.site.test");
        assert!(away.queries.count(|query| query.contains("n1.site")) > 0);
        assert_eq!(tunproxy.counted(&lab.host, &["dns", "looped"]), 0);
        assert!(tunproxy.stop().success());
        nothing_left(&sites, &mut capture);
    });
}

#[test]
fn a_nameserver_on_an_address_of_this_host_that_asks_nobody_is_asked_for_what_it_knows() {
    run(&["curl", "dig", TUN], || {
        let (lab, _sites, mut capture) = lab_that_asks(HOST_V4);
        let at_host = Peers::new(&lab.host);
        let server = at_host.dns(names_at(HOST_V4), zone().address("nas.home.test", V4));
        for nameserver in ["".to_owned(), format!(", nameserver: [{HOST_V4}]")] {
            let tunproxy = profile("", &nameserver).start(&lab.host);
            for name in [NAME, "nas.home.test"] {
                let said = fetch(&lab, &["--proxy", "http://127.0.0.1:7890"], name);
                assert!(said.stdout.contains(&format!("host={name}")), "{said:?}\n{}", tunproxy.output());
            }
            let nobody = fetch(&lab, &["--proxy", "http://127.0.0.1:7890", "-f"], "nobody.home.test");
            assert!(!nobody.succeeded(), "{nobody:?}");
            assert!(tunproxy.stop().success());
        }
        assert!(server.queries.count(|query| query.contains("nas.home")) > 0);
        capture.assert_nothing("a question of a program", is_of_a_program);
    });
}

#[test]
fn names_are_found_through_an_unbound_that_changes_the_case_of_letters() {
    run(&["curl", "dig", "unbound", TUN], || {
        any_stub_will_do(|lab, behind| unbound(&lab.host, names_at(STUB), behind, "  use-caps-for-id: yes\n"));
    });
}

#[test]
fn names_are_found_through_an_unbound_that_asks_over_tcp_and_keeps_answers_for_long() {
    run(&["curl", "dig", "unbound", TUN], || {
        let words = "  tcp-upstream: yes\n  cache-min-ttl: 3600\n";
        any_stub_will_do(|lab, behind| unbound(&lab.host, names_at(STUB), behind, words));
    });
}

/// The key of the root, as every system has it: of the lab's names nothing can be proved by it.
const VALIDATING: &str = "  module-config: \"validator iterator\"\n  trust-anchor: \". DS 20326 8 2 \
                          E06D44B80B8F1D39A95C0B0D7C65D08458E880409BBC683457104237C7F8EC8D\"\n";

#[test]
fn names_are_found_through_an_unbound_that_validates_others() {
    run(&["curl", "dig", "unbound", TUN], || {
        let words = format!("{VALIDATING}  domain-insecure: \"test.\"\n");
        any_stub_will_do(|lab, behind| unbound(&lab.host, names_at(STUB), behind, &words));
    });
}

#[test]
fn names_are_found_through_an_unbound_that_validates_in_vain_and_lets_that_pass() {
    run(&["curl", "dig", "unbound", TUN], || {
        let words = format!("{VALIDATING}  val-permissive-mode: yes\n");
        any_stub_will_do(|lab, behind| unbound(&lab.host, names_at(STUB), behind, &words));
    });
}

#[test]
fn a_gateway_without_fake_addresses_answers_its_clients_and_itself_through_a_stub() {
    run(&["dig", "dnsmasq", "unbound", TUN], || {
        let lab = Topology::with_lan();
        let sites = Sites::open(&lab);
        let itself = format!(", nameserver: [{HOST_LAN_V4}]");
        for (number, ip, nameserver) in [(0, STUB, ""), (1, STUB, ""), (2, HOST_LAN_V4, ""), (3, HOST_LAN_V4, &itself)]
        {
            world::set_resolv_conf(&format!("nameserver {ip}\n"));
            let stub = match number {
                1 => unbound(&lab.host, names_at(ip), &[GATEWAY_V4], ""),
                _ => dnsmasq(&lab.host, names_at(ip), &[GATEWAY_V4]),
            };
            let place = Place::new(&format!(
                "mode: direct\nipv6: false\ntun: {{ enable: true, auto-forward: true }}\n\
                 dns: {{ enable: true, ipv6: false, enhanced-mode: redir-host{nameserver} }}\n",
            ));
            let tunproxy = place.start(&lab.host);
            let client = (lab.client(), if ip == STUB { "203.0.113.53" } else { ip });
            for (ns, server) in [client, (&lab.host, "203.0.113.53"), (&lab.host, ip)] {
                for (name, answer) in [(NAME, V4), (OTHER, V4), ("nobody.example.test", "")] {
                    let mut dig = ns.command("dig");
                    // A question that waits for itself would wait for five seconds.
                    dig.args(["+short", "+tries=1", "+timeout=4", &format!("@{server}"), name, "A"]);
                    let said = Said::of(&mut dig);
                    assert_eq!(said.stdout.trim(), answer, "{number} {server} {name}: {}", tunproxy.output());
                }
            }
            assert!(tunproxy.stop().success());
            drop(stub);
        }
        let asked = sites.dns.queries.all();
        assert!(!asked.is_empty() && !asked.iter().any(|query| query.split(['.', ' ']).any(|label| label.len() == 32)));
    });
}

#[test]
fn what_the_stub_alone_knows_is_found_for_clients_of_our_ports() {
    run(&["curl", "dnsmasq", TUN], || {
        let (lab, _sites, _capture) = lab();
        let _stub = dnsmasq(&lab.host, names_at(STUB), &[GATEWAY_V4]);
        let tunproxy = profile("", "").start(&lab.host);
        let said = fetch(&lab, &["--proxy", "http://127.0.0.1:7890"], "nas.home.test");
        assert!(said.stdout.contains("host=nas.home.test path=/stub"), "{said:?}\n{}", tunproxy.output());
        let said = fetch(&lab, &["--proxy", "http://127.0.0.1:7890", "-f"], "nobody.home.test");
        assert!(!said.succeeded(), "{said:?}");
        assert!(tunproxy.stop().success());
    });
}

#[test]
fn a_nameserver_behind_the_stub_that_is_dead_is_given_up_for_another() {
    run(&["curl", "dnsmasq", "unbound", TUN], || {
        let (lab, sites, _capture) = lab();
        // Nobody is at the first address; who asks there hears nothing. dnsmasq always begins with it.
        let behind = ["203.0.113.99", GATEWAY_V4];
        for number in 0..2 {
            let stub = match number {
                0 => dnsmasq(&lab.host, names_at(STUB), &behind),
                _ => unbound(&lab.host, names_at(STUB), &behind, ""),
            };
            let tunproxy = profile("", "").start(&lab.host);
            for time in 0..4 {
                let name = format!("n{time}.site.test");
                let said = fetch(&lab, &[], &name);
                assert!(said.stdout.contains(&format!("host={name}")), "{said:?}\n{}", tunproxy.output());
                assert!(sites.dns.queries.count(|query| query.contains(&name)) > 0, "{name}");
            }
            assert!(tunproxy.stop().success());
            drop(stub);
        }
    });
}

#[test]
fn those_behind_the_stub_of_systemd_resolved_are_read_from_its_file_and_asked() {
    run(&["curl", "dig", TUN], || {
        let (lab, sites, mut capture) = lab();
        world::set_resolv_conf("nameserver 127.0.0.53\noptions edns0 trust-ad\n");
        lab.host.run("mkdir", &["-p", "/run/systemd/resolve"]);
        std::fs::write("/run/systemd/resolve/resolv.conf", format!("nameserver {GATEWAY_V4}\n"))
            .expect("a file of ours");
        let asked = super::support::peers::Record::default();
        let (noted, behind) = (asked.clone(), at(&format!("{GATEWAY_V4}:53")));
        let at_host = Peers::new(&lab.host);
        let _stub = at_host.udp(at("127.0.0.53:53"), async move |socket| {
            let mut buffer = vec![0; 4096];
            loop {
                let (length, from) = socket.recv_from(&mut buffer).await?;
                noted.note("a question".to_owned());
                let up = tokio::net::UdpSocket::bind("0.0.0.0:0").await?;
                up.send_to(&buffer[..length], behind).await?;
                let (length, _) = up.recv_from(&mut buffer).await?;
                socket.send_to(&buffer[..length], from).await?;
            }
        });
        let tunproxy = profile("", "").start(&lab.host);
        assert!(dig(&lab, "127.0.0.53", OTHER, &["A"]).starts_with("198.18."), "{}", tunproxy.output());
        let by_programs = asked.all().len();
        let proxied = fetch(&lab, &["--proxy", "http://127.0.0.1:7890"], NAME);
        assert!(proxied.stdout.contains(&format!("host={NAME}")), "{proxied:?}\n{}", tunproxy.output());
        assert_eq!(asked.all().len(), by_programs, "our own questions go past the stub");
        assert!(tunproxy.stop().success());
        nothing_left(&sites, &mut capture);
    });
}
