//! The lab proves itself: peers against programs of the distribution, and both oracles against a known difference.

use std::net::SocketAddr;

use super::support::client::{Session, act, act_in};
use super::support::netns::veth;
use super::support::peers::digest::of_pattern;
use super::support::peers::dns::{Behaviour, Zone};
use super::support::peers::proxy::Door;
use super::support::peers::tls::Identity;
use super::support::peers::{Peers, Record};
use super::support::program::Program;
use super::support::sites::{V4, V6};
use super::support::topology::{BLACK_HOLE_V4, BLACK_HOLE_V6, GATEWAY_V4, HOST_V4, HOST_V6};
use super::support::tunproxy::{Place, Said};
use super::support::{Capture, Dump, Netns, Sites, Topology, packet, run, third_party, world};

fn at(address: &str) -> SocketAddr {
    address.parse().expect("an address")
}

#[test]
fn a_test_is_root_of_namespaces_that_end_with_it() {
    run(&[], || {
        assert!(nix::unistd::geteuid().is_root());
        assert_eq!(std::process::id(), 1, "process 1 of a pid namespace takes every other one with it");
        assert!(std::fs::write("/run/mine", "").is_ok());
        world::set_resolv_conf("nameserver 192.0.2.1\n");
        assert_eq!(std::fs::read_to_string("/etc/resolv.conf").unwrap(), "nameserver 192.0.2.1\n");
    });
}

#[test]
fn what_a_test_writes_stays_inside() {
    let before = std::fs::read("/etc/resolv.conf").unwrap();
    let ran = world::attempt(&[], || {
        world::set_resolv_conf("nameserver 192.0.2.77\n");
        std::fs::write("/run/tunproxy-lab-was-here", "").unwrap();
    });
    if ran.is_some() {
        assert_eq!(std::fs::read("/etc/resolv.conf").unwrap(), before);
        assert!(!std::path::Path::new("/run/tunproxy-lab-was-here").exists());
    }
}

#[test]
fn a_failure_inside_is_a_failure_outside_with_its_words() {
    let ran = world::attempt(&[], || {
        let _keeps_running = Program::start("sh", Netns::new("idle").command("sh"));
        // Inside, the harness must report a failure that the process outside then sees.
        panic!("this failure comes from inside");
    });
    if let Some(result) = ran {
        assert!(result.unwrap_err().contains("this failure comes from inside"));
    }
}

#[test]
fn curl_reaches_a_site_by_address_in_both_families() {
    run(&["curl"], || {
        let lab = Topology::desktop();
        let _v4 = lab.sites.http(at("203.0.113.10:80"));
        let _v6 = lab.sites.http(at("[2001:db8:1::10]:80"));
        let said = lab.host.run("curl", &["-sS", "-g", "http://203.0.113.10/a", "http://[2001:db8:1::10]/b"]);
        assert!(said.contains(&format!("host=203.0.113.10 path=/a client={HOST_V4}")), "{said}");
        assert!(said.contains(&format!("host=[2001:db8:1::10] path=/b client={HOST_V6}")), "{said}");
    });
}

#[test]
fn curl_gets_every_byte_and_posts_every_byte() {
    run(&["curl"], || {
        let lab = Topology::desktop();
        let _site = lab.sites.http(at("203.0.113.10:80"));
        let script = "curl -sS http://203.0.113.10/bytes/5000000 | tee /run/body | sha256sum
                      curl -sS --data-binary @/run/body http://203.0.113.10/sink";
        let said = lab.host.run("sh", &["-c", script]);
        let digest = of_pattern(5_000_000);
        assert_eq!(said.matches(&digest).count(), 2, "{said}");
        assert!(said.contains("bytes=5000000"), "{said}");
    });
}

#[test]
fn curl_trusts_a_tls_site_by_its_certificate_only() {
    run(&["curl"], || {
        let lab = Topology::desktop();
        let identity = Identity::new(&["www.example.test"]);
        let _site = lab.sites.https(at("203.0.113.10:443"), &identity);
        let resolve = ["-sS", "--resolve", "www.example.test:443:203.0.113.10", "https://www.example.test/tls"];
        let trusting = [&["--cacert", identity.certificate.to_str().unwrap()][..], &resolve].concat();
        assert!(lab.host.run("curl", &trusting).contains("host=www.example.test path=/tls"));
        assert_eq!(
            Said::of(lab.host.command("curl").args(resolve)).code,
            Some(60),
            "curl's code for a bad certificate"
        );
    });
}

#[test]
fn dig_gets_every_kind_of_answer_and_the_server_counts() {
    run(&["dig"], || {
        let lab = Topology::desktop();
        let mut zone = Zone::default()
            .address("www.example.test", "203.0.113.10")
            .address("www.example.test", "2001:db8:1::10")
            .text("www.example.test", "some words")
            .https("www.example.test")
            .pointer("203.0.113.10", "www.example.test")
            .behaviour("broken.example.test", Behaviour::Failure)
            .behaviour("noise.example.test", Behaviour::Garbage(vec![0xff; 40]))
            .behaviour("mute.example.test", Behaviour::Silence);
        for last in 1..=100 {
            zone = zone.address("many.example.test", &format!("203.0.113.{last}"));
        }
        let server = lab.at_gateway.dns(at(&format!("{GATEWAY_V4}:53")), zone);
        let dig = |words: &str| {
            let words: Vec<&str> = ["+tries=1", "+timeout=2"].into_iter().chain(words.split(' ')).collect();
            Said::of(lab.host.command("dig").args(words)).stdout
        };
        assert_eq!(dig("+short www.example.test A"), "203.0.113.10\n");
        assert_eq!(dig("+short www.example.test AAAA"), "2001:db8:1::10\n");
        assert_eq!(dig("+short www.example.test TXT"), "\"some words\"\n");
        assert_eq!(dig("+short www.example.test HTTPS"), "1 .\n");
        assert_eq!(dig("+short -x 203.0.113.10"), "www.example.test.\n");
        assert_eq!(dig("+short +tcp www.example.test A"), "203.0.113.10\n");
        assert!(dig("nobody.example.test A").contains("status: NXDOMAIN"));
        assert!(dig("www.example.test MX").contains("status: NOERROR, "), "a name without the type is no NXDOMAIN");
        assert!(dig("broken.example.test A").contains("status: SERVFAIL"));
        assert!(!dig("noise.example.test A").contains("status: NOERROR"));
        assert!(dig("mute.example.test A").contains("timed out"));
        assert!(dig("+noedns +ignore many.example.test A").contains("flags: qr tc"), "512 bytes hold no 100 addresses");
        assert_eq!(dig("+short many.example.test A").lines().count(), 100, "over TCP, after the truncated answer");
        assert_eq!(server.queries.count(|query| query == "udp www.example.test A"), 1);
        assert_eq!(server.queries.count(|query| query == "tcp www.example.test A"), 1);
    });
}

#[test]
fn tcp_peers_close_halves_reset_and_refuse_as_the_kernel_shows_it() {
    run(&[], || {
        let lab = Topology::desktop();
        let record = Record::default();
        let _exchange = lab.sites.tcp_exchange(at("203.0.113.10:9000"), &record);
        let _reset = lab.sites.tcp_resetting(at("203.0.113.10:9001"));
        let _silent = lab.sites.tcp_silent(at("203.0.113.10:9002"));
        for direction in ["up", "down", "both"] {
            let digest = act_in(&lab.host, &format!("{direction} 203.0.113.10:9000 3000000"));
            assert_eq!(digest, Ok(of_pattern(3_000_000)), "{direction}");
        }
        assert_eq!(record.all().len(), 3);
        assert_eq!(act_in(&lab.host, "ask 203.0.113.10:9001 x"), Err("ECONNRESET".to_owned()));
        assert_eq!(act_in(&lab.host, "connect 203.0.113.10:9002"), Ok(String::new()));
        assert_eq!(act_in(&lab.host, "connect 203.0.113.10:9003"), Err("ECONNREFUSED".to_owned()));
        assert_eq!(act_in(&lab.host, "connect [2001:db8:1::10]:9003"), Err("ECONNREFUSED".to_owned()));
        for hole in [BLACK_HOLE_V4.to_owned(), format!("[{BLACK_HOLE_V6}]")] {
            assert_eq!(act_in(&lab.host, &format!("connect {hole}:80 1")), Err("ETIMEDOUT".to_owned()), "{hole}");
        }
    });
}

#[test]
fn a_peer_that_is_dropped_is_gone() {
    run(&[], || {
        let lab = Topology::desktop();
        let echo = lab.sites.tcp_echo(at("203.0.113.10:7"));
        let mut session = Session::open(&lab.host, at(&format!("{HOST_V4}:0")), echo.address);
        assert_eq!(session.alive().map(drop), Ok(()));
        drop(echo);
        assert!(session.alive().is_err());
        assert_eq!(act_in(&lab.host, "connect 203.0.113.10:7"), Err("ECONNREFUSED".to_owned()));
    });
}

#[test]
fn short_connections_and_datagrams_are_answered() {
    run(&[], || {
        let lab = Topology::desktop();
        let heard = Record::default();
        let _tcp = lab.sites.tcp_echo(at("203.0.113.10:7"));
        let _udp4 = lab.sites.udp_echo(at("203.0.113.10:7"), &heard);
        let _udp6 = lab.sites.udp_echo(at("[2001:db8:1::10]:7"), &heard);
        assert_eq!(act_in(&lab.host, "churn 2000 32 203.0.113.10:7"), Ok("2000".to_owned()));
        assert_eq!(act_in(&lab.host, "datagram 203.0.113.10:7 hello"), Ok("hello".to_owned()));
        assert_eq!(act_in(&lab.host, "datagram [2001:db8:1::10]:7 hello"), Ok("hello".to_owned()));
        assert_eq!(act_in(&lab.host, "datagram 203.0.113.10:8 hello"), Err("ECONNREFUSED".to_owned()));
        assert_eq!(heard.count(|from| from.starts_with(HOST_V4)), 1);
    });
}

#[test]
fn the_internet_opens_connections_to_the_host_and_to_its_lan() {
    run(&[], || {
        let lab = Topology::with_lan().rp_filter("1");
        let at_host = Peers::new(&lab.host);
        let at_client = Peers::new(lab.client());
        let _ssh = [at_host.tcp_echo(at("0.0.0.0:22")), at_host.tcp_echo(at("[::]:22"))];
        let _web = at_client.tcp_echo(at("0.0.0.0:80"));
        for (from, to) in [
            ("203.0.113.50:0", format!("{HOST_V4}:22")),
            ("[2001:db8:1::50]:0", format!("[{HOST_V6}]:22")),
            ("203.0.113.50:0", "10.7.0.2:80".to_owned()),
        ] {
            let mut session = Session::open(&lab.internet, at(from), at(&to));
            assert_eq!(session.alive().map(drop), Ok(()), "{from} to {to}");
        }
    });
}

#[test]
fn own_proxies_carry_curl_by_name_with_credentials() {
    run(&["curl"], || {
        let lab = Topology::desktop();
        let _site = lab.sites.http(at("203.0.113.10:80"));
        let door = Door::knowing(&[("www.example.test", "203.0.113.10")]).with_credentials("ann", "secret:word");
        let _socks = lab.sites.socks5(at("203.0.113.3:1080"), door.clone());
        let _http = lab.sites.http_proxy(at("203.0.113.3:8080"), door.clone());
        for proxy in ["socks5h://ann:secret%3Aword@203.0.113.3:1080", "http://ann:secret%3Aword@203.0.113.3:8080"] {
            let said = lab.host.run("curl", &["-sS", "-p", "-x", proxy, "http://www.example.test/x"]);
            assert!(said.contains("host=www.example.test path=/x client=203.0.113"), "{proxy}: {said}");
        }
        assert_eq!(door.requests.all(), ["tcp www.example.test:80"; 2]);
        for (proxy, code) in [("socks5h://203.0.113.3:1080", 97), ("http://203.0.113.3:8080", 56)] {
            let said = Said::of(lab.host.command("curl").args(["-sS", "-p", "-x", proxy, "http://www.example.test/"]));
            assert_eq!(said.code, Some(code), "{proxy} without credentials: {said:?}");
        }
    });
}

#[test]
fn an_own_socks_server_relays_datagrams_in_both_families() {
    run(&[], || {
        let lab = Topology::desktop();
        let sites = Sites::open(&lab);
        let door = Door::default();
        let _socks = lab.sites.socks5(at("203.0.113.3:1080"), door.clone());
        for site in [V4, V6] {
            let relayed = act_in(&lab.host, &format!("relay 203.0.113.3:1080 {site}:7 hello"));
            assert_eq!(relayed, Ok("hello".to_owned()), "{site}");
        }
        assert_eq!(door.requests.all(), [format!("udp {V4}:7"), format!("udp {V6}:7")]);
        assert_eq!(sites.datagrams.count(|from| from.starts_with(HOST_V4)), 0);
    });
}

#[test]
fn the_distributions_proxies_carry_curl() {
    run(&["curl", "danted", "microsocks", "tinyproxy"], || {
        let lab = Topology::desktop();
        let _site = lab.sites.http(at("203.0.113.10:80"));
        let _echo = lab.sites.udp_echo(at("203.0.113.10:7"), &Record::default());
        lab.internet.ip("addr add 203.0.113.3/32 dev lo");
        let danted = third_party::danted(&lab.internet, at("203.0.113.3:1080"), "203.0.113.3");
        let _microsocks = third_party::microsocks(&lab.internet, at("203.0.113.3:1081"), Some(("ann", "secret")));
        let _tinyproxy = third_party::tinyproxy(&lab.internet, at("203.0.113.3:8080"), Some(("ann", "secret")));
        let relayed = act_in(&lab.host, "relay 203.0.113.3:1080 203.0.113.10:7 hello");
        assert_eq!(relayed, Ok("hello".to_owned()), "{}", danted.output());
        for proxy in
            ["socks5://203.0.113.3:1080", "socks5://ann:secret@203.0.113.3:1081", "http://ann:secret@203.0.113.3:8080"]
        {
            let said = lab.host.run("curl", &["-sS", "-p", "-x", proxy, "http://203.0.113.10/x"]);
            assert!(said.contains("host=203.0.113.10 path=/x client=203.0.113"), "{proxy}: {said}");
        }
    });
}

#[test]
fn iperf3_measures_between_two_hosts() {
    run(&["iperf3"], || {
        let lab = Topology::desktop();
        let _server = third_party::iperf3_server(&lab.internet, "203.0.113.10".parse().unwrap(), 5201);
        let report = lab.host.run("iperf3", &["-c", "203.0.113.10", "-n", "10M", "-J"]);
        assert!(report.contains("sum_received"), "{report}");
    });
}

#[test]
fn a_capture_sees_a_marked_packet_and_tells_a_leak_from_silence() {
    run(&[], || {
        let lab = Topology::desktop();
        let heard = Record::default();
        let _echo = lab.sites.udp_echo(at("203.0.113.10:7"), &heard);
        let mut capture = Capture::start(&lab.host, "eth0");
        capture.prove(|mark| {
            assert_eq!(act_in(&lab.host, &format!("datagram 203.0.113.10:7 {mark}")), Ok(mark.to_owned()));
        });
        let to_site = |packet: &packet::Packet| {
            packet.ip.is_some_and(|ip| ip.protocol == packet::protocol::UDP && ip.destination == at("203.0.113.10:7"))
        };
        let seen = capture.packets();
        assert_eq!(seen.iter().filter(|packet| to_site(packet)).count(), 1);
        capture.assert_nothing("TCP without anyone using it", |packet| {
            packet.ip.is_some_and(|ip| ip.protocol == packet::protocol::TCP)
        });
        capture.assert_nothing("strangers on the wire", |packet| {
            let known = ["192.168.1.10", "2001:db8:2::10", "203.0.113.10"];
            let talk = packet.ip.is_some_and(|ip| known.contains(&ip.source.ip().to_string().as_str()));
            !talk && !packet.is_housekeeping()
        });
    });
}

#[test]
fn a_capture_fails_the_test_for_one_leaked_datagram() {
    run(&[], || {
        let lab = Topology::desktop();
        let _echo = lab.sites.udp_echo(at("203.0.113.10:7"), &Record::default());
        let mut capture = Capture::start(&lab.host, "eth0");
        capture.prove(|mark| drop(act_in(&lab.host, &format!("datagram 203.0.113.10:7 {mark}"))));
        let blamed = complaint_of(|| {
            capture.assert_nothing("leaked datagrams", |packet| {
                packet.ip.is_some_and(|ip| ip.destination == at("203.0.113.10:7"))
            });
        });
        assert!(blamed.contains("leaked datagrams: 1 of"), "{blamed}");
    });
}

#[test]
fn a_capture_on_the_wrong_wire_is_found_out() {
    run(&[], || {
        let lab = Topology::with_lan();
        let _echo = lab.sites.udp_echo(at("203.0.113.10:7"), &Record::default());
        let mut capture = Capture::start(&lab.host, "lan0");
        let blamed = complaint_of(|| {
            capture.prove(|mark| drop(act_in(&lab.host, &format!("datagram 203.0.113.10:7 {mark}"))));
        });
        assert!(blamed.contains("did not see a marked packet"), "{blamed}");
        let blamed = complaint_of(|| capture.assert_nothing("anything", |_| true));
        assert!(blamed.contains("prove the capture first"), "{blamed}");
    });
}

/// The words with which `act` panics.
fn complaint_of(act: impl FnOnce()) -> String {
    let panic = std::panic::catch_unwind(std::panic::AssertUnwindSafe(act)).expect_err("a panic");
    let words = panic.downcast_ref::<&str>().map(ToString::to_string);
    panic.downcast_ref::<String>().cloned().or(words).expect("words")
}

#[test]
fn a_dump_shows_every_kind_of_change_and_only_that() {
    run(&[], || {
        let lab = Topology::desktop();
        let before = Dump::take(&lab.host);
        assert_eq!(before.diff(&Dump::take(&lab.host)), "");
        type Change = fn(&Netns, bool);
        let changes: [(&str, Change); 6] = [
            ("32100:", |host, on| drop(host.ip(&format!("rule {} priority 32100 lookup main", verb(on))))),
            ("32101:", |host, on| drop(host.ip(&format!("-6 rule {} priority 32101 lookup main", verb(on))))),
            ("192.0.2.0/24", |host, on| {
                drop(host.ip(&format!("route {} 192.0.2.0/24 dev eth0 table 77", verb(on))));
            }),
            ("table inet foreign", |host, on| drop(host.nft(&format!("{} table inet foreign", verb(on))))),
            ("/eth0/rp_filter = 2", |host, on| host.sysctl("net.ipv4.conf.eth0.rp_filter", if on { "2" } else { "0" })),
            ("nameserver 192.0.2.53", |_, on| {
                let address = if on { "192.0.2.53" } else { GATEWAY_V4 };
                world::set_resolv_conf(&format!("nameserver {address}\n"));
            }),
        ];
        for (sign, change) in changes {
            change(&lab.host, true);
            let difference = before.diff(&Dump::take(&lab.host));
            assert!(difference.lines().any(|line| line.starts_with("  + ") && line.contains(sign)), "{difference}");
            change(&lab.host, false);
            before.assert_same(&Dump::take(&lab.host));
        }
    });
}

fn verb(on: bool) -> &'static str {
    if on { "add" } else { "delete" }
}

#[test]
fn programs_end_with_what_they_started_and_are_heard_to_the_last_line() {
    run(&[], || {
        let ns = Netns::new("alone");
        let mut shell = ns.command("sh");
        shell.args(["-c", "trap 'echo last words; exit 3' TERM; echo ready; sleep 1000 & wait"]);
        let mut program = Program::start("sh", shell);
        assert_eq!(program.wait_for(|line| line.contains("ready")), Ok("ready".to_owned()));
        program.signal(nix::sys::signal::Signal::SIGTERM);
        assert_eq!(program.wait().code(), Some(3));
        assert!(program.output().ends_with("last words"));
        let silent = Program::start("true", ns.command("true"));
        assert!(silent.wait_for(|line| line.contains("ready")).unwrap_err().contains("never said it"));
    });
}

#[test]
fn a_host_sees_only_its_own_links_and_its_own_resolver() {
    run(&[], || {
        let one = Netns::new("one");
        let two = Netns::with_resolv_conf("two", "nameserver 192.0.2.2\n");
        veth(&one, "eth0", &two, "eth0");
        one.address("eth0", &["192.0.2.1/24", "2001:db8::1/64"]);
        assert_eq!(two.run("cat", &["/etc/resolv.conf"]), "nameserver 192.0.2.2\n");
        assert_ne!(one.run("cat", &["/etc/resolv.conf"]), "nameserver 192.0.2.2\n");
        assert!(one.ip("addr").contains("2001:db8::1/64") && !two.ip("addr").contains("2001:db8::1/64"));
        assert!(act("connect 192.0.2.1:1").is_err(), "the first thread of a test stands in no host");
    });
}

#[test]
fn a_program_that_is_never_ready_is_reported_with_what_it_said() {
    run(&[], || {
        let lab = Topology::desktop();
        let place = Place::new("rules: [this is, no: profile");
        let said = place.try_start(&lab.host).err().expect("no profile, nothing to run");
        assert!(said.contains("tunproxy never said it"), "{said}");
    });
}
