//! A whole run on a host: it takes the traffic, spares what must live on, and leaves nothing behind.

use std::net::SocketAddr;
use std::os::unix::net::UnixDatagram;

use nix::sys::signal::Signal;

use super::support::client::{Session, act_in};
use super::support::packet::{Packet, protocol};
use super::support::peers::proxy::Door;
use super::support::peers::{Peer, Peers};
use super::support::program::Program;
use super::support::sites::{NAME, V4, V6};
use super::support::topology::{GATEWAY_V4, HOST_V4, HOST_V6};
use super::support::tunproxy::{Place, Said};
use super::support::{Capture, Dump, Sites, Topology, run, world};

const TUN: &str = "/dev/net/tun";

fn at(address: &str) -> SocketAddr {
    address.parse().expect("an address")
}

/// The host's whole traffic, decided by `rules`.
fn profile(rules: &str) -> Place {
    Place::new(&format!(
        "
mode: rule
ipv6: true
log-level: info
tun: {{ enable: true, auto-route: true, dns-hijack: ['any:53'] }}
dns: {{ enable: true, enhanced-mode: fake-ip, nameserver: [192.168.1.1] }}
proxies: [{{ name: up, type: socks5, server: 203.0.113.3, port: 1080, udp: true }}]
rules: [{rules}]
"
    ))
}

/// With and without the check that many distributions switch on.
fn both_rp_filters(test: impl Fn(Topology)) {
    for value in ["0", "1"] {
        test(Topology::desktop().rp_filter(value));
    }
}

/// Somebody at work on the host over connections from outside, one in each family.
struct Workers {
    sessions: Vec<Session>,
    _servers: [Peer; 2],
    _thread: Peers,
}

impl Workers {
    fn log_in(lab: &Topology, port: u16) -> Self {
        let at_host = Peers::new(&lab.host);
        let servers = ["0.0.0.0", "[::]"].map(|any| at_host.tcp_echo(at(&format!("{any}:{port}"))));
        let ways = [("203.0.113.50:0", HOST_V4.to_owned()), ("[2001:db8:1::50]:0", format!("[{HOST_V6}]"))];
        let open = |(from, to): &(&str, String)| Session::open(&lab.internet, at(from), at(&format!("{to}:{port}")));
        Self { sessions: ways.iter().map(open).collect(), _servers: servers, _thread: at_host }
    }

    fn assert_alive(&mut self, when: &str) {
        for session in &mut self.sessions {
            assert_eq!(session.alive().map(drop), Ok(()), "a session from outside died {when}");
        }
    }
}

/// Sites answer, whichever way the traffic takes.
fn answers(lab: &Topology) {
    for site in [V4, V6] {
        assert_eq!(act_in(&lab.host, &format!("ask {site}:7 x")), Ok("x".to_owned()), "{site}");
        assert_eq!(act_in(&lab.host, &format!("datagram {site}:7 x")), Ok("x".to_owned()), "{site}");
    }
}

#[test]
fn the_hosts_traffic_goes_where_the_rules_say() {
    run(&["curl", "dig", TUN], || {
        both_rp_filters(|lab| {
            let _sites = Sites::open(&lab);
            let rules = "'DOMAIN,www.example.test,DIRECT', 'IP-CIDR,203.0.113.10/32,DIRECT', 'MATCH,DIRECT'";
            let tunproxy = profile(rules).start(&lab.host);
            for (url, rule) in [
                (format!("http://{NAME}/"), "DOMAIN"),
                (format!("http://{V4}/"), "IP-CIDR"),
                (format!("http://{V6}/"), "MATCH"),
            ] {
                let curl = || Said::of(lab.host.command("curl").args(["-sSg", "--connect-timeout", "20", &url]));
                let (said, _line) = tunproxy.line_after(curl, &[rule, "DIRECT"]);
                assert!(said.stdout.contains("path=/"), "{url}: {said:?}\n{}", tunproxy.output());
            }
            for site in [V4, V6, NAME] {
                assert_eq!(act_in(&lab.host, &format!("datagram {site}:7 x")), Ok("x".to_owned()), "{site}");
            }
            assert_eq!(act_in(&lab.host, &format!("connect {V4}:81")), Err("ECONNREFUSED".to_owned()));
            // Whoever is asked, the answer is ours.
            for server in [GATEWAY_V4, "203.0.113.53"] {
                let answer = lab.host.run("dig", &["+short", &format!("@{server}"), NAME, "A"]);
                assert!(answer.starts_with("198.18."), "{server}: {answer}");
            }
            assert!(tunproxy.stop().success());
        });
    });
}

#[test]
fn sessions_from_outside_live_through_start_run_and_stop() {
    run(&[TUN], || {
        both_rp_filters(|lab| {
            let _sites = Sites::open(&lab);
            let mut workers = Workers::log_in(&lab, 22);
            workers.assert_alive("before the start");
            let tunproxy = profile("'MATCH,REJECT'").start(&lab.host);
            workers.assert_alive("at the start");
            let mut late = Workers::log_in(&lab, 2222);
            assert_eq!(act_in(&lab.host, &format!("connect {V4}:80")), Err("ECONNREFUSED".to_owned()), "it is at work");
            workers.assert_alive("while it runs");
            late.assert_alive("opened while it runs");
            assert!(tunproxy.stop().success());
            workers.assert_alive("at the stop");
            late.assert_alive("at the stop, opened while it ran");
        });
    });
}

#[test]
fn a_stop_leaves_the_host_as_it_was() {
    run(&[TUN], || {
        both_rp_filters(|lab| {
            let _sites = Sites::open(&lab);
            let before = Dump::take(&lab.host);
            let tunproxy = profile("'MATCH,DIRECT'").start(&lab.host);
            assert_ne!(before.diff(&Dump::take(&lab.host)), "", "a run that changes nothing takes no traffic");
            answers(&lab);
            assert!(tunproxy.stop().success());
            before.assert_same(&Dump::take(&lab.host));
            answers(&lab);
        });
    });
}

#[test]
fn a_stop_touches_nothing_of_others() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        for words in [
            "rule add priority 9000 fwmark 0x1000000/0x1000000 lookup 2022",
            "rule add priority 9010 from 192.0.2.0/24 lookup 2022",
            "route add 192.0.2.0/24 dev eth0 table 2022",
            "-6 rule add priority 9001 from 2001:db8:5::/48 lookup 2022",
        ] {
            lab.host.ip(words);
        }
        lab.host.nft("add table inet tunproxy");
        lab.host.nft("add chain inet tunproxy foreign { type filter hook output priority 0; }");
        let before = Dump::take(&lab.host);
        let tunproxy = profile("'MATCH,DIRECT'").start(&lab.host);
        tunproxy.assert_carries(&lab.host);
        answers(&lab);
        assert!(tunproxy.stop().success());
        before.assert_same(&Dump::take(&lab.host));
    });
}

#[test]
fn after_a_kill_the_host_works_and_cleanup_removes_the_rest() {
    run(&[TUN], || {
        both_rp_filters(|lab| {
            let _sites = Sites::open(&lab);
            let mut workers = Workers::log_in(&lab, 22);
            let before = Dump::take(&lab.host);
            let tunproxy = profile("'MATCH,REJECT'").start(&lab.host);
            assert_eq!(act_in(&lab.host, &format!("connect {V4}:80")), Err("ECONNREFUSED".to_owned()));
            let place = tunproxy.kill();
            answers(&lab);
            place.clean_up(&lab.host);
            before.assert_same(&Dump::take(&lab.host));
            place.clean_up(&lab.host);
            before.assert_same(&Dump::take(&lab.host));
            workers.assert_alive("over a crash and the clean-up");
        });
    });
}

#[test]
fn a_start_after_a_kill_clears_what_was_left() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let before = Dump::take(&lab.host);
        let place = profile("'MATCH,DIRECT'").start(&lab.host).kill();
        let once_more = place.start(&lab.host).kill();
        let tunproxy = once_more.start(&lab.host);
        tunproxy.line("an earlier run ended without putting the host back");
        tunproxy.assert_carries(&lab.host);
        answers(&lab);
        assert!(tunproxy.stop().success());
        before.assert_same(&Dump::take(&lab.host));
    });
}

/// Whether the host sent this outside, and not as an answer or to keep the link working.
fn leaves_the_host(packet: &Packet) -> bool {
    let ours = [HOST_V4.to_owned(), HOST_V6.to_owned()];
    let from_us = packet.ip.is_some_and(|ip| ours.contains(&ip.source.ip().to_string()));
    from_us && !packet.is_housekeeping()
}

/// Everything a host may try, by name and by address, over both protocols and families.
fn try_everything(lab: &Topology) {
    for site in [NAME, V4, V6] {
        let _ = act_in(&lab.host, &format!("connect {site}:80 5"));
        let _ = act_in(&lab.host, &format!("datagram {site}:7 x 1"));
    }
    for server in ["203.0.113.53", "2001:db8:1::53", GATEWAY_V4] {
        for tcp in ["+tcp", "+notcp"] {
            let server = format!("@{server}");
            let words = [&server, tcp, "+tries=1", "+timeout=2", "unheard-of.example.test", "A"];
            let _ = Said::of(lab.host.command("dig").args(words));
        }
    }
}

fn proven_capture(lab: &Topology) -> Capture {
    let mut capture = Capture::start(&lab.host, "eth0");
    capture.prove(|mark| {
        assert_eq!(act_in(&lab.host, &format!("datagram {V4}:7 {mark}")), Ok(mark.to_owned()));
    });
    capture
}

#[test]
fn nothing_leaves_a_host_whose_rules_reject_everything() {
    run(&["dig", TUN], || {
        both_rp_filters(|lab| {
            let _sites = Sites::open(&lab);
            let mut capture = proven_capture(&lab);
            let tunproxy = profile("'MATCH,REJECT'").start(&lab.host);
            let already = capture.packets().iter().filter(|packet| leaves_the_host(packet)).count();
            try_everything(&lab);
            let leaks: Vec<String> = capture
                .packets()
                .iter()
                .filter(|p| leaves_the_host(p))
                .skip(already)
                .map(ToString::to_string)
                .collect();
            assert_eq!(leaks, Vec::<String>::new(), "while it ran");
            assert!(tunproxy.stop().success());
        });
    });
}

#[test]
fn only_the_proxy_is_spoken_to_when_the_rules_say_so() {
    run(&["dig", TUN], || {
        let lab = Topology::desktop();
        let sites = Sites::open(&lab);
        let door = Door::knowing(&[(NAME, V4)]);
        let _proxy = lab.sites.socks5(at("203.0.113.3:1080"), door.clone());
        let mut capture = proven_capture(&lab);
        let tunproxy = profile("'MATCH,up'").start(&lab.host);
        let already = capture.packets().iter().filter(|packet| leaves_the_host(packet)).count();
        try_everything(&lab);
        let to_others: Vec<String> = capture
            .packets()
            .iter()
            .filter(|packet| leaves_the_host(packet))
            .skip(already)
            .filter(|packet| packet.ip.is_none_or(|ip| ip.destination.ip().to_string() != "203.0.113.3"))
            .map(ToString::to_string)
            .collect();
        assert_eq!(to_others, Vec::<String>::new());
        assert!(door.requests.count(|request| request.contains(NAME)) > 0, "{:?}", door.requests.all());
        assert_eq!(sites.dns.queries.all(), Vec::<String>::new());
        assert!(tunproxy.stop().success());
    });
}

#[test]
fn queries_of_our_own_resolver_are_the_only_ones_that_leave() {
    run(&["dig", TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let mut capture = proven_capture(&lab);
        let tunproxy = profile("'MATCH,DIRECT'").start(&lab.host);
        try_everything(&lab);
        let stray = |packet: &Packet| {
            let dns = |ip: &super::support::packet::Ip| {
                ip.destination.port() == 53 && matches!(ip.protocol, protocol::TCP | protocol::UDP)
            };
            packet.ip.is_some_and(|ip| dns(&ip) && ip.destination.ip().to_string() != GATEWAY_V4)
        };
        capture.assert_nothing("DNS to a server that the profile does not name", stray);
        assert!(tunproxy.stop().success());
    });
}

#[test]
fn a_stop_ends_open_flows_instead_of_leaving_them_hanging() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let tunproxy = profile("'MATCH,DIRECT'").start(&lab.host);
        let mut session = Session::open(&lab.host, at("0.0.0.0:0"), at(&format!("{V4}:7")));
        assert_eq!(session.alive().map(drop), Ok(()));
        tunproxy.assert_carries(&lab.host);
        assert!(tunproxy.stop().success());
        let end = session.alive().expect_err("a flow of ours cannot outlive us");
        assert_ne!(end, "EAGAIN", "it was told, and did not have to wait");
    });
}

#[test]
fn a_supervisor_is_told_when_traffic_flows() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let path = world::fresh_dir("notify").join("socket");
        let supervisor = UnixDatagram::bind(&path).unwrap();
        supervisor.set_read_timeout(Some(std::time::Duration::from_secs(30))).unwrap();
        let mut command = profile("'MATCH,REJECT'").run_command(&lab.host);
        command.env("NOTIFY_SOCKET", &path);
        let mut program = Program::start("tunproxy", command);
        let mut message = [0; 512];
        let told = loop {
            let length = supervisor.recv(&mut message).expect("a message to the supervisor");
            let text = String::from_utf8_lossy(&message[..length]).into_owned();
            if text.lines().any(|line| line == "READY=1") {
                break text;
            }
        };
        assert!(told.contains("READY=1"));
        assert_eq!(act_in(&lab.host, &format!("connect {V4}:80")), Err("ECONNREFUSED".to_owned()), "it said ready");
        program.signal(Signal::SIGTERM);
        assert!(program.wait().success());
    });
}

#[test]
fn a_reload_is_declined_in_words_and_the_run_goes_on() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let tunproxy = profile("'MATCH,DIRECT'").start(&lab.host);
        let ((), line) = tunproxy.line_after(|| tunproxy.signal(Signal::SIGHUP), &["reload"]);
        assert!(!line.is_empty());
        tunproxy.assert_carries(&lab.host);
        answers(&lab);
        assert!(tunproxy.stop().success());
    });
}

#[test]
fn a_program_called_nft_in_the_callers_path_gets_nothing_of_ours() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let dir = world::fresh_dir("path");
        let (script, ran) = (dir.join("nft"), dir.join("ran"));
        std::fs::write(&script, format!("#!/bin/sh\necho ran >> {}\n", ran.display())).unwrap();
        std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let path = format!("{}:{}", dir.display(), std::env::var("PATH").unwrap_or_default());
        let mut command = profile("'MATCH,DIRECT'").run_command(&lab.host);
        command.env("PATH", path).env("LD_PRELOAD", dir.join("library.so"));
        let mut program = Program::start("tunproxy", command);
        program.wait_for(|line| line.starts_with("tunproxy ready")).unwrap();
        assert!(lab.host.run("nft", &["list", "tables"]).contains("inet tunproxy"), "{}", program.output());
        program.signal(Signal::SIGTERM);
        assert!(program.wait().success());
        assert!(!ran.exists());
    });
}

#[test]
fn where_the_tun_cannot_have_ipv6_names_have_no_ipv6_addresses() {
    run(&["dig", TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        lab.host.sysctl("net.ipv6.conf.default.disable_ipv6", "1");
        let aaaa = || lab.host.run("dig", &["+short", &format!("@{GATEWAY_V4}"), NAME, "AAAA"]);
        assert_ne!(aaaa(), "");
        let read_only = "mount --bind /proc/sys /proc/sys && mount -o remount,bind,ro /proc/sys";
        assert!(Said::of(std::process::Command::new("sh").args(["-c", read_only])).succeeded());
        let tunproxy = profile("'MATCH,DIRECT'").start(&lab.host);
        tunproxy.line("IPv6 cannot be switched on for the TUN");
        assert_eq!(aaaa(), "");
        assert_eq!(act_in(&lab.host, &format!("ask {NAME}:7 x")), Ok("x".to_owned()));
        assert!(tunproxy.stop().success());
    });
}
